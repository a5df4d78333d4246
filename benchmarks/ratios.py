"""Times in result files: lookup, comparison, and the one rule for times too noisy for a verdict.

A result file holds cases, a case holds providers, and a provider holds the quartiles of its times.
In files of the loss they are found under a mode ("forward") and a metric ("time", "host"), in the
others under "time" alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vi_simsiam.text import counted

from . import names

Case = dict[str, Any]
Times = dict[str, float]

GIGABYTE = 1e9
NOT_MEASURED = "not measured"
TOO_NOISY = "too noisy to tell"
_NOISY = 0.2
LEGEND = (
    "Too noisy to tell: the quartiles of a time that is compared lie "
    f"{100 * _NOISY:.0f} % of its median or more apart."
)


class Ratio(NamedTuple):
    """One time over another, and whether they are too noisy for a verdict."""

    value: float
    noisy: bool

    def shown(self, form: str = "{:.2f} x") -> str:
        """Format the ratio for a cell."""
        return TOO_NOISY if self.noisy else form.format(self.value)


def spread(times: Times) -> float:
    """Distance between the quartiles of a time over its median."""
    return (times["upper_us"] - times["lower_us"]) / times["median_us"]


def noisy(*times: Times | None) -> bool:
    """Return True if the spread of any of these times is too large for a verdict."""
    return any(found is not None and spread(found) >= _NOISY for found in times)


def ratio(over: Times, under: Times) -> Ratio:
    """Ratio of two medians."""
    return Ratio(over["median_us"] / under["median_us"], noisy(over, under))


def times_of(
    case: Case, provider: str, mode: str | None = None, metric: str = "time"
) -> Times | None:
    """Quartiles of a provider on a case; None where it has none, as with every wrong result."""
    found = case["providers"].get(provider)
    if found is None or not found["correct"]:
        return None
    times: Times | None = (found if mode is None else found[mode] or {}).get(metric)
    return times


def fastest(
    case: Case, providers: Iterable[str], mode: str | None = None, metric: str = "time"
) -> tuple[str, Times] | None:
    """The provider with the smallest median, and its quartiles; None where none has a time."""
    found = [
        (name, times)
        for name in providers
        if (times := times_of(case, name, mode, metric)) is not None
    ]
    return min(found, key=lambda item: item[1]["median_us"]) if found else None


def speed_up(
    case: Case,
    ours: Sequence[str],
    theirs: Sequence[str],
    mode: str | None = None,
    metric: str = "time",
) -> Ratio | None:
    """Speed-up of the fastest of `ours` over the fastest of `theirs`."""
    own, other = fastest(case, ours, mode, metric), fastest(case, theirs, mode, metric)
    return ratio(other[1], own[1]) if own and other else None


def floor_of(case: Case) -> str:
    """The network alone, with the layers that training uses."""
    return names.NETWORK_KERNELS if names.NETWORK_KERNELS in case["providers"] else names.NETWORK


def exposed_share(case: Case) -> Ratio | None:
    """Share of the step by which the augmentation makes it longer."""
    exposed, whole = case["phases"]["exposed augmentation"], times_of(case, names.STEP)
    if exposed is None or whole is None:
        return None
    return Ratio(exposed / whole["median_us"], noisy(whole, times_of(case, names.AT_HAND)))


def case_label(case: Case) -> str:
    """Readable name of a case, such as "256 x 2048, 8 views, bfloat16"."""
    if "label" in case:
        return str(case["label"])
    views = ""
    if (case["views"], case["targets"]) != (2, 2):
        views = f", {counted(case['views'], 'view')}"
    cosine = ", cosine" if case["distribution"] == "cosine" else ""
    return f"{case['batch']} x {case['dim']}{views}, {case['dtype']}{cosine}"
