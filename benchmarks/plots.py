"""Plots of result files, drawn from the files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vi_simsiam.text import counted

from . import names
from .ratios import Case, Times, speed_up, times_of

_OURS, _OTHERS = "#2f6db3", "#8a8f98"
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
    with matplotlib.rc_context(_STYLE):
        for name, make in _FIGURES[result["benchmark"]].items():
            figure = make(result)
            FigureCanvasAgg(figure)
            figure.savefig(folder / name, dpi=160)
    return plot_paths(result["benchmark"], folder)


def _speed_up(result: dict[str, Any]) -> Figure:
    """Fastest fused backend against fastest torch.compile, over the batch, a line for each D."""
    cases = [case for case in result["cases"] if case["distribution"] == "power_spherical"]
    kinds = sorted({(case["views"], case["targets"], case["dtype"]) for case in cases}) or [
        (2, 2, "float32")
    ]
    figure = Figure(figsize=(0.6 + 2.4 * max(len(kinds), 2), 3.0), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    dims = sorted({case["dim"] for case in cases})
    for panel, (views, targets, dtype) in zip(panels, kinds, strict=True):
        for dim, colour in zip(dims, _shades(len(dims)), strict=True):
            points = []
            for case in cases:
                kind = (case["views"], case["targets"], case["dtype"], case["dim"])
                faster = speed_up(case, names.FUSED, names.COMPILED, "forward_backward")
                if kind == (views, targets, dtype, dim) and faster is not None:
                    points.append((case["batch"], faster.value))
            if points:
                points.sort()
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
        panel.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:g}"[0] in "25" else "")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="best")
    panels[0].set_ylabel("times faster than the best torch.compile")
    figure.suptitle(f"Loss and gradient, {_place(result)}", x=0.01, ha="left", fontsize=9)
    return figure


def _bandwidth(result: dict[str, Any]) -> Figure:
    """Bytes that must move over the time, against these bytes; a copy of them is the roof."""
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    columns = list(dict.fromkeys(name for case in result["cases"] for name in case["providers"]))
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for panel, mode, title in zip(
        panels, ("forward", "forward_backward"), ("loss", "loss and gradient"), strict=True
    ):
        copies = [(case, case["copy"][mode]) for case in result["cases"]]
        label = "copy of the same bytes"
        _scatter_rates(panel, mode, copies, marker="_", s=70, color="#24292f", label=label)
        for name in columns:
            times = [(case, times_of(case, name, mode)) for case in result["cases"]]
            size, above = (16, 3) if name in names.FUSED else (10, 2)
            style = {"color": _COLOURS.get(name, "#000000"), "label": name, "lw": 0}
            _scatter_rates(panel, mode, times, s=size, zorder=above, **style)
        panel.set(xscale="log", yscale="log", xlabel="bytes that must move", title=title)
    panels[0].set_ylabel("these bytes / time (GB/s)")
    shown = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if shown:
        figure.legend(list(shown.values()), list(shown), loc="outside right upper")
    figure.suptitle(f"Achieved bandwidth, {_place(result)}", x=0.01, ha="left", fontsize=9)
    return figure


def _scatter_rates(
    panel: Axes, mode: str, times: Iterable[tuple[Case, Times | None]], **style: Any
) -> None:
    """Bytes that must move and GB/s for each case that has a time."""
    measured = [(case["least_bytes"][mode], found) for case, found in times if found is not None]
    if measured:
        rates = [nbytes / found["median_us"] / 1e3 for nbytes, found in measured]
        panel.scatter([nbytes for nbytes, _ in measured], rates, **style)


def _place(result: dict[str, Any]) -> str:
    """Device, version and date of a measurement, for a title."""
    device = result["processor"]
    if result["device_type"] != "cpu":
        device = result["device"].split(" (")[0]
    return f"{device}, PyTorch {result['versions']['torch']}, {result['date'][:10]}"


def _shades(count: int) -> list[Any]:
    if count <= len(_BY_DIM):
        return list(_BY_DIM[len(_BY_DIM) - count :])
    return list(matplotlib.colormaps["viridis"]([i / count for i in range(count)]))


def _rates(result: dict[str, Any]) -> Figure:
    """Views per second of every provider, a panel for each case."""
    cases = result["cases"]
    rows = max((len(case["providers"]) for case in cases), default=1)
    figure = Figure(
        figsize=(7.0, 0.8 + max(1, len(cases)) * (0.35 + 0.24 * rows)), layout="constrained"
    )
    panels = figure.subplots(max(1, len(cases)), 1, squeeze=False, sharex=True)[:, 0]
    for panel, case in zip(panels, cases, strict=False):
        timed = [name for name in case["providers"] if times_of(case, name)][::-1]
        rates = [case["providers"][name]["views_per_second"] for name in timed]
        bars = panel.barh(
            timed,
            rates,
            color=[_OURS if name.startswith(names.OURS) else _OTHERS for name in timed],
            height=0.7,
        )
        panel.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=7)
        panel.set(title=case["label"])
        panel.margins(x=0.12)
        panel.grid(axis="y", visible=False)
    panels[-1].set_xlabel("views a second")
    figure.suptitle(_place(result), x=0.01, ha="left", fontsize=9)
    return figure


def _phases(result: dict[str, Any]) -> Figure:
    """A bar for each case: the parts of the step, and the network alone by layers as lines."""
    cases = result["cases"]
    figure = Figure(figsize=(7.0, 1.4 + 0.35 * max(1, len(cases))), layout="constrained")
    panel = figure.subplots()
    for row, case in enumerate(cases):
        left = 0.0
        for name, colour in _PHASES.items():
            width = max(0.0, case["phases"].get(name) or 0.0) / 1e3
            panel.barh(
                row, width, left=left, color=colour, height=0.6, label=name if row == 0 else None
            )
            left += width
        lines = {names.NETWORK: "-", names.NETWORK_COMPILED: "--", names.NETWORK_KERNELS: ":"}
        for name, style in lines.items():
            if (alone := times_of(case, name)) is not None:
                x, y = [alone["median_us"] / 1e3] * 2, [row - 0.4, row + 0.4]
                label = name if row == 0 else None
                panel.plot(x, y, style, color="#24292f", lw=1.4, label=label)
    panel.set_yticks(range(len(cases)), [case["label"] for case in cases])
    panel.invert_yaxis()
    panel.set(xlabel="ms a step")
    panel.grid(axis="y", visible=False)
    if cases:
        figure.legend(loc="outside lower center", ncols=4)
    figure.suptitle(_place(result), x=0.01, ha="left", fontsize=9)
    return figure


_FIGURES: dict[str, dict[str, Callable[[dict[str, Any]], Figure]]] = {
    "multiview_loss": {
        "multiview_loss_speedup.png": _speed_up,
        "multiview_loss_bandwidth.png": _bandwidth,
    },
    "augment": {"augment.png": _rates},
    "step": {"step.png": _phases},
    "train": {"train.png": _rates},
}
"""The figures of each benchmark, by file name."""
