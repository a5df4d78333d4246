"""All tests with several versions of Python and PyTorch, one cell after the other.

    python scripts/matrix.py                                   every cell
    python scripts/matrix.py 3.13-2.15 3.12-2.11               these two
    python scripts/matrix.py 3.13-2.15 --tests tests/test_config.py      no result is written

A cell installs the last commit into a new environment below build/matrix/, which is removed
afterwards; the log of the cell stays there. Each result goes to benchmarks/results/matrix.json at
once, other cells keep theirs. Interpreters are looked for on PATH as python3.11, python3.12, ...
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vi_simsiam.benchmarks.matrix import NAME
from vi_simsiam.benchmarks.results import read_result
from vi_simsiam.files import write_json

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "matrix.json"
FOLDER = ROOT / "build" / "matrix"
_PYTHONS = ("3.11", "3.12", "3.13")
_TORCHES = ("2.11", "2.12", "2.13", "2.14", "2.15")
# Each Python with the newest PyTorch, each PyTorch with one Python.
CELLS = [f"{python}-{_TORCHES[-1]}" for python in _PYTHONS]
CELLS += [f"{_PYTHONS[1]}-{torch}" for torch in reversed(_TORCHES[:-1])]
# Packages that a cell chooses, or that PyTorch does; constraints.txt gives the others.
_FREE = ("torch", "torchvision", "triton", "setuptools")
_SHOWN = (*_FREE[:3], "numpy")
_VERSIONS = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), **{p: version(p) for p in sys.argv[1:]}}))
"""


class Failure(Exception):
    """A cell whose tests could not be run, and why."""


def main(cells: Sequence[str], tests: Sequence[str] = ()) -> int:
    """Run cells, or only some test files in them.

    Returns:
        0 if all passed, 1 if one did not, 2 for an unknown cell.
    """
    if unknown := [cell for cell in cells if cell not in CELLS]:
        print(f"matrix: no cell {unknown[0]!r}; there are {', '.join(CELLS)}", file=sys.stderr)
        return 2
    code = 0
    for cell in cells or CELLS:
        found = run_cell(cell, tests)
        counts = f"{found['passed']} passed, {len(found['failed'])} failed"
        print(f"matrix: {cell}: {found['problem'] or counts}", *found["failed"], sep="\n  ")
        if not tests:
            record(found)
        if found["problem"] or found["failed"]:
            code = 1
    return code


def run_cell(cell: str, tests: Sequence[str] = ()) -> dict[str, Any]:
    """Install and test one cell; return its row."""
    python, torch = cell.split("-")
    row: dict[str, Any] = {
        "python": python,
        "torch": torch,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output(["git", "rev-parse", "HEAD"], ROOT),
        "versions": {},
        "passed": 0,
        "skipped": 0,
        "failed": [],
        "problem": None,
    }
    folder = FOLDER / cell
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with (FOLDER / f"{cell}.log").open("w") as log:
            row |= _tested(folder, python, torch, tests, log)
    except Failure as failure:
        row["problem"] = str(failure)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def _tested(
    folder: Path, python: str, torch: str, tests: Sequence[str], log: Any
) -> dict[str, Any]:
    interpreter = shutil.which(f"python{python}")
    if interpreter is None:
        raise Failure(f"no python{python} on PATH")
    source, own = folder / "source", folder / "env" / "bin" / "python"
    constraints = folder / "constraints.txt"
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in pinned if re.split("==", line)[0].lower() not in _FREE]
    constraints.write_text("\n".join(kept) + "\n")
    # No GPU is used, and nvcc would take minutes.
    environment = {**os.environ, "PIP_CONSTRAINT": str(constraints), "VI_SIMSIAM_NO_CUDA": "1"}
    environment.pop("PYTHONPATH", None)  # only the installed package is tested

    def call(*words: str | Path) -> int:
        print(*words, file=log, flush=True)
        return subprocess.run(
            words, cwd=source if source.exists() else folder, env=environment,
            stdout=log, stderr=log,
        ).returncode  # fmt: skip

    pip = (own, "-m", "pip", "--disable-pip-version-check", "install")
    if call("git", "clone", "--quiet", ROOT, source) or call(
        interpreter, "-m", "venv", own.parents[1]
    ):
        raise Failure(f"no environment of {interpreter}")
    if call(*pip, f"torch=={torch}.*", "torchvision", "triton", "-e", ".[dev]"):
        lines = Path(log.name).read_text().splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise Failure(f"cannot be installed ({errors[0] if errors else 'see the log'})")
    versions = json.loads(_output([own, "-c", _VERSIONS, *_SHOWN], folder))
    report = folder / "report.xml"
    call(own, "-m", "pytest", "-n", "2", "--dist", "worksteal", f"--junitxml={report}", *tests)
    if not report.exists():
        raise Failure("the tests did not end")
    return {"versions": versions, **counts(report.read_text())}


def counts(report: str) -> dict[str, Any]:
    """Numbers of tests that passed and were skipped, and names of others, of a JUnit report."""
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": []}
    for case in ElementTree.fromstring(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(f"{case.get('classname')}.{case.get('name')}")
        else:
            found["passed" if case.find("skipped") is None else "skipped"] += 1
    return found


def record(row: dict[str, Any]) -> None:
    """Put the row of a cell in the result file, in place of an earlier one of this cell."""
    cases = read_result(RESULT, NAME)["cases"] if RESULT.exists() else []
    place = (row["python"], row["torch"])
    cases = [each for each in cases if (each["python"], each["torch"]) != place]
    cases = sorted([*cases, row], key=lambda each: (each["torch"], each["python"]))
    system = f"{platform.system()} {platform.machine()}"
    write_json(RESULT, {"benchmark": NAME, "platform": system, "cases": cases})


def _output(command: Sequence[str | Path], folder: Path) -> str:
    return subprocess.run(
        command, cwd=folder, check=True, text=True, stdout=subprocess.PIPE
    ).stdout.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="All tests with several versions of packages.")
    cells_help = f"{', '.join(CELLS)}; all of them if none is given"
    parser.add_argument("cells", nargs="*", metavar="CELL", help=cells_help)
    tests_help = "run only these test files, and write no result"
    parser.add_argument("--tests", nargs="+", default=(), metavar="FILE", help=tests_help)
    given = parser.parse_args()
    sys.exit(main(given.cells, given.tests))
