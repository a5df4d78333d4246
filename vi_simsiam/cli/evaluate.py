"""`vi-simsiam evaluate|knn|linear|logistic|figures|uncertainty|report`: results of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from vi_simsiam.cli.parsing import RunOptions, open_run, parse
from vi_simsiam.text import cell, counted, print_line, show

if TYPE_CHECKING:
    from vi_simsiam.engine.distributed import World
    from vi_simsiam.engine.run import Run
    from vi_simsiam.evaluation.features import FeatureSets


@dataclass(frozen=True)
class _Knn(RunOptions):
    k: int = 20
    """Number of neighbours; all training images where they are fewer."""
    temperature: float = 0.1
    """Neighbours are weighted by exp(cosine / temperature)."""


@dataclass(frozen=True)
class _Linear(RunOptions):
    preset: str = "default"
    """default, or paper (the paper's protocol with a held-out fifth of the training set)."""


@dataclass(frozen=True)
class _Logistic(RunOptions):
    c: float | None = None
    """Inverse strength of the penalty; None to choose it on a fifth of the images, held out."""


@dataclass(frozen=True)
class _Uncertainty(RunOptions):
    ood: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Another data set, as for --data, or near=DATA or far=DATA by its assumed distance."""
    images: int | None = None
    """Most validation images that are evaluated; None for all."""
    corruption_images: int = 200
    """Most images that are damaged step by step."""
    seed: int = 0
    """Seed of every choice of images, of the views and of the damage."""


def evaluate(arguments: list[str]) -> int:
    """Run all evaluations of a run."""
    options = parse("evaluate", RunOptions, arguments)

    from vi_simsiam.engine.distributed import joined

    with joined(options.device) as world:
        evaluate_run(open_run(options, str(world.device)), world)
    return 0


def evaluate_run(
    run: Run, world: World, console: Console | None = None, *, quiet: bool = False
) -> None:
    """Draw the figures, evaluate by k nearest neighbours and linear probe, and print the results.

    The results are the last lines: accuracies of the validation images, by kNN also from ten labels
    a class, and of the same images shifted and turned a little. Writes curves.png (where the run
    has a log), kappa.png and density.png (VI-SimSiam only), knn.json and linear.json to the run
    folder; the features are computed once.

    Args:
        run: the run.
        world: ranks that share the computing of features; rank 0 does the rest.
        console: where to print; None for standard output.
        quiet: print the accuracies only.

    Raises:
        InputError: the data has no labels or no validation images; the figures are drawn before.
    """
    from vi_simsiam.engine.verdict import Health
    from vi_simsiam.evaluation.features import collect
    from vi_simsiam.evaluation.figures import draw_curves, draw_density, draw_kappa
    from vi_simsiam.evaluation.knn import evaluate_knn
    from vi_simsiam.evaluation.linear import evaluate_linear
    from vi_simsiam.evaluation.results import summary_lines, summary_table

    output = world.console(console)
    console = Console(quiet=True) if quiet else output
    with console.status("drawing figures", spinner="line") as status:
        if world.is_main:
            for figure in (*draw_curves(run.path), *draw_density(run.path), *draw_kappa(run)):
                print_line(console, f"figure {figure}")
        features = collect(run, report=status.update, world=world)
        if not world.is_main:
            return
        status.update("nearest neighbours")
        measured = {"kNN": evaluate_knn(features)}
        status.update("linear probes")
        measured["linear"] = evaluate_linear(features)
    console.print(summary_table(measured))
    health = Health.of_run(run.path, run.config)
    if health is not None and health.short:
        print_line(output, f"warning: training {health.line}", style="yellow")
    for line in summary_lines(measured):
        print_line(output, line + run.unfinished)


def knn(arguments: list[str]) -> int:
    """Classify by nearest neighbours."""
    options = parse("knn", _Knn, arguments)

    from vi_simsiam.engine.knn import KnnConfig
    from vi_simsiam.evaluation.knn import evaluate_knn

    config = KnnConfig(k=options.k, temperature=options.temperature)
    return _classify(options, "kNN", lambda features: evaluate_knn(features, config), table=False)


def linear(arguments: list[str]) -> int:
    """Train a linear probe."""
    options = parse("linear", _Linear, arguments)

    from vi_simsiam.evaluation.linear import evaluate_linear, linear_preset

    config = linear_preset(options.preset)
    return _classify(options, "linear", lambda features: evaluate_linear(features, config))


def logistic(arguments: list[str]) -> int:
    """Fit a logistic regression."""
    options = parse("logistic", _Logistic, arguments)

    from vi_simsiam.evaluation.logistic import LogisticConfig, evaluate_logistic

    config = LogisticConfig(c=options.c)
    return _classify(options, "logistic", lambda features: evaluate_logistic(features, config))


def _classify(
    options: RunOptions, name: str, score: Callable[[FeatureSets], Any], *, table: bool = True
) -> int:
    """Print the accuracy of a classifier on a run's features, with a table if `table` is set."""
    from vi_simsiam.evaluation.features import collect
    from vi_simsiam.evaluation.results import summary_lines, summary_table

    with Console().status("features", spinner="line") as status:
        run = open_run(options)
        features = collect(run, report=status.update)
        status.update(f"{name} probes")
        result = score(features)
    if table:
        Console().print(summary_table({name: result}))
    for line in summary_lines({name: result}):
        show(line + run.unfinished)
    return 0


def figures(arguments: list[str]) -> int:
    """Draw a run's figures, and those of its uncertainty if it was measured."""
    options = parse("figures", RunOptions, arguments)

    from vi_simsiam.evaluation.figures import draw_curves, draw_density, draw_kappa
    from vi_simsiam.evaluation.uncertainty_figures import draw_uncertainty

    folder = options.run
    with Console().status("drawing figures", spinner="line"):
        logs = [*draw_curves(folder), *draw_density(folder), *draw_uncertainty(folder)]
        drawn = [*logs, *draw_kappa(open_run(options))]
    for path in drawn:
        show(path)
    return 0


def uncertainty(arguments: list[str]) -> int:
    """Measure the concentration of a run, or of the first of several seeds, and simpler scores."""
    options = parse("uncertainty", _Uncertainty, arguments)

    from vi_simsiam.evaluation.uncertainty import UNCERTAINTY, evaluate_uncertainty
    from vi_simsiam.experiments.seeds import finished

    console = Console()
    first, *seeds = finished(options.run)
    run = open_run(dataclasses.replace(options, run=first))
    with console.status("uncertainty", spinner="line") as status:
        result = evaluate_uncertainty(
            run,
            seeds=seeds,
            ood=options.ood,
            images=options.images,
            seed=options.seed,
            corruption_images=options.corruption_images,
            report=lambda phrase: status.update(cell(phrase)),
        )
    print_result(result, console)
    print_line(console, f"written to {run.path / UNCERTAINTY}{run.unfinished}")
    return 0


def print_result(result: dict[str, Any], console: Console) -> None:
    """Print the content of an uncertainty.json: calibration, and kappa against trivial scores."""
    from vi_simsiam.evaluation.comparisons import comparisons

    if (found := result["calibration"]) is not None:
        print_line(
            console,
            f"calibration: mean cosine of two views {found['observed']:.3f}, claimed "
            f"{found['expected']:.3f}; error {found['error']:.3f} over "
            f"{counted(len(found['bins']), 'bin')} of {counted(found['pairs'], 'pair')}",
        )
    table = Table("", "measure", box=None, pad_edge=False)
    table.add_column("kappa", justify="right")
    table.add_column("best trivial score", justify="right")
    table.add_column("kappa is")
    rows = comparisons(result)
    for row in rows:
        verdict = {None: "-", True: "ahead", False: "not ahead"}[row.ahead]
        rival = f"{row.baseline or 'none'} {_shown(row.value)}"
        table.add_row(*map(cell, (row.part, row.measure, _shown(row.kappa), rival, verdict)))
    console.print(table)
    compared = [row for row in rows if row.ahead is not None]
    ahead = sum(bool(row.ahead) for row in compared)
    print_line(
        console,
        f"kappa is ahead of the best trivial score in {ahead} of "
        f"{counted(len(compared), 'comparison')}. That score is the best of lengths of features "
        "and statistics of the pixels, picked in each row after the fact, which favours it; one "
        "run does not show the spread between seeds.",
    )
    for note in result["settings"]["notes"]:
        print_line(console, f"note: {note}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def report(arguments: list[str]) -> int:
    """Write RUN/report.html and print its path; without images if they or the weights are gone."""
    options = parse("report", RunOptions, arguments)

    from vi_simsiam.evaluation.report import write_report

    show(write_report(options.run, lambda: open_run(options)))
    return 0
