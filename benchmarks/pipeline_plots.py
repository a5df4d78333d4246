"""Plots of the result files of input pipeline, step and training, drawn from the files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .pipeline_targets import COMPILED, KERNELS, NETWORK, OURS, median_of
from .plots import STYLE, place, save

_OURS, _OTHERS = "#2f6db3", "#8a8f98"
_PHASES = {
    "forward": "#173a63",
    "loss": "#e07b39",
    "backward": "#2f6db3",
    "optimiser": "#9cc4ea",
    "gaps": "#b9bec5",
    "exposed augmentation": "#5aa469",
}


def plot_path(folder: Path, benchmark: str) -> Path:
    """Where `draw` writes."""
    return folder / f"{benchmark}.png"


def draw(benchmark: str, result: dict[str, Any], folder: Path) -> tuple[Path]:
    """Draw the plot of a result file into `folder` and return its path."""
    path = plot_path(folder, benchmark)
    with matplotlib.rc_context(STYLE):
        save(_phases(result) if benchmark == "step" else _rates(result), path)
    return (path,)


def _rates(result: dict[str, Any]) -> Figure:
    """Views a second of every provider, a panel a case."""
    cases = result["cases"]
    rows = max((len(case["providers"]) for case in cases), default=1)
    figure = Figure(
        figsize=(7.0, 0.8 + max(1, len(cases)) * (0.35 + 0.24 * rows)), layout="constrained"
    )
    panels = figure.subplots(max(1, len(cases)), 1, squeeze=False, sharex=True)[:, 0]
    for panel, case in zip(panels, cases, strict=False):
        timed = [name for name in case["providers"] if median_of(case, name) is not None][::-1]
        rates = [case["providers"][name]["views_per_second"] for name in timed]
        bars = panel.barh(
            timed,
            rates,
            color=[_OURS if name.startswith(OURS) else _OTHERS for name in timed],
            height=0.7,
        )
        panel.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=7)
        panel.set(title=case["label"])
        panel.margins(x=0.12)
        panel.grid(axis="y", visible=False)
    panels[-1].set_xlabel("views a second")
    figure.suptitle(place(result), x=0.01, ha="left", fontsize=9)
    return figure


def _phases(result: dict[str, Any]) -> Figure:
    """The step's parts one after the other, and the network alone with each kind of layers as lines, a bar a case."""
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
        for name, style in ((NETWORK, "-"), (COMPILED, "--"), (KERNELS, ":")):
            if (alone := median_of(case, name)) is not None:
                label = name if row == 0 else None
                panel.plot(
                    [alone / 1e3] * 2,
                    [row - 0.4, row + 0.4],
                    style,
                    color="#24292f",
                    lw=1.4,
                    label=label,
                )
    panel.set_yticks(range(len(cases)), [case["label"] for case in cases])
    panel.invert_yaxis()
    panel.set(xlabel="ms a step")
    panel.grid(axis="y", visible=False)
    if cases:
        figure.legend(loc="outside lower center", ncols=4)
    figure.suptitle(place(result), x=0.01, ha="left", fontsize=9)
    return figure
