"""The table of `make matrix`: versions of Python by versions of PyTorch."""

from __future__ import annotations

from typing import Any

from vi_simsiam.text import counted, markdown_grid

NAME = "matrix"


def markdown_table(result: dict[str, Any]) -> str:
    """A row for each Python, a column for each PyTorch, and below it what did not pass."""
    cells = {(each["torch"], each["python"]): each for each in result["cases"]}
    pythons, torches = (
        sorted({each[name] for each in result["cases"]}, key=_version)
        for name in ("python", "torch")
    )
    rows = [
        (python, *(_outcome(cells.get((torch, python))) for torch in torches)) for python in pythons
    ]
    notes = [
        f"PyTorch {each['torch']} on Python {each['python']}: {', '.join(found)}."
        for each in result["cases"]
        if (found := [*([each["problem"]] if each["problem"] else []), *each["failed"]])
    ]
    dates = sorted(each["date"][:10] for each in result["cases"])
    span = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    grid = markdown_grid(("Python", *(f"PyTorch {torch}" for torch in torches)), rows)
    return "\n\n".join([grid, *notes, f"`make matrix`, {span}, {result['platform']}, no GPU."])


def _version(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]


def _outcome(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if cell["problem"]:
        return "not tested"
    passed = counted(cell["passed"], "test")
    return f"{len(cell['failed'])} failed, {passed} passed" if cell["failed"] else f"{passed} pass"
