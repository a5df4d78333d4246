"""Two result files of the same benchmark, case by case: what became faster or slower by more than the recorded noise."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from vi_simsiam.errors import InputError

from .cases import MODES
from .harness import read_result
from .targets import case_label, time_of

NAME = "multiview_loss"
_LEAST_NOISE = 0.02
"""Differences below 2 % are never called a change: clocks and placement differ from run to run."""


@dataclass(frozen=True)
class Options:
    """Options of `vi-simsiam bench compare`."""

    before: Annotated[Path, tyro.conf.Positional]
    """Result file to compare with."""
    after: Annotated[Path, tyro.conf.Positional]
    """Result file that must not be slower."""


@dataclass(frozen=True)
class Change:
    """One time in both files: new over old, how much of that noise explains, and whether it is a regression."""

    case: str
    provider: str
    what: str
    ratio: float | None
    allowed: float
    note: str = ""

    @property
    def regression(self) -> bool:
        """Slower than noise explains, or no result any more."""
        return self.ratio is None or self.ratio > self.allowed


def run(options: Options, console: Console | None = None) -> int:
    """Print the ratios; 1 if anything is slower beyond the noise recorded in the files, else 0.

    Raises:
        InputError: a file that is missing or no result of this benchmark, or files without a case in common.
    """
    console = console or Console()
    before, after = (read_result(path, NAME) for path in (options.before, options.after))
    try:
        changes = compare(before, after)
        for name in ("device", "processor", "versions"):
            if before.get(name) != after.get(name):
                said = f"note: different {name}: {before.get(name)} and {after.get(name)}"
                console.print(said, soft_wrap=True, markup=False)
    except (KeyError, TypeError) as error:
        raise InputError(f"results: a case lacks what is compared ({error}); measure it again") from error
    if not changes:
        raise InputError(f"results: {options.before} and {options.after} have no timed case in common")
    table = Table()
    for column in ("case", "provider", "what", "new / old", "noise", ""):
        table.add_column(column, justify="right" if column in ("new / old", "noise") else "left")
    for change in changes:
        ratio = "-" if change.ratio is None else f"{change.ratio:.3f}"
        verdict = "slower" if change.regression else "faster" if _faster(change) else ""
        table.add_row(
            change.case, change.provider, change.what, ratio, f"{change.allowed - 1:.1%}", change.note or verdict
        )
    console.print(table)
    slower = sum(change.regression for change in changes)
    console.print(f"{len(changes)} times compared; {slower} slower beyond the noise.")
    return 1 if slower else 0


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Every time that `before` has, for the cases and providers that both have.

    The noise of a time is the range between its quartiles over its median, in both files together, at least 2 %. Where
    the copy of the same case, which is no code of this project, became slower, the machine did, and so much more is allowed.
    """
    cases = {case["name"]: case for case in after["cases"]}
    return [
        change
        for old in before["cases"]
        if (new := cases.get(old["name"])) is not None
        for name in old["providers"]
        if name in new["providers"]
        for mode, metric in itertools.product(MODES, ("time", "host"))
        if (change := _change(old, new, name, mode, metric)) is not None
    ]


def _change(old: dict[str, Any], new: dict[str, Any], name: str, mode: str, metric: str) -> Change | None:
    before, after = time_of(old, name, mode, metric), time_of(new, name, mode, metric)
    what = ("loss" if mode == "forward" else "loss + gradient") + (", host" if metric == "host" else "")
    if before is None:
        return None
    if after is None:
        found = new["providers"][name]
        reason = found["failure"] or (found[mode] or {}).get("failure") or "no time any more"
        return Change(case_label(old), name, what, None, 1.0, reason)
    noise = max(_LEAST_NOISE, _spread(before) + _spread(after))
    machine = _machine(old, new, mode) if metric == "time" else 1.0
    return Change(case_label(old), name, what, after["median_us"] / before["median_us"], machine * (1 + noise))


def _faster(change: Change) -> bool:
    return change.ratio is not None and change.ratio < 1 / change.allowed


def _spread(times: dict[str, float]) -> float:
    return (times["upper_us"] - times["lower_us"]) / times["median_us"]


def _machine(old: dict[str, Any], new: dict[str, Any], mode: str) -> float:
    """How much slower the copy became; 1 where it became faster."""
    copies = old["copy"][mode], new["copy"][mode]
    if copies[0] is None or copies[1] is None:
        return 1.0
    return max(1.0, float(copies[1]["median_us"]) / float(copies[0]["median_us"]))
