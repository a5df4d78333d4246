"""Figures of uncertainty.json: reliability.png, risk_coverage.png, corruptions.png and scores.png.

Every score is higher for less certain images; "kappa" is minus the concentration. Scores computed
from the image alone, without a network, are marked: a learned score should be above them.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

from vi_simsiam.evaluation.results import read_result
from vi_simsiam.evaluation.style import BLUE, GRAY, INK, ORANGE, STYLE, figure, save, shown
from vi_simsiam.text import counted

IMAGE_STATISTICS = ("edge_energy", "contrast", "jpeg_size")
"""Scores without a network."""
_GREENS = ("#3f9b6c", "#8a5fb0")
_CHOSEN = (BLUE, *_GREENS, ORANGE)
_KINDS = (
    BLUE, ORANGE, *_GREENS, "#c2507f", "#7a7f3a", "#2a9aa8", "#a5673f", "#5a6472", "#c9a227",
)  # fmt: skip


def draw_uncertainty(run_folder: Path) -> list[Path]:
    """Draw every figure that RUN/uncertainty.json has the data of; none without that file.

    Returns:
        The paths of the figures.

    Raises:
        InputError: the file cannot be read.
    """
    result = read_result(run_folder, "uncertainty")
    if result is None:
        return []
    figures = {
        "reliability": (result["calibration"], reliability),
        "risk_coverage": (result["misclassification"], risk_coverage),
        "corruptions": (result["corruptions"], corruptions),
        "scores": (result["misclassification"] or result["ood"], scores),
    }
    with matplotlib.rc_context(STYLE):
        return [
            save(draw(result), run_folder / f"{name}.png")
            for name, (part, draw) in figures.items()
            if part
        ]


def figures_of(part: dict[str, Any], key: str) -> dict[str, float]:
    """One measure of every score of a part; NaN where it is not defined."""
    return {
        name: math.nan if values[key] is None else values[key]
        for name, values in part["scores"].items()
    }


def best_others(values: dict[str, float], count: int = 2) -> list[str]:
    """The `count` highest scores other than "kappa", best first.

    The highest image statistic is added at the end if it is not among them.
    """
    finite = [name for name in values if name != "kappa" and math.isfinite(values[name])]
    order = sorted(finite, key=lambda name: -values[name])
    statistics = [name for name in order if name in IMAGE_STATISTICS]
    return list(dict.fromkeys([*order[:count], *statistics[:1]]))


def score_label(name: str) -> str:
    """The label of a score in figures and tables."""
    if name == "kappa":
        return "κ"
    return name.replace("_", " ") + (" *" if name in IMAGE_STATISTICS else "")


def reliability(result: dict[str, Any]) -> Figure:
    """Observed against expected cosine by bin with the diagonal, and the pairs in each bin."""
    part = result["calibration"]
    expected, observed, count = (
        np.array([each[key] for each in part["bins"]]) for key in ("expected", "observed", "count")
    )
    drawn, left, right = _panels(
        result,
        f"{counted(part['pairs'], 'pair')} of views, mean cosine expected {part['expected']:.3f}, "
        f"observed {part['observed']:.3f}, calibration error {part['error']:.3f}",
    )
    low, high = min(expected.min(), observed.min()), max(expected.max(), observed.max())
    margin = 0.06 * (high - low) or 0.05
    limits = (low - margin, high + margin)
    left.plot(limits, limits, color=GRAY, lw=1, ls=(0, (3, 2)), label="expected = observed")
    left.plot(expected, observed, "o-", color=BLUE, ms=4, label="bin of pairs")
    left.set(xlim=limits, ylim=limits, aspect="equal", title="cosine of prediction and target")
    left.set(xlabel="expected, κ / (κ + D − 1)", ylabel="observed")
    left.legend(loc="upper left")
    right.bar(range(1, len(count) + 1), count, color=BLUE, width=0.7)
    right.set(title="pairs in each bin", xlabel="bin, least certain first")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.grid(axis="x", visible=False)
    return drawn


def risk_coverage(result: dict[str, Any]) -> Figure:
    """Errors among the images kept, most certain first, and the area below for every score."""
    part = result["misclassification"]
    area, curves = figures_of(part, "aurc"), part["risk_coverage"]
    drawn, left, right = _panels(
        result,
        f"{counted(result['images'], 'image')}, {part['classifier']} classifier, "
        f"accuracy {100 * part['accuracy']:.1f} %",
    )
    best = best_others({name: -value for name, value in area.items()})
    for name, colour in zip(["kappa", *best], _CHOSEN, strict=False):
        dashes: Any = (0, (3, 1.5)) if name in IMAGE_STATISTICS else "solid"
        width, order = (2.0, 4) if name == "kappa" else (1.1, 3)
        x, y, label = curves[name]["coverage"], curves[name]["risk"], score_label(name)
        left.plot(x, y, color=colour, lw=width, ls=dashes, zorder=order, label=label)
    # An oracle drops the errors first: none is left until the coverage exceeds the accuracy.
    coverage = np.linspace(0.01, 1, 100)
    oracle = np.maximum(0, 1 - part["accuracy"] / coverage)
    dashed, dotted = (0, (3, 2)), (0, (1, 2))
    left.plot(coverage, oracle, color=INK, lw=1, ls=dashed, label="oracle")
    left.axhline(1 - part["accuracy"], color=GRAY, lw=1, ls=dotted, label="random")
    left.set(title="risk by coverage", xlabel="coverage: share of images kept")
    left.set(xlim=(0, 1), ylabel="share of errors")
    left.set_ylim(0, max(0.01, 1.3 * left.get_ylim()[1]))  # room for the legend
    left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    left.legend(loc="upper left", ncols=3)
    _dots(right, dict(sorted(area.items(), key=lambda item: item[1])))
    for name, colour, dashes in (("oracle", INK, dashed), ("random", GRAY, dotted)):
        right.axvline(part[name]["aurc"], color=colour, lw=1, ls=dashes, label=name)
    right.set_title("area below (AURC), lower is better")
    right.legend(loc="best")
    return _noted(drawn)


def corruptions(result: dict[str, Any]) -> Figure:
    """Median concentration by level of corruption, and each score's correlation with the level."""
    parts: dict[str, Any] = result["corruptions"]
    drawn, left, right = _panels(
        result, f"images corrupted in {counted(len(parts), 'way')}, level 0 is the image itself"
    )
    for (kind, part), colour in zip(parts.items(), itertools.cycle(_KINDS), strict=False):
        x, y = part["levels"], part["median_kappa"]
        left.plot(x, y, "o-", ms=2.5, lw=1.2, color=colour, label=kind)
    left.set(title="median κ / (D − 1)", xlabel="level of corruption")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_ylim(0, (1.1 + 0.08 * math.ceil(len(parts) / 3)) * left.get_ylim()[1])
    left.legend(loc="upper left", ncols=3, columnspacing=1.2)
    trends = [figures_of(part, "spearman") for part in parts.values()]
    names = [name for name in result["scores"] if name in trends[0]]
    mean = {name: float(np.mean([trend[name] for trend in trends])) for name in names}
    rows = np.arange(len(parts))
    chosen = ["kappa", *best_others(mean)]
    # A little apart, so that equal values hide no score.
    shifts = (0.0, -0.14, 0.14, 0.0)
    for name, colour, shift in zip(chosen, _CHOSEN, shifts, strict=False):
        values, label = [trend[name] for trend in trends], score_label(name)
        right.plot(values, rows + shift, "o", **_marker(name, colour), label=label)
    right.axvline(0, color=GRAY, lw=0.8)
    right.set_yticks(rows, list(parts))
    right.set_xlim(-1.05, 1.05)
    right.set_ylim(len(parts) - 0.5, -0.5 - 0.16 * len(parts))  # room for the legend
    right.set_title("rank correlation of score and level")
    right.set_xlabel("Spearman's ρ: 1 if uncertainty rises with every level")
    right.legend(loc="upper left", ncols=4, columnspacing=1.2)
    return _noted(drawn)


def scores(result: dict[str, Any]) -> Figure:
    """AUROC of all scores, a panel for misclassified images and for each set of foreign images."""
    parts = {f"{name} ({part['kind']})": part for name, part in result["ood"].items()}
    if result["misclassification"]:
        parts = {"misclassified": result["misclassification"], **parts}
    panels = {name: figures_of(part, "auroc") for name, part in parts.items()}
    names = list(result["scores"])
    title = "separation of these images from the others by each score (AUROC, 0.5 is chance)"
    height = max(2.4, 1.1 + 0.165 * len(names))
    drawn = figure(f"{shown(result['data'])}: {title}", (8.0, height))
    found = [value for values in panels.values() for value in values.values()]
    low = min([0.5, *filter(math.isfinite, found)])
    grid = drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (target, values) in zip(grid, panels.items(), strict=True):
        axes.axvline(0.5, color=GRAY, lw=0.8, ls=(0, (3, 2)))
        axes.axvline(values["kappa"], color=BLUE, lw=0.8, alpha=0.5)
        _dots(axes, {name: values.get(name, math.nan) for name in names})
        axes.set_xlim(math.floor(10 * low - 0.2) / 10, 1.03)
        axes.set_title(target, fontsize=8.5 if len(panels) < 4 else 7.5)
        axes.xaxis.set_major_locator(MultipleLocator(0.2 if low > 0.25 else 0.25))
    return _noted(drawn)


def _panels(result: dict[str, Any], title: str) -> tuple[Figure, Axes, Axes]:
    drawn = figure(f"{shown(result['data'])}: {title}")
    left, right = drawn.subplots(1, 2, width_ratios=(0.54, 0.46))
    return drawn, left, right


def _marker(name: str, colour: str) -> dict[str, Any]:
    """Style of a score's dots: the concentration larger, image statistics hollow."""
    fill = "white" if name in IMAGE_STATISTICS else colour
    return {"color": colour, "mfc": fill, "ms": 6 if name == "kappa" else 4.5}


def _dots(axes: Axes, values: dict[str, float]) -> None:
    """A row per score, the first on top: the concentration in blue, image statistics orange."""
    for row, (name, value) in enumerate(values.items()):
        colour = BLUE if name == "kappa" else ORANGE if name in IMAGE_STATISTICS else INK
        axes.plot(value, row, "o", **_marker(name, colour))
    axes.set_yticks(range(len(values)), [score_label(name) for name in values])
    for label, name in zip(axes.get_yticklabels(), values, strict=False):
        label.set_color(BLUE if name == "kappa" else INK)
        label.set_fontweight("bold" if name == "kappa" else "normal")
    axes.set_ylim(len(values) - 0.4, -0.6)


def _noted(drawn: Figure) -> Figure:
    note = "* uses the image alone, without a network"
    drawn.supxlabel(note, x=0.99, ha="right", fontsize=7, color="#57606a")
    return drawn
