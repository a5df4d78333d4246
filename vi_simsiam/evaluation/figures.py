"""Figures of a run: curves.png, the course of training; kappa.png, the model's certainty; and
density.png, the loss over the concentration.

All are 1600 x 680 pixels, meant to be shown at half that size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from vi_simsiam.data.sources import ImageSource
from vi_simsiam.engine.forward import extract
from vi_simsiam.engine.log import read_log
from vi_simsiam.engine.run import Run, read_config
from vi_simsiam.engine.verdict import COLLAPSE_THRESHOLD
from vi_simsiam.evaluation.style import (
    BLUE,
    GRAY,
    INK,
    ORANGE,
    STYLE,
    figure,
    number,
    save,
    shown,
)
from vi_simsiam.functional import power_spherical_log_prob
from vi_simsiam.inference.ranking import extremes
from vi_simsiam.models import VISimSiam
from vi_simsiam.text import METHODS, brief_repr, counted

_Values = NDArray[np.float64]
_THUMBNAIL = 112
_CURVES = ("epoch", "loss", "cosine", "lr", "z_std", "effective_rank", "grad_norm")
"""Figures of a log that curves.png shows, of an older version's where it has them."""
_LEAST_EPOCH = 1e-6

CONCENTRATIONS = (0.0, 0.25, 1.0, 4.0, 16.0)
"""kappa/(D - 1) of the curves over the cosine: mean cosines of 0, 0.2, 0.5, 0.8 and 0.94."""
COSINES = (0.2, 0.5, 0.8, 0.9)
"""Cosines of the curves over the concentration."""
_SHADES = ("#a9c8ec", "#6ea3dc", "#2f6db3", "#174a86", "#0b2a52")


def draw_curves(run_folder: Path) -> list[Path]:
    """Draw metrics.jsonl of a run as RUN/curves.png; nothing where nothing was logged.

    Returns:
        The paths of the figures, as every function that draws.

    Raises:
        InputError: there is no run, or its log cannot be read.
    """
    config = read_config(run_folder)
    columns = read_metrics(run_folder)
    if not columns:
        return []
    missing = np.full(len(columns["step"]), np.nan)
    metrics = {**dict.fromkeys(_CURVES, missing), **columns}
    epoch = metrics["epoch"]
    has_kappa = "kappa" in columns
    with matplotlib.rc_context(STYLE):
        drawn = figure(f"{METHODS[config.method]} on {shown(config.data)}, {config.model.backbone}")
        loss, cosine, third, spread, rank, gradient = drawn.subplots(2, 3, sharex=True).flat
        title = "loss (0 = no better than chance)" if has_kappa else "loss"
        _curve(loss, title, epoch, metrics["loss"])
        title = "cosine of prediction and target"
        _curve(cosine, title, epoch, metrics["cosine"], label="cosine")
        if "knn" in metrics:
            measured = np.isfinite(metrics["knn"])
            points = epoch[measured], metrics["knn"][measured]
            cosine.plot(*points, color=ORANGE, lw=1.1, marker="o", ms=2.5, label="kNN accuracy")
            cosine.legend(loc="best", ncols=2)
        if has_kappa:
            _curve(third, "concentration κ / (D − 1)", epoch, metrics["kappa"], label="predicted")
            if "kappa_best" in columns:
                best = moving_average(metrics["kappa_best"])
                label = "best for the cosines"
                third.plot(epoch, best, color=ORANGE, lw=1.1, ls=(0, (3, 2)), label=label)
            third.set_ylim(top=1.3 * third.get_ylim()[1])  # room for the legend
            third.legend(loc="upper left", ncols=2)
            rate = gradient.twinx()
            rate.plot(epoch, metrics["lr"], color=GRAY, lw=1, ls=(0, (3, 2)))
            rate.set_ylim(bottom=0)
            rate.set_ylabel("learning rate (dashed)", color=GRAY, fontsize=7)
            rate.tick_params(colors=GRAY)
            rate.grid(False)
        else:
            _curve(third, "learning rate", epoch, metrics["lr"])
        _curve(spread, "spread (z-std · √D, 1 = even)", epoch, metrics["z_std"])
        spread.axhline(1, color=GRAY, lw=0.8, ls=(0, (1, 2)))
        spread.axhspan(0, COLLAPSE_THRESHOLD, color="#fbe3d6", lw=0, zorder=0)
        style: dict[str, Any] = {"ha": "right", "va": "center", "color": "#b3592a", "fontsize": 7}
        place = (0.98, COLLAPSE_THRESHOLD / 2)
        spread.text(*place, "collapse", transform=spread.get_yaxis_transform(), **style)
        spread.set_ylim(0, 1.05 * float(np.nanmax([*metrics["z_std"], 1.05])))
        _curve(rank, "effective rank of a batch", epoch, metrics["effective_rank"])
        _curve(gradient, "gradient norm", epoch, metrics["grad_norm"])
        for panel in (rank, gradient):
            panel.set_ylim(bottom=0)
        for panel in (spread, rank, gradient):
            panel.set_xlabel("epoch")
            panel.set_xlim(0, float(np.nanmax([*epoch, _LEAST_EPOCH])))
        return [save(drawn, run_folder / "curves.png")]


def read_metrics(run_folder: Path) -> dict[str, _Values]:
    """The figures of a run's log as columns, float64 over its lines; none where nothing was logged.

    NaN stands where a line lacks a value, or has one that is not finite.

    Raises:
        InputError: the log cannot be read.
    """
    lines, _ = read_log(run_folder)
    figures = [
        {name: x for name, x in line.items() if type(x) in (int, float) and math.isfinite(x)}
        for line in lines
    ]
    names = dict.fromkeys(name for line in figures for name in line)
    return {name: np.array([line.get(name, np.nan) for line in figures]) for name in names}


def moving_average(values: _Values) -> _Values:
    """Centred mean over a fiftieth of the values, fewer at both ends; the values if below 100."""
    window = np.ones(2 * (len(values) // 100) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


@dataclass(frozen=True)
class Certainty:
    """Concentrations of a run's predictions on the un-augmented images of one of its splits."""

    kind: str
    """The split: "validation", or "training" where there are no validation images."""
    source: ImageSource
    values: _Values
    """kappa / (D - 1) of every image, (N,)."""

    __repr__ = brief_repr


def certainty(run: Run) -> Certainty | None:
    """Concentrations of a run's validation images, or of its training images if it has none.

    Returns None for SimSiam.

    Raises:
        InputError: an image cannot be read, or the weights are damaged.
    """
    model = run.model
    if not isinstance(model, VISimSiam):
        return None
    train, val = run.splits.train, run.splits.val
    kind, chosen = ("training", train) if val is None or len(val) == 0 else ("validation", val)
    source, _ = run.readable(chosen)

    def kappa(images: Tensor) -> Tensor:
        concentration = model.encode(images)[-1]
        assert concentration is not None
        return concentration

    size, device, workers = run.config.augment.size, run.device, run.workers
    found = extract(
        model,
        source,
        size=size,
        device=device,
        workers=workers,
        output=kappa,
        constants=run.config.augment.constants,
    )
    return Certainty(kind, source, found.double().numpy() / (model.dim - 1))


def draw_kappa(run: Run, found: Certainty | None = None) -> list[Path]:
    """Draw the concentrations as RUN/kappa.png: a histogram, and the images at its two ends.

    Figure 4 of Nakamura et al. (arXiv 2203.11437) is such a histogram. Un-augmented validation
    images are used, or training images if there are none. Nothing is drawn for SimSiam, which
    predicts no concentration.

    Args:
        run: the run.
        found: the result of `certainty`; None to compute it.

    Raises:
        InputError: an image cannot be read, or the weights are damaged.
    """
    found = found or certainty(run)
    if found is None:
        return []
    source, values = found.source, found.values
    images = counted(len(values), f"{found.kind} image")
    titles = ("least certain (lowest κ)", "most certain (highest κ)")
    with matplotlib.rc_context(STYLE):
        drawn = figure(f"VI-SimSiam on {shown(run.config.data)}: {images}, un-augmented")
        grid = drawn.add_gridspec(2, 2, width_ratios=(0.56, 0.44))
        _histogram(drawn.add_subfigure(grid[:, 0]).subplots(), values)
        for row, (title, indices) in enumerate(zip(titles, extremes(values, 8), strict=True)):
            _thumbnails(drawn.add_subfigure(grid[row, 1]), title, source, indices, values)
        return [save(drawn, run.path / "kappa.png", colours=256)]


def draw_density(run_folder: Path) -> list[Path]:
    """Draw minus the Power Spherical log-density of a run's D as RUN/density.png.

    Left over the cosine for several concentrations, right over the concentration for several
    cosines with the minimum marked. It is the true density, in nats, as the paper shows it;
    training's loss is relative to the uniform density, which is kappa = 0 here. Nothing is drawn
    for SimSiam, whose loss is no density.

    Raises:
        InputError: there is no run.
    """
    config = read_config(run_folder)
    if config.method == "simsiam":
        return []
    dim = config.model.dim
    with matplotlib.rc_context(STYLE):
        space = f"the sphere in D = {dim:,} dimensions"
        drawn = figure(f"−log PS(z; μ, κ) in nats, the true density on {space}")
        left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(0.54, 0.46))
        _over_cosine(left, dim)
        _over_concentration(right, dim)
        return [save(drawn, run_folder / "density.png")]


def surprise(concentration: _Values, cosine: _Values, dim: int) -> _Values:
    """-log PS(z; mu, kappa) in nats where mu.z is `cosine`, (N,) float64.

    Args:
        concentration: kappa / (D - 1), at least 0, (N,) or (1,).
        cosine: between -1 and 1, (N,) or (1,).
        dim: D, at least 2.
    """
    kappa, angle = np.broadcast_arrays(concentration * (dim - 1), cosine)
    loc = torch.zeros(len(angle), dim, dtype=torch.float64)
    loc[:, 0] = 1
    point = torch.zeros_like(loc)
    point[:, 0] = torch.tensor(angle)
    point[:, 1] = torch.tensor(np.sqrt(1 - angle**2))
    result: _Values = -power_spherical_log_prob(point, loc, torch.tensor(kappa)).numpy()
    return result


def _curve(
    axes: Axes, title: str, epoch: _Values, values: _Values, label: str | None = None
) -> None:
    axes.set_title(title)
    axes.plot(epoch, values, color=BLUE, lw=0.8, alpha=0.3)
    mean, alone = moving_average(values), len(epoch) < 3
    # A line would not show so few points; they may lie on the edge.
    marker = "o" if alone else None
    axes.plot(epoch, mean, color=BLUE, label=label, marker=marker, ms=3, clip_on=not alone)


def _histogram(axes: Axes, values: _Values) -> None:
    low, high = float(values.min()), float(values.max())
    margin = 0.02 * (high - low) or 0.05 * abs(low) or 0.5
    bins = min(50, max(8, len(values) // 20))
    axes.hist(values, bins, range=(max(0, low - margin), high + margin), color=BLUE)
    median = float(np.median(values))
    axes.axvline(median, color=ORANGE, lw=1.2, label=f"median {number(median, high - low)}")
    axes.legend(loc="best")
    axes.set_title("certainty")
    axes.set_xlabel("predicted concentration κ / (D − 1)")
    axes.set_ylabel("images")
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _thumbnails(
    figure: SubFigure,
    title: str,
    source: ImageSource,
    indices: NDArray[np.int64],
    values: _Values,
) -> None:
    figure.suptitle(title, x=0.02, ha="left", fontsize=8.5, fontweight="bold")
    cells = figure.subplots(2, 4).flat
    for cell in cells:
        cell.axis("off")
    for cell, index in zip(figure.axes, indices.tolist(), strict=False):
        image = source.image(index)
        small = min(image.size) < _THUMBNAIL
        method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
        cell.imshow(ImageOps.fit(image, (_THUMBNAIL, _THUMBNAIL), method))
        text = number(float(values[index]), float(np.ptp(values)))
        cell.set_title(text, loc="center", fontsize=7, fontweight="normal", pad=2)


def _over_cosine(axes: Axes, dim: int) -> None:
    cosine = np.linspace(-1, 1, 401)
    curves = {value: surprise(np.array([value]), cosine, dim) for value in CONCENTRATIONS}
    for (value, curve), shade in zip(curves.items(), _SHADES, strict=True):
        dashes = (0, (3, 2)) if value == 0 else "solid"
        label = "0 (uniform)" if value == 0 else f"{value:g}"
        axes.plot(cosine, curve, color=GRAY if value == 0 else shade, ls=dashes, label=label)
    level, lowest = curves[0.0][0], min(float(curve.min()) for curve in curves.values())
    axes.set_ylim(lowest - 0.05 * (level - lowest), level + 0.8 * (level - lowest))
    axes.set_xlim(-1, 1)
    axes.set_title("over the cosine")
    axes.set_xlabel("cosine μ·z")
    axes.set_ylabel("−log PS (nats)")
    axes.legend(title="κ / (D − 1)", loc="lower left", title_fontsize=7)


def _over_concentration(axes: Axes, dim: int) -> None:
    concentration = np.geomspace(0.01, 100, 401)
    for value, shade in zip(COSINES, _SHADES[1:], strict=True):
        curve = surprise(concentration, np.array([value]), dim)
        best = int(curve.argmin())
        axes.plot(concentration, curve, color=shade, label=f"{value:g}")
        axes.plot(concentration[best], curve[best], "o", color=shade, ms=3.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(concentration[0], concentration[-1])
    axes.set_title("over the concentration, minimum marked")
    axes.set_xlabel("κ / (D − 1)")
    axes.legend(title="cosine", loc="upper left", title_fontsize=7, labelcolor=INK)
