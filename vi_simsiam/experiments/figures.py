"""Figures of an experiment: stability.png, accuracy.png and purposes.png.

They show its trainings, the accuracies, and what scores of uncertainty are worth by purpose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.verdict import COLLAPSE_THRESHOLD
from vi_simsiam.evaluation.style import BLUE, GRAY, INK, ORANGE, STYLE, figure, save, shown
from vi_simsiam.experiments.cells import arm_label
from vi_simsiam.experiments.purposes import PURPOSES, shown_purposes
from vi_simsiam.experiments.results import Arms, Experiment, Run, all_runs, columns, measures
from vi_simsiam.experiments.statistics import estimate, interval
from vi_simsiam.experiments.tables import MEASURE_NAMES

STABILITY, ACCURACY, PURPOSES_FIGURE = "stability.png", "accuracy.png", "purposes.png"
_OWN_COLOURS = {"vi-simsiam": BLUE, "simsiam": ORANGE}
_COLOURS = ("#4c9a6a", "#9161b0", "#c2a01e", "#b8433f", "#3aa0a8", "#7a5c43", "#d46a9f", GRAY)
_PANELS = {
    "ratio": "κ / κ*",
    "grad_norm": "gradient norm",
    "z_std": "z-std · √D",
    "effective_rank": "effective rank",
}
_LOG = ("ratio", "grad_norm")
_COLUMNS = 4
"""Panels of purposes.png side by side."""
_WITH_ONE = ("ratio", "z_std")
"""Quantities whose panel marks the value 1."""


def draw(out: Path) -> list[Path]:
    """Draw OUT/stability.png, OUT/accuracy.png and OUT/purposes.png of the runs with a result.

    Returns:
        The paths of the figures drawn.
    """
    experiment = Experiment.read(out)
    with matplotlib.rc_context(STYLE):
        drawn = (
            _stability(experiment, out / STABILITY),
            _accuracy(experiment, out / ACCURACY),
            _purposes(experiment, out / PURPOSES_FIGURE),
        )
    return [path for path in drawn if path is not None]


def groups(experiment: Experiment) -> dict[str, Arms]:
    """Runs with a curve by column of stability.png: {title: {arm: runs}}.

    A column has one data set, one D and one parametrisation of the concentration. SimSiam has no
    concentration. It joins the other column of its data set and D if there is only one, and has a
    column of its own otherwise.
    """
    found: dict[tuple[str, int, str], Arms] = {}
    for arm, runs in experiment.arms.items():
        for run in runs:
            if "epoch" in run["curve"]:
                key = (run["data"], _dim(run), _parametrisation(run))
                found.setdefault(key, {}).setdefault(arm, []).append(run)
    for key in [key for key in found if not key[2]]:
        others = [other for other in found if other[:2] == key[:2] and other[2]]
        if len(others) == 1:
            found[others[0]] = {**found.pop(key), **found[others[0]]}
    several = len({data for data, _, _ in found}) > 1
    titles = {}
    for (data, dim, parametrisation), arms in sorted(found.items(), key=lambda item: item[0]):
        parts = (data if several else "", f"D = {dim}", parametrisation)
        titles[", ".join(filter(None, parts))] = arms
    return titles


def _dim(run: Run) -> int:
    return TrainConfig.from_dict(run["config"]).model.dim


def _parametrisation(run: Run) -> str:
    """The link from the predictor's output to the concentration; empty for SimSiam."""
    if run["method"] != "vi-simsiam":
        return ""
    loss = TrainConfig.from_dict(run["config"]).loss
    scale = loss.concentration_scale
    if loss.concentration_link != "softplus":
        return "default loss" if loss.cosine_weight else "κ quadratic"
    if scale is None:
        return "κ = (D−1) softplus"
    return f"κ = {'' if scale == 1 else f'{scale:g} '}softplus"


def _stability(experiment: Experiment, path: Path) -> Path | None:
    """Small multiples over training: columns as in `groups`, rows of quantities, a line a run."""
    found = {title: _named(experiment, arms) for title, arms in groups(experiment).items()}
    if not found:
        return None
    names = list(dict.fromkeys(name for arms in found.values() for name in arms))
    others = [name for name in names if name not in _OWN_COLOURS]
    colours = _OWN_COLOURS | {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(others)}
    size = (max(8.0, 1.2 + 2.2 * len(found)), 6.4)
    title = f"Experiment {experiment.plan['experiment']}: trainings, a line for each run"
    drawn = figure(title, size)
    grid = drawn.subplots(len(_PANELS), len(found), sharex="col", sharey="row", squeeze=False)
    for column, (title, arms) in zip(grid.T, found.items(), strict=True):
        for axes, quantity in zip(column, _PANELS, strict=True):
            _lines(axes, quantity, {colours[name]: runs for name, runs in arms.items()})
        column[0].set_title(title, fontsize=7.5)
        column[-1].set_xlabel("epoch")
    for axes, (quantity, label) in zip(grid[:, 0], _PANELS.items(), strict=True):
        axes.set_ylabel(label)
        # After all lines, because a fixed limit stops autoscaling for the whole row.
        if quantity not in _LOG:
            axes.set_ylim(bottom=0)
    handles = [Line2D([], [], color=colours[name], label=arm_label(name)) for name in names]
    drawn.legend(handles=handles, loc="outside lower left", ncols=min(len(names), 5))
    return save(drawn, path)


def _named(experiment: Experiment, arms: Arms) -> Arms:
    """Arms by name without data set and D, so that an arm has the same colour at every D."""
    named = {}
    for arm, runs in arms.items():
        dim = _dim(runs[0])
        named[experiment.short(arm).removesuffix(f"-d{dim}")] = runs
    return named


def _lines(axes: Axes, quantity: str, runs_of: Arms) -> None:
    """Draw one quantity of the runs, given by colour."""
    if quantity in _LOG:
        axes.set_yscale("log")
        # The default formatter writes mathtext, which figures do not parse.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if quantity in _WITH_ONE:
        axes.axhline(1, color=GRAY, lw=0.8, ls=(0, (1, 2)))
    if quantity == "z_std":
        axes.axhspan(0, COLLAPSE_THRESHOLD, color="#fbe3d6", lw=0, zorder=0)
    for colour, runs in runs_of.items():
        for run in runs:
            curve = columns(run)
            if quantity not in curve:
                continue
            x, y = curve["epoch"], curve[quantity]
            axes.plot(x, y, color=colour, lw=1, alpha=0.8)
            if "diverged" in run:
                axes.plot(x[-1], y[-1], color=colour, marker="x", ms=5, clip_on=False)


def _accuracy(experiment: Experiment, path: Path) -> Path | None:
    """A panel for each data set and accuracy: runs, their mean, and Student's 95 % interval."""
    arms_on = {data: experiment.on(data) for data in experiment.data}
    measured = {data: measures(all_runs(arms)) for data, arms in arms_on.items()}
    data_sets = [data for data, names in measured.items() if names]
    if not data_sets:
        return None
    names = measures(all_runs(experiment.arms))
    rows = max(len(arms_on[data]) for data in data_sets)
    size = (max(8.0, 1.6 + 2.0 * len(names)), len(data_sets) * (0.9 + 0.28 * rows) + 0.5)
    title = (
        f"Experiment {experiment.plan['experiment']}: accuracy, %; small: runs, large: means, "
        "lines: 95 % interval over seeds"
    )
    drawn = figure(title, size)
    grid = drawn.subplots(len(data_sets), len(names), sharex="col", squeeze=False)
    for panels, data in zip(grid, data_sets, strict=True):
        arms = {experiment.short(arm): runs for arm, runs in arms_on[data].items()}
        for axes, name in zip(panels, names, strict=True):
            _points(axes, name, arms)
            axes.set_title(MEASURE_NAMES[name], fontsize=7.5)
            axes.set_yticks(range(len(arms)), [""] * len(arms))
            axes.set_ylim(len(arms) - 0.5, -0.5)
        panels[0].set_yticks(range(len(arms)), [arm_label(arm) for arm in arms])
        if len(data_sets) > 1:
            panels[0].set_ylabel(data)
    return save(drawn, path)


def _points(axes: Axes, name: str, arms: Arms) -> None:
    every: list[float] = []
    for row, (arm, runs) in enumerate(arms.items()):
        values = [100 * run["accuracy"][name] for run in runs if name in run["accuracy"]]
        found = estimate(values)
        if found is None:
            continue
        every += values
        colour = _OWN_COLOURS.get(arm, GRAY)
        axes.plot(values, [row] * len(values), ls="", marker="o", ms=3, color=colour, alpha=0.5)
        axes.plot(found["mean"], row, marker="D", ms=4.5, color=colour)
        if (ends := interval(found)) is not None:
            axes.plot(ends, [row, row], color=colour, lw=1.2)
    if every:  # an interval of two seeds is often much wider than the points, and is cut off
        margin = 0.25 * (max(every) - min(every)) + 0.5
        axes.set_xlim(min(every) - margin, max(every) + margin)


def _purposes(experiment: Experiment, path: Path) -> Path | None:
    """A panel for each data set and purpose: the AUROC of every score, its runs and their mean."""
    found = {data: rows for data, rows in experiment.purposes().items() if rows}
    shares = {data: shown_purposes(rows) for data, rows in found.items()}
    columns = min(_COLUMNS, max(map(len, shares.values()), default=0))
    if not columns:
        return None
    # A data set begins in the first column, where its scores are named.
    panels = [
        (data, name)
        for data, names in shares.items()
        for name in names + [None] * (-len(names) % columns)
    ]
    lines = len(panels) // columns
    height = 0.7 + lines * (0.6 + 0.15 * max(map(len, found.values())))
    title = (
        f"Experiment {experiment.plan['experiment']}: AUROC by purpose, 0.5 is chance; small: "
        "runs, large: means; † needs labels"
    )
    drawn = figure(title, (8.0, height))
    grid = drawn.subplots(lines, columns, sharex=True, squeeze=False)
    for place, (data, name) in enumerate(panels):
        axes, rows = grid.flat[place], found[data]
        if name is None:
            axes.remove()
            if place >= columns:
                grid.flat[place - columns].tick_params(labelbottom=True)
            continue
        axes.axvline(0.5, color=GRAY, lw=0.8, ls=(0, (3, 2)))
        for number, row in enumerate(rows):
            if name in row["auroc"]:
                _auroc(axes, number, row["runs"][name], row["auroc"][name]["mean"], row)
        titles = [""] * len(rows) if place % columns else [row["title"] for row in rows]
        axes.set_yticks(range(len(rows)), titles)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        several = f"{shown(data)}: " if len(found) > 1 else ""
        axes.set_title(several + PURPOSES[name], fontsize=7.5)
        axes.xaxis.set_major_locator(MultipleLocator(0.25))
    return save(drawn, path)


def _auroc(axes: Axes, line: int, runs: list[float], mean: float, row: dict[str, Any]) -> None:
    """The dots of a score: kappa in blue, scores that need labels hollow."""
    colour = BLUE if row["kappa"] else INK
    axes.plot(runs, [line] * len(runs), ls="", marker="o", ms=2.5, color=colour, alpha=0.4)
    fill = "white" if row["labels"] else colour
    axes.plot(mean, line, marker="D", ms=4, color=colour, mfc=fill)
