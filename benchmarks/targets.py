"""The speeds that the project aims at, by benchmark and device, each judged on a result file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from vi_simsiam.text import counted

from .cases import BOTH, MODES, cases_for
from .results import (
    AT_HAND,
    COMPILED,
    EAGER,
    FUSED,
    LIGHTLY,
    NETWORK_COMPILED,
    NETWORK_KERNELS,
    NOT_MEASURED,
    OURS,
    OURS_SIMSIAM,
    STEP,
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
    step_with,
    times_of,
)

_BANDWIDTH_BYTES = 2 * 10**8
"""From here on bandwidth decides: more than three times the largest cache."""
_IMAGENETTE = 9_469
"""Training images of ImageNette: a training on fewer does not count."""


class Target(NamedTuple):
    """One target: a row of the table of targets."""

    what: str
    wanted: str
    figure: str = NOT_MEASURED
    met: str = "-"
    """yes, no, too noisy to tell, or - where it is not measured, or holds in those cases alone that
    are."""


HEAD = ("what", "target", "measured", "met")
"""Head of the table of targets."""


def _verdict(comparisons: Iterable[tuple[bool, bool]]) -> str:
    """The verdict on comparisons that must all hold, each given as (it holds, noisy).

    A noisy one decides nothing: a target is missed by a quiet one that fails, and met only if all
    are quiet.
    """
    found = list(comparisons)
    if not all(held or noise for held, noise in found):
        return "no"
    return TOO_NOISY if any(noise for _, noise in found) else "yes"


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
        notes = []
        if len(found) > 1:
            most = "least" if self.at_least else "most"
            notes.append(f"{most} of {counted(len(quiet or found), 'case')}: {label}")
        elif len(cases) > 1:
            notes.append(label)
        if missing := len(cases) - len(found):
            notes.append(f"no figure for {counted(missing, 'case')} more")
        text += f" ({'; '.join(notes)})" if notes else ""
        if quiet and len(quiet) < len(found):
            text += f"; {len(found) - len(quiet)} more {TOO_NOISY}"
        sign = 1 if self.at_least else -1
        held = [(sign * each.value >= sign * self.limit, each.noisy) for each, _ in found]
        met = _verdict(held)
        if missing and met == "yes":  # figures of some cases can miss a target of all, not meet it
            met = "-"
        return Target(self.what, self.wanted, text, met)


def _small(case: Case, batch: int) -> bool:
    return bool(case["distribution"] == "power_spherical" and case["batch"] <= batch)


def _large(case: Case) -> bool:
    power_spherical = case["distribution"] == "power_spherical"
    return bool(power_spherical and case["least_bytes"][BOTH] >= _BANDWIDTH_BYTES)


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
        lambda case: speed_up(case, FUSED, others, BOTH, metric),
        applies,
        at_least=True,
    )


def _times_copy(case: Case) -> Ratio | None:
    """Time of the fastest fused backend over that of a copy of the same bytes."""
    ours, copy = fastest(case, FUSED, BOTH), case["copy"][BOTH]
    return None if ours is None or copy is None else ratio(ours[1], copy)


def _copy_share(case: Case) -> Ratio | None:
    """Share of a copy's bandwidth that the fastest fused backend reaches."""
    found = _times_copy(case)
    return None if found is None else Ratio(1 / found.value, found.noisy)


def _large_loss(dtype: str) -> Row:
    return Row(
        f"loss and gradient at 32768 x 2048, {dtype}, against a copy of the same bytes",
        "at most 1.10 times the copy",
        1.10,
        _times_copy,
        _named(f"power_spherical 32768x2048 2x2 {dtype}"),
    )


def _nowhere_slower(cases: Sequence[Case]) -> Target:
    """Slower counts where the quartile ranges do not touch: a difference within them is noise."""
    what = "fastest fused backend against every other provider, all cases, times and modes"
    wanted = "nowhere slower"
    quiet, loud, slower = 0, 0, []
    timings = ((c, mode, metric) for c in cases for mode in MODES for metric in ("time", "host"))
    for case, mode, metric in timings:
        ours = fastest(case, FUSED, mode, metric)
        theirs = fastest(case, ("eager", *COMPILED), mode, metric)
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
        return Target(what, wanted)
    figure = f"slower in none of {counted(quiet, 'comparison')}"
    if slower:
        worst, where = max(slower)
        figure = f"slower in {len(slower)} of {quiet}, by {worst:.2f} times at worst ({where})"
    figure += f"; {loud} more {TOO_NOISY}" if loud else ""
    return Target(what, wanted, figure, _verdict([(not slower, False), (True, loud > 0)]))


def _apart(case: Case) -> Ratio | None:
    """The slower of Triton and CUDA against the faster."""
    triton, cuda = (times_of(case, name, BOTH) for name in ("triton", "cuda"))
    if triton is None or cuda is None:
        return None
    apart = ratio(triton, cuda)
    return Ratio(max(apart.value, 1 / apart.value), apart.noisy)


def _telling(case: Case) -> bool:
    return case["name"] in {each.name for each in cases_for("cuda", short=True)}


def _views_faster(size: int, factor: float) -> Row:
    return Row(
        f"views/s at 2x{size}, batch 64, against lightly's",
        f"at least {factor:g} times",
        factor,
        lambda case: speed_up(case, [OURS], [LIGHTLY]),
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
        found = case["providers"].get(OURS)
        number = value(found) if found and found["correct"] else None
        return None if number is None else Ratio(number, timed and noisy(found.get("time")))

    def applies(case: Case) -> bool:
        extent = (case["view_label"], case["batch"], case["epochs"])
        large = case["images"] >= _IMAGENETTE
        return "imagenette" in case["data"] and extent == ("2x128", 64, 200) and large

    where = "200 epochs of ImageNette-128, 2x128, batch 64"
    return Row(f"{where}: {what}", wanted, limit, figure, applies, shown=shown)


def _sum(*seconds: float | None) -> float | None:
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None


def _whole_trainings(cases: Sequence[Case]) -> Target:
    """Target of the longest of several trainings."""
    row = Row(
        "views/s of whole trainings at CIFAR-10, 2x32, against lightly's",
        "at least 2 times",
        2,
        lambda case: speed_up(case, [OURS_SIMSIAM], [LIGHTLY]),
        lambda case: (case["data"], case["view_label"]) == ("cifar10", "2x32"),
        at_least=True,
    )
    found = [case for case in cases if row.applies(case) and row.figure(case) is not None]
    if not found:
        return row([])
    longest = max(found, key=lambda case: case["images"] * case["epochs"])
    own, other = (
        f"{longest['providers'][name]['views_per_second']:,.0f}" for name in (OURS_SIMSIAM, LIGHTLY)
    )
    extent = f"{counted(longest['epochs'], 'epoch')} of {counted(longest['images'], 'image')}"
    target = row([longest])
    return target._replace(figure=f"{target.figure} ({own} and {other}; {extent})")


_COMPILE_SMALL, _IN_GRAPH = "best torch.compile at B <= 1024", "kernel time in a CUDA graph"
_UP_TO_1024, _UP_TO_256 = partial(_small, batch=1024), partial(_small, batch=256)
_ON_CPU = _named("power_spherical 256x2048 2x2 float32")
_NORM = "BatchNorm, addition and ReLU, forward and backward,"
_TARGETS: dict[tuple[str, str], Sequence[Callable[[Sequence[Case]], Target]]] = {
    ("multiview_loss", "cuda"): (
        _large_loss("bfloat16"),
        _large_loss("float32"),
        _loss_faster("best torch.compile, from 200 MB of traffic on", 1.4, COMPILED, _large),
        _loss_faster(f"{_COMPILE_SMALL}, {_IN_GRAPH}", 5, COMPILED, _UP_TO_1024),
        _loss_faster(
            f"{_COMPILE_SMALL}, host time in eager mode", 5, COMPILED, _UP_TO_1024, "host"
        ),
        _loss_faster(f"eager at B <= 256, {_IN_GRAPH}", 20, ["eager"], _UP_TO_256),
        _nowhere_slower,
        Row(
            "Triton against CUDA, loss and gradient at the telling cases",
            "within 10 %",
            1.10,
            _apart,
            _telling,
        ),
    ),
    ("multiview_loss", "cpu"): (
        _loss_faster("eager at 256 x 2048, two views, float32", 2, ["eager"], _ON_CPU),
        _loss_faster("torch.compile at 256 x 2048, two views, float32", 1, COMPILED, _ON_CPU),
        _nowhere_slower,
    ),
    ("batch_norm", "cuda"): (
        Row(
            f"{_NORM} against a copy of the same bytes",
            "at least 85 % of its bandwidth",
            0.85,
            _copy_share,
            at_least=True,
            shown="{:.0%}",
        ),
    ),
    ("batch_norm", "cpu"): (
        Row(
            f"{_NORM} against PyTorch's, at the four largest of 2x32, batch 64",
            "at least 1.5 times faster",
            1.5,
            lambda case: speed_up(case, FUSED, EAGER, BOTH),
            lambda case: case["name"].startswith("2x32 batch 64 "),
            at_least=True,
        ),
    ),
    ("augment", "cuda"): (_views_faster(128, 10), _views_faster(224, 5)),
    ("step", "cuda"): (
        Row(
            "training step against the same network's forward and backward alone, same kernels",
            "at most 1.05 times",
            1.05,
            lambda case: speed_up(case, [floor_of(case)], [STEP]),
        ),
        Row(
            "forward and backward of the network alone, with our kernels, against torch.compile",
            "at least 1.3 times faster",
            1.3,
            lambda case: speed_up(case, [NETWORK_KERNELS], [NETWORK_COMPILED]),
            at_least=True,
        ),
        Row("exposed augmentation", "at most 2 % of the step", 0.02, exposed_share, shown="{:.1%}"),
    ),
    ("step", "cpu"): (
        Row(
            "training step with our kernels against PyTorch's layers, all views in one pass",
            "at least 1.2 times faster",
            1.2,
            lambda case: speed_up(case, [AT_HAND], [step_with("torch", "kernels")]),
            at_least=True,
        ),
    ),
    ("train", "cuda"): (
        _on_imagenette("training", "at most 75 s", 75, lambda found: found.get("training_seconds")),
        _on_imagenette(
            "cold start and kNN evaluation",
            "at most 45 s",
            45,
            lambda found: _sum(found.get("cold_start_seconds"), found.get("evaluation_seconds")),
        ),
        _on_imagenette(
            "peak memory beside the images",
            "at most 2.5 GB",
            2.5,
            lambda found: found.get("peak_bytes") and found["peak_bytes"] / 1e9,
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
