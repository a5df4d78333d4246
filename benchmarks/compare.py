"""Comparison of two result files of a benchmark: changes beyond the recorded noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console

from vi_simsiam.errors import InputError
from vi_simsiam.text import counted, print_line

from .cases import MODES
from .results import (
    TOO_NOISY,
    Case,
    Ratio,
    Times,
    case_label,
    ratio,
    read_result,
    spread,
    times_of,
)
from .tables import terminal_table

_LEAST_NOISE = 0.02
"""Differences below 2 % are never called a change: clocks and placement differ between runs."""

_BENCHMARKS = ("multiview_loss", "batch_norm", "augment", "step", "train")


@dataclass(frozen=True)
class Options:
    """Options of `vi-simsiam bench compare`."""

    before: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BEFORE")]
    """Result file to compare with."""
    after: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="AFTER")]
    """Result file that must not be slower."""


class Change(NamedTuple):
    """One time in both files: a row of the table."""

    case: str
    provider: str
    what: str
    ratio: str
    """New over old."""
    noise: str
    """Share that noise explains."""
    verdict: str
    """slower, faster, too noisy to tell, the failure of a lost result, or empty for noise."""

    @property
    def regression(self) -> bool:
        """Return True if it is slower than noise explains, or has no result any more."""
        return self.verdict not in ("", "faster", TOO_NOISY)


_HEAD = ("case", "provider", "what", "new / old", "noise", "")


def run(options: Options) -> int:
    """Print the ratios; return 1 if anything is slower beyond the recorded noise, else 0.

    Times that are too noisy for a verdict are counted and decide nothing.

    Raises:
        InputError: a missing file, one of another benchmark, or files without a common case or
            without a time that is quiet enough to compare.
    """
    console = Console()
    before = read_result(options.before, *_BENCHMARKS)
    after = read_result(options.after, before["benchmark"])
    both = f"{options.before} and {options.after}"
    changes = compare(before, after)
    for name in ("device", "processor", "versions"):
        old, new = before.get(name), after.get(name)
        if old != new:
            print_line(console, f"note: different {name}: {old} and {new}")
    if not changes:
        raise InputError(f"results: {both} have no timed case in common")
    console.print(terminal_table(None, _HEAD, changes, numbers=False))
    slower = sum(change.regression for change in changes)
    unclear = sum(change.verdict == TOO_NOISY for change in changes)
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
    this project, became slower: then the machine did. For loss and BatchNorm that is a copy of
    the same bytes, otherwise the provider that the case names. Where one of these times is noisy
    (see `results`) there is no verdict.
    """
    found = {case["name"]: case for case in after["cases"]}
    changes = []
    for old in before["cases"]:
        new = found.get(old["name"], {"providers": {}})
        was, now = _times(old), _times(new)
        for (name, what), times in was.items():
            if times is None or name not in new["providers"]:
                continue
            judged = "-", "0.0%", _failure(new["providers"][name], what)
            if (new_times := now[name, what]) is not None:
                stick = new.get("yardstick", "copy")
                sticks = [each.get((stick, what)) for each in (was, now) if stick != name]
                judged = _judged(times, new_times, *filter(None, sticks))
            changes.append(Change(case_label(old), name, what, *judged))
    return changes


def _times(case: Case) -> dict[tuple[str, str], Times | None]:
    """Times by provider and by what was timed; with modes also those of the copy."""
    found: dict[tuple[str, str], Times | None] = {}
    for name in case["providers"]:
        if "copy" not in case:
            found[name, "time"] = times_of(case, name)
            continue
        for mode, title in MODES.items():
            found[name, title] = times_of(case, name, mode)
            found[name, f"{title}, host"] = times_of(case, name, mode, "host")
            found["copy", title] = case["copy"][mode]
    return found


def _failure(entry: dict[str, Any], what: str) -> str:
    modes = [mode for mode, title in MODES.items() if what.removesuffix(", host") == title]
    reasons = [entry["failure"], *((entry.get(mode) or {}).get("failure") for mode in modes)]
    return next(filter(None, reasons), "no time any more")


def _judged(was: Times, now: Times, *sticks: Times) -> tuple[str, str, str]:
    """New over old, the share that noise explains, and the verdict."""
    found = ratio(now, was)
    machine = ratio(sticks[1], sticks[0]) if len(sticks) == 2 else Ratio(1.0, False)
    noise = max(_LEAST_NOISE, spread(was) + spread(now))
    allowed = max(1.0, machine.value) * (1 + noise)
    verdict = ""
    if found.noisy or machine.noisy:
        verdict = TOO_NOISY
    elif found.value > allowed:
        verdict = "slower"
    elif found.value < 1 / allowed:
        verdict = "faster"
    return f"{found.value:.3f}", f"{allowed - 1:.1%}", verdict
