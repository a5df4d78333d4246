"""All evaluations of a run in one go: figures, both accuracies, and the lines that sum them up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.run import Run
from vi_simsiam.engine.verdict import Health
from vi_simsiam.evaluation.features import collect
from vi_simsiam.evaluation.figures import draw_curves, draw_density, draw_kappa, logged
from vi_simsiam.evaluation.knn import evaluate_knn
from vi_simsiam.evaluation.linear import evaluate_linear
from vi_simsiam.evaluation.results import accuracies


def evaluate_run(
    run: Run, world: World | None = None, console: Console | None = None, *, quiet: bool = False
) -> None:
    """Draw the figures, evaluate by k nearest neighbours and linear probe, and print the results.

    The results are the last two lines. Writes curves.png (where the run has a log), kappa.png and
    density.png (VI-SimSiam only), knn.json and linear.json to the run folder; the features are
    computed once.

    Args:
        run: the run.
        world: ranks that share the computing of features; rank 0 does the rest. None for this
            process alone.
        console: where to print; None for standard output.
        quiet: print the accuracies only.

    Raises:
        InputError: the data has no labels or no validation images; the figures are drawn before.
    """
    plain: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
    world = world or World(run.device)
    results = world.console(console)
    console = Console(quiet=True) if quiet else results
    with console.status("drawing figures", spinner="line") as status:
        for figure in _figures(run) if world.is_main else ():
            if figure is not None:
                console.print(f"figure {figure}", **plain)
        features = collect(run, report=status.update, world=world)
        if not world.is_main:
            return
        status.update("nearest neighbours")
        knn = evaluate_knn(features)
        status.update("linear probes")
        linear = evaluate_linear(features)
    console.print(summary_table({"kNN": knn, "linear": linear}))
    health = Health.of_run(run.path, run.config)
    if health is not None and health.short:
        results.print(f"warning: training {health.line}", style="yellow", **plain)
    for line in (summary_line("kNN", knn), summary_line("linear", linear)):
        results.print(line, **plain)


def _figures(run: Run) -> Iterator[Path | None]:
    yield draw_curves(run.path) if logged(run.path) else None
    yield draw_density(run.path)
    yield draw_kappa(run)


def summary_table(results: dict[str, dict[str, Any]]) -> Table:
    """Every accuracy of the given results in per cent: a row per encoder, a column per measure.

    Args:
        results: by title, as `evaluate_knn`, `evaluate_linear` and `evaluate_logistic` return them.
    """
    measures = accuracies(results)
    table = Table("encoder")
    for measure in measures:
        table.add_column(measure, justify="right")
    for encoder in next(iter(measures.values())):
        table.add_row(encoder, *(f"{100 * shares[encoder]:.1f}" for shares in measures.values()))
    return table


def summary_line(name: str, result: dict[str, Any]) -> str:
    """One line for a result: "kNN top-1: 71.2 % (untrained 55.0 %, pixels 75.0 %)".

    It ends with k if all training images vote.

    Args:
        name: title of the evaluation.
        result: as `evaluate_knn`, `evaluate_linear` or `evaluate_logistic` returns it.
    """
    top1 = {encoder: f"{100 * share:.1f} %" for encoder, share in result["top1"].items()}
    others = ", ".join(f"{encoder} {top1[encoder]}" for encoder in ("untrained", "pixels"))
    line = f"{name} top-1: {top1['trained']} ({others})"
    k = result.get("settings", {}).get("k")
    everyone = k is not None and k >= result["train_images"]
    return f"{line} with k = {k}, all training images" if everyone else line
