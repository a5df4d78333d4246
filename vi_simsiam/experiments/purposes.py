"""Scores of uncertainty by purpose: what each is worth, with one measure for all, the AUROC.

A purpose is to tell some images from others by a score that is higher for them; 0.5 is chance.

    refusing            images that the logistic probe gets wrong, from the others
    retrieval           images whose nearest neighbour has another class, from the others
    retrieval_unseen    the same among images of classes that were not trained on
    near, far           images of other data sets, like and unlike the own, from validation images
    damaged             blurred, noisy, faded and compressed images, from the intact ones
    covered             images of which 30 % or more are covered, from the intact ones
    empty               images of which 80 % or more have faded to grey, from the intact ones

Purposes and scores were fixed before the first run.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from vi_simsiam.data_names import FOREIGN_KINDS
from vi_simsiam.experiments.cells import arm_label, mean_sd
from vi_simsiam.experiments.statistics import estimate
from vi_simsiam.stages import NAMES as STAGES
from vi_simsiam.stages import RESNET
from vi_simsiam.text import counted, markdown_grid

PURPOSES = {
    "refusing": "refusing",
    "retrieval": "retrieval",
    "retrieval_unseen": "retrieval, unseen classes",
    "near": "foreign, near",
    "far": "foreign, far",
    "damaged": "damaged",
    "covered": "covered",
    "empty": "empty",
}
"""By name, the heads of tables and figures."""
_LEVELS = {
    "damaged": (("blur", "noise", "contrast", "jpeg"), 1),
    "covered": (("occlusion",), 3),
    "empty": (("blank",), 4),
}
"""Kinds of damage of a purpose, and the lowest level that counts."""
_LABELLED, _OF_LABELLED = ("softmax", "energy", "mahalanobis"), ("refusing", "near", "far")
"""Scores that need labels of the training images, and the purposes that they are compared for."""
_IN_RESNETS = f"{RESNET[-1]}_norm"
"""This score is "embedding_norm" there."""
_OF_FEATURES = (
    "embedding_norm",
    *(f"{name}_norm" for name in STAGES if f"{name}_norm" != _IN_RESNETS),
    "projection_norm",
    "knn_distance",
    "mahalanobis_label_free",
    "view_agreement",
)
_OF_PIXELS = ("edge_energy", "contrast", "jpeg_size")
_ON = "fitted"
SCORES = (
    ("vi-simsiam", "kappa"),
    (_ON, "kappa"),
    *((_ON, score) for score in (*_OF_FEATURES, *_OF_PIXELS, *_LABELLED)),
)
"""The arms and scores that the experiment "kappa" compares. The backbone of the arm `fitted` is
SimSiam's, so its other scores are those that SimSiam has without any concentration."""
_DIGITS = 2
_NOTE = (
    "AUROC, mean ± sd over seeds; 0.5 is chance, 1 the best. The scores without the name of an arm "
    f"are those of SimSiam's features, as the arm `{_ON}` has them, and of the pixels. Refusing: "
    "errors of the logistic probe. Retrieval: the nearest neighbour has another class. Foreign: "
    "images of other data sets against validation images; noise and digits are far. Damaged: blur, "
    "noise, contrast and JPEG at all levels against intact images; covered: occlusion from level 3 "
    "on; empty: blank from level 4 on."
)


def purposes(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """AUROCs of an uncertainty.json by purpose and score; several data sets count by their mean.

    A score has no entry where it was not measured on every set of a purpose, or has no AUROC.
    """
    errors, ood = result["misclassification"], result["ood"].values()
    retrieval, damage = (result["retrieval"] or {}).values(), result["corruptions"]
    parts: dict[str, list[dict[str, float | None]]] = {
        "refusing": [] if errors is None else [_aurocs(errors)],
        "retrieval": [part["scores"] for part in retrieval if part["seen_classes"]],
        "retrieval_unseen": [part["scores"] for part in retrieval if not part["seen_classes"]],
        **{kind: [_aurocs(part) for part in ood if part["kind"] == kind] for kind in FOREIGN_KINDS},
        **{
            purpose: [_of_damaged(damage[kind], least) for kind in kinds if kind in damage]
            for purpose, (kinds, least) in _LEVELS.items()
        },
    }
    return {purpose: _means(found) for purpose, found in parts.items() if found}


def _aurocs(part: dict[str, Any]) -> dict[str, float | None]:
    return {score: figures["auroc"] for score, figures in part["scores"].items()}


def _of_damaged(part: dict[str, Any], least: int) -> dict[str, float | None]:
    """The mean AUROC of every score over the levels of damage from `least` on."""
    scores = part["scores"].items()
    return {score: statistics.mean(trend["aurocs"][least - 1 :]) for score, trend in scores}


def _means(parts: list[dict[str, float | None]]) -> dict[str, float]:
    found = {score: [part.get(score) for part in parts] for score in parts[0]}
    whole = {score: [x for x in values if x is not None] for score, values in found.items()}
    return {
        score: statistics.mean(values)
        for score, values in whole.items()
        if len(values) == len(parts)
    }


def compared(
    scores: Iterable[tuple[str, str]], arms: Mapping[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The scores of a plan, with an `estimate` over seeds for every purpose.

    Args:
        scores: pairs of an arm and one of its scores.
        arms: results of the runs of every arm, on one data set.

    Returns:
        For every score that was measured for any purpose: "title", "labels" (True if it needs
        them), "kappa", "auroc" (estimates by purpose) and "runs" (their values by purpose).
    """
    rows = []
    for arm, score in scores:
        labels = score in _LABELLED
        runs = {
            purpose: [
                run["purposes"][purpose][score]
                for run in arms.get(arm, [])
                if score in run.get("purposes", {}).get(purpose, {})
            ]
            for purpose in PURPOSES
            if not labels or purpose in _OF_LABELLED
        }
        found = {purpose: estimate(values) for purpose, values in runs.items() if values}
        if found:
            is_kappa = score == "kappa"
            title = f"κ of {arm_label(arm)}" if is_kappa else score.replace("_", " ")
            row = {"title": title + " †" * labels, "labels": labels, "kappa": is_kappa}
            rows.append({**row, "auroc": found, "runs": runs})
    return rows


def shown_purposes(rows: list[dict[str, Any]]) -> list[str]:
    """The purposes that any score was measured for."""
    return [name for name in PURPOSES if any(name in row["auroc"] for row in rows)]


def purposes_markdown(found: dict[str, list[dict[str, Any]]]) -> str:
    """A table of `compared` scores for each data set, and how to read them; empty without any."""
    parts = [part for data, rows in found.items() if rows for part in (f"**{data}**", _grid(rows))]
    if not parts:
        return ""
    count = max(sum(not row["labels"] for row in rows) for rows in found.values())
    chosen = (
        f"Bold: the highest mean among the {counted(count, 'score')} without labels. It is chosen "
        "afterwards, which favours it: in other runs another may be best. † needs labels of the "
        "training images. Purposes and scores were fixed before any run; nothing is corrected for "
        "their number."
    )
    return "\n\n".join([*parts, _NOTE, chosen])


def _grid(rows: list[dict[str, Any]]) -> str:
    """A line for every score and a column for every purpose, whose highest figures are bold."""
    names = shown_purposes(rows)
    free = [row["auroc"] for row in rows if not row["labels"]]
    best = {name: max((_mean(each, name) for each in free), default=-1.0) for name in names}

    def cell(row: dict[str, Any], name: str) -> str:
        text = mean_sd(row["auroc"].get(name), 1, _DIGITS)
        is_best = not row["labels"] and _mean(row["auroc"], name) == best[name]
        return f"**{text}**" if is_best and text != "-" else text

    lines = [(row["title"], *(cell(row, name) for name in names)) for row in rows]
    return markdown_grid(("score", *(PURPOSES[name] for name in names)), lines)


def _mean(estimates: dict[str, Any], name: str) -> float:
    """The mean of a purpose as it is shown; less than any AUROC where it was not measured."""
    return round(estimates[name]["mean"], _DIGITS) if name in estimates else -1.0
