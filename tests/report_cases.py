"""An uncertainty.json with every part, with numbers that are made up and consistent."""

from __future__ import annotations

from typing import Any

import numpy as np

from vi_simsiam.evaluation.corruptions import MAGNITUDES
from vi_simsiam.evaluation.scores import DESCRIPTIONS

SCORES, KINDS = DESCRIPTIONS, tuple(MAGNITUDES)


def uncertainty_result(seed: int = 0, data: str = "fashion-mini") -> dict[str, Any]:
    """An uncertainty.json with all SCORES, three sets of foreign images and six corruptions."""
    draw = np.random.default_rng(seed)
    accuracy, coverage = 0.745, np.linspace(0.02, 1, 50)

    def auroc() -> dict[str, float]:
        return {name: float(draw.uniform(0.35, 0.95)) for name in SCORES}

    def trend() -> dict[str, float]:
        return {"spearman": float(draw.uniform(-0.6, 1)), "monotone": float(draw.uniform(0, 1))}

    held_out, noise, mine = ("held-out", "near", 400), ("noise", "far", 500), ("mine", "given", 73)
    misclassification = auroc()
    curves = {
        name: {
            "coverage": coverage.tolist(),
            "risk": ((1 - accuracy) * coverage ** (2 * value - 1)).tolist(),
        }
        for name, value in misclassification.items()
    }
    expected = np.sort(draw.uniform(0.2, 0.8, 10))
    observed = np.clip(expected + draw.normal(0, 0.03, 10), 0, 1)
    count = draw.integers(300, 500, 10)
    return {
        "evaluation": "uncertainty",
        "data": data,
        "dim": 512,
        "images": 2000,
        "settings": {"seed": 0, "corruption_images": 200},
        "scores": SCORES,
        "calibration": {
            "pairs": int(count.sum()),
            "expected": float(np.average(expected, weights=count)),
            "observed": float(np.average(observed, weights=count)),
            "error": float(np.average(np.abs(expected - observed), weights=count)),
            "bins": [
                {"expected": float(e), "observed": float(o), "count": int(n)}
                for e, o, n in zip(expected, observed, count, strict=True)
            ],
        },
        "misclassification": {
            "classifier": "logistic",
            "accuracy": accuracy,
            "scores": {
                name: {
                    "auroc": value,
                    "aurc": np.mean(curves[name]["risk"]),
                    "augrc": 0.3 - value / 4,
                }
                for name, value in misclassification.items()
            },
            "oracle": {"aurc": 0.036, "augrc": 0.0325},
            "random": {"aurc": 1 - accuracy, "augrc": (1 - accuracy) / 2},
            "risk_coverage": curves,
        },
        "retrieval": {
            "validation": {"seen_classes": True, "recall_at_1": 0.7, "scores": auroc()},
            "cifar10": {"seen_classes": False, "recall_at_1": 0.31, "scores": auroc()},
        },
        "ood": {
            name: {
                "kind": kind,
                "images": images,
                "scores": {
                    score: {"auroc": value, "aupr": 0.9 * value, "fpr95": 1 - value}
                    for score, value in auroc().items()
                },
            }
            for name, kind, images in (held_out, noise, mine)
        },
        "corruptions": {
            kind: {
                "levels": list(range(6)),
                "median_kappa": (
                    draw.uniform(0.4, 1.0) * np.exp(-draw.uniform(0, 0.4) * np.arange(6))
                ).tolist(),
                "scores": {name: trend() for name in SCORES},
            }
            for kind in KINDS
        },
        "versions": {"vi-simsiam": "0.1.0", "torch": "2.14.1", "scikit-learn": "1.9.0"},
    }
