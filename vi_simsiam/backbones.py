"""torchvision's ResNets as backbones, and their ImageNet weights on this machine."""

from __future__ import annotations

import hashlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torchvision
from torch import nn

from vi_simsiam.config import Stem
from vi_simsiam.downloads import downloading
from vi_simsiam.errors import InputError, none_of
from vi_simsiam.normalisation import PerViewBatchNorm2d, make_fusible


def build_backbone(
    name: str,
    *,
    stem: Stem = "imagenet",
    pretrained: bool = False,
    zero_init_residual: bool = True,
    channels: int = 3,
) -> tuple[nn.Module, int]:
    """A torchvision ResNet without its classifier, and the width of its pooled features.

    Args:
        name: a torchvision ResNet, ResNeXt or Wide ResNet.
        stem: "imagenet" as in torchvision; "small" is a 3x3 convolution of stride 1, no max-pool.
        pretrained: load torchvision's default ImageNet weights.
        channels: of the images. Where they are not three, the pretrained first convolution's
            weights are repeated over the channels in the order red, green, blue, and scaled by
            3/channels, which keeps the size of its output (Wightman, timm, `adapt_input_conv`).
        zero_init_residual: start every residual branch at zero (Goyal et al., arXiv 1706.02677).

    Raises:
        InputError: no torchvision ResNet of that name.
    """
    check_backbone(name)
    network, features = plain_resnet(
        name,
        stem,
        pretrained=pretrained,
        channels=channels,
        zero_init_residual=zero_init_residual,
        norm_layer=PerViewBatchNorm2d,
    )
    make_fusible(network)
    return network, features


def plain_resnet(
    name: str, stem: Stem, *, pretrained: bool = False, channels: int = 3, **options: Any
) -> tuple[Any, int]:
    """`build_backbone` without this package's layers; `options` go to torchvision."""
    network = torchvision.models.get_model(name, **options)
    if pretrained:  # torchvision itself would load any pickle
        network.load_state_dict(_load_weights(name))
    features: int = network.fc.in_features
    network.fc = nn.Identity()
    if stem == "small":
        _replace_first(network, channels, 3, stride=1)
        network.maxpool = nn.Identity()
    elif channels != 3:
        weight = network.conv1.weight.detach()
        _replace_first(network, channels, 7, stride=2)
        if pretrained:
            order = torch.arange(channels) % 3
            network.conv1.weight.data.copy_(weight[:, order] * (3 / channels))
    return network, features


def _replace_first(network: Any, channels: int, side: int, *, stride: int) -> None:
    """Give a ResNet a new first convolution, drawn as torchvision draws its own."""
    maps = network.conv1.out_channels
    network.conv1 = nn.Conv2d(channels, maps, side, stride, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")


def check_backbone(name: str) -> None:
    """Raise InputError unless torchvision has a ResNet, ResNeXt or Wide ResNet of that name."""
    models = torchvision.models.list_models(module=torchvision.models)
    known = [model for model in models if "resne" in model]
    if name not in known:
        raise none_of("backbone", name, known)


def fetch_weights(name: str, *, download: bool) -> None:
    """Download a backbone's default ImageNet weights to torchvision's cache, if they are missing.

    Raises:
        InputError: no such backbone, missing weights that cannot or must not be downloaded, or a
            copy with another checksum.
    """
    check_backbone(name)
    weights = _weights(name)
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if file.is_file():
        _check_sum(file)
        return
    if not download:
        raise InputError(
            f"pretrained: no copy of the weights found (looked for {file}), and downloading is off"
        )
    with downloading("pretrained", weights.url, f"a copy is recognised as {file}"):
        _load_weights(name)


def _weights(name: str) -> Any:
    return torchvision.models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]


def _load_weights(name: str) -> dict[str, Any]:
    """A backbone's default weights, downloaded if they are missing."""
    weights = _weights(name)
    try:
        found: dict[str, Any] = weights.get_state_dict(check_hash=True, weights_only=True)
    except UnpicklingError as error:
        file = Path(weights.url).name
        raise InputError(f"pretrained: {file} is damaged or holds no weights; remove it") from error
    return found


def _check_sum(file: Path) -> None:
    """Raise InputError unless a file's SHA-256 begins as its name ends, which a download checks."""
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    expected = file.stem.rpartition("-")[2]
    if not found.startswith(expected):
        raise InputError(
            f"pretrained: {file} is damaged, as its SHA-256 begins with {found[:8]} and not with "
            f"{expected}; remove it"
        )
