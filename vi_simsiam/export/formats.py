"""Weights in the formats of other libraries; each writer hands back how its file is read again, so that it is checked.

A backbone is a torchvision ResNet, and its parameters keep torchvision's names. timm's ResNets have the same names and the
same arithmetic. The whole model, with projector and predictor, goes to safetensors and, as a graph, to ONNX.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam import __version__
from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.checkpoint import write_atomically, write_json
from vi_simsiam.errors import InputError
from vi_simsiam.models import SimSiam, VISimSiam, build_model
from vi_simsiam.ops.augment import IMAGENET_MEAN, IMAGENET_STD
from vi_simsiam.paths import user_path, utf8_path
from vi_simsiam.text import data_label

FORMATS = ("torchvision", "timm", "safetensors", "onnx")
"""What a run can be exported as."""
TORCHVISION_WEIGHTS, SAFETENSORS_WEIGHTS = "model.pth", "model.safetensors"

Outputs = Callable[[Tensor], dict[str, Tensor]]
"""Normalised images (B, 3, S, S) to what a file makes of them, by the names of `forward`, or some of them."""


def forward(model: SimSiam, images: Tensor) -> dict[str, Tensor]:
    """What a model in eval mode makes of normalised images (B, 3, S, S): "embedding" (B, F) of the backbone.

    VI-SimSiam adds "loc" (B, D), the unit mean direction, and "concentration" (B,), kappa.
    """
    embedding = model.backbone(images)
    if not isinstance(model, VISimSiam):
        return {"embedding": embedding}
    prediction = model.predictor(model.projector(embedding))
    loc = F.normalize(prediction[..., : model.dim], dim=-1)
    return {"embedding": embedding, "loc": loc, "concentration": model.concentration(prediction)}


def outputs(model: SimSiam) -> Outputs:
    """`forward` of a model, without gradients."""

    @torch.no_grad()
    def compute(images: Tensor) -> dict[str, Tensor]:
        return forward(model, images)

    return compute


def embedding(backbone: nn.Module) -> Outputs:
    """The features alone, under the name "embedding"."""

    @torch.no_grad()
    def compute(images: Tensor) -> dict[str, Tensor]:
        return {"embedding": backbone(images)}

    return compute


def preprocessing(config: TrainConfig) -> dict[str, Any]:
    """How an image becomes the model's input: JSON types only.

    The shorter side is resized to "size" pixels (bicubic, with antialiasing), the centre square cropped, and channels in
    [0, 1] are normalised by "mean" and "std".
    """
    return {
        "size": config.augment.size,
        "resize": config.augment.size,
        "interpolation": "bicubic",
        "crop": "center",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }


def portable(config: TrainConfig) -> dict[str, Any]:
    """A configuration as JSON types without the paths of the machine it was trained on.

    Folders and files, `folder:/home/me/cats` say, keep their last name; `data_root` and `cache_dir` are left out.
    """
    plain = {
        name: value
        for name, value in config.to_dict().items()
        if name not in ("data_root", "cache_dir")
    }
    plain["data"] = data_label(config.data)
    if plain.get("frozen_run") is not None:
        plain["frozen_run"] = Path(plain["frozen_run"]).name
    return plain


def write_torchvision(model: SimSiam, config: TrainConfig, folder: Path) -> Outputs:
    """Write the backbone's state dict to FOLDER/model.pth, under torchvision's names and without a classifier.

    Returns:
        The features of the file as plain torchvision computes them.
    """
    weights = _weights(model.backbone)
    write_atomically(folder / TORCHVISION_WEIGHTS, lambda file: torch.save(weights, file))
    network = torchvision.models.get_model(config.model.backbone)
    network.fc = nn.Identity()
    if config.model.stem == "small":
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.load_state_dict(torch.load(folder / TORCHVISION_WEIGHTS, weights_only=True))
    return embedding(network.eval())


def write_timm(model: SimSiam, config: TrainConfig, folder: Path) -> Outputs:
    """Write a folder as timm reads it from a disk or the Hugging Face Hub: model.safetensors and config.json.

    Returns:
        The features of the folder as timm computes them.

    Raises:
        InputError: timm has no network like this one.
    """
    import timm
    from safetensors.torch import save

    name = config.model.backbone
    if config.model.stem != "imagenet":
        raise InputError(
            f"format: timm's {name} has no stem {config.model.stem!r}; torchvision, safetensors and onnx take this run"
        )
    if not timm.is_model(name):
        raise InputError(
            f"format: timm has no {name}; torchvision, safetensors and onnx take this run"
        )
    content = save(_weights(model.backbone), metadata={"format": "pt"})
    write_atomically(folder / SAFETENSORS_WEIGHTS, lambda file: file.write(content))
    seen = preprocessing(config)
    size = seen["size"]
    pretrained = {
        "tag": config.method.replace("-", "_"),
        "input_size": [3, size, size],
        "fixed_input_size": False,
        "interpolation": seen["interpolation"],
        "crop_pct": size / seen["resize"],
        "crop_mode": seen["crop"],
        "mean": seen["mean"],
        "std": seen["std"],
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "conv1",
        "classifier": "fc",
    }
    described = {
        "architecture": name,
        "num_classes": 0,
        "num_features": model.features,
        "global_pool": "avg",
        "pretrained_cfg": pretrained,
    }
    write_json(folder / "config.json", described)
    network = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    return embedding(network.eval())


def write_safetensors(model: SimSiam, config: TrainConfig, folder: Path) -> Outputs:
    """Write the whole model to FOLDER/model.safetensors: backbone, projector and predictor with its concentration.

    The file's metadata hold the method, D, how the concentration is scaled, the preprocessing and the configuration, so
    that `load_safetensors` needs nothing else.

    Returns:
        The outputs of the file, read again.
    """
    from safetensors.torch import save

    metadata = {
        "format": "pt",
        "library": f"vi-simsiam {__version__}",
        "method": config.method,
        "dim": str(model.dim),
        "preprocessing": json.dumps(preprocessing(config)),
        "config": json.dumps(portable(config)),
    }
    if isinstance(model, VISimSiam):
        metadata["concentration_scale"] = repr(model.form.scale)
        metadata["concentration_min"] = repr(model.form.minimum)
        metadata["concentration_gain"] = repr(model.form.gain)
        metadata["concentration_link"] = model.form.link
    path = folder / SAFETENSORS_WEIGHTS
    # The moving average that made the targets of training (`TrainConfig.ema`) is of no use afterwards.
    weights = {
        name: value for name, value in _weights(model).items() if not name.startswith("target.")
    }
    content = save(weights, metadata=metadata)
    write_atomically(path, lambda file: file.write(content))
    return outputs(load_safetensors(path))


def load_safetensors(path: str | Path) -> SimSiam | VISimSiam:
    """The model in a file that `vi-simsiam export --format safetensors` wrote, on the CPU and in eval mode.

    Args:
        path: the file, or the folder with its model.safetensors.

    Raises:
        InputError: there is no such file, it is damaged, or it is of another format.
    """
    from safetensors import SafetensorError, safe_open

    path = user_path("path", path)
    if path.is_dir():
        path = path / SAFETENSORS_WEIGHTS
    if not path.is_file():
        raise InputError(
            f"path: {path} is no file; a folder or file of `vi-simsiam export --format safetensors` is"
        )
    try:
        with utf8_path(path) as named, safe_open(named, framework="pt") as file:
            metadata = file.metadata() or {}
            if "config" not in metadata:
                raise InputError(
                    f"path: {path} does not say which model it holds; a file of "
                    "`vi-simsiam export --format safetensors` does"
                )
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"path: {path} cannot be read ({error}); it must be a safetensors file"
        ) from error
    try:
        plain = json.loads(metadata["config"])
        # The file has the weights: torchvision's need not be downloaded, and there is no moving average.
        plain["model"]["pretrained"], plain["ema"] = False, None
        model = build_model(TrainConfig.from_dict(plain))
        model.load_state_dict(weights)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"path: the weights in {path} do not fit the model that its metadata describe"
        ) from error
    return model.eval()


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module: own copies on the CPU, in the usual order of memory."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in module.state_dict().items()
    }
