"""The speeds that the fused loss is meant to reach, each with the figure that a result file gives, or "not measured"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .cases import MODES, cases_for
from .providers import COMPILED, FUSED

_Results = dict[str, Any]

NOT_MEASURED = "not measured"
BANDWIDTH_BYTES = 2 * 10**8
"""From here on bandwidth decides: more than three times the largest cache, and launching is a small part of the time."""


@dataclass(frozen=True)
class Target:
    """One target: what, the figure wanted, the figure measured, and whether it is met (None where not measured)."""

    what: str
    wanted: str
    figure: str = NOT_MEASURED
    met: bool | None = None


def time_of(case: _Results, provider: str, mode: str, metric: str = "time") -> dict[str, float] | None:
    """Quartiles of a provider on a case; None where it has none, which includes every wrong result."""
    found = case["providers"].get(provider)
    if found is None or not found["correct"]:
        return None
    times: dict[str, float] | None = (found[mode] or {}).get(metric)
    return times


def fastest(
    case: _Results, providers: Iterable[str], mode: str, metric: str = "time"
) -> tuple[str, dict[str, float]] | None:
    """The provider with the smallest median, and its quartiles; None where none has a time."""
    found = [(name, times) for name in providers if (times := time_of(case, name, mode, metric)) is not None]
    return min(found, key=lambda item: item[1]["median_us"]) if found else None


def speed_up(
    case: _Results, baselines: Iterable[str], mode: str = "forward_backward", metric: str = "time"
) -> float | None:
    """How many times faster the fastest fused provider is than the fastest baseline."""
    ours, theirs = fastest(case, FUSED, mode, metric), fastest(case, baselines, mode, metric)
    return theirs[1]["median_us"] / ours[1]["median_us"] if ours and theirs else None


def case_label(case: _Results) -> str:
    """A case as people read it, such as "256 x 2048, 8 views, bfloat16"."""
    views = "" if (case["views"], case["targets"]) == (2, 2) else f", {case['views']} views"
    cosine = ", cosine" if case["distribution"] == "cosine" else ""
    return f"{case['batch']} x {case['dim']}{views}, {case['dtype']}{cosine}"


def targets(result: _Results) -> list[Target]:
    """The targets for the result's kind of device."""
    return gpu_targets(result) if result["device_type"] == "cuda" else cpu_targets(result)


def gpu_targets(result: _Results | None) -> list[Target]:
    """Targets for an H200; all "not measured" where there is no result."""
    cases = _power_spherical(result)
    large = [case for case in cases if case["least_bytes"]["forward_backward"] >= BANDWIDTH_BYTES]
    small = [case for case in cases if case["batch"] <= 1024]
    smallest = [case for case in cases if case["batch"] <= 256]
    return [
        *(_share_of_copy(cases, dtype) for dtype in ("bfloat16", "float32")),
        _least("best torch.compile, from 200 MB of traffic on", 1.4, large, COMPILED),
        _least("best torch.compile at B <= 1024, kernel time in a CUDA graph", 5, small, COMPILED),
        _least("best torch.compile at B <= 1024, host time in eager mode", 5, small, COMPILED, "host"),
        _least("eager at B <= 256, kernel time in a CUDA graph", 20, smallest, ("eager",)),
        _nowhere_slower(result, ("eager", *COMPILED)),
        _agreement(result),
    ]


def cpu_targets(result: _Results | None) -> list[Target]:
    """Targets for two CPU cores; all "not measured" where there is no result."""
    case = [case for case in _power_spherical(result) if case["name"] == "power_spherical 256x2048 2x2 float32"]
    return [
        _least("eager at 256 x 2048, two views, float32", 2, case, ("eager",)),
        _least("torch.compile at 256 x 2048, two views, float32", 1, case, COMPILED),
        _nowhere_slower(result, ("eager", *COMPILED)),
    ]


def _power_spherical(result: _Results | None) -> list[_Results]:
    return [] if result is None else [case for case in result["cases"] if case["distribution"] == "power_spherical"]


def _share_of_copy(cases: Sequence[_Results], dtype: str) -> Target:
    what = f"loss and gradient at 32768 x 2048, {dtype}, against a copy of the same bytes"
    wanted = "at most 1.10 times the copy"
    for case in cases:
        copy = case["copy"]["forward_backward"]
        if case["name"] != f"power_spherical 32768x2048 2x2 {dtype}" or copy is None:
            continue
        ratios = {
            name: times["median_us"] / copy["median_us"]
            for name in FUSED
            if (times := time_of(case, name, "forward_backward")) is not None
        }
        if ratios:
            figure = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            return Target(what, wanted, figure, min(ratios.values()) <= 1.10)
    return Target(what, wanted)


def _least(
    what: str, factor: float, cases: Sequence[_Results], baselines: Sequence[str], metric: str = "time"
) -> Target:
    what, wanted = (
        f"loss and gradient against {what}",
        f"at least {factor:g} times faster" if factor > 1 else "not slower",
    )
    found = [
        (ratio, case) for case in cases if (ratio := speed_up(case, baselines, "forward_backward", metric)) is not None
    ]
    if not found:
        return Target(what, wanted)
    ratio, case = min(found, key=lambda item: item[0])
    many = f" (least of {len(found)} cases: {case_label(case)})" if len(found) > 1 else ""
    return Target(what, wanted, f"{ratio:.2f} times{many}", ratio >= factor)


def _nowhere_slower(result: _Results | None, others: Sequence[str]) -> Target:
    """Slower counts where the quartile ranges do not touch: a difference within the noise is none."""
    what, wanted = "fastest fused backend against every other provider, all cases, times and modes", "nowhere slower"
    compared, slower = 0, []
    for case, mode, metric in _timings(result):
        ours, theirs = fastest(case, FUSED, mode, metric), fastest(case, others, mode, metric)
        if ours is None or theirs is None:
            continue
        compared += 1
        if ours[1]["lower_us"] > theirs[1]["upper_us"]:
            ratio = ours[1]["median_us"] / theirs[1]["median_us"]
            slower.append((ratio, f"{case_label(case)}, {mode.replace('_', ' + ')}, {theirs[0]}"))
    if not compared:
        return Target(what, wanted)
    if not slower:
        return Target(what, wanted, f"slower in none of {compared} comparisons", True)
    ratio, where = max(slower)
    return Target(
        what, wanted, f"slower in {len(slower)} of {compared}, by {ratio:.2f} times at worst ({where})", False
    )


def _agreement(result: _Results | None) -> Target:
    what, wanted = "Triton against CUDA, loss and gradient at the telling cases", "within 10 %"
    telling = {case.name for case in cases_for("cuda", short=True)}
    found = []
    for case in result["cases"] if result is not None else []:
        triton, cuda = (time_of(case, name, "forward_backward") for name in ("triton", "cuda"))
        if case["name"] in telling and triton is not None and cuda is not None:
            ratio = triton["median_us"] / cuda["median_us"]
            found.append((max(ratio, 1 / ratio), f"Triton / CUDA {ratio:.2f} at {case_label(case)}"))
    if not found:
        return Target(what, wanted)
    worst, where = max(found)
    return Target(what, wanted, f"farthest apart: {where}", worst <= 1.10)


def _timings(result: _Results | None) -> Iterable[tuple[_Results, str, str]]:
    cases = [] if result is None else result["cases"]
    return ((case, mode, metric) for case in cases for mode in MODES for metric in ("time", "host"))
