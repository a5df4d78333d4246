"""Small runs on disk and folders of images for the inference tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vi_simsiam.config import AugmentConfig, Method, ModelConfig, TrainConfig
from vi_simsiam.engine.checkpoint import Checkpoint, write_json
from vi_simsiam.models import build_model

SIZE = 16
DIM = 12
ON_CPU = ["--device", "cpu", "--workers", "1"]


def save_run(folder: Path, method: Method = "vi-simsiam") -> Path:
    """An untrained ResNet-18 with the files of a run, whose training data is missing."""
    folder.mkdir(parents=True)
    config = TrainConfig(
        method=method,
        data="folder:/gone",
        augment=AugmentConfig(size=SIZE),
        model=ModelConfig(dim=DIM, projector_hidden=8, predictor_hidden=8),
    )
    torch.manual_seed(5)
    model = build_model(config)
    if method == "vi-simsiam":
        with torch.no_grad():  # concentrations that differ visibly between images
            last = model.predictor[-1]
            assert isinstance(last, torch.nn.Linear)
            last.weight[DIM] = 2000 * last.weight[DIM].abs()
    write_json(folder / "config.json", config.to_dict())
    Checkpoint(1, 0.0, 1, model.state_dict(), {}).save(folder / "checkpoint.pt")
    return folder


def save_images(folder: Path, count: int, *, seed: int = 0) -> list[Path]:
    """Random images of several shapes, number 1 gray, number 2 with alpha; sorted paths."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = []
    for i in range(count):
        coarse = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((20 + i % 5, 17 + i % 3), Image.Resampling.BICUBIC)
        image = image.convert({1: "L", 2: "RGBA"}.get(i, "RGB"))
        paths.append(folder / f"{i:03d}.png")
        image.save(paths[-1])
    return paths
