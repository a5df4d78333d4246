"""`vi-simsiam evaluate|knn|linear|logistic|figures`: what a trained run is worth."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from vi_simsiam.cli.parsing import RunOptions, open_run, parse


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
    """Inverse strength of the penalty; None to choose it on a held-out fifth of the training images."""


@dataclass(frozen=True)
class _Figures(RunOptions):
    pass


def evaluate(arguments: list[str]) -> int:
    """All evaluations of a run."""
    options = parse("evaluate", RunOptions, arguments)

    from vi_simsiam.engine.distributed import joined
    from vi_simsiam.evaluation.summary import evaluate_run

    with joined(options.device) as world:
        evaluate_run(open_run(options, str(world.device)), world)
    return 0


def knn(arguments: list[str]) -> int:
    """Classify by nearest neighbours."""
    options = parse("knn", _Knn, arguments)

    from vi_simsiam.evaluation.features import collect
    from vi_simsiam.evaluation.knn import KnnConfig, evaluate_knn
    from vi_simsiam.evaluation.summary import summary_line

    config = KnnConfig(k=options.k, temperature=options.temperature)
    with Console().status("features", spinner="line") as status:
        result = evaluate_knn(collect(open_run(options), report=status.update), config)
    print(summary_line("kNN", result))
    return 0


def linear(arguments: list[str]) -> int:
    """Train a linear probe."""
    options = parse("linear", _Linear, arguments)

    from vi_simsiam.evaluation.features import collect
    from vi_simsiam.evaluation.linear import evaluate_linear, linear_preset
    from vi_simsiam.evaluation.summary import summary_line, summary_table

    config = linear_preset(options.preset)
    with Console().status("features", spinner="line") as status:
        features = collect(open_run(options), report=status.update)
        status.update("linear probes")
        result = evaluate_linear(features, config)
    Console().print(summary_table({"linear": result}))
    print(summary_line("linear", result))
    return 0


def logistic(arguments: list[str]) -> int:
    """Fit a logistic regression."""
    options = parse("logistic", _Logistic, arguments)

    from vi_simsiam.evaluation.features import collect
    from vi_simsiam.evaluation.logistic import LogisticConfig, evaluate_logistic
    from vi_simsiam.evaluation.summary import summary_line, summary_table

    config = LogisticConfig(c=options.c)
    with Console().status("features", spinner="line") as status:
        features = collect(open_run(options), report=status.update)
        status.update("logistic regressions")
        result = evaluate_logistic(features, config)
    Console().print(summary_table({"logistic": result}))
    print(summary_line("logistic", result))
    return 0


def figures(arguments: list[str]) -> int:
    """Draw a run's figures, those of its uncertainty if that was measured."""
    options = parse("figures", _Figures, arguments)

    from vi_simsiam.evaluation.figures import draw_curves, draw_density, draw_kappa, logged
    from vi_simsiam.evaluation.uncertainty_figures import draw_uncertainty

    with Console().status("drawing figures", spinner="line"):
        curves = draw_curves(options.run) if logged(options.run) else None
        known = (curves, draw_density(options.run), *draw_uncertainty(options.run))
        drawn = (*known, draw_kappa(open_run(options)))
    for path in drawn:
        if path is not None:
            print(path)
    return 0
