"""`make matrix`: a row for each cell, kept until the cell is run again, and the table of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vi_simsiam.benchmarks.matrix import markdown_table

SCRIPT = Path(__file__).parents[1] / "scripts" / "matrix.py"
REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="passes"/>
<testcase classname="tests.a" name="fails"><failure message="1 != 2"/></testcase>
<testcase classname="tests.a" name="breaks"><error message="no fixture"/></testcase>
<testcase classname="tests.a" name="is left out"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """scripts/matrix.py, with a result file and a folder of its own."""
    spec = importlib.util.spec_from_file_location("matrix_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "matrix_script", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULT", tmp_path / "matrix.json")
    monkeypatch.setattr(module, "FOLDER", tmp_path / "cells")
    return module


def row(python: str, torch: str, **changes: Any) -> dict[str, Any]:
    """A cell in which ten tests passed."""
    found = {"python": python, "torch": torch, "date": "2026-01-02T03:04:05+00:00"}
    return {**found, "passed": 10, "skipped": 1, "failed": [], "problem": None, **changes}


def test_cells_that_were_run_keep_their_rows(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tested(folder: Path, python: str, torch: str, tests: object, log: object) -> dict[str, Any]:
        (folder / "env").write_text("gigabytes")
        if python == "3.11":
            raise matrix.Failure("no python3.11 on PATH")
        return {"versions": {"torch": torch}, "passed": passed, "failed": [], "skipped": 2}

    monkeypatch.setattr(matrix, "_tested", tested)
    passed = 5
    assert matrix.main(["3.13-2.15", "3.12-2.11"]) == 0
    passed = 6
    assert matrix.main(["3.13-2.15", "3.11-2.15"]) == 1
    assert matrix.main(["3.12-2.11"], ["tests/test_config.py"]) == 0  # writes nothing
    cases = json.loads(matrix.RESULT.read_text())["cases"]
    found = [(each["python"], each["torch"], each["passed"], each["problem"]) for each in cases]
    assert found == [
        ("3.12", "2.11", 5, None),
        ("3.11", "2.15", 0, "no python3.11 on PATH"),
        ("3.13", "2.15", 6, None),
    ]
    assert [file.suffix for file in sorted(matrix.FOLDER.iterdir())] == 3 * [".log"]


def test_an_unknown_cell_is_refused(matrix: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main(["3.9-1.0"]) == 2
    assert "no cell '3.9-1.0'; there are 3.11-2.15" in capsys.readouterr().err


def test_results_of_tests_are_counted(matrix: ModuleType) -> None:
    found = matrix.counts(REPORT)
    assert found == {"passed": 1, "skipped": 1, "failed": ["tests.a.fails", "tests.a.breaks"]}


def test_the_table_shows_every_cell_and_what_did_not_pass() -> None:
    cases = [
        row("3.12", "2.9"),
        row("3.12", "2.11", failed=["tests.a.fails"], date="2026-01-05T00:00:00+00:00"),
        row("3.13", "2.11", problem="cannot be installed (no wheel)"),
    ]
    assert markdown_table({"platform": "Linux x86_64", "cases": cases}) == (
        "| Python | PyTorch 2.9 | PyTorch 2.11 |\n|---|---:|---:|\n"
        "| 3.12 | 10 tests pass | 1 failed, 10 tests passed |\n"
        "| 3.13 | - | not tested |\n\n"
        "PyTorch 2.11 on Python 3.12: tests.a.fails.\n\n"
        "PyTorch 2.11 on Python 3.13: cannot be installed (no wheel).\n\n"
        "`make matrix`, 2026-01-02 to 2026-01-05, Linux x86_64, no GPU."
    )
