"""`python -m vi_simsiam` is the command `vi-simsiam`."""

import sys

from vi_simsiam.cli import main

if __name__ == "__main__":
    sys.exit(main())
