"""Two result files of the same benchmark, case by case: what became faster or slower by more than the recorded noise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vi_simsiam.errors import InputError
from vi_simsiam.text import counted

from .cases import MODES
from .harness import read_result
from .noise import TOO_NOISY, Ratio, ratio, spread
from .pipeline_targets import times_of
from .tables import say
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
    noisy: bool = False
    """Whether a time that it rests on is too noisy for a verdict."""

    @property
    def regression(self) -> bool:
        """Slower than noise explains, or no result any more."""
        return self.ratio is None or (self.ratio > self.allowed and not self.noisy)

    @property
    def verdict(self) -> str:
        """What became of the time, in a word or two; empty where noise explains the difference."""
        if self.note:
            return self.note
        if self.noisy:
            return TOO_NOISY
        if self.regression:
            return "slower"
        return "faster" if self.ratio is not None and self.ratio < 1 / self.allowed else ""


def run(options: Options, console: Console | None = None) -> int:
    """Print the ratios; 1 if anything is slower beyond the noise recorded in the files, else 0.

    Times that are too noisy for a verdict are counted and decide nothing.

    Raises:
        InputError: a file that is missing or no result of this benchmark, or files without a case in common, or with
            none that is quiet enough to compare.
    """
    console = console or Console()
    before = read_result(options.before, *COMPARED)
    after = read_result(options.after, before["benchmark"])
    try:
        changes = compare(before, after)
        for name in ("device", "processor", "versions"):
            if before.get(name) != after.get(name):
                say(console, f"note: different {name}: {before.get(name)} and {after.get(name)}")
    except (KeyError, TypeError) as error:
        raise InputError(
            f"results: a case lacks what is compared ({error}); measure it again"
        ) from error
    if not changes:
        raise InputError(
            f"results: {options.before} and {options.after} have no timed case in common"
        )
    table = Table()
    for column in ("case", "provider", "what", "new / old", "noise", ""):
        table.add_column(column, justify="right" if column in ("new / old", "noise") else "left")
    for change in changes:
        shown = "-" if change.ratio is None else f"{change.ratio:.3f}"
        cells = (
            change.case,
            change.provider,
            change.what,
            shown,
            f"{change.allowed - 1:.1%}",
            change.verdict,
        )
        table.add_row(*map(escape, cells))
    console.print(table)
    slower, unclear = (
        sum(getattr(change, kind) for change in changes) for kind in ("regression", "noisy")
    )
    if unclear == len(changes):
        raise InputError(
            f"results: all {counted(unclear, 'time')} of {options.before} and {options.after} are {TOO_NOISY}; measure "
            "again on a quiet machine"
        )
    said = f"{counted(len(changes), 'time')} compared; {slower} slower beyond the noise."
    if unclear:
        said += f" {unclear} {TOO_NOISY}: the exit code does not rest on them; measure again on a quiet machine."
    say(console, said)
    return 1 if slower else 0


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Every time that `before` has, for the cases and providers that both have.

    The noise of a time is the range between its quartiles over its median, in both files together, at least 2 %. Where
    something measured beside it that is no code of this project became slower, the machine did, and so much more is
    allowed: for the loss a copy of the same bytes, otherwise the provider that the case names as its yardstick. Where one
    of these times is noisy (see `noise`) there is no verdict.
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
    """A time of a provider: of what, its quartiles (None without a result), the yardstick's, and what failed."""

    case: str
    what: str
    times: dict[str, float] | None
    yardstick: dict[str, float] | None
    failure: str


def _loss_times(case: dict[str, Any], name: str) -> Iterator[_Time]:
    found = case["providers"][name]
    for mode, metric in itertools.product(MODES, ("time", "host")):
        what = ("loss" if mode == "forward" else "loss + gradient") + (
            ", host" if metric == "host" else ""
        )
        failure = found["failure"] or (found[mode] or {}).get("failure") or "no time any more"
        yardstick = case["copy"][mode] if metric == "time" else None
        yield _Time(case_label(case), what, time_of(case, name, mode, metric), yardstick, failure)


def _pipeline_times(case: dict[str, Any], name: str) -> Iterator[_Time]:
    found = case["providers"][name]
    times = times_of(case, name)
    yardstick = None if name == case["yardstick"] else times_of(case, case["yardstick"])
    yield _Time(case["label"], "time", times, yardstick, found["failure"] or "no time any more")


def _change(name: str, before: _Time, after: _Time) -> Change | None:
    if before.times is None:
        return None
    if after.times is None:
        return Change(before.case, name, before.what, None, 1.0, after.failure)
    noise = max(_LEAST_NOISE, spread(before.times) + spread(after.times))
    machine = Ratio(1.0, False)
    if before.yardstick is not None and after.yardstick is not None:
        machine = ratio(after.yardstick, before.yardstick)
    found = ratio(after.times, before.times)
    allowed = max(1.0, machine.value) * (1 + noise)
    return Change(
        before.case, name, before.what, found.value, allowed, noisy=found.noisy or machine.noisy
    )
