"""The speeds that the fused loss is meant to reach, each with the figure that a result file gives, or "not measured"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vi_simsiam.text import counted

from .cases import MODES, cases_for
from .noise import TOO_NOISY, Ratio, noisy, ratio
from .providers import COMPILED, FUSED

_Results = dict[str, Any]

NOT_MEASURED = "not measured"
BANDWIDTH_BYTES = 2 * 10**8
"""From here on bandwidth decides: more than three times the largest cache, and launching is a small part of the time."""


@dataclass(frozen=True)
class Target:
    """One target: what, the figure wanted, the figure measured, and whether it is met (None where that is not known)."""

    what: str
    wanted: str
    figure: str = NOT_MEASURED
    met: bool | None = None
    noisy: bool = False
    """Whether it was measured, but too noisily to tell."""


def of_all(what: str, wanted: str, figure: str, holds: Iterable[tuple[bool, bool]]) -> Target:
    """A target that every comparison must hold, each given as (it holds, it is noisy).

    A noisy comparison decides nothing: the target is missed by a quiet one that fails, and met only if all are quiet.
    """
    found = list(holds)
    if any(not held for held, noise in found if not noise):
        return Target(what, wanted, figure, False)
    noise = any(noise for _, noise in found)
    return Target(what, wanted, figure, None if noise else True, noise)


def worst_of(
    what: str,
    wanted: str,
    found: Sequence[tuple[Ratio, str]],
    *,
    holds: Callable[[float], bool],
    shown: str,
    worst: Callable[..., tuple[Ratio, str]] = max,
    cases: int = 1,
) -> Target:
    """A target for ratios of cases, each given with the case's label: the worst quiet one is its figure.

    Args:
        what: see `Target`.
        wanted: see `Target`.
        found: of every case that was measured.
        holds: whether a ratio is good enough.
        shown: format of a ratio.
        worst: `max` or `min`.
        cases: how many were measured, those without this ratio among them.
    """
    if not found:
        return Target(what, wanted)
    quiet = [each for each in found if not each[0].noisy]
    (value, _), label = worst(quiet or found)
    figure = shown.format(value)
    if len(found) > 1:
        most = "most" if worst is max else "least"
        figure += f" ({most} of {counted(len(quiet or found), 'case')}: {label})"
        if quiet and len(quiet) < len(found):
            figure += f"; {len(found) - len(quiet)} more {TOO_NOISY}"
    elif cases > 1:
        figure += f" ({label}; no figure for {counted(cases - 1, 'case')} more)"
    return of_all(what, wanted, figure, ((holds(each.value), each.noisy) for each, _ in found))


def time_of(
    case: _Results, provider: str, mode: str, metric: str = "time"
) -> dict[str, float] | None:
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
    found = [
        (name, times)
        for name in providers
        if (times := time_of(case, name, mode, metric)) is not None
    ]
    return min(found, key=lambda item: item[1]["median_us"]) if found else None


def speed_up(
    case: _Results, baselines: Iterable[str], mode: str = "forward_backward", metric: str = "time"
) -> Ratio | None:
    """How many times faster the fastest fused provider is than the fastest baseline."""
    ours, theirs = fastest(case, FUSED, mode, metric), fastest(case, baselines, mode, metric)
    return ratio(theirs[1], ours[1]) if ours and theirs else None


def case_label(case: _Results) -> str:
    """A case as people read it, such as "256 x 2048, 8 views, bfloat16"."""
    views = (
        "" if (case["views"], case["targets"]) == (2, 2) else f", {counted(case['views'], 'view')}"
    )
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
        _least(
            "best torch.compile at B <= 1024, host time in eager mode", 5, small, COMPILED, "host"
        ),
        _least("eager at B <= 256, kernel time in a CUDA graph", 20, smallest, ("eager",)),
        _nowhere_slower(result, ("eager", *COMPILED)),
        _agreement(result),
    ]


def cpu_targets(result: _Results | None) -> list[Target]:
    """Targets for two CPU cores; all "not measured" where there is no result."""
    case = [
        case
        for case in _power_spherical(result)
        if case["name"] == "power_spherical 256x2048 2x2 float32"
    ]
    return [
        _least("eager at 256 x 2048, two views, float32", 2, case, ("eager",)),
        _least("torch.compile at 256 x 2048, two views, float32", 1, case, COMPILED),
        _nowhere_slower(result, ("eager", *COMPILED)),
    ]


def _power_spherical(result: _Results | None) -> list[_Results]:
    return (
        []
        if result is None
        else [case for case in result["cases"] if case["distribution"] == "power_spherical"]
    )


def _share_of_copy(cases: Sequence[_Results], dtype: str) -> Target:
    what = f"loss and gradient at 32768 x 2048, {dtype}, against a copy of the same bytes"
    wanted = "at most 1.10 times the copy"
    for case in cases:
        copy = case["copy"]["forward_backward"]
        if case["name"] != f"power_spherical 32768x2048 2x2 {dtype}" or copy is None:
            continue
        ratios = {
            name: ratio(times, copy)
            for name in FUSED
            if (times := time_of(case, name, "forward_backward")) is not None
        }
        if ratios:
            figure = ", ".join(f"{name} {found.value:.2f}" for name, found in ratios.items())
            # One backend is enough: a noisy one matters only where no quiet one reaches it.
            reached = any(found.value <= 1.10 and not found.noisy for found in ratios.values())
            noise = not reached and any(found.noisy for found in ratios.values())
            return Target(what, wanted, figure, None if noise else reached, noise)
    return Target(what, wanted)


def _least(
    what: str,
    factor: float,
    cases: Sequence[_Results],
    baselines: Sequence[str],
    metric: str = "time",
) -> Target:
    what, wanted = (
        f"loss and gradient against {what}",
        f"at least {factor:g} times faster" if factor > 1 else "not slower",
    )
    found = [
        (faster, case_label(case))
        for case in cases
        if (faster := speed_up(case, baselines, "forward_backward", metric)) is not None
    ]
    return worst_of(
        what, wanted, found, holds=lambda value: value >= factor, shown="{:.2f} times", worst=min
    )


def _nowhere_slower(result: _Results | None, others: Sequence[str]) -> Target:
    """Slower counts where the quartile ranges do not touch: a difference within the noise is none."""
    what, wanted = (
        "fastest fused backend against every other provider, all cases, times and modes",
        "nowhere slower",
    )
    quiet, loud, slower = 0, 0, []
    for case, mode, metric in _timings(result):
        ours, theirs = fastest(case, FUSED, mode, metric), fastest(case, others, mode, metric)
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
    holds = (
        [(False, False)] * len(slower)
        + [(True, False)] * (quiet - len(slower))
        + [(True, True)] * loud
    )
    return of_all(what, wanted, figure, holds)


def _agreement(result: _Results | None) -> Target:
    what, wanted = "Triton against CUDA, loss and gradient at the telling cases", "within 10 %"
    telling = {case.name for case in cases_for("cuda", short=True)}
    found = []
    for case in result["cases"] if result is not None else []:
        triton, cuda = (time_of(case, name, "forward_backward") for name in ("triton", "cuda"))
        if case["name"] in telling and triton is not None and cuda is not None:
            apart = ratio(triton, cuda)
            found.append((apart, f"Triton / CUDA {apart.value:.2f} at {case_label(case)}"))
    if not found:
        return Target(what, wanted)

    def distance(each: tuple[Ratio, str]) -> tuple[float, str]:
        return max(each[0].value, 1 / each[0].value), each[1]

    _, where = max([each for each in found if not each[0].noisy] or found, key=distance)
    holds = ((distance(each)[0] <= 1.10, each[0].noisy) for each in found)
    return of_all(what, wanted, f"farthest apart: {where}", holds)


def _timings(result: _Results | None) -> Iterable[tuple[_Results, str, str]]:
    cases = [] if result is None else result["cases"]
    return ((case, mode, metric) for case in cases for mode in MODES for metric in ("time", "host"))
