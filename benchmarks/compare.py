"""Comparison of two result files of a benchmark: changes beyond the recorded noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from vi_simsiam.errors import InputError
from vi_simsiam.text import counted, print_line

from .cases import MODES
from .ratios import TOO_NOISY, Case, Ratio, Times, case_label, ratio, spread, times_of
from .results import read_result
from .tables import terminal_table

_LEAST_NOISE = 0.02
"""Differences below 2 % are never called a change: clocks and placement differ between runs."""


@dataclass(frozen=True)
class Options:
    """Options of `vi-simsiam bench compare`."""

    before: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BEFORE")]
    """Result file to compare with."""
    after: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="AFTER")]
    """Result file that must not be slower."""


@dataclass(frozen=True)
class Change:
    """One time in both files."""

    case: str
    provider: str
    what: str
    ratio: float | None
    """New over old; None where there is no new time."""
    allowed: float
    """Ratio that noise explains."""
    note: str = ""
    noisy: bool = False
    """A time that it rests on is too noisy for a verdict."""

    @property
    def regression(self) -> bool:
        """Return True if it is slower than noise explains, or has no result any more."""
        return self.ratio is None or (self.ratio > self.allowed and not self.noisy)

    @property
    def verdict(self) -> str:
        """The change in a word or two; empty where noise explains the difference."""
        if self.ratio is None or self.noisy:
            return self.note or TOO_NOISY
        return "slower" if self.regression else "faster" if self.ratio < 1 / self.allowed else ""


def run(options: Options, console: Console | None = None) -> int:
    """Print the ratios; return 1 if anything is slower beyond the recorded noise, else 0.

    Times that are too noisy for a verdict are counted and decide nothing.

    Raises:
        InputError: a missing file, one of another benchmark, or files without a common case or
            without a time that is quiet enough to compare.
    """
    console = console or Console()
    before = read_result(options.before, "multiview_loss", "augment", "step", "train")
    after = read_result(options.after, before["benchmark"])
    both = f"{options.before} and {options.after}"
    try:
        changes = compare(before, after)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"results: a case lacks what is compared ({error}); measure it again"
        ) from error
    for name in ("device", "processor", "versions"):
        old, new = before.get(name), after.get(name)
        if old != new:
            print_line(console, f"note: different {name}: {old} and {new}")
    if not changes:
        raise InputError(f"results: {both} have no timed case in common")
    rows = [
        (
            change.case,
            change.provider,
            change.what,
            "-" if change.ratio is None else f"{change.ratio:.3f}",
            f"{change.allowed - 1:.1%}",
            change.verdict,
        )
        for change in changes
    ]
    head = ("case", "provider", "what", "new / old", "noise", "")
    console.print(terminal_table(None, head, rows, right=("new / old", "noise")))
    slower = sum(change.regression for change in changes)
    unclear = sum(change.noisy for change in changes)
    if unclear == len(changes):
        raise InputError(
            f"results: all {counted(unclear, 'time')} of {both} are {TOO_NOISY}; "
            "measure again on a quiet machine"
        )
    summary = f"{counted(len(changes), 'time')} compared; {slower} slower beyond the noise."
    if unclear:
        summary += (
            f" {unclear} {TOO_NOISY}: the exit code does not rest on them; "
            "measure again on a quiet machine."
        )
    print_line(console, summary)
    return 1 if slower else 0


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Compare every time of `before`, for the cases and providers that both have.

    The noise of a time is the range between its quartiles over its median, added up for both
    files, at least 2 %. More is allowed where a yardstick measured beside it, which is no code of
    this project, became slower: then the machine did. For the loss that is a copy of the same
    bytes, otherwise the provider that the case names. Where one of these times is noisy (see
    `ratios`) there is no verdict.
    """
    timings: list[tuple[str, str | None, str]] = [("time", None, "time")]
    if before["benchmark"] == "multiview_loss":
        titles = zip(MODES, ("loss", "loss + gradient"), strict=True)
        timings = [
            (f"{what}{more}", mode, metric)
            for mode, what in titles
            for metric, more in (("time", ""), ("host", ", host"))
        ]
    found = {case["name"]: case for case in after["cases"]}
    changes = [
        _change(old, found[old["name"]], name, *timing)
        for old in before["cases"]
        if old["name"] in found
        for name in old["providers"]
        if name in found[old["name"]]["providers"]
        for timing in timings
    ]
    return [change for change in changes if change is not None]


def _yardstick(case: Case, name: str, mode: str | None, metric: str) -> Times | None:
    if mode is None:
        return None if name == case["yardstick"] else times_of(case, case["yardstick"])
    return case["copy"][mode] if metric == "time" else None


def _change(
    old: Case, new: Case, name: str, what: str, mode: str | None, metric: str
) -> Change | None:
    label = case_label(old)
    was, now = times_of(old, name, mode, metric), times_of(new, name, mode, metric)
    if was is None:
        return None
    if now is None:
        entry = new["providers"][name]
        failure = entry["failure"] or ((mode and entry[mode]) or {}).get("failure")
        return Change(label, name, what, None, 1.0, failure or "no time any more")
    machine = Ratio(1.0, False)
    stick_was, stick_now = (_yardstick(case, name, mode, metric) for case in (old, new))
    if stick_was is not None and stick_now is not None:
        machine = ratio(stick_now, stick_was)
    found = ratio(now, was)
    noise = max(_LEAST_NOISE, spread(was) + spread(now))
    allowed = max(1.0, machine.value) * (1 + noise)
    return Change(label, name, what, found.value, allowed, noisy=found.noisy or machine.noisy)
