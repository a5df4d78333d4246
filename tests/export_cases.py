"""Runs to export: torchvision networks whose weights all matter, in memory or as a folder."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from vi_simsiam.config import AugmentConfig, LossConfig, Method, ModelConfig, Stem, TrainConfig
from vi_simsiam.data.datasets import Splits, open_dataset
from vi_simsiam.engine.checkpoint import Checkpoint, write_json
from vi_simsiam.engine.run import Run
from vi_simsiam.models import build_model

SIZE = 16
CPU = torch.device("cpu")


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
    return Run(folder, config, model.eval(), embedded_images(), CPU, 0)


@cache
def embedded_images() -> Splits:
    """The embedded images, unpacked once."""
    return open_dataset("fashion-mini")


def largest(found: object, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((torch.as_tensor(found) - expected).abs().max() / expected.abs().max())


def save(run: Run) -> Path:
    """Write a run's checkpoint and a line of its log; returns the folder."""
    Checkpoint(7, 1.0, 8_000, run.model.state_dict(), {}).save(run.path / "checkpoint.pt")
    (run.path / "metrics.jsonl").write_text('{"step": 7, "epoch": 0.5, "loss": -0.25}\n')
    return run.path


def code_blocks(card: str) -> list[str]:
    """All Python of a card, block by block."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def run_code(code: list[str]) -> dict[str, Any]:
    """The names that blocks of code define, run one after the other."""
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    return names
