"""The program: `vi-simsiam`, or `python -m vi_simsiam`."""

import signal
import sys

# Until `main` handles Ctrl-C, and after it, the process ends without a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from vi_simsiam.cli import main

if __name__ == "__main__":
    sys.exit(main())
