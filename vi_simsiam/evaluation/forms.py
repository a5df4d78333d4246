"""Forms of a run's result files, with the ranges that figures and tables rely on."""

from __future__ import annotations

from typing import Annotated, NotRequired, TypedDict

from vi_simsiam.checks import Rule
from vi_simsiam.evaluation.corruptions import LEVELS

_ROUNDING = 1e-6
_MOST = 100

Share = Annotated[
    float, Rule(lambda x: -_ROUNDING <= x <= 1 + _ROUNDING, "a share between 0 and 1")
]
Cosine = Annotated[float, Rule(lambda x: abs(x) <= 1 + _ROUNDING, "between -1 and 1")]
Count = Annotated[int, Rule(lambda x: 0 <= x < 2**53, "a number of at least 0")]
Label = Annotated[str, Rule(lambda x: len(x) <= 255, "at most 255 characters long")]
"""A name that a table or a figure shows."""
Text = Annotated[str, Rule(lambda x: len(x) <= 4096, "at most 4096 characters long")]
_FEW = Rule(lambda x: len(x) <= _MOST, f"at most {_MOST} entries")
_Figure = Share | None


class Settings(TypedDict):
    """Settings of an evaluation; others are shown as they are."""

    k: NotRequired[Count | None]
    inferred: NotRequired[list[Label] | None]
    notes: NotRequired[list[Text]]


class Accuracies(TypedDict):
    """knn.json, linear.json and logistic.json: shares by encoder."""

    step: NotRequired[Count]
    top1: Annotated[dict[Label, Share], _FEW]
    top5: NotRequired[Annotated[dict[Label, Share], _FEW] | None]
    held_out_top1: NotRequired[Annotated[dict[Label, Share], _FEW] | None]
    moved_top1: NotRequired[Annotated[dict[Label, Share], _FEW] | None]
    few_labels_top1: NotRequired[Annotated[dict[Label, Share], _FEW] | None]
    train_images: NotRequired[Count]
    val_images: NotRequired[Count]
    settings: NotRequired[Settings | None]
    versions: NotRequired[Annotated[dict[Label, Label | None], _FEW] | None]


class _Bin(TypedDict):
    expected: Cosine
    observed: Cosine
    count: Count


class _Calibration(TypedDict):
    pairs: Count
    expected: Cosine
    observed: Cosine
    error: Annotated[float, Rule(lambda x: 0 <= x <= 2 + _ROUNDING, "between 0 and 2")]
    bins: Annotated[list[_Bin], Rule(lambda x: 0 < len(x) <= _MOST, f"1 to {_MOST} bins")]


class _Errors(TypedDict):
    auroc: Share | None
    aurc: Share | None
    augrc: NotRequired[_Figure]


class _Area(TypedDict):
    aurc: Share
    augrc: NotRequired[_Figure]


class _Curve(TypedDict):
    coverage: list[Share]
    risk: list[Share]


_CURVE = Rule(lambda x: len(x["coverage"]) == len(x["risk"]), "as many risks as coverages")
_KAPPA = Rule(lambda x: "kappa" in x and len(x) <= _MOST, f"up to {_MOST} scores with kappa")


class _Misclassification(TypedDict):
    classifier: Label
    accuracy: Share
    scores: Annotated[dict[Label, _Errors], _KAPPA]
    oracle: _Area
    random: _Area
    risk_coverage: dict[Label, Annotated[_Curve, _CURVE]]


_CURVES = Rule(
    lambda x: x["scores"].keys() <= x["risk_coverage"].keys(), "a curve of risks for every score"
)


class _Retrieval(TypedDict):
    seen_classes: bool
    recall_at_1: Share
    scores: Annotated[dict[Label, Share | None], _FEW]


class _Detection(TypedDict):
    auroc: Share | None
    aupr: NotRequired[_Figure]
    fpr95: NotRequired[_Figure]


class _Foreign(TypedDict):
    kind: Label
    images: Count
    scores: Annotated[dict[Label, _Detection], _KAPPA]


_DAMAGED = Rule(lambda x: len(x) == len(LEVELS) - 1, f"{len(LEVELS) - 1} values, one for a level")


class _Trend(TypedDict):
    spearman: Cosine | None
    monotone: Share | None
    aurocs: NotRequired[Annotated[list[Share], _DAMAGED]]


_Kappas = Annotated[
    list[Annotated[float, Rule(lambda x: x >= 0, "at least 0")]],
    Rule(lambda x: len(x) == len(LEVELS), f"{len(LEVELS)} values, one for each level"),
]


class _Corruption(TypedDict):
    levels: Annotated[list[int], Rule(lambda x: x == list(LEVELS), f"{list(LEVELS)}")]
    median_kappa: _Kappas
    scores: Annotated[dict[Label, _Trend], _KAPPA]


_SAME_SCORES = Rule(
    lambda x: len(x) <= _MOST and len({frozenset(part["scores"]) for part in x.values()}) <= 1,
    f"at most {_MOST} corruptions with the same scores",
)


class Uncertainty(TypedDict):
    """uncertainty.json."""

    step: NotRequired[Count]
    data: Text
    images: Count
    settings: Settings
    scores: Annotated[dict[Label, Text], _FEW]
    calibration: _Calibration | None
    misclassification: Annotated[_Misclassification, _CURVES] | None
    retrieval: Annotated[dict[Label, _Retrieval], _FEW] | None
    ood: Annotated[dict[Label, _Foreign], Rule(lambda x: len(x) <= 20, "at most 20 sets")]
    corruptions: Annotated[dict[Label, _Corruption], _SAME_SCORES]
    versions: NotRequired[Annotated[dict[Label, Label | None], _FEW] | None]
