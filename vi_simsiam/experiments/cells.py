"""Arms and numbers as text: in the tables of an experiment, in its sentences and figures."""

from __future__ import annotations

from typing import Any

from vi_simsiam.text import METHODS


def arm_label(arm: str) -> str:
    """The name of an arm in tables and figures."""
    return next((title for method, title in METHODS.items() if method == arm), arm)


def percent(share: float) -> str:
    """A share in percent with one decimal, "41.2 %"."""
    return f"{100 * share:.1f} %"


def points(share: float) -> str:
    """A difference in percentage points with its sign; a difference that rounds to 0 has none."""
    text = f"{100 * share:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def gain(found: dict[str, Any] | None) -> str:
    """A `statistics.difference` in percentage points, with its interval if there is one."""
    if found is None:
        return "-"
    if found.get("same"):
        return "the same features"
    value = points(found["value"])
    if found["low"] is None:
        return value
    return f"{value} ({points(found['low'])} to {points(found['high'])})"


def mean_sd(found: dict[str, Any] | None, factor: float, digits: int | None = 1) -> str:
    """Mean and standard deviation of an `estimate`; the mean alone for one seed, "-" for none.

    `digits` are decimals; None stands for three significant digits.
    """
    if found is None:
        return "-"

    def shown(value: float) -> str:
        if digits is not None:
            return f"{factor * value:.{digits}f}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    return shown(found["mean"]) + ("" if found["sd"] is None else f" ± {shown(found['sd'])}")


def setting(value: Any) -> str:
    """A setting; the values of a list side by side."""
    if isinstance(value, list):
        return " ".join(map(setting, value))
    return "-" if value is None else str(value)
