"""When times are too noisy for a verdict: the one rule of all tables, targets and comparisons."""

from __future__ import annotations

from typing import NamedTuple

TOO_NOISY = "too noisy to tell"
"""Stands where a verdict would."""
_NOISY = 0.2
LEGEND = f"Too noisy to tell: the quartiles of a time that is compared lie {100 * _NOISY:.0f} % of its median or more apart."


class Ratio(NamedTuple):
    """One time over another, and whether a verdict can rest on it."""

    value: float
    noisy: bool

    def shown(self, form: str = "{:.2f} x") -> str:
        """The ratio as a cell."""
        return TOO_NOISY if self.noisy else form.format(self.value)


def spread(times: dict[str, float]) -> float:
    """How far the quartiles of a time lie apart, over its median."""
    return (times["upper_us"] - times["lower_us"]) / times["median_us"]


def noisy(*times: dict[str, float] | None) -> bool:
    """Whether the quartiles of any of these times lie so far apart that its median says little."""
    return any(found is not None and spread(found) >= _NOISY for found in times)


def ratio(over: dict[str, float], under: dict[str, float]) -> Ratio:
    """The ratio of two medians."""
    return Ratio(over["median_us"] / under["median_us"], noisy(over, under))
