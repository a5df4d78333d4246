"""Figures of a run: curves.png, what training did, and kappa.png, what the model is certain of.

Both are 1600 x 680 pixels, meant to be shown at half that size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vi_simsiam.data.loader import eval_loader
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.engine.run import METRICS, Run, read_config
from vi_simsiam.engine.verdict import COLLAPSE_THRESHOLD
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.style import (
    BLUE,
    GRAY,
    ORANGE,
    STYLE,
    figure,
    number,
    save,
    shown,
)
from vi_simsiam.models import VISimSiam
from vi_simsiam.text import METHODS, brief_repr, counted

_THUMBNAIL = 112
_WORDS = {"state", "captured", "not_captured"}
"""Fields of metrics.jsonl that are no figures."""


def draw_curves(run_folder: Path) -> Path:
    """Draw metrics.jsonl of a run as RUN/curves.png and return its path.

    Raises:
        InputError: there is no run, no metrics yet, or a line of metrics that cannot be read.
    """
    config = read_config(run_folder)
    metrics = read_metrics(run_folder / METRICS)
    epoch = metrics["epoch"]
    has_kappa = "kappa" in metrics
    with matplotlib.rc_context(STYLE):
        drawn = figure(f"{METHODS[config.method]} on {shown(config.data)}, {config.model.backbone}")
        loss, cosine, third, spread, rank, gradient = drawn.subplots(2, 3, sharex=True).flat
        _curve(
            loss,
            "loss (0 = no better than chance)" if has_kappa else "loss",
            epoch,
            metrics["loss"],
        )
        _curve(cosine, "cosine of prediction and target", epoch, metrics["cosine"])
        if has_kappa:
            _curve(third, "concentration κ / (D − 1)", epoch, metrics["kappa"], label="predicted")
            if "kappa_best" in metrics:
                best = moving_average(metrics["kappa_best"])
                third.plot(
                    epoch, best, color=ORANGE, lw=1.1, ls=(0, (3, 2)), label="best for the cosines"
                )
            third.set_ylim(top=1.3 * third.get_ylim()[1])  # room for the legend
            third.legend(loc="upper left", ncols=2)
            _learning_rate(gradient.twinx(), epoch, metrics["lr"])
        else:
            _curve(third, "learning rate", epoch, metrics["lr"])
        _curve(spread, "spread (z-std · √D, 1 = even)", epoch, metrics["z_std"])
        spread.axhline(1, color=GRAY, lw=0.8, ls=(0, (1, 2)))
        spread.axhspan(0, COLLAPSE_THRESHOLD, color="#fbe3d6", lw=0, zorder=0)
        spread.text(0.98, COLLAPSE_THRESHOLD / 2, "collapse", ha="right", va="center", color="#b3592a", fontsize=7,
                    transform=spread.get_yaxis_transform())  # fmt: skip
        spread.set_ylim(0, max(1.1, 1.05 * float(np.nanmax(metrics["z_std"]))))
        _curve(rank, "effective rank of a batch", epoch, metrics["effective_rank"])
        _curve(gradient, "gradient norm", epoch, metrics["grad_norm"])
        for panel in (rank, gradient):
            panel.set_ylim(bottom=0)
        for panel in (spread, rank, gradient):
            panel.set_xlabel("epoch")
            panel.set_xlim(0, epoch[-1])
        return save(drawn, run_folder / "curves.png")


def logged(run_folder: Path) -> bool:
    """Whether a run has a metrics.jsonl to draw: a copy of its weights and configuration alone has none."""
    path = run_folder / METRICS
    return path.is_file() and path.stat().st_size > 0


def read_metrics(path: Path) -> dict[str, NDArray[np.float64]]:
    """Columns of a metrics.jsonl but for its words, float64 over its lines; NaN where a line lacks a value.

    Raises:
        InputError: there is no such file, it is empty, or a line is not a JSON object of numbers and those words.
    """
    if not path.is_file():
        raise InputError(f"run: {path.parent} has no {path.name}")
    lines: list[dict[str, float]] = []
    for row, text in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            lines.append(
                {
                    name: float(value)
                    for name, value in json.loads(text).items()
                    if name not in _WORDS
                }
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"run: {path} line {row} cannot be read ({error})") from error
    if not lines:
        raise InputError(f"run: {path} is empty; nothing was logged yet")
    return {
        name: np.array([line.get(name, np.nan) for line in lines])
        for line in lines
        for name in line
    }


def moving_average(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean over a fiftieth of the values, over fewer at both ends; unchanged below 100 values."""
    window = np.ones(2 * (len(values) // 100) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


@dataclass(frozen=True)
class Certainty:
    """How concentrated a run's predictions are on the un-augmented images of one of its splits."""

    kind: str
    """Which split: "validation", or "training" where there are no validation images."""
    source: ImageSource
    values: NDArray[np.float64]
    """kappa / (D - 1) of every image, (N,)."""

    __repr__ = brief_repr


def certainty(run: Run) -> Certainty | None:
    """The concentrations of a run's validation images, or of its training images if it has none; None for SimSiam.

    Raises:
        InputError: an image cannot be read, or the weights are damaged.
    """
    if not isinstance(run.model, VISimSiam):
        return None
    train, val = run.splits.train, run.splits.val
    kind, chosen = ("training", train) if val is None or len(val) == 0 else ("validation", val)
    source, _ = run.readable(chosen)
    return Certainty(kind, source, concentrations(run, source))


def draw_kappa(run: Run, found: Certainty | None = None) -> Path | None:
    """Draw how concentrated a run's predictions are as RUN/kappa.png: a histogram, and the images at its two ends.

    Figure 4 of Nakamura et al. (arXiv 2203.11437) is such a histogram. Un-augmented validation images are used, or
    training images if there are none. Returns the path, or None for SimSiam, which predicts no concentration.

    Args:
        run: the run.
        found: what `certainty` returned, where it is known already; None to compute it.

    Raises:
        InputError: an image cannot be read, or the weights are damaged.
    """
    found = found or certainty(run)
    if found is None:
        return None
    source, values = found.source, found.values
    lowest, highest = extremes(values)
    with matplotlib.rc_context(STYLE):
        drawn = figure(
            f"VI-SimSiam on {shown(run.config.data)}: {counted(len(values), f'{found.kind} image')}, un-augmented"
        )
        grid = drawn.add_gridspec(2, 2, width_ratios=(0.56, 0.44))
        _histogram(drawn.add_subfigure(grid[:, 0]).subplots(), values)
        _thumbnails(
            drawn.add_subfigure(grid[0, 1]), "least certain (lowest κ)", source, lowest, values
        )
        _thumbnails(
            drawn.add_subfigure(grid[1, 1]), "most certain (highest κ)", source, highest, values
        )
        return save(drawn, run.path / "kappa.png", colours=256)


@torch.no_grad()
def concentrations(run: Run, source: ImageSource) -> NDArray[np.float64]:
    """kappa / (D - 1) that a run's VI-SimSiam predicts for the un-augmented images of `source`, (N,) float64, in order.

    Raises:
        InputError: an image cannot be read, there is none, or a concentration is not finite.
    """
    model = run.model
    if not isinstance(model, VISimSiam):
        raise InputError("run: SimSiam predicts no concentration; vi-simsiam does")
    parts = [
        model.concentration(model.predictor(model.projector(model.backbone(images.to(run.device)))))
        .double()
        .cpu()
        for images, _ in eval_loader(source, run.config.augment.size, 256, run.workers)
    ]
    if not parts:
        raise InputError(f"source: {source.name} holds no images")
    values: NDArray[np.float64] = torch.cat(parts).numpy() / (model.dim - 1)
    if not np.isfinite(values).all():
        raise InputError(
            f"run: {run.path} predicts concentrations that are not finite; its weights are damaged"
        )
    return values


def extremes(
    values: NDArray[np.float64], count: int = 8
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the `count` lowest values, ascending, and of the `count` highest, descending; none is in both."""
    order = np.argsort(values, kind="stable")
    low = min(count, -(-len(values) // 2))
    high = min(count, len(values) - low)
    return order[:low], order[::-1][:high]


def _curve(
    axes: Axes,
    title: str,
    epoch: NDArray[np.float64],
    values: NDArray[np.float64],
    label: str | None = None,
) -> None:
    axes.set_title(title)
    axes.plot(epoch, values, color=BLUE, lw=0.8, alpha=0.3)
    alone = len(epoch) < 3  # points that no line would show; they may stand on the edge
    marker = "o" if alone else None
    axes.plot(
        epoch,
        moving_average(values),
        color=BLUE,
        label=label,
        marker=marker,
        ms=3,
        clip_on=not alone,
    )


def _learning_rate(axes: Axes, epoch: NDArray[np.float64], rate: NDArray[np.float64]) -> None:
    axes.plot(epoch, rate, color=GRAY, lw=1, ls=(0, (3, 2)))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate (dashed)", color=GRAY, fontsize=7)
    axes.tick_params(colors=GRAY)
    axes.grid(False)


def _histogram(axes: Axes, values: NDArray[np.float64]) -> None:
    low, high = float(values.min()), float(values.max())
    margin = 0.02 * (high - low) or 0.05 * abs(low) or 0.5
    axes.hist(
        values,
        bins=min(50, max(8, len(values) // 20)),
        range=(max(0, low - margin), high + margin),
        color=BLUE,
    )
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
    values: NDArray[np.float64],
) -> None:
    figure.suptitle(title, x=0.02, ha="left", fontsize=8.5, fontweight="bold")
    cells = figure.subplots(2, 4).flat
    for cell in cells:
        cell.axis("off")
    for cell, index in zip(figure.axes, indices.tolist(), strict=False):
        image = source.image(index)
        method = (
            Image.Resampling.NEAREST if min(image.size) < _THUMBNAIL else Image.Resampling.LANCZOS
        )
        cell.imshow(ImageOps.fit(image, (_THUMBNAIL, _THUMBNAIL), method))
        text = number(float(values[index]), float(np.ptp(values)))
        cell.set_title(text, loc="center", fontsize=7, fontweight="normal", pad=2)
