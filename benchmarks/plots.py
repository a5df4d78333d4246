"""Plots of result files, drawn from the files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vi_simsiam.text import counted

from .cases import BOTH, MODES
from .results import (
    COMPILED,
    FUSED,
    NETWORK,
    NETWORK_COMPILED,
    NETWORK_KERNELS,
    OURS,
    speed_up,
    times_of,
)

_OURS, _OTHERS, _DARK = "#2f6db3", "#8a8f98", "#24292f"
_PHASES = {
    "forward": "#173a63",
    "loss": "#e07b39",
    "backward": "#2f6db3",
    "optimiser": "#9cc4ea",
    "gaps": "#b9bec5",
    "exposed augmentation": "#5aa469",
}
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
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff2",
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.4,
}


def plot_paths(benchmark: str, folder: Path) -> list[Path]:
    """Paths of the plots that `draw` writes."""
    return [folder / name for name in _FIGURES[benchmark]]


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the plots of a result file into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    place = result["processor"]
    if result["device_type"] != "cpu":
        place = result["device"].split(" (")[0]
    place += f", PyTorch {result['versions'].get('torch')}, {result['date'][:10]}"
    with matplotlib.rc_context(_STYLE):
        for name, (title, make) in _FIGURES[result["benchmark"]].items():
            figure = make(result["cases"])
            FigureCanvasAgg(figure)
            figure.suptitle(title + place, x=0.01, ha="left", fontsize=9)
            figure.savefig(folder / name, dpi=160)
    return plot_paths(result["benchmark"], folder)


_Cases = list[dict[str, Any]]


def _speed_up(cases: _Cases) -> Figure:
    """Fastest fused backend against fastest torch.compile, over the batch, a line for each D."""
    cases = [case for case in cases if case["distribution"] == "power_spherical"]
    kinds = sorted({(case["views"], case["targets"], case["dtype"]) for case in cases})
    kinds = kinds or [(2, 2, "float32")]
    figure = Figure(figsize=(0.6 + 2.4 * max(len(kinds), 2), 3.0))
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    dims, batches = (sorted({case[key] for case in cases}) for key in ("dim", "batch"))
    colours: Any = _BY_DIM[-len(dims) :]
    if len(dims) > len(_BY_DIM):
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 1, len(dims)))
    for panel, kind in zip(panels, kinds, strict=True):
        views, targets, dtype = kind
        for dim, colour in zip(dims, colours, strict=False):
            points = {}
            for case in cases:
                found = (case["views"], case["targets"], case["dtype"], case["dim"])
                faster = speed_up(case, FUSED, COMPILED, BOTH)
                if found == (*kind, dim) and faster is not None:
                    points[case["batch"]] = faster.value
            if points:
                x, y = zip(*sorted(points.items()), strict=True)
                panel.plot(x, y, marker="o", ms=3, color=colour, label=f"D = {dim:,}")
        panel.axhline(1, color=_DARK, lw=0.8, ls=(0, (3, 2)))
        title = f"{counted(views, 'view')}, {counted(targets, 'target')}, {dtype}"
        panel.set(xscale="log", yscale="log", xlabel="batch", title=title)
        panel.set_xticks(batches, [f"{batch:,}" for batch in batches])
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:g}"[0] in "25" else "")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="best")
    panels[0].set_ylabel("times faster than the best torch.compile")
    return figure


def _bandwidth(cases: _Cases) -> Figure:
    """Bytes that must move over the time, against these bytes; a copy of them is the roof."""
    figure = Figure(figsize=(8.0, 3.4))
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    columns = list(dict.fromkeys(name for case in cases for name in case["providers"]))
    shown: dict[str, Any] = {}
    for panel, (mode, title) in zip(panels, MODES.items(), strict=True):
        for name in ("copy of the same bytes", *columns):
            style: dict[str, Any] = {"s": 70, "marker": "_", "color": _DARK}
            if name in columns:
                size, order = (16, 3) if name in FUSED else (10, 2)
                style = {"s": size, "zorder": order, "lw": 0, "color": _COLOURS.get(name, _DARK)}
            points = []
            for case in cases:
                times = times_of(case, name, mode) if name in columns else case["copy"][mode]
                if times is not None:
                    nbytes = case["least_bytes"][mode]
                    points.append((nbytes, nbytes / times["median_us"] / 1e3))
            if points:
                shown[name] = panel.scatter(*zip(*points, strict=True), **style)
        panel.set(xscale="log", yscale="log", xlabel="bytes that must move", title=title)
    panels[0].set_ylabel("these bytes / time (GB/s)")
    if shown:
        figure.legend(list(shown.values()), list(shown), loc="outside right upper")
    return figure


def _rates(cases: _Cases) -> Figure:
    """Views per second of every provider, a panel for each case."""
    rows = max((len(case["providers"]) for case in cases), default=1)
    count = max(1, len(cases))
    figure = Figure(figsize=(7.0, 0.8 + count * (0.35 + 0.24 * rows)))
    panels = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    for panel, case in zip(panels, cases, strict=False):
        timed = [name for name in case["providers"] if times_of(case, name)][::-1]
        rates = [case["providers"][name]["views_per_second"] for name in timed]
        colours = [_OURS if name.startswith(OURS) else _OTHERS for name in timed]
        bars = panel.barh(timed, rates, color=colours, height=0.7)
        panel.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=7)
        panel.set(title=case["label"])
        panel.margins(x=0.12)
        panel.grid(axis="y", visible=False)
    panels[-1].set_xlabel("views a second")
    return figure


def _phases(cases: _Cases) -> Figure:
    """A bar for each case: the parts of the step, and the network alone by layers as lines."""
    figure = Figure(figsize=(7.0, 1.4 + 0.35 * max(1, len(cases))))
    panel = figure.subplots()
    lines = {NETWORK: "-", NETWORK_COMPILED: "--", NETWORK_KERNELS: ":"}
    for row, case in enumerate(cases):
        left = 0.0
        for name, colour in _PHASES.items():
            width = max(0.0, case["phases"].get(name) or 0.0) / 1e3
            label = name if row == 0 else None
            panel.barh(row, width, left=left, color=colour, height=0.6, label=label)
            left += width
        for name, style in lines.items():
            if (alone := times_of(case, name)) is not None:
                x, y = [alone["median_us"] / 1e3] * 2, [row - 0.4, row + 0.4]
                panel.plot(x, y, style, color=_DARK, label=name if row == 0 else None)
    panel.set_yticks(range(len(cases)), [case["label"] for case in cases])
    panel.invert_yaxis()
    panel.set(xlabel="ms a step")
    panel.grid(axis="y", visible=False)
    if cases:
        figure.legend(loc="outside lower center", ncols=4)
    return figure


_FIGURES: dict[str, dict[str, tuple[str, Callable[[_Cases], Figure]]]] = {
    "multiview_loss": {
        "multiview_loss_speedup.png": ("Loss and gradient, ", _speed_up),
        "multiview_loss_bandwidth.png": ("Achieved bandwidth, ", _bandwidth),
    },
    "batch_norm": {},
    "augment": {"augment.png": ("", _rates)},
    "step": {"step.png": ("", _phases)},
    "train": {"train.png": ("", _rates)},
}
"""The figures of each benchmark, by file name: the start of the title, and what draws it."""
