"""density.png: the loss over the concentration, as in figure 3 of arXiv 2203.11437."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from vi_simsiam.engine.run import read_config
from vi_simsiam.evaluation.style import GRAY, INK, STYLE, figure, save
from vi_simsiam.functional import power_spherical_log_prob

CONCENTRATIONS = (0.0, 0.25, 1.0, 4.0, 16.0)
"""kappa/(D - 1) of the curves over the cosine: mean cosines of 0, 0.2, 0.5, 0.8 and 0.94."""
COSINES = (0.2, 0.5, 0.8, 0.9)
"""Cosines of the curves over the concentration."""
_SHADES = ("#a9c8ec", "#6ea3dc", "#2f6db3", "#174a86", "#0b2a52")


def draw_density(run_folder: Path) -> Path | None:
    """Draw minus the Power Spherical log-density of a run's D as RUN/density.png.

    Left over the cosine for several concentrations, right over the concentration for several
    cosines with the minimum marked. It is the true density, in nats, as the paper shows it;
    training's loss is relative to the uniform density, which is kappa = 0 here. Returns the path,
    or None for SimSiam, whose loss is no density.

    Raises:
        InputError: there is no run.
    """
    config = read_config(run_folder)
    if config.method == "simsiam":
        return None
    dim = config.model.dim
    with matplotlib.rc_context(STYLE):
        space = f"the sphere in D = {dim:,} dimensions"
        drawn = figure(f"−log PS(z; μ, κ) in nats, the true density on {space}")
        left, right = drawn.subplots(1, 2, sharey=True, width_ratios=(0.54, 0.46))
        _over_cosine(left, dim)
        _over_concentration(right, dim)
        return save(drawn, run_folder / "density.png")


def surprise(
    concentration: NDArray[np.float64], cosine: NDArray[np.float64], dim: int
) -> NDArray[np.float64]:
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
    result: NDArray[np.float64] = -power_spherical_log_prob(point, loc, torch.tensor(kappa)).numpy()
    return result


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
