"""Figures of an experiment: stability.png, how its trainings went, and accuracy.png, what they came to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vi_simsiam.config import with_former_loss
from vi_simsiam.engine.verdict import COLLAPSE_THRESHOLD
from vi_simsiam.evaluation.style import BLUE, GRAY, ORANGE, STYLE, figure, save
from vi_simsiam.experiments.plan import MEASURES
from vi_simsiam.experiments.records import Experiment, columns, measures
from vi_simsiam.experiments.statistics import estimate
from vi_simsiam.experiments.tables import MEASURE_NAMES, arm_label

STABILITY, ACCURACY = "stability.png", "accuracy.png"
_OWN_COLOURS = {"vi-simsiam": BLUE, "simsiam": ORANGE}
_COLOURS = ("#4c9a6a", "#9161b0", "#c2a01e", "#b8433f", "#3aa0a8", "#7a5c43", "#d46a9f", GRAY)
_PANELS = {
    "ratio": "κ / κ*",
    "grad_norm": "gradient norm",
    "z_std": "z-std · √D",
    "effective_rank": "effective rank",
}
_LOG = ("ratio", "grad_norm")


def draw(out: Path) -> list[Path]:
    """Draw OUT/stability.png and OUT/accuracy.png of the runs that are there; returns the paths of what was drawn.

    Raises:
        InputError: there is no plan, or a file is damaged.
    """
    experiment = Experiment.read(out)
    with matplotlib.rc_context(STYLE):
        drawn = (_stability(experiment, out / STABILITY), _accuracy(experiment, out / ACCURACY))
    return [path for path in drawn if path is not None]


def groups(experiment: Experiment) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs with a curve as the columns of stability.png: by title, {arm: runs}.

    A column has one data set, one D and one parametrisation of the concentration. SimSiam has none and stands in a column of
    its own, unless its D has only one other column on this data: then it stands there.
    """
    found: dict[tuple[str, int, str], dict[str, list[dict[str, Any]]]] = {}
    for arm, runs in experiment.arms.items():
        for run in runs:
            if columns(run).get("epoch", np.empty(0)).size:
                key = (run["data"], run["config"]["model"]["dim"], _parametrisation(run))
                found.setdefault(key, {}).setdefault(arm, []).append(run)
    for key in [key for key in found if not key[2]]:
        others = [other for other in found if other[:2] == key[:2] and other[2]]
        if len(others) == 1:
            found[others[0]] = {**found.pop(key), **found[others[0]]}
    with_data = len({key[0] for key in found}) > 1
    return {
        _title(key, with_data): arms
        for key, arms in sorted(found.items(), key=lambda item: item[0])
    }


def _title(key: tuple[str, int, str], with_data: bool) -> str:
    data, dim, parametrisation = key
    return ", ".join(
        part for part in (data if with_data else "", f"D = {dim}", parametrisation) if part
    )


def _parametrisation(run: dict[str, Any]) -> str:
    """How the concentration follows from the predictor's output; empty for SimSiam."""
    if run["method"] != "vi-simsiam":
        return ""
    loss = with_former_loss(run["config"])["loss"]
    scale, link = loss["concentration_scale"], loss["concentration_link"]
    if link != "softplus":
        return "default loss" if loss["cosine_weight"] else "κ quadratic"
    return (
        "κ = (D−1) softplus"
        if scale is None
        else f"κ = {'' if scale == 1 else f'{scale:g} '}softplus"
    )


def _stability(experiment: Experiment, path: Path) -> Path | None:
    """Small multiples over training: a column for each D and parametrisation, a row for each quantity, a line for each run."""
    found = groups(experiment)
    if not found:
        return None
    names = list(
        dict.fromkeys(
            _name(experiment, arm, runs) for arms in found.values() for arm, runs in arms.items()
        )
    )
    others = [name for name in names if name not in _OWN_COLOURS]
    colour = _OWN_COLOURS | {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(others)}
    size = (max(8.0, 1.2 + 2.2 * len(found)), 6.4)
    drawn = figure(
        f"Experiment {experiment.plan['experiment']}: trainings, a line for each run", size
    )
    grid = drawn.subplots(len(_PANELS), len(found), sharex="col", sharey="row", squeeze=False)
    for column, (title, arms) in zip(grid.T, found.items(), strict=True):
        for axes, name in zip(column, _PANELS, strict=True):
            _lines(
                axes,
                name,
                {colour[_name(experiment, arm, runs)]: runs for arm, runs in arms.items()},
            )
        column[0].set_title(title, fontsize=7.5)
        column[-1].set_xlabel("epoch")
    for axes, (name, label) in zip(grid[:, 0], _PANELS.items(), strict=True):
        axes.set_ylabel(label)
        if (
            name not in _LOG
        ):  # once all lines are there: a limit ends the fitting of the others in its row
            axes.set_ylim(bottom=0)
    handles = [Line2D([], [], color=colour[name], label=arm_label(name)) for name in names]
    drawn.legend(handles=handles, loc="outside lower left", ncols=min(len(names), 5))
    return save(drawn, path)


def _name(experiment: Experiment, arm: str, runs: list[dict[str, Any]]) -> str:
    """The arm without data set and D, which the column says: one colour for the same thing at every D."""
    return experiment.short(arm).removesuffix(f"-d{runs[0]['config']['model']['dim']}")


def _lines(axes: Axes, name: str, runs_of: dict[str, list[dict[str, Any]]]) -> None:
    """One quantity of the runs of every arm, by the arm's colour."""
    if name in _LOG:
        axes.set_yscale("log")
        # The default formatter writes mathtext, which figures do not parse.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if name == "ratio":
        axes.axhline(1, color=GRAY, lw=0.8, ls=(0, (1, 2)))
    if name == "z_std":
        axes.axhline(1, color=GRAY, lw=0.8, ls=(0, (1, 2)))
        axes.axhspan(0, COLLAPSE_THRESHOLD, color="#fbe3d6", lw=0, zorder=0)
    for colour, runs in runs_of.items():
        for run in runs:
            curve = columns(run)
            if name in curve:
                axes.plot(curve["epoch"], curve[name], color=colour, lw=1, alpha=0.8)
                if run.get("diverged"):
                    axes.plot(
                        curve["epoch"][-1],
                        curve[name][-1],
                        color=colour,
                        marker="x",
                        ms=5,
                        clip_on=False,
                    )


def _accuracy(experiment: Experiment, path: Path) -> Path | None:
    """A panel for each data set and accuracy: a point for each run, the mean, and Student's 95 % interval over seeds."""
    names = measures(_all(experiment), MEASURES)
    data = [
        each
        for each in experiment.data
        if any(measures(runs, ()) for runs in experiment.on(each).values())
    ]
    if not names or not data:
        return None
    rows = max(len(experiment.on(each)) for each in data)
    size = (max(8.0, 1.6 + 2.0 * len(names)), len(data) * (0.9 + 0.28 * rows) + 0.5)
    title = f"Experiment {experiment.plan['experiment']}: accuracy, %; small: runs, large: means, lines: 95 % interval over seeds"
    drawn = figure(title, size)
    grid = drawn.subplots(len(data), len(names), sharex="col", squeeze=False)
    for panels, each in zip(grid, data, strict=True):
        arms = {experiment.short(arm): runs for arm, runs in experiment.on(each).items()}
        for axes, name in zip(panels, names, strict=True):
            _points(axes, name, arms)
            axes.set_title(MEASURE_NAMES.get(name, name), fontsize=7.5)
            axes.set_yticks(
                range(len(arms)),
                [arm_label(arm) for arm in arms] if axes is panels[0] else [""] * len(arms),
            )
            axes.set_ylim(len(arms) - 0.5, -0.5)
        if len(data) > 1:
            panels[0].set_ylabel(each)
    return save(drawn, path)


def _points(axes: Axes, name: str, arms: dict[str, list[dict[str, Any]]]) -> None:
    everything: list[float] = []
    for row, (arm, runs) in enumerate(arms.items()):
        values = [
            100 * run["accuracy"][name] for run in runs if run["accuracy"].get(name) is not None
        ]
        if not values:
            continue
        everything += values
        colour = _OWN_COLOURS.get(arm, GRAY)
        found = estimate(values)
        axes.plot(values, [row] * len(values), ls="", marker="o", ms=3, color=colour, alpha=0.5)
        axes.plot(found.mean, row, marker="D", ms=4.5, color=colour)
        if (interval := found.interval()) is not None:
            axes.plot(interval, [row, row], color=colour, lw=1.2)
    if (
        everything
    ):  # the interval of two seeds is often wider than all there is to see, and leaves the panel
        margin = 0.25 * (max(everything) - min(everything)) + 0.5
        axes.set_xlim(min(everything) - margin, max(everything) + margin)


def _all(experiment: Experiment) -> Iterable[dict[str, Any]]:
    return (run for runs in experiment.arms.values() for run in runs)
