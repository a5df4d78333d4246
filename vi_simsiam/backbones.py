"""Backbones by name: torchvision's ResNets, timm's models, modules of one's own; their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torchvision
from torch import nn

from vi_simsiam.config import IMAGENET_MEAN, IMAGENET_STD, Constants, Stem, TrainConfig
from vi_simsiam.downloads import downloading
from vi_simsiam.errors import InputError, none_of
from vi_simsiam.normalisation import PerViewBatchNorm2d, make_fusible
from vi_simsiam.other_backbones import (
    build_module,
    build_timm,
    fetch_timm,
    pooled_width,
    renormalise,
    timm_constants,
    timm_settings,
)


def build_backbone(
    name: str,
    *,
    stem: Stem = "imagenet",
    pretrained: bool = False,
    zero_init_residual: bool = True,
    channels: int = 3,
    sizes: Sequence[int] = (),
    constants: Constants | None = (IMAGENET_MEAN, IMAGENET_STD),
) -> tuple[nn.Module, int]:
    """A network without its classifier, and the width of its pooled features.

    Args:
        name: a torchvision ResNet, ResNeXt or Wide ResNet; timm:NAME, any model of timm; or
            module:PACKAGE.ATTRIBUTE, a callable without arguments that returns a module.
        stem: "imagenet" as in torchvision; for torchvision's networks also a 3x3 convolution
            without the max-pool, of stride 2 ("medium") or 1 ("small").
        pretrained: load the library's default ImageNet weights.
        channels: of the images. Where they are not three, a pretrained first convolution's weights
            are repeated over the channels in the order red, green, blue, and scaled by 3/channels,
            which keeps the size of its output (Wightman, timm, `adapt_input_conv`).
        zero_init_residual: start every residual branch at zero (Goyal et al., arXiv 1706.02677);
            a module of one's own begins as it does.
        sizes: sides of the views that it has to take, in pixels, those of a transformer of fixed
            size first; empty for the network's own size. torchvision's networks take all.
        constants: mean and deviation by which images of 8-bit RGB are normalised, which a timm
            model converts to its own; None for other images.

    Raises:
        InputError: no such network, or one that takes no such views or has no pooled features.
    """
    kind, _, rest = name.partition(":")
    if kind == "timm":
        network = build_timm(rest, sizes, pretrained=pretrained, channels=channels)
        if constants is not None:
            renormalise(network, constants, timm_constants(rest))
        if not zero_init_residual:
            _open_residuals(network)
        own = timm_settings(rest).input_size[-1]
        advice = f"its own size is --size {own}"
        return network, pooled_width(
            network, f"backbone: {name}", sizes or (own,), channels, advice
        )
    if kind == "module":
        # On the meta device it could not read values while it is built.
        with torch.device("cpu"):
            network = build_module(rest)
            features = pooled_width(network, f"backbone: {name}", sizes or (224,), channels)
        return network.to(torch.get_default_device()), features
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


def view_sizes(config: TrainConfig) -> list[int]:
    """The sides of a run's views in pixels, that of the global ones first."""
    views = config.augment
    return [views.size, views.local_size] if views.local_views else [views.size]


def input_options(config: TrainConfig) -> dict[str, Any]:
    """The arguments of `build_backbone` that describe the images of a run."""
    return {
        "channels": config.decode.channels,
        "sizes": view_sizes(config),
        "constants": config.augment.constants if config.decode.is_rgb else None,
    }


def own_size(config: TrainConfig) -> int | None:
    """The side of the views that a run's timm model or its weights are made for, in pixels.

    None where other sizes do as well.
    """
    kind, _, name = config.model.backbone.partition(":")
    if kind != "timm":
        return None
    settings = timm_settings(name)
    started = config.model.pretrained or config.init is not None
    return int(settings.input_size[-1]) if settings.fixed_input_size or started else None


def _open_residuals(network: nn.Module) -> None:
    """Undo the start of residual branches at zero, which is that of their last BatchNorm."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine and not module.weight.any():
            nn.init.ones_(module.weight)


def plain_resnet(
    name: str, stem: Stem, *, pretrained: bool = False, channels: int = 3, **options: Any
) -> tuple[Any, int]:
    """`build_backbone` without this package's layers; `options` go to torchvision."""
    network = torchvision.models.get_model(name, **options)
    if pretrained:  # torchvision itself would load any pickle
        network.load_state_dict(_load_weights(name))
    features: int = network.fc.in_features
    network.fc = nn.Identity()
    if stem != "imagenet":
        _replace_first(network, channels, 3, stride=2 if stem == "medium" else 1)
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
        raise none_of("backbone", name, [*known, "timm:NAME", "module:PACKAGE.ATTRIBUTE"])


def fetch_weights(name: str, *, download: bool) -> None:
    """Download a backbone's default ImageNet weights to its library's cache, if they are missing.

    Raises:
        InputError: no such backbone, missing weights that cannot or must not be downloaded, or a
            copy with another checksum.
    """
    kind, _, rest = name.partition(":")
    if kind == "timm":
        fetch_timm(rest, download=download)
        return
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
