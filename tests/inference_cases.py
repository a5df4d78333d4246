"""Runs with random weights, in memory or in a folder, images, and the code of model cards."""

from __future__ import annotations

import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from vi_simsiam.config import AugmentConfig, LossConfig, Method, ModelConfig, Stem, TrainConfig
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.engine.checkpoint import Checkpoint
from vi_simsiam.engine.run import Run
from vi_simsiam.files import write_json
from vi_simsiam.models import build_model

SIZE = 16
DIM = 12
ON_CPU = ["--device", "cpu", "--workers", "1"]
_embedded_images = cache(partial(open_dataset, "fashion-mini"))


def save_run(folder: Path, method: Method = "vi-simsiam", seed: int = 5) -> Path:
    """An untrained ResNet-18 with the files of a run, whose training data is missing."""
    folder.mkdir(parents=True)
    config = TrainConfig(
        method=method,
        data="folder:/gone",
        seed=seed,
        augment=AugmentConfig(size=SIZE),
        model=ModelConfig(dim=DIM, projector_hidden=8, predictor_hidden=8),
    )
    torch.manual_seed(seed)
    model = build_model(config)
    if method == "vi-simsiam":
        with torch.no_grad():  # concentrations that differ visibly between images
            last = model.predictor[-1]
            assert isinstance(last, torch.nn.Linear)
            last.weight[DIM] = 2000 * last.weight[DIM].abs()
    write_json(folder / "config.json", config.to_dict())
    Checkpoint(1, 0.0, 1, model.state_dict(), {}).save(folder / "checkpoint-00000001.safetensors")
    return folder


def save_seeds(folder: Path, method: Method = "vi-simsiam", count: int = 3) -> Path:
    """Runs of seeds 5, 6, ..., as `train --seeds` leaves them, and one more that has failed."""
    for seed in range(5, 5 + count):
        save_run(folder / f"seed-{seed}", method, seed)
    runs = [{"seed": seed, "exit": int(seed == 5 + count)} for seed in range(5, 6 + count)]
    write_json(folder / "seeds.json", {"arguments": [], "runs": runs})
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


def network_run(
    folder: Path,
    backbone: str = "resnet18",
    *,
    stem: Stem = "imagenet",
    method: Method = "vi-simsiam",
    loss: LossConfig | None = None,
    ema: float | None = None,
) -> Run:
    """A run of a torchvision network on the embedded images, in memory.

    Its BatchNorm has random statistics and factors: fresh ones would hide a layer that was mixed up
    or left out, and the residual branches of a fresh network give zero.
    """
    config = TrainConfig(
        method=method,
        data="fashion-mini",
        augment=AugmentConfig(size=SIZE),
        model=ModelConfig(backbone, stem=stem, dim=8, projector_hidden=6, predictor_hidden=6),
        loss=loss or LossConfig(),
        ema=ema,
        data_root=folder / "a place of its own",
    )
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = build_model(config)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for values in (module.running_mean, module.running_var, *module.parameters()):
                values.data.uniform_(0.2, 1.0, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_dict())
    return Run(folder, config, model.eval(), _embedded_images(), torch.device("cpu"), 0, 1, 1)


def largest(found: object, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((torch.as_tensor(found) - expected).abs().max() / expected.abs().max())


def code_blocks(card: str) -> list[str]:
    """All Python of a card, block by block."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def run_code(code: list[str]) -> dict[str, Any]:
    """The names that blocks of code define, run one after the other."""
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    return names
