"""`vi-simsiam uncertainty`: what a run's concentration is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vi_simsiam.cli.parsing import RunOptions, open_run, parse
from vi_simsiam.text import counted


@dataclass(frozen=True)
class _Uncertainty(RunOptions):
    ood: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Another data set to tell from the run's own, as --data takes it; near=DATA or far=DATA says how far it is held to be. Once for each."""
    images: int | None = None
    """Most validation images that are evaluated; None for all."""
    corruption_images: int = 200
    """Most images that are damaged step by step."""
    seed: int = 0
    """Of every choice of images, of the views and of the damage."""


def uncertainty(arguments: list[str]) -> int:
    """Measure the concentration of a run against simpler scores."""
    options = parse("uncertainty", _Uncertainty, arguments)

    from vi_simsiam.evaluation.uncertainty import UNCERTAINTY, evaluate_uncertainty

    console = Console()
    run = open_run(options)
    with console.status("uncertainty", spinner="line") as status:
        result = evaluate_uncertainty(
            run,
            ood=options.ood,
            images=options.images,
            seed=options.seed,
            corruption_images=options.corruption_images,
            report=lambda phrase: status.update(escape(phrase)),
        )
    print_result(result, console)
    console.print(
        f"written to {run.path / UNCERTAINTY}", highlight=False, markup=False, soft_wrap=True
    )
    return 0


def print_result(result: dict[str, Any], console: Console) -> None:
    """Print what an uncertainty.json says of the concentration: its calibration, and its rivals."""
    from vi_simsiam.evaluation.uncertainty import comparisons

    found = result["calibration"]
    if found is not None:
        console.print(
            f"calibration: mean cosine of two views {found['observed']:.3f}, claimed {found['expected']:.3f}; "
            f"error {found['error']:.3f} over {counted(len(found['bins']), 'bin')} of {counted(found['pairs'], 'pair')}",
            highlight=False,
            soft_wrap=True,
        )
    table = Table("", "measure", box=None, pad_edge=False)
    table.add_column("kappa", justify="right")
    table.add_column("best trivial score", justify="right")
    table.add_column("kappa is")
    rows = comparisons(result)
    for row in rows:
        verdict = {None: "-", True: "ahead", False: "not ahead"}[row.ahead]
        rival = f"{row.baseline or 'none'} {_shown(row.value)}"
        table.add_row(*map(escape, (row.part, row.measure, _shown(row.kappa), rival, verdict)))
    console.print(table)
    compared = [row for row in rows if row.ahead is not None]
    ahead = sum(bool(row.ahead) for row in compared)
    lines = [
        f"kappa is ahead of the best trivial score in {ahead} of {counted(len(compared), 'comparison')}. That score is the best "
        "of lengths of features and statistics of the pixels, picked in each row after the fact, which favours it; "
        "one run tells nothing of the spread between seeds.",
        *(f"note: {note}" for note in result["settings"]["notes"]),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
