"""What the tables of all benchmarks share: how targets, times, noise and the place of a measurement are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .noise import TOO_NOISY, noisy, spread
from .targets import Target

_MET = {True: "yes", False: "no", None: "-"}


def say(console: Console, line: str) -> None:
    """Print a line as it is: no break within a path, and no brackets taken for a style."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def targets_table(found: Sequence[Target]) -> Table:
    """Targets for the terminal."""
    table = Table(title="targets", title_justify="left")
    for column in ("what", "target", "measured", "met"):
        table.add_column(column)
    for target in found:
        table.add_row(target.what, target.wanted, target.figure, _met(target))
    return table


def markdown_targets(found: Sequence[Target]) -> str:
    """Targets as a Markdown table."""
    rows = [(target.what, target.wanted, target.figure, _met(target)) for target in found]
    return markdown_grid(("what", "target", "measured", "met"), rows, numbers=False)


def _met(target: Target) -> str:
    return TOO_NOISY if target.noisy else _MET[target.met]


def markdown_grid(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True
) -> str:
    """A Markdown table; with `numbers` all columns but the first are flush right."""
    rule = "|---|" + ("---:|" if numbers else "---|") * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def noise_notes(times: Iterable[tuple[str, dict[str, float] | None]]) -> list[str]:
    """A note on the noisiest provider, where one is too noisy for a verdict."""
    wide = [(spread(found), name) for name, found in times if found is not None and noisy(found)]
    return [
        f"noisy: the quartiles of {name} lie {apart:.0%} of the median apart; is the machine busy?"
        for apart, name in sorted(wide)[-1:]
    ]


def number(value: float) -> str:
    """A figure with three digits that mean something."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def brief(reason: str) -> str:
    """A failure's reason for a cell; the rest of it stands below the table."""
    return reason.split(":")[0]


def where(result: dict[str, Any]) -> str:
    """On what, with what and when a result was measured."""
    device = (
        result["processor"]
        if result["device_type"] == "cpu"
        else f"{result['device']}, driver {result['driver']}"
    )
    return f"{device}; PyTorch {result['versions']['torch']}; {result['date'][:10]}."
