"""Small runs and feature sets for the evaluation tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from vi_simsiam.config import AugmentConfig, Method, ModelConfig, TrainConfig
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.engine.run import Run
from vi_simsiam.evaluation import figures, uncertainty_figures
from vi_simsiam.evaluation.corruptions import MAGNITUDES
from vi_simsiam.evaluation.features import FeatureSets
from vi_simsiam.evaluation.scores import DESCRIPTIONS
from vi_simsiam.files import write_atomically, write_json
from vi_simsiam.models import SimSiam, VISimSiam

CPU = torch.device("cpu")
SIZE = 8


def gray_source(
    count: int, *, classes: int = 2, labelled: bool = True, name: str = "gray", side: int = SIZE
) -> ArraySource:
    """Image i is uniformly gray; brightness rises with i, in `classes` equal steps of labels."""
    levels = np.linspace(10, 240, count).astype(np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (count, side, side, 3)).copy()
    labels = np.arange(count) * classes // count
    names = [f"class {i}" for i in range(classes)]
    return ArraySource(images, labels if labelled else None, names if labelled else None, name)


class TinyBackbone(nn.Module):
    """Mean colour through a linear layer, BatchNorm and dropout: its modes differ."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(4, 3, generator=generator))
            self.linear.bias.copy_(torch.randn(4, generator=generator))
            self.norm.running_mean.copy_(torch.randn(4, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(self.norm(self.linear(images.mean((2, 3)))))


def make_run(
    folder: Path,
    *,
    method: Method = "vi-simsiam",
    train: ArraySource | None = None,
    val: ArraySource | None = None,
    lines: int = 4,
) -> Run:
    """A run of a tiny model on gray images, with config.json and metrics.jsonl in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(method=method, augment=AugmentConfig(size=SIZE), model=ModelConfig(dim=8))
    write_json(folder / "config.json", config.to_dict())
    metrics = metric_lines(lines, kappa=method == "vi-simsiam")
    text = "".join(json.dumps(line) + "\n" for line in metrics)
    (folder / "metrics.jsonl").write_text(text)
    torch.manual_seed(3)
    kind = VISimSiam if method == "vi-simsiam" else SimSiam
    model = kind(TinyBackbone(), features=4, dim=8, projector_hidden=6, predictor_hidden=6).eval()
    splits, step = Splits("gray", train or gray_source(24), val), 10 * lines
    return Run(folder, config, model, splits, CPU, 0, step, step)


def skip_rendering(patch: pytest.MonkeyPatch) -> None:
    """Write blank images for figures: rendering takes the most time, and has its own tests."""

    def save(figure: Figure, path: Path, colours: int | None = None) -> Path:
        image = Image.new("RGB", (16, 7))
        write_atomically(path, lambda file: image.save(file, format="PNG"))
        return path

    for module in (figures, uncertainty_figures):
        patch.setattr(module, "save", save)


def metric_lines(count: int, *, kappa: bool) -> list[dict[str, float]]:
    """Metrics of a training with cosines rising to 0.9."""
    lines = []
    for i in range(count):
        share = (i + 1) / count
        line = {"step": 10 * (i + 1), "epoch": 2 * share, "loss": -share, "cosine": 0.9 * share}
        line |= {
            "z_std": 0.9,
            "effective_rank": 5 * share,
            "grad_norm": 1.0,
            "lr": 0.01 - share / 100,
        }
        lines.append({**line, "kappa": share, "kappa_best": 1.1 * share} if kappa else line)
    return lines


def feature_sets(
    path: Path, *, train: int = 60, val: int = 30, classes: int = 3, noise: float = 0.1
) -> FeatureSets:
    """Clusters around unit vectors for "trained", noise alone for the others."""
    generator = np.random.default_rng(0)

    def draw(labels: NDArray[np.int64], spread: float) -> Tensor:
        points = np.eye(8)[labels] * (spread < 1) + spread * generator.normal(size=(len(labels), 8))
        return torch.from_numpy(points.astype(np.float32))

    labels = {"train": np.arange(train) % classes, "val": np.arange(val) % classes}
    names = ("trained", "untrained", "pixels")
    sets = {
        split: {name: draw(y, noise if name == "trained" else 1.0) for name in names}
        for split, y in labels.items()
    }
    return FeatureSets(
        path=path,
        data="clusters",
        classes=tuple("abcdefgh"[:classes]),
        train=sets["train"],
        train_labels=torch.from_numpy(labels["train"]),
        val=sets["val"],
        val_labels=torch.from_numpy(labels["val"]),
        device=CPU,
        step=40,
    )


def uncertainty_result(data: str = "fashion-mini") -> dict[str, Any]:
    """An uncertainty.json with every part, of numbers that are made up."""
    draw = np.random.default_rng(0)

    def drawn(*keys: str) -> dict[str, dict[str, float]]:
        return {name: {key: float(draw.random()) for key in keys} for name in DESCRIPTIONS}

    def retrieval(seen: bool) -> dict[str, Any]:
        aurocs = {name: float(draw.random()) for name in DESCRIPTIONS}
        return {"seen_classes": seen, "recall_at_1": 0.31, "scores": aurocs}

    coverage, cosines = np.linspace(0.02, 1, 50), (np.arange(10) / 10).tolist()
    sets = (("held-out", "near", 400), ("noise", "far", 500), ("mine", "given", 73))
    return {
        "evaluation": "uncertainty",
        "data": data,
        "dim": 512,
        "images": 2000,
        "settings": {"seed": 0, "corruption_images": 200},
        "scores": DESCRIPTIONS,
        "calibration": {
            "pairs": 3450,
            "expected": 0.45,
            "observed": 0.5,
            "error": 0.03,
            "bins": [
                {"expected": cosine, "observed": cosine**2, "count": 300 + i}
                for i, cosine in enumerate(cosines)
            ],
        },
        "misclassification": {
            "classifier": "logistic",
            "accuracy": 0.745,
            "scores": drawn("auroc", "aurc", "augrc"),
            "oracle": {"aurc": 0.036, "augrc": 0.0325},
            "random": {"aurc": 0.255, "augrc": 0.1275},
            "risk_coverage": {
                name: {"coverage": coverage.tolist(), "risk": (draw.random() * coverage).tolist()}
                for name in DESCRIPTIONS
            },
        },
        "retrieval": {"validation": retrieval(True), "cifar10": retrieval(False)},
        "ood": {
            name: {"kind": kind, "images": images, "scores": drawn("auroc", "aupr", "fpr95")}
            for name, kind, images in sets
        },
        "corruptions": {
            kind: {
                "levels": list(range(6)),
                "median_kappa": draw.random(6).tolist(),
                "scores": {
                    name: {**figures, "aurocs": [0.5 + figures["monotone"] / 2] * 5}
                    for name, figures in drawn("spearman", "monotone").items()
                },
            }
            for kind in MAGNITUDES
        },
        "versions": {"vi-simsiam": "0.1.0", "torch": "2.14.1", "scikit-learn": "1.9.0"},
    }
