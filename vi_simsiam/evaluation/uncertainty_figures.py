"""Figures of uncertainty.json: reliability.png, risk_coverage.png, corruptions.png and scores.png.

Every score is higher for what is less certain; "kappa" is minus the concentration. Scores that look at the image alone,
and at no network, are marked: a learned score is worth something where it is above them.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.style import BLUE, GRAY, INK, ORANGE, STYLE, figure, save, shown
from vi_simsiam.text import counted

UNCERTAINTY = "uncertainty.json"
IMAGE_STATISTICS = ("edge_energy", "contrast", "jpeg_size")
"""Scores without a network."""
_KINDS = (
    "#2f6db3",
    "#e07b39",
    "#3f9b6c",
    "#8a5fb0",
    "#c2507f",
    "#7a7f3a",
    "#2a9aa8",
    "#a5673f",
    "#5a6472",
    "#c9a227",
)
_GREENS = ("#3f9b6c", "#8a5fb0")


def draw_uncertainty(run_folder: Path) -> list[Path]:
    """Draw every figure that RUN/uncertainty.json has the data of, and return their paths; none without that file.

    Raises:
        InputError: the file cannot be read, or lacks what its parts need.
    """
    if not (run_folder / UNCERTAINTY).is_file():
        return []
    result = read_uncertainty(run_folder)
    figures: dict[str, tuple[object, Callable[[dict[str, Any]], Figure]]] = {
        "reliability": (result.get("calibration"), reliability),
        "risk_coverage": (result.get("misclassification"), risk_coverage),
        "corruptions": (result.get("corruptions"), corruptions),
        "scores": (result.get("misclassification") or result.get("ood"), scores),
    }
    drawn = []
    with matplotlib.rc_context(STYLE):
        for name, (part, draw) in figures.items():
            if not part:
                continue
            try:
                drawn.append(save(draw(result), run_folder / f"{name}.png"))
            except (
                KeyError,
                TypeError,
                AttributeError,
                ValueError,
                IndexError,
            ) as error:  # a part without rows, say
                raise InputError(
                    f"run: {run_folder / UNCERTAINTY} lacks what {name}.png shows ({error!r}); {_makes(run_folder)} again"
                ) from error
    return drawn


def read_uncertainty(run_folder: Path) -> dict[str, Any]:
    """The content of RUN/uncertainty.json.

    Raises:
        InputError: there is none, or it holds no JSON object.
    """
    path = run_folder / UNCERTAINTY
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"run: {run_folder} has no {UNCERTAINTY}; {_makes(run_folder)}") from None
    except ValueError as error:  # JSON and Unicode errors alike
        raise InputError(
            f"run: {path} cannot be read ({error}); {_makes(run_folder)} again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"run: {path} holds no JSON object; {_makes(run_folder)} again")
    return content


def _makes(run_folder: Path) -> str:
    return f"{shlex.join(['vi-simsiam', 'uncertainty', str(run_folder)])} makes it"


def targets(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """AUROC of every score by what it is to tell apart: misclassified images, and each set of foreign images."""
    found: dict[str, dict[str, float]] = {}
    if result.get("misclassification"):
        found["misclassified"] = figures_of(result["misclassification"], "auroc")
    for name, part in (result.get("ood") or {}).items():
        found[f"{name} ({part['kind']})"] = figures_of(part, "auroc")
    return found


def figures_of(part: dict[str, Any], key: str) -> dict[str, float]:
    """One figure of every score of a part; NaN where it is not defined."""
    return {
        name: math.nan if values[key] is None else values[key]
        for name, values in part["scores"].items()
    }


def best_others(values: dict[str, float], count: int = 2) -> list[str]:
    """The `count` highest scores beside "kappa", and the highest image statistic if it is not among them; best first."""
    order = sorted(
        (name for name in values if name != "kappa" and math.isfinite(values[name])),
        key=lambda name: -values[name],
    )
    chosen = order[:count]
    trivial = next((name for name in order if name in IMAGE_STATISTICS), None)
    return chosen if trivial is None or trivial in chosen else [*chosen, trivial]


def score_label(name: str) -> str:
    """A score as figures and tables name it."""
    return (
        "κ"
        if name == "kappa"
        else name.replace("_", " ") + (" *" if name in IMAGE_STATISTICS else "")
    )


def reliability(result: dict[str, Any]) -> Figure:
    """Observed against expected cosine by bin with the diagonal, and the number of pairs in each bin."""
    part = result["calibration"]
    bins = [each for each in part["bins"] if each["count"]]
    expected, observed, count = (
        np.array([each[key] for each in bins]) for key in ("expected", "observed", "count")
    )
    drawn = figure(
        f"{shown(result['data'])}: {counted(part['pairs'], 'pair')} of views, mean cosine expected {part['expected']:.3f}, "
        f"observed {part['observed']:.3f}, calibration error {part['error']:.3f}"
    )
    left, right = drawn.subplots(1, 2, width_ratios=(0.54, 0.46))
    low, high = min(expected.min(), observed.min()), max(expected.max(), observed.max())
    margin = 0.06 * (high - low) or 0.05
    limits = (low - margin, high + margin)
    left.plot(limits, limits, color=GRAY, lw=1, ls=(0, (3, 2)), label="expected = observed")
    left.plot(expected, observed, "o-", color=BLUE, ms=4, label="bin of pairs")
    left.set(xlim=limits, ylim=limits, aspect="equal")
    left.set_title("cosine of prediction and target")
    left.set_xlabel("expected, κ / (κ + D − 1)")
    left.set_ylabel("observed")
    left.legend(loc="upper left")
    right.bar(range(1, len(bins) + 1), count, color=BLUE, width=0.7)
    right.set_title("pairs in each bin")
    right.set_xlabel("bin, least certain first")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.grid(axis="x", visible=False)
    return drawn


def risk_coverage(result: dict[str, Any]) -> Figure:
    """Errors among the images kept, least uncertain first, and the area below that curve for every score."""
    part = result["misclassification"]
    area = figures_of(part, "aurc")
    drawn = figure(
        f"{shown(result['data'])}: {counted(result['images'], 'image')}, {part['classifier']} classifier, "
        f"accuracy {100 * part['accuracy']:.1f} %"
    )
    left, right = drawn.subplots(1, 2, width_ratios=(0.54, 0.46))
    others = [
        name
        for name in best_others({name: -value for name, value in area.items()})
        if name in part["risk_coverage"]
    ]
    coverage, risk = np.linspace(0.01, 1, 100), 1 - part["accuracy"]
    for name, colour in zip(["kappa", *others], (BLUE, *_GREENS, ORANGE), strict=False):
        if name in part["risk_coverage"]:
            dashes: Any = (0, (3, 1.5)) if name in IMAGE_STATISTICS else "solid"
            width, order = (2.0, 4) if name == "kappa" else (1.1, 3)
            curve = part["risk_coverage"][name]
            left.plot(curve["coverage"], curve["risk"], color=colour, lw=width, ls=dashes, zorder=order,
                      label=score_label(name))  # fmt: skip
    # Whoever knows the errors drops them first: none is left until the coverage exceeds the accuracy.
    left.plot(
        coverage,
        np.maximum(0, 1 - part["accuracy"] / coverage),
        color=INK,
        lw=1,
        ls=(0, (3, 2)),
        label="oracle",
    )
    left.axhline(risk, color=GRAY, lw=1, ls=(0, (1, 2)), label="random")
    left.set(
        xlim=(0, 1),
        title="risk by coverage",
        xlabel="coverage: share of images kept",
        ylabel="share of errors",
    )
    left.set_ylim(0, max(0.01, 1.3 * left.get_ylim()[1]))  # room for the legend
    left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    left.legend(loc="upper left", ncols=3)
    _dots(
        right,
        {
            name: area[name]
            for name in sorted(area, key=lambda name: (math.isnan(area[name]), area[name]))
        },
    )
    for name, style in (("oracle", (0, (3, 2))), ("random", (0, (1, 2)))):
        right.axvline(
            part[name]["aurc"], color=INK if name == "oracle" else GRAY, lw=1, ls=style, label=name
        )
    right.set_title("area below (AURC), lower is better")
    right.legend(loc="best")
    return _noted(drawn)


def corruptions(result: dict[str, Any]) -> Figure:
    """Median concentration by level of corruption, and how well each score follows the level."""
    parts: dict[str, Any] = result["corruptions"]
    drawn = figure(
        f"{shown(result['data'])}: images corrupted in {counted(len(parts), 'way')}, level 0 is the image itself"
    )
    left, right = drawn.subplots(1, 2, width_ratios=(0.54, 0.46))
    medians = {kind: part for kind, part in parts.items() if part["median_kappa"] is not None}
    for (kind, part), colour in zip(medians.items(), itertools.cycle(_KINDS), strict=False):
        label = kind.replace("_", " ")
        left.plot(
            part["levels"], part["median_kappa"], "o-", ms=2.5, lw=1.2, color=colour, label=label
        )
    left.set(title="median κ / (D − 1)", xlabel="level of corruption")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    if medians:
        left.set_ylim(
            0, (1.1 + 0.08 * -(-len(medians) // 3)) * left.get_ylim()[1]
        )  # room for the legend
        left.legend(loc="upper left", ncols=3, columnspacing=1.2)
    trends = [figures_of(part, "spearman") for part in parts.values()]
    names = [name for name in result["scores"] if all(name in trend for trend in trends)]
    mean = {name: float(np.mean([trend[name] for trend in trends])) for name in names}
    rows = np.arange(len(parts))
    others = best_others(mean)
    chosen = ["kappa"] * ("kappa" in mean) + others
    # A little apart, so that equal values hide no score.
    for name, colour, shift in zip(
        chosen, (BLUE, *_GREENS, ORANGE), (0.0, -0.14, 0.14, 0.0), strict=False
    ):
        fill, size = "white" if name in IMAGE_STATISTICS else colour, 6 if name == "kappa" else 4.5
        values = [trend[name] for trend in trends]
        right.plot(
            values, rows + shift, "o", color=colour, mfc=fill, ms=size, label=score_label(name)
        )
    right.axvline(0, color=GRAY, lw=0.8)
    right.set_yticks(rows, [kind.replace("_", " ") for kind in parts])
    right.set_xlim(-1.05, 1.05)
    right.set_ylim(len(parts) - 0.5, -0.5 - 0.16 * len(parts))  # room for the legend
    right.set_title("rank correlation of score and level")
    right.set_xlabel("Spearman's ρ: 1 if uncertainty rises with every level")
    right.legend(loc="upper left", ncols=4, columnspacing=1.2)
    return _noted(drawn)


def scores(result: dict[str, Any]) -> Figure:
    """AUROC of all scores, a panel for misclassified images and for each set of foreign images."""
    panels = targets(result)
    names = [name for name in result["scores"] if any(name in values for values in panels.values())]
    drawn = figure(
        f"{shown(result['data'])}: how well each score tells these images from the others (AUROC, 0.5 is chance)",
        (8.0, max(2.4, 1.1 + 0.165 * len(names))),
    )
    low = min(
        [
            0.5,
            *(
                value
                for values in panels.values()
                for value in values.values()
                if math.isfinite(value)
            ),
        ]
    )
    for axes, (target, values) in zip(
        drawn.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        axes.axvline(0.5, color=GRAY, lw=0.8, ls=(0, (3, 2)))
        if "kappa" in values:
            axes.axvline(values["kappa"], color=BLUE, lw=0.8, alpha=0.5)
        _dots(axes, {name: values.get(name, math.nan) for name in names})
        axes.set_xlim(math.floor(10 * low - 0.2) / 10, 1.03)
        axes.set_title(target, fontsize=8.5 if len(panels) < 4 else 7.5)
        axes.xaxis.set_major_locator(MultipleLocator(0.2 if low > 0.25 else 0.25))
    return _noted(drawn)


def _dots(axes: Axes, values: dict[str, float]) -> None:
    """A row a score, the first on top: the concentration in blue, image statistics hollow."""
    for row, (name, value) in enumerate(values.items()):
        colour = BLUE if name == "kappa" else ORANGE if name in IMAGE_STATISTICS else INK
        axes.plot(value, row, "o", color=colour, ms=6 if name == "kappa" else 4.5,
                  mfc="white" if name in IMAGE_STATISTICS else colour)  # fmt: skip
    axes.set_yticks(range(len(values)), [score_label(name) for name in values])
    for label, name in zip(axes.get_yticklabels(), values, strict=False):
        label.set_color(BLUE if name == "kappa" else INK)
        label.set_fontweight("bold" if name == "kappa" else "normal")
    axes.set_ylim(len(values) - 0.4, -0.6)


def _noted(drawn: Figure) -> Figure:
    drawn.supxlabel(
        "* looks at the image alone, at no network", x=0.99, ha="right", fontsize=7, color="#57606a"
    )
    return drawn
