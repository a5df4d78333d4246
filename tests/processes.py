"""Tests of other files, run in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(**variables: str) -> dict[str, str]:
    """The variables of this process without pytest's own, and these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return kept | variables


def run_tests(*arguments: str, wrapper: tuple[str, ...] = (), **variables: str) -> str:
    """Run pytest with these arguments and variables; all must pass. Returns the output."""
    command = [*wrapper, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    command += arguments
    given = environment(**variables)
    result = subprocess.run(command, env=given, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-3000:]
    assert re.search(r"\d+ passed", result.stdout), result.stdout
    return result.stdout
