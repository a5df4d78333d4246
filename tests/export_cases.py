"""Runs to export: torchvision networks whose weights all matter, in memory or as a folder."""

from __future__ import annotations

import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from vi_simsiam.config import AugmentConfig, LossConfig, Method, ModelConfig, Stem, TrainConfig
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.engine.checkpoint import write_json
from vi_simsiam.engine.run import Run
from vi_simsiam.models import build_model

SIZE = 16
CPU = torch.device("cpu")
_embedded_images = cache(partial(open_dataset, "fashion-mini"))


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
    return Run(folder, config, model.eval(), _embedded_images(), CPU, 0)


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
