"""Forms of the result files of the benchmarks, with the ranges that tables and plots rely on."""

from __future__ import annotations

import re
from typing import Annotated, Any, NotRequired, TypedDict

from vi_simsiam.checks import NOT_NEGATIVE, POSITIVE, Rule, at_least

_Label = Annotated[str, Rule(lambda x: len(x) <= 255, "at most 255 characters long")]
_Failure = Annotated[str, Rule(lambda x: len(x) <= 4096, "at most 4096 characters long")]
_Count = Annotated[int, at_least(1)]
_Version = Annotated[
    str, Rule(lambda x: re.fullmatch(r"[a-z]+|\d{1,4}(\.\d{1,4})*", x), "a version")
]
_Figure = Annotated[float, NOT_NEGATIVE] | None
_FEW = Rule(lambda x: len(x) <= 100, "at most 100 of them")


class _Times(TypedDict):
    median_us: Annotated[float, POSITIVE]
    lower_us: Annotated[float, NOT_NEGATIVE]
    upper_us: Annotated[float, NOT_NEGATIVE]


class _Mode(TypedDict):
    time: NotRequired[_Times | None]
    host: NotRequired[_Times | None]
    failure: NotRequired[_Failure | None]
    bytes_per_second: NotRequired[_Figure]
    copy_share: NotRequired[Annotated[float, POSITIVE] | None]
    peak_bytes: NotRequired[_Figure]


class _WithModes(TypedDict):
    correct: bool
    failure: _Failure | None
    gradient_error: NotRequired[_Figure]
    forward: _Mode | None
    forward_backward: _Mode | None


class _Copy(TypedDict):
    forward: _Times | None
    forward_backward: _Times | None


class _Bytes(TypedDict):
    forward: _Count
    forward_backward: _Count


class _LossCase(TypedDict):
    name: _Label
    label: NotRequired[_Label]
    distribution: _Label
    batch: _Count
    dim: _Count
    views: _Count
    targets: _Count
    dtype: _Label
    copy: _Copy
    least_bytes: _Bytes
    providers: Annotated[dict[_Label, _WithModes], _FEW]


class _NormCase(TypedDict):
    name: _Label
    label: _Label
    copy: _Copy
    least_bytes: NotRequired[_Bytes]
    providers: Annotated[dict[_Label, _WithModes], _FEW]


class _Provider(TypedDict):
    correct: bool
    failure: _Failure | None
    time: NotRequired[_Times | None]
    views_per_second: NotRequired[_Figure]
    error: NotRequired[dict[_Label, _Figure] | None]
    mean: NotRequired[float]
    std: NotRequired[float]
    mfu: NotRequired[_Figure]
    losses: NotRequired[list[float] | None]
    training_seconds: NotRequired[_Figure]
    cold_start_seconds: NotRequired[_Figure]
    evaluation_seconds: NotRequired[_Figure]
    caching_seconds: NotRequired[_Figure]
    seconds_to_target: NotRequired[_Figure]
    knn_top1: NotRequired[_Figure]
    peak_bytes: NotRequired[_Figure]


def _has_rates(providers: dict[str, Any]) -> bool:
    timed = (each for each in providers.values() if each.get("time") is not None)
    return all(each.get("views_per_second") is not None for each in timed)


_RATES = Rule(_has_rates, "entries with views_per_second where they have a time")


class _AugmentCase(TypedDict):
    name: _Label
    label: _Label
    yardstick: NotRequired[_Label]
    providers: Annotated[dict[_Label, _Provider], _FEW, _RATES]


class _Launch(TypedDict):
    kind: _Label
    name: str
    count: Annotated[int, NOT_NEGATIVE]
    us: Annotated[float, NOT_NEGATIVE]


class _StepCase(TypedDict):
    name: _Label
    label: _Label
    yardstick: NotRequired[_Label]
    phases: Annotated[dict[_Label, float | None], _FEW]
    launches: NotRequired[dict[_Label, list[_Launch]] | None]
    providers: Annotated[dict[_Label, _Provider], _FEW]


class _TrainCase(_AugmentCase):
    view_label: _Label
    data: _Label
    batch: _Count
    images: _Count
    epochs: _Count
    workers: Annotated[int, NOT_NEGATIVE]
    target_accuracy: _Figure


class _Head(TypedDict):
    device_type: _Label
    device: _Label
    processor: _Label
    driver: NotRequired[_Label | None]
    date: _Label
    versions: dict[_Label, _Label | None]


class _Loss(_Head):
    cases: list[_LossCase]


class _Norm(_Head):
    cases: Annotated[list[_NormCase], Rule(lambda x: len(x) <= 1000, "at most 1000 cases")]


class _Augment(_Head):
    data: _Label
    workers: Annotated[int, NOT_NEGATIVE]
    cases: Annotated[list[_AugmentCase], _FEW]


class _Step(_Head):
    cases: Annotated[list[_StepCase], _FEW]


class _Train(_Head):
    cases: Annotated[list[_TrainCase], _FEW]


class _Errors(TypedDict):
    value: Annotated[float, NOT_NEGATIVE]
    derivative: Annotated[float, NOT_NEGATIVE]


class _Accuracy(_Head):
    dim: _Count
    kappas: list[float]
    providers: dict[_Label, _Failure | list[_Errors]]


class _Cell(TypedDict):
    python: _Version
    torch: _Version
    date: _Label
    commit: _Label | None
    versions: Annotated[dict[_Label, _Label], _FEW]
    passed: Annotated[int, NOT_NEGATIVE]
    skipped: Annotated[int, NOT_NEGATIVE]
    failed: list[_Failure]
    problem: _Failure | None


class _Matrix(TypedDict):
    benchmark: str
    platform: _Label
    cases: Annotated[list[_Cell], Rule(lambda x: 1 <= len(x) <= 100, "1 to 100 of them")]


FORMS: dict[str, Any] = {
    "multiview_loss": _Loss,
    "batch_norm": _Norm,
    "augment": _Augment,
    "step": _Step,
    "train": _Train,
    "accuracy": _Accuracy,
    "matrix": _Matrix,
}
"""By benchmark."""
