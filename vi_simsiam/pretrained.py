"""Names of torchvision's ResNets, and downloads of their ImageNet weights."""

from __future__ import annotations

import http.client
from pathlib import Path

import torch
import torchvision

from vi_simsiam.downloads import patience
from vi_simsiam.errors import InputError, none_of


def check_backbone(name: str) -> None:
    """Raise InputError unless torchvision has a ResNet, ResNeXt or Wide ResNet of that name."""
    models = torchvision.models.list_models(module=torchvision.models)
    known = [model for model in models if "resne" in model]
    if name not in known:
        raise none_of("backbone", name, known)


def fetch_weights(name: str, *, download: bool) -> None:
    """Download a backbone's default ImageNet weights to torchvision's cache, unless they are there.

    Raises:
        InputError: no such backbone, or missing weights that cannot or must not be downloaded.
    """
    check_backbone(name)
    weights = torchvision.models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if file.is_file():
        return
    if not download:
        raise InputError(
            f"pretrained: no copy of the weights found (looked for {file}), and downloading is off"
        )
    try:
        with patience():
            weights.get_state_dict(check_hash=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise InputError(
            f"pretrained: {weights.url} could not be downloaded ({reason}); "
            f"a copy is recognised as {file}"
        ) from error
