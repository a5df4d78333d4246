"""Forms of the result files of the benchmarks, with the ranges that tables and plots rely on."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, NotRequired, TypedDict

from vi_simsiam.checks import NOT_NEGATIVE, POSITIVE, SEED, Rule, at_least
from vi_simsiam.evaluation.forms import Label, Share, Text
from vi_simsiam.experiments.forms import ProgressLine

_Count = Annotated[int, at_least(1)]
_Version = Annotated[
    str, Rule(lambda x: re.fullmatch(r"[a-z]+|\d{1,4}(\.\d{1,4})*", x), "a version")
]
_FINITE = Rule(math.isfinite, "a finite number")
_Figure = Annotated[float, NOT_NEGATIVE] | None
_FEW = Rule(lambda x: len(x) <= 100, "at most 100 of them")
_SOME = Rule(lambda x: 1 <= len(x) <= 100, "1 to 100 of them")
_Shares = Annotated[list[Share], _SOME]
_Counts = Annotated[list[Annotated[int, NOT_NEGATIVE]], _SOME]


class _Times(TypedDict):
    median_us: Annotated[float, POSITIVE]
    lower_us: Annotated[float, NOT_NEGATIVE]
    upper_us: Annotated[float, NOT_NEGATIVE]


class _Mode(TypedDict):
    time: NotRequired[_Times | None]
    host: NotRequired[_Times | None]
    failure: NotRequired[Text | None]
    bytes_per_second: NotRequired[_Figure]
    copy_share: NotRequired[Annotated[float, POSITIVE] | None]
    peak_bytes: NotRequired[_Figure]


class _WithModes(TypedDict):
    correct: bool
    failure: Text | None
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
    name: Label
    label: NotRequired[Label]
    distribution: Label
    batch: _Count
    dim: _Count
    views: _Count
    targets: _Count
    dtype: Label
    copy: _Copy
    least_bytes: _Bytes
    providers: Annotated[dict[Label, _WithModes], _FEW]


class _NormCase(TypedDict):
    name: Label
    label: Label
    copy: _Copy
    least_bytes: NotRequired[_Bytes]
    providers: Annotated[dict[Label, _WithModes], _FEW]


class _Provider(TypedDict):
    correct: bool
    failure: Text | None
    time: NotRequired[_Times | None]
    views_per_second: NotRequired[_Figure]
    error: NotRequired[dict[Label, _Figure] | None]
    mean: NotRequired[float]
    std: NotRequired[float]
    mfu: NotRequired[_Figure]
    losses: NotRequired[list[float] | None]
    training_seconds: NotRequired[_Figure]
    # Below 0 where later epochs took longer than the first.
    cold_start_seconds: NotRequired[Annotated[float, _FINITE] | None]
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
    name: Label
    label: Label
    yardstick: NotRequired[Label]
    providers: Annotated[dict[Label, _Provider], _FEW, _RATES]


class _Launch(TypedDict):
    kind: Label
    name: str
    count: Annotated[int, NOT_NEGATIVE]
    us: Annotated[float, NOT_NEGATIVE]


class _StepCase(TypedDict):
    name: Label
    label: Label
    yardstick: NotRequired[Label]
    phases: Annotated[dict[Label, float | None], _FEW]
    launches: NotRequired[dict[Label, list[_Launch]] | None]
    providers: Annotated[dict[Label, _Provider], _FEW]


class _TrainCase(_AugmentCase):
    view_label: Label
    data: Label
    batch: _Count
    images: _Count
    epochs: _Count
    workers: Annotated[int, NOT_NEGATIVE]
    target_accuracy: _Figure


class _Head(TypedDict):
    device_type: Label
    device: Label
    processor: Label
    driver: NotRequired[Label | None]
    date: Label
    versions: dict[Label, Label | None]


class _Loss(_Head):
    cases: list[_LossCase]


class _Norm(_Head):
    cases: Annotated[list[_NormCase], Rule(lambda x: len(x) <= 1000, "at most 1000 cases")]


class _Augment(_Head):
    data: Label
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
    providers: dict[Label, Text | list[_Errors]]


class _Kind(TypedDict):
    scores: Annotated[dict[Label, Text | _Shares], _FEW]
    found: _Shares
    false_alarms: _Counts
    clean: _Counts


class _CleanCase(TypedDict):
    name: Label
    images: _Count
    encoder: Label
    foreign: Label
    kinds: Annotated[dict[Label, _Kind], _SOME]


class _Clean(_Head):
    cases: Annotated[list[_CleanCase], _FEW]


class _RecordRun(TypedDict):
    seed: Annotated[int, SEED]
    progress: Annotated[list[ProgressLine], Rule(len, "at least one line")]


class _RecordCase(_Head):
    record: Label
    title: Label
    recipe: dict[Label, Any]
    data: Label
    commit: Label | None
    runs: Annotated[list[_RecordRun], Rule(len, "at least one run")]


class _Record(TypedDict):
    benchmark: str
    cases: list[_RecordCase]


class _Cell(TypedDict):
    python: _Version
    torch: _Version
    date: Label
    commit: Label | None
    versions: Annotated[dict[Label, Label], _FEW]
    passed: Annotated[int, NOT_NEGATIVE]
    skipped: Annotated[int, NOT_NEGATIVE]
    failed: list[Text]
    problem: Text | None


class _Matrix(TypedDict):
    benchmark: str
    platform: Label
    cases: Annotated[list[_Cell], _SOME]


FORMS: dict[str, Any] = {
    "multiview_loss": _Loss,
    "batch_norm": _Norm,
    "augment": _Augment,
    "step": _Step,
    "train": _Train,
    "accuracy": _Accuracy,
    "clean": _Clean,
    "record": _Record,
    "matrix": _Matrix,
}
"""By benchmark."""
