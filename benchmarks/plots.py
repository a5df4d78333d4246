"""Plots of a result file of the loss, drawn from the file alone: speed-up over the batch, and achieved bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vi_simsiam.text import counted

from .providers import COMPILED, FUSED
from .targets import speed_up, time_of

_COLOURS = {
    "textbook": "#b9bec5",
    "eager": "#8a8f98",
    "torch.compile": "#e07b39",
    "torch.compile max-autotune": "#b3592a",
    "triton": "#2f6db3",
    "cuda": "#5aa469",
    "cpu": "#2f6db3",
}
_BY_DIM = ("#9cc4ea", "#5b9bd5", "#2f6db3", "#173a63")
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff2",
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.4,
}


def plot_paths(folder: Path) -> tuple[Path, Path]:
    """Where `draw` writes."""
    return folder / "multiview_loss_speedup.png", folder / "multiview_loss_bandwidth.png"


def draw(result: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Draw both plots of a result file into `folder` and return their paths."""
    paths = plot_paths(folder)
    with matplotlib.rc_context(STYLE):
        save(_speed_up(result), paths[0])
        save(_bandwidth(result), paths[1])
    return paths


def _speed_up(result: dict[str, Any]) -> Figure:
    """The fastest fused backend against the fastest torch.compile, over the batch, a line for each D."""
    cases = [case for case in result["cases"] if case["distribution"] == "power_spherical"]
    kinds = sorted({(case["views"], case["targets"], case["dtype"]) for case in cases}) or [
        (2, 2, "float32")
    ]
    figure = Figure(figsize=(0.6 + 2.4 * max(len(kinds), 2), 3.0), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    dims = sorted({case["dim"] for case in cases})
    for panel, (views, targets, dtype) in zip(panels, kinds, strict=True):
        for dim, colour in zip(dims, _shades(len(dims)), strict=True):
            points = sorted(
                (case["batch"], faster.value)
                for case in cases
                if (case["views"], case["targets"], case["dtype"], case["dim"])
                == (views, targets, dtype, dim)
                and (faster := speed_up(case, COMPILED)) is not None
            )
            if points:
                x, y = zip(*points, strict=True)
                panel.plot(x, y, marker="o", ms=3, color=colour, label=f"D = {dim:,}")
        panel.axhline(1, color="#24292f", lw=0.8, ls=(0, (3, 2)))
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="batch",
            title=f"{counted(views, 'view')}, {counted(targets, 'target')}, {dtype}",
        )
        batches = sorted({case["batch"] for case in cases})
        panel.set_xticks(batches, [f"{batch:,}" for batch in batches])
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(
            lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else ""
        )
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="best")
    panels[0].set_ylabel("times faster than the best torch.compile")
    figure.suptitle(f"Loss and gradient, {place(result)}", x=0.01, ha="left", fontsize=9)
    return figure


def _bandwidth(result: dict[str, Any]) -> Figure:
    """Bytes that cannot be avoided over the time, against these bytes: the copy of the same bytes is the roof."""
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    names = list(dict.fromkeys(name for case in result["cases"] for name in case["providers"]))
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for panel, mode, title in zip(
        panels, ("forward", "forward_backward"), ("loss", "loss and gradient"), strict=True
    ):
        roof = [
            (case["least_bytes"][mode], _rate(case, mode, times))
            for case in result["cases"]
            if (times := case["copy"][mode]) is not None
        ]
        if roof:
            x, y = zip(*roof, strict=True)
            panel.scatter(x, y, marker="_", s=70, color="#24292f", label="copy of the same bytes")
        for name in names:
            points = [
                (case["least_bytes"][mode], _rate(case, mode, times))
                for case in result["cases"]
                if (times := time_of(case, name, mode)) is not None
            ]
            if points:
                fused = name in FUSED
                x, y = zip(*points, strict=True)
                colour = _COLOURS.get(name, "#000000")
                panel.scatter(
                    x,
                    y,
                    s=16 if fused else 10,
                    color=colour,
                    label=name,
                    zorder=3 if fused else 2,
                    lw=0,
                )
        panel.set(xscale="log", yscale="log", xlabel="bytes that must move", title=title)
    panels[0].set_ylabel("these bytes / time (GB/s)")
    shown = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if shown:
        figure.legend(list(shown.values()), list(shown), loc="outside right upper")
    figure.suptitle(f"Achieved bandwidth, {place(result)}", x=0.01, ha="left", fontsize=9)
    return figure


def _rate(case: dict[str, Any], mode: str, times: dict[str, float]) -> float:
    return float(case["least_bytes"][mode]) / times["median_us"] / 1e3


def place(result: dict[str, Any]) -> str:
    """On what, with what and when a result was measured, for a title."""
    device = (
        result["processor"] if result["device_type"] == "cpu" else result["device"].split(" (")[0]
    )
    return f"{device}, PyTorch {result['versions']['torch']}, {result['date'][:10]}"


def _shades(count: int) -> list[Any]:
    if count <= len(_BY_DIM):
        return list(_BY_DIM[len(_BY_DIM) - count :])
    return list(matplotlib.colormaps["viridis"]([i / count for i in range(count)]))


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
