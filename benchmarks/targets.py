"""The speeds that the project aims at, by benchmark and device, each judged on a result file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.table import Table

from vi_simsiam.text import counted, markdown_grid

from . import names
from .cases import MODES, cases_for
from .ratios import (
    GIGABYTE,
    NOT_MEASURED,
    TOO_NOISY,
    Case,
    Ratio,
    case_label,
    exposed_share,
    fastest,
    floor_of,
    noisy,
    ratio,
    speed_up,
    times_of,
)
from .tables import terminal_table

_BANDWIDTH_BYTES = 2 * 10**8
"""From here on bandwidth decides: more than three times the largest cache."""
_IMAGENETTE = 9_469
"""Training images of ImageNette: a training on fewer does not count."""
_BOTH = MODES[1]


@dataclass(frozen=True)
class Target:
    """One target: what, the figure wanted, the figure measured, and whether it is met."""

    what: str
    wanted: str
    figure: str = NOT_MEASURED
    met: bool | None = None
    """None where that is not known."""
    noisy: bool = False
    """Measured, but too noisily to tell."""

    def judged(self, figure: str, holds: Iterable[tuple[bool, bool]]) -> Target:
        """Enter the figure of comparisons that must all hold, each given as (it holds, noisy).

        A noisy comparison decides nothing: the target is missed by a quiet one that fails, and met
        only if all are quiet.
        """
        found = list(holds)
        missed = any(not held for held, noise in found if not noise)
        noise = not missed and any(noise for _, noise in found)
        return dataclasses.replace(
            self, figure=figure, met=None if noise else not missed, noisy=noise
        )


@dataclass(frozen=True)
class Row:
    """A target that one figure of every case must reach; the worst quiet figure is shown."""

    what: str
    wanted: str
    limit: float
    figure: Callable[[Case], Ratio | None]
    """The figure of a case; None where it has none."""
    applies: Callable[[Case], bool] = lambda case: True
    at_least: bool = False
    """The limit is the least figure that is good enough, not the largest."""
    shown: str = "{:.2f} times"

    def __call__(self, cases: Sequence[Case]) -> Target:
        """Judge the cases that the target is about."""
        cases = [case for case in cases if self.applies(case)]
        figures = [(self.figure(case), case_label(case)) for case in cases]
        found = [(figure, label) for figure, label in figures if figure is not None]
        if not found:
            return Target(self.what, self.wanted)
        quiet = [each for each in found if not each[0].noisy]
        (value, _), label = (min if self.at_least else max)(quiet or found)
        text = self.shown.format(value)
        if len(found) > 1:
            most = "least" if self.at_least else "most"
            text += f" ({most} of {counted(len(quiet or found), 'case')}: {label})"
            if quiet and len(quiet) < len(found):
                text += f"; {len(found) - len(quiet)} more {TOO_NOISY}"
        elif len(cases) > 1:
            text += f" ({label}; no figure for {counted(len(cases) - 1, 'case')} more)"
        sign = 1 if self.at_least else -1
        holds = [(sign * each.value >= sign * self.limit, each.noisy) for each, _ in found]
        return Target(self.what, self.wanted).judged(text, holds)


def _small(case: Case, batch: int) -> bool:
    return bool(case["distribution"] == "power_spherical" and case["batch"] <= batch)


def _large(case: Case) -> bool:
    power_spherical = case["distribution"] == "power_spherical"
    return bool(power_spherical and case["least_bytes"][_BOTH] >= _BANDWIDTH_BYTES)


def _named(name: str) -> Callable[[Case], bool]:
    return lambda case: bool(case["name"] == name)


def _loss_faster(
    what: str,
    factor: float,
    others: Sequence[str],
    applies: Callable[[Case], bool],
    metric: str = "time",
) -> Row:
    return Row(
        f"loss and gradient against {what}",
        f"at least {factor:g} times faster" if factor > 1 else "not slower",
        factor,
        lambda case: speed_up(case, names.FUSED, others, _BOTH, metric),
        applies,
        at_least=True,
    )


def _share_of_copy(cases: Sequence[Case], dtype: str) -> Target:
    """One backend is enough: a noisy one matters only where no quiet one reaches the limit."""
    what = f"loss and gradient at 32768 x 2048, {dtype}, against a copy of the same bytes"
    target = Target(what, "at most 1.10 times the copy")
    for case in cases:
        copy = case["copy"][_BOTH]
        if case["name"] != f"power_spherical 32768x2048 2x2 {dtype}" or copy is None:
            continue
        times = {name: times_of(case, name, _BOTH) for name in names.FUSED}
        found = {name: ratio(own, copy) for name, own in times.items() if own is not None}
        if found:
            figure = ", ".join(f"{name} {each.value:.2f}" for name, each in found.items())
            met = any(each.value <= 1.10 and not each.noisy for each in found.values())
            noise = not met and any(each.noisy for each in found.values())
            return dataclasses.replace(
                target, figure=figure, met=None if noise else met, noisy=noise
            )
    return target


def _nowhere_slower(cases: Sequence[Case]) -> Target:
    """Slower counts where the quartile ranges do not touch: a difference within them is noise."""
    what = "fastest fused backend against every other provider, all cases, times and modes"
    target = Target(what, "nowhere slower")
    quiet, loud, slower = 0, 0, []
    timings = ((c, mode, metric) for c in cases for mode in MODES for metric in ("time", "host"))
    for case, mode, metric in timings:
        ours = fastest(case, names.FUSED, mode, metric)
        theirs = fastest(case, ("eager", *names.COMPILED), mode, metric)
        if ours is None or theirs is None:
            continue
        if noisy(ours[1], theirs[1]):
            loud += 1
            continue
        quiet += 1
        if ours[1]["lower_us"] > theirs[1]["upper_us"]:
            label = f"{case_label(case)}, {mode.replace('_', ' + ')}, {theirs[0]}"
            slower.append((ratio(ours[1], theirs[1]).value, label))
    if not quiet + loud:
        return target
    figure = f"slower in none of {counted(quiet, 'comparison')}"
    if slower:
        worst, where = max(slower)
        figure = f"slower in {len(slower)} of {quiet}, by {worst:.2f} times at worst ({where})"
    figure += f"; {loud} more {TOO_NOISY}" if loud else ""
    return target.judged(figure, [(not slower, False), (True, loud > 0)])


def _agreement(cases: Sequence[Case]) -> Target:
    target = Target("Triton against CUDA, loss and gradient at the telling cases", "within 10 %")
    telling = {case.name for case in cases_for("cuda", short=True)}
    found = []
    for case in cases:
        triton, cuda = (times_of(case, name, _BOTH) for name in ("triton", "cuda"))
        if case["name"] in telling and triton is not None and cuda is not None:
            apart = ratio(triton, cuda)
            label = f"Triton / CUDA {apart.value:.2f} at {case_label(case)}"
            found.append((max(apart.value, 1 / apart.value), label, apart.noisy))
    if not found:
        return target
    _, where, _ = max([each for each in found if not each[2]] or found)
    holds = [(distance <= 1.10, noise) for distance, _, noise in found]
    return target.judged(f"farthest apart: {where}", holds)


def _views_faster(size: int, factor: float) -> Row:
    return Row(
        f"views/s at 2x{size}, batch 64, against lightly's",
        f"at least {factor:g} times",
        factor,
        lambda case: speed_up(case, [names.OURS], [names.LIGHTLY]),
        _named(f"2x{size} batch 64"),
        at_least=True,
        shown="{:.1f} times",
    )


def _on_imagenette(
    what: str,
    wanted: str,
    limit: float,
    value: Callable[[dict[str, Any]], float | None],
    shown: str = "{:.0f} s",
    *,
    timed: bool = True,
) -> Row:
    """A figure of our training of 200 epochs on ImageNette."""

    def figure(case: Case) -> Ratio | None:
        found = case["providers"].get(names.OURS)
        number = value(found) if found and found["correct"] else None
        return None if number is None else Ratio(number, timed and noisy(found["time"]))

    def applies(case: Case) -> bool:
        extent = (case["view_label"], case["batch"], case["epochs"])
        large = case["images"] >= _IMAGENETTE
        return "imagenette" in case["data"] and extent == ("2x128", 64, 200) and large

    where = "200 epochs of ImageNette-128, 2x128, batch 64"
    return Row(f"{where}: {what}", wanted, limit, figure, applies, shown=shown)


def _whole_trainings(cases: Sequence[Case]) -> Target:
    """Target of the longest of several trainings."""
    row = Row(
        "views/s of whole trainings at CIFAR-10, 2x32, against lightly's",
        "at least 1.5 times",
        1.5,
        lambda case: speed_up(case, [names.OURS_SIMSIAM], [names.LIGHTLY]),
        lambda case: (case["data"], case["view_label"]) == ("cifar10", "2x32"),
        at_least=True,
    )
    found = [case for case in cases if row.applies(case) and row.figure(case) is not None]
    longest = sorted(found, key=lambda case: case["images"] * case["epochs"])[-1:]
    target = row(longest)
    for case in longest:
        own, other = (
            f"{case['providers'][name]['views_per_second']:,.0f}"
            for name in (names.OURS_SIMSIAM, names.LIGHTLY)
        )
        extent = f"{counted(case['epochs'], 'epoch')} of {counted(case['images'], 'image')}"
        figure = f"{target.figure} ({own} and {other}; {extent})"
        target = dataclasses.replace(target, figure=figure)
    return target


_COMPILE_SMALL, _IN_GRAPH = "best torch.compile at B <= 1024", "kernel time in a CUDA graph"
_UP_TO_1024, _UP_TO_256 = partial(_small, batch=1024), partial(_small, batch=256)
_ON_CPU = _named("power_spherical 256x2048 2x2 float32")
_TARGETS: dict[tuple[str, str], Sequence[Callable[[Sequence[Case]], Target]]] = {
    ("multiview_loss", "cuda"): (
        partial(_share_of_copy, dtype="bfloat16"),
        partial(_share_of_copy, dtype="float32"),
        _loss_faster("best torch.compile, from 200 MB of traffic on", 1.4, names.COMPILED, _large),
        _loss_faster(f"{_COMPILE_SMALL}, {_IN_GRAPH}", 5, names.COMPILED, _UP_TO_1024),
        _loss_faster(
            f"{_COMPILE_SMALL}, host time in eager mode", 5, names.COMPILED, _UP_TO_1024, "host"
        ),
        _loss_faster(f"eager at B <= 256, {_IN_GRAPH}", 20, ["eager"], _UP_TO_256),
        _nowhere_slower,
        _agreement,
    ),
    ("multiview_loss", "cpu"): (
        _loss_faster("eager at 256 x 2048, two views, float32", 2, ["eager"], _ON_CPU),
        _loss_faster("torch.compile at 256 x 2048, two views, float32", 1, names.COMPILED, _ON_CPU),
        _nowhere_slower,
    ),
    ("augment", "cuda"): (_views_faster(128, 10), _views_faster(224, 5)),
    ("step", "cuda"): (
        Row(
            "training step against the same network's forward and backward alone, same kernels",
            "at most 1.05 times",
            1.05,
            lambda case: speed_up(case, [floor_of(case)], [names.STEP]),
        ),
        Row(
            "forward and backward of the network alone, with our kernels, against torch.compile",
            "at least 1.3 times faster",
            1.3,
            lambda case: speed_up(case, [names.NETWORK_KERNELS], [names.NETWORK_COMPILED]),
            at_least=True,
        ),
        Row("exposed augmentation", "at most 2 % of the step", 0.02, exposed_share, shown="{:.1%}"),
    ),
    ("train", "cuda"): (
        _on_imagenette("training", "at most 120 s", 120, lambda found: found["training_seconds"]),
        _on_imagenette(
            "cold start and kNN evaluation",
            "at most 45 s",
            45,
            lambda found: found["cold_start_seconds"] + found["evaluation_seconds"],
        ),
        _on_imagenette(
            "peak memory beside the images",
            "at most 2.5 GB",
            2.5,
            lambda found: found["peak_bytes"] and found["peak_bytes"] / GIGABYTE,
            "{:.2f} GB",
            timed=False,
        ),
    ),
    ("train", "cpu"): (_whole_trainings,),
}
"""Targets for an H200 and for two CPU cores."""


def targets_for(benchmark: str, device_type: str, cases: Sequence[Case]) -> list[Target]:
    """The targets of a benchmark on a kind of device; there may be none."""
    return [judge(cases) for judge in _TARGETS.get((benchmark, device_type), ())]


_HEAD = ("what", "target", "measured", "met")


def _rows(targets: Iterable[Target]) -> list[Sequence[str]]:
    words = {True: "yes", False: "no", None: "-"}
    return [
        (each.what, each.wanted, each.figure, TOO_NOISY if each.noisy else words[each.met])
        for each in targets
    ]


def targets_table(targets: Sequence[Target]) -> Table:
    """Targets for the terminal."""
    return terminal_table("targets", _HEAD, _rows(targets), right=())


def targets_markdown(targets: Sequence[Target]) -> str:
    """Targets as a Markdown table."""
    return markdown_grid(_HEAD, _rows(targets), numbers=False)
