"""The speeds that input pipeline, step and training are meant to reach, each with its figure or "not measured"."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vi_simsiam.text import counted

from .noise import Ratio, noisy, ratio
from .targets import Target, of_all, worst_of

_Results = dict[str, Any]

OURS, LIGHTLY = "vi-simsiam", "lightly"
STEP, AT_HAND, NETWORK = "step", "step on views at hand", "network alone"
COMPILED, KERNELS = "network alone, torch.compile", "network alone, kernels"
GIGABYTE = 1e9
_IMAGENETTE = 9_469
"""Its training images: a training on fewer says nothing of the target."""


def times_of(case: _Results, provider: str) -> dict[str, float] | None:
    """Quartiles of a provider on a case; None where it has none, which includes every wrong result."""
    found = case["providers"].get(provider)
    return None if found is None or not found["correct"] else found.get("time")


def median_of(case: _Results, provider: str) -> float | None:
    """Median microseconds of a provider on a case; None where it has none."""
    found = times_of(case, provider)
    return None if found is None else float(found["median_us"])


def speed_up(case: _Results, ours: str, theirs: str) -> Ratio | None:
    """How many times faster `ours` is than `theirs`."""
    own, other = times_of(case, ours), times_of(case, theirs)
    return ratio(other, own) if own is not None and other is not None else None


def floor_of(case: _Results) -> str:
    """The network alone, with the layers that training uses."""
    return KERNELS if KERNELS in case["providers"] else NETWORK


def exposed_share(case: _Results) -> Ratio | None:
    """Share of the step that the augmentation makes it longer by."""
    exposed, whole = case["phases"]["exposed augmentation"], times_of(case, STEP)
    if exposed is None or whole is None:
        return None
    return Ratio(exposed / whole["median_us"], noisy(whole, times_of(case, AT_HAND)))


def pipeline_targets(result: _Results) -> list[Target]:
    """The targets of the benchmark and device that the result is from; there may be none."""
    on_gpu = result["device_type"] == "cuda"
    if result["benchmark"] == "train":
        return train_targets(result) if on_gpu else cpu_targets(result)
    return (
        {"augment": augment_targets, "step": step_targets}[result["benchmark"]](result)
        if on_gpu
        else []
    )


def augment_targets(result: _Results | None) -> list[Target]:
    """Views a second on an H200."""
    return [
        _views(
            result,
            f"2x{size} batch 64",
            factor,
            f"views/s at 2x{size}, batch 64, against lightly's",
        )
        for size, factor in ((128, 10), (224, 5))
    ]


def step_targets(result: _Results | None) -> list[Target]:
    """The step on an H200, over all cases."""
    return [
        _worst(
            result,
            "training step against the same network's forward and backward alone, same kernels",
            "at most 1.05 times",
            1.05,
            lambda case: speed_up(case, floor_of(case), STEP),
            "{:.2f} times",
        ),
        worst_of(
            "forward and backward of the network alone, with our kernels, against torch.compile",
            "at least 1.3 times faster",
            [
                (faster, case["label"])
                for case in _cases(result)
                if (faster := speed_up(case, KERNELS, COMPILED))
            ],
            holds=lambda each: each >= 1.3,
            shown="{:.2f} times",
            worst=min,
            cases=len(list(_cases(result))),
        ),
        _worst(
            result, "exposed augmentation", "at most 2 % of the step", 0.02, exposed_share, "{:.1%}"
        ),
    ]


def train_targets(result: _Results | None) -> list[Target]:
    """200 epochs of ImageNette-128, 2x128, batch 64 on an H200."""
    found = next(
        (
            case["providers"].get(OURS)
            for case in _cases(result)
            if "imagenette" in case["data"]
            and case["view_label"] == "2x128"
            and (case["batch"], case["epochs"]) == (64, 200)
            and case["images"] >= _IMAGENETTE
        ),
        None,
    )
    where = "200 epochs of ImageNette-128, 2x128, batch 64"
    seconds = "{:.0f} s"
    return [
        _figure(
            found,
            f"{where}: training",
            "at most 120 s",
            120,
            lambda x: x["training_seconds"],
            seconds,
        ),
        _figure(
            found, f"{where}: cold start and kNN evaluation", "at most 45 s", 45, _beside, seconds
        ),
        _figure(
            found,
            f"{where}: peak memory beside the images",
            "at most 2.5 GB",
            2.5 * GIGABYTE,
            lambda x: x["peak_bytes"],
            lambda value: f"{value / GIGABYTE:.2f} GB",
            timed=False,
        ),
    ]


def cpu_targets(result: _Results | None) -> list[Target]:
    """Training on two CPU cores; of several the longest counts."""
    what, wanted = (
        "views/s of whole trainings at CIFAR-10, 2x32, against lightly's",
        "at least 1.5 times",
    )
    mine = f"{OURS}, method simsiam"
    found = [
        case
        for case in _cases(result)
        if case["data"] == "cifar10"
        and case["view_label"] == "2x32"
        and speed_up(case, mine, LIGHTLY) is not None
    ]
    if found:
        longest = max(found, key=lambda case: case["images"] * case["epochs"])
        faster = speed_up(longest, mine, LIGHTLY)
        assert faster is not None
        own, other = (
            f"{longest['providers'][name]['views_per_second']:,.0f}" for name in (mine, LIGHTLY)
        )
        extent = f"{counted(longest['epochs'], 'epoch')} of {counted(longest['images'], 'image')}"
        figure = f"{faster.value:.2f} times ({own} and {other}; {extent})"
        return [of_all(what, wanted, figure, [(faster.value >= 1.5, faster.noisy)])]
    return [Target(what, wanted)]


def gpu_targets(
    augment: _Results | None, step: _Results | None, train: _Results | None
) -> list[Target]:
    """All targets for an H200."""
    return [*augment_targets(augment), *step_targets(step), *train_targets(train)]


def _cases(result: _Results | None) -> Iterable[_Results]:
    return [] if result is None else result["cases"]


def _views(result: _Results | None, name: str, factor: float, what: str) -> Target:
    wanted = f"at least {factor:g} times"
    for case in _cases(result):
        if case["name"] == name and (faster := speed_up(case, OURS, LIGHTLY)) is not None:
            return of_all(
                what, wanted, f"{faster.value:.1f} times", [(faster.value >= factor, faster.noisy)]
            )
    return Target(what, wanted)


def _worst(
    result: _Results | None,
    what: str,
    wanted: str,
    limit: float,
    value: Callable[[_Results], Ratio | None],
    shown: str,
) -> Target:
    found = [
        (figure, case["label"]) for case in _cases(result) if (figure := value(case)) is not None
    ]
    cases = len(list(_cases(result)))
    return worst_of(what, wanted, found, holds=lambda each: each <= limit, shown=shown, cases=cases)


def _figure(
    found: _Results | None,
    what: str,
    wanted: str,
    limit: float,
    value: Callable[[_Results], float | None],
    shown: str | Callable[[float], str],
    *,
    timed: bool = True,
) -> Target:
    figure = value(found) if found is not None and found["correct"] else None
    if figure is None:
        return Target(what, wanted)
    text = shown.format(figure) if isinstance(shown, str) else shown(figure)
    return of_all(
        what,
        wanted,
        text,
        [(figure <= limit, timed and found is not None and noisy(found["time"]))],
    )


def _beside(found: _Results) -> float | None:
    """Seconds of cold start and last evaluation."""
    cold, evaluation = found["cold_start_seconds"], found["evaluation_seconds"]
    return None if cold is None or evaluation is None else float(cold) + float(evaluation)
