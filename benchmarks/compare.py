"""Two result files of the same benchmark, case by case: what became faster or slower by more than the recorded noise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from vi_simsiam.errors import InputError

from .cases import MODES
from .harness import read_result
from .pipeline_targets import median_of
from .tables import spread
from .targets import case_label, time_of

LOSS = "multiview_loss"
COMPARED = (LOSS, "augment", "step", "train")
"""Benchmarks whose result files can be compared."""
_LEAST_NOISE = 0.02
"""Differences below 2 % are never called a change: clocks and placement differ from run to run."""


@dataclass(frozen=True)
class Options:
    """Options of `vi-simsiam bench compare`."""

    before: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BEFORE")]
    """Result file to compare with."""
    after: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="AFTER")]
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
    before = read_result(options.before, *COMPARED)
    after = read_result(options.after, before["benchmark"])
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
    something measured beside it that is no code of this project became slower, the machine did, and so much more is
    allowed: for the loss a copy of the same bytes, otherwise the provider that the case names as its yardstick.
    """
    times = _loss_times if before["benchmark"] == LOSS else _pipeline_times
    cases = {case["name"]: case for case in after["cases"]}
    return [
        change
        for old in before["cases"]
        if (new := cases.get(old["name"])) is not None
        for name in old["providers"]
        if name in new["providers"]
        for was, now in zip(times(old, name), times(new, name), strict=True)
        if (change := _change(name, was, now)) is not None
    ]


@dataclass(frozen=True)
class _Time:
    """A time of a provider: of what, its quartiles (None without a result), the yardstick's median, and what failed."""

    case: str
    what: str
    times: dict[str, float] | None
    yardstick: float | None
    failure: str


def _loss_times(case: dict[str, Any], name: str) -> Iterator[_Time]:
    found = case["providers"][name]
    for mode, metric in itertools.product(MODES, ("time", "host")):
        what = ("loss" if mode == "forward" else "loss + gradient") + (", host" if metric == "host" else "")
        failure = found["failure"] or (found[mode] or {}).get("failure") or "no time any more"
        copy = case["copy"][mode] if metric == "time" else None
        yardstick = None if copy is None else float(copy["median_us"])
        yield _Time(case_label(case), what, time_of(case, name, mode, metric), yardstick, failure)


def _pipeline_times(case: dict[str, Any], name: str) -> Iterator[_Time]:
    found = case["providers"][name]
    times = found["time"] if found["correct"] else None
    yardstick = None if name == case["yardstick"] else median_of(case, case["yardstick"])
    yield _Time(case["label"], "time", times, yardstick, found["failure"] or "no time any more")


def _change(name: str, before: _Time, after: _Time) -> Change | None:
    if before.times is None:
        return None
    if after.times is None:
        return Change(before.case, name, before.what, None, 1.0, after.failure)
    noise = max(_LEAST_NOISE, spread(before.times) + spread(after.times))
    machine = 1.0
    if before.yardstick is not None and after.yardstick is not None:
        machine = max(1.0, after.yardstick / before.yardstick)
    ratio = after.times["median_us"] / before.times["median_us"]
    return Change(before.case, name, before.what, ratio, machine * (1 + noise))


def _faster(change: Change) -> bool:
    return change.ratio is not None and change.ratio < 1 / change.allowed
