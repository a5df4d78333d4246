"""The concentration beside the best of the other scores, in every part of an uncertainty.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vi_simsiam.evaluation.scores import TRIVIAL

_Figures = dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """One measure of the concentration and of the best scores of two kinds; higher is better."""

    part: str
    measure: str
    kappa: float | None
    baseline: str | None
    """The best score of `TRIVIAL`."""
    value: float | None
    """Its measure."""
    other: str | None = None
    """The best of the scores that need labels, training images or more passes."""
    other_value: float | None = None
    """Its measure."""

    @property
    def gap(self) -> float | None:
        """Lead of the concentration over the baseline; None if one of them is not defined."""
        return None if self.kappa is None or self.value is None else self.kappa - self.value

    @property
    def ahead(self) -> bool | None:
        """True if the concentration does better; None if it or the baseline is not defined."""
        return None if self.gap is None else self.gap > 0


def comparisons(result: dict[str, Any]) -> list[Comparison]:
    """Rows of an uncertainty.json: the concentration and the scores that do best in the same part.

    The best of several scores on the images that they are compared on has the advantage of the
    choice. Where none is defined, its name and value are None.
    """
    parts: list[tuple[str, str, _Figures]] = []
    if result["misclassification"] is not None:
        parts.append(("misclassification", "AUROC", _figures(result["misclassification"], "auroc")))
    for name, part in (result["retrieval"] or {}).items():
        parts.append((f"retrieval: {name}", "R-AUROC", part["scores"]))
    for name, part in result["ood"].items():
        parts.append((f"{name} ({part['kind']})", "AUROC", _figures(part, "auroc")))
    for kind, part in result["corruptions"].items():
        parts.append((f"corruption: {kind}", "Spearman", _figures(part, "spearman")))
    rows = []
    for name, measure, figures in parts:
        others = [score for score in figures if score != "kappa" and score not in TRIVIAL]
        best = (*_best(figures, TRIVIAL), *_best(figures, others))
        rows.append(Comparison(name, measure, figures.get("kappa"), *best))
    return rows


def _figures(part: dict[str, Any], key: str) -> _Figures:
    return {score: values[key] for score, values in part["scores"].items()}


def _best(figures: _Figures, names: Iterable[str]) -> tuple[str, float] | tuple[None, None]:
    defined = [(name, value) for name in names if (value := figures.get(name)) is not None]
    return max(defined, key=lambda pair: pair[1]) if defined else (None, None)
