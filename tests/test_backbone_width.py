"""The width of a backbone's features is found without computing any, where that is possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vi_simsiam import from_pretrained
from vi_simsiam.backbones import build_backbone
from vi_simsiam.config import AugmentConfig, ModelConfig, TrainConfig
from vi_simsiam.errors import InputError
from vi_simsiam.export import load_safetensors
from vi_simsiam.export.folder import title
from vi_simsiam.export.formats import portable
from vi_simsiam.models import build_model
from vi_simsiam.other_backbones import pooled_width

HEADS = {"dim": 16, "projector_hidden": 16, "predictor_hidden": 16}
seen: list[tuple[str, int]] = []


class Pooled(nn.Module):
    """Writes down where its images are, and keeps a tensor from one call to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.kept: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        seen.append((images.device.type, images.shape[-1]))
        if self.kept is None:
            self.kept = torch.ones(4, device=images.device)
        return self.first(images).mean((2, 3)) * self.kept


class Reading(Pooled):
    """Reads a value while it is built, and another one in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.linspace(0, 1, 3)[1].item()

    def forward(self, images: Tensor) -> Tensor:
        features = super().forward(images)
        return features if features.sum().item() > 0 else features * self.scale


def test_a_width_is_found_without_computing_features() -> None:
    network = Pooled().train()
    seen.clear()
    assert pooled_width(network, "pooled", (3000, 16)) == 4
    assert seen == [("meta", 3000), ("meta", 16)]
    assert network.training
    assert network.kept is None
    assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 4)


def test_a_network_that_reads_values_is_run() -> None:
    network = Reading().train()
    seen.clear()
    assert pooled_width(network, "reading", (16,)) == 4
    assert ("cpu", 16) in seen
    assert network.training


def exported(place: Path, backbone: str, **views: Any) -> Path:
    """A file as `vi-simsiam export` writes it, with these settings of the views."""
    parts = ModelConfig(backbone, **HEADS)
    config = TrainConfig(model=parts, augment=AugmentConfig(size=32))
    weights = build_model(config).state_dict()
    plain = portable(config)
    plain["augment"] |= views
    save_file(weights, place / "model.safetensors", {"config": json.dumps(plain)})
    return place


def test_a_file_with_an_edited_size_is_opened_without_computing(tmp_path: Path) -> None:
    """Two images of a million pixels a side would take 24 TB."""
    encoder = from_pretrained(exported(tmp_path, "timm:test_resnet", size=10**6), device="cpu")
    assert encoder.config.augment.size == 10**6
    with pytest.raises(InputError, match="cannot take views of 999 pixels"):
        from_pretrained(exported(tmp_path, "timm:test_vit", size=999), device="cpu")


def test_a_module_that_reads_values_while_it_is_built_is_opened(tmp_path: Path) -> None:
    model = load_safetensors(exported(tmp_path, f"module:{__name__}.Reading"))
    assert isinstance(model.backbone, Reading)
    assert model.backbone.first.weight.device.type == "cpu"
    with torch.device("meta"):
        network, features = build_backbone(f"module:{__name__}.Reading", sizes=(16,))
    assert (network.first.weight.device.type, features) == ("meta", 4)


def test_the_title_of_fitted_distributions() -> None:
    fitted = TrainConfig(model=ModelConfig("timm:test_vit", projector="standardised"))
    assert title(fitted) == "timm:test_vit with distributions by VI-SimSiam"
    assert title(TrainConfig()) == "resnet18 by VI-SimSiam"
    assert title(TrainConfig(method="simsiam")) == "resnet18 by SimSiam"
