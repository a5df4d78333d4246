"""Weights in the formats of other libraries. Each writer returns the outputs of its file, to check.

A backbone is of torchvision or timm, whose names its parameters keep, or a module of one's own.
timm has torchvision's ResNets with the same names and the same arithmetic. The whole model, with
projector and predictor, goes to safetensors and, as a graph, to ONNX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vi_simsiam import __version__
from vi_simsiam.backbones import plain_resnet, view_sizes
from vi_simsiam.config import TrainConfig
from vi_simsiam.data_names import data_label
from vi_simsiam.errors import InputError
from vi_simsiam.files import naming, parse_json, write_atomically, write_json
from vi_simsiam.models import SimSiam, VISimSiam, build_model
from vi_simsiam.other_backbones import (
    refuse_code,
    renormalise,
    size_options,
    timm_constants,
    timm_settings,
)
from vi_simsiam.paths import user_path, utf8_path

WEIGHTS = "model.safetensors"
"""The file of the whole model."""
Outputs = Callable[[Tensor], dict[str, Tensor]]
"""Maps normalised images (B, 3, S, S) to a file's outputs, by the names of `forward`, or some."""


def forward(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Outputs in eval mode of a model, or of a backbone alone, for normalised images (B, 3, S, S).

    "embedding" (B, F) of the backbone; VI-SimSiam adds "loc" (B, D), the unit mean direction, and
    "concentration" (B,), kappa.
    """
    if not isinstance(model, VISimSiam):
        return {"embedding": (model.backbone if isinstance(model, SimSiam) else model)(images)}
    embedding, _, loc, _, concentration = model.encode(images)
    assert concentration is not None
    return {"embedding": embedding, "loc": loc, "concentration": concentration}


def outputs(model: nn.Module) -> Outputs:
    """`forward` of a model, without gradients."""
    return torch.no_grad()(functools.partial(forward, model))


def preprocessing(config: TrainConfig) -> dict[str, Any]:
    """Preprocessing of the model's input images, in JSON types.

    The shorter side is resized to "size" pixels (bicubic, with antialiasing), the centre square
    cropped, and channels in [0, 1] are normalised by "mean" and "std".
    """
    mean, std = config.augment.constants
    return {
        "channels": config.decode.channels,
        "bits": config.decode.bits,
        "size": config.augment.size,
        "resize": config.augment.size,
        "interpolation": "bicubic",
        "crop": "center",
        "mean": list(mean),
        "std": list(std),
    }


def portable(config: TrainConfig) -> dict[str, Any]:
    """A configuration as JSON types without the paths of the machine it was trained on.

    Folders and files, `folder:/home/me/cats` say, keep their last name; `data_root` and `cache_dir`
    are left out.
    """
    plain = config.to_dict()
    del plain["data_root"], plain["cache_dir"]
    plain["data"] = data_label(config.data)
    plain["init"] = config.init and config.init.name
    return plain


def write_torchvision(model: SimSiam, config: TrainConfig, path: Path) -> Outputs:
    """Write the backbone's state dict under torchvision's names; it has no classifier.

    Returns the features of the file, computed by plain torchvision.

    Raises:
        InputError: torchvision has no such network.
    """
    if ":" in config.model.backbone:
        _, others = _other_formats(config)
        raise InputError(f"format: torchvision has no {config.model.backbone}; {others}")
    weights = _weights(model.backbone)
    write_atomically(path, lambda file: torch.save(weights, file))
    network, _ = plain_resnet(
        config.model.backbone, config.model.stem, channels=config.decode.channels
    )
    network.load_state_dict(torch.load(path, weights_only=True))
    return outputs(network.eval())


def write_timm(model: SimSiam, config: TrainConfig, path: Path) -> Outputs:
    """Write the weights, and beside them config.json as timm and the Hugging Face Hub expect it.

    Returns the features of the folder, computed by timm.

    Raises:
        InputError: timm has no network like this one.
    """
    import timm
    from safetensors.torch import save

    name, others = _other_formats(config)
    if config.model.stem != "imagenet":
        raise InputError(f"format: timm's {name} has no stem {config.model.stem!r}; {others}")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise InputError(f"format: timm has no {config.model.backbone}; {others}")
    content = save(_weights(model.backbone), metadata={"format": "pt"})
    write_atomically(path, lambda file: file.write(content))
    view = preprocessing(config)
    settings = timm_settings(name) if config.model.backbone.startswith("timm:") else None
    arguments: dict[str, Any] = {} if settings is None else size_options(name, view_sizes(config))
    if view["channels"] != 3:
        arguments["in_chans"] = view["channels"]
    elif settings is not None and config.decode.is_rgb:  # which the weights are trained for
        view["mean"], view["std"] = map(list, timm_constants(name))
    pretrained = {
        "tag": config.method.replace("-", "_"),
        "input_size": [view["channels"], view["size"], view["size"]],
        "fixed_input_size": settings is not None and settings.fixed_input_size,
        "interpolation": view["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": view["crop"],
        "mean": view["mean"],
        "std": view["std"],
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "conv1" if settings is None else settings.first_conv,
        "classifier": "fc" if settings is None else settings.classifier,
    }
    described = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": model.features,
        "pretrained_cfg": pretrained,
        "model_args": arguments,
    }
    write_json(path.with_name("config.json"), described)
    network = timm.create_model(f"local-dir:{path.parent}", pretrained=True, num_classes=0)
    renormalise(network, config.augment.constants, (view["mean"], view["std"]))
    return outputs(network.eval())


def _other_formats(config: TrainConfig) -> tuple[str, str]:
    """The name of a run's backbone in its library, and the formats that always fit, in words."""
    kind, _, name = config.model.backbone.rpartition(":")
    library = {"": "torchvision, ", "timm": "timm, "}.get(kind, "")
    return name, f"{library}safetensors and onnx take this run"


def write_safetensors(model: SimSiam, config: TrainConfig, path: Path) -> Outputs:
    """Write the whole model: backbone, projector and predictor, with all that loading it needs.

    Returns the outputs of the file, read again.
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
        metadata |= {
            "concentration_scale": repr(model.form.scale),
            "concentration_min": repr(model.form.minimum),
            "concentration_gain": repr(model.form.gain),
            "concentration_link": model.form.link,
        }
    weights = _weights(model)
    # The moving average for the targets of training (`TrainConfig.ema`) is useless afterwards.
    kept = {name: value for name, value in weights.items() if not name.startswith("target.")}
    content = save(kept, metadata=metadata)
    write_atomically(path, lambda file: file.write(content))
    return outputs(load_safetensors(path))


class _Graph(nn.Module):
    """The outputs as a tuple, as the exporter needs them."""

    def __init__(self, model: SimSiam) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(forward(self.model, images).values())


def write_onnx(model: SimSiam, config: TrainConfig, path: Path) -> Outputs | None:
    """Write the model as a graph of `forward` by PyTorch's exporter, for batches of any size.

    Returns the file's outputs as onnxruntime computes them on the CPU; None if it is not installed.
    """
    size = config.augment.size
    # Two images: the exporter takes a batch of one for a constant.
    example = torch.zeros(2, config.decode.channels, size, size)
    names = list(outputs(model)(example))
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the others are about operators that are not used here
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Graph(model).eval(),
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=names,
                dynamic_shapes={"images": {0: "batch"}},
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    with naming(path):
        program.save(str(path))
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def compute(images: Tensor) -> dict[str, Tensor]:
        arrays = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return compute


def load_safetensors(path: str | Path) -> SimSiam | VISimSiam:
    """The model in a file by `vi-simsiam export --format safetensors`, on the CPU in eval mode.

    Args:
        path: the file, or the folder with its model.safetensors.

    Raises:
        InputError: there is no such file, it is damaged, or it is of another format.
    """
    return read_safetensors(path)[1]


def read_safetensors(path: str | Path) -> tuple[TrainConfig, SimSiam | VISimSiam]:
    """The configuration and the model of a file, see `load_safetensors`."""
    from safetensors import SafetensorError, safe_open

    path = user_path("path", path)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise InputError(
            f"path: {path} is no file; a folder or file of `vi-simsiam export --format "
            "safetensors` is"
        )
    try:
        with utf8_path(path) as named, safe_open(named, framework="pt") as file:
            metadata = file.metadata() or {}
            if "config" not in metadata:
                raise InputError(
                    f"path: {path} has no configuration of its model; a file of "
                    "`vi-simsiam export --format safetensors` has one"
                )
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"path: {path} cannot be read ({error}); it must be a safetensors file"
        ) from error
    try:
        plain = parse_json(metadata["config"], dict[str, Any])
        # The weights of the start are in the file, too; their place is another's.
        config = TrainConfig.from_dict(plain | {"ema": None, "init": None})
        refuse_code(str(path), config.model.backbone)
        # The file has the weights: torchvision's are not needed, and there is no moving average.
        parts = dataclasses.replace(config.model, pretrained=False)
        config = dataclasses.replace(config, model=parts)
        with torch.device("meta"):  # a model larger than the file takes no memory
            expected = build_model(config).state_dict()
        if _shapes(expected) != _shapes(weights):
            raise ValueError("names or shapes differ")
        model = build_model(config)
        model.load_state_dict(weights)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"path: the weights in {path} do not fit the model that its metadata describe"
        ) from error
    return config, model.eval()


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module: own copies on the CPU, in the usual order of memory."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in module.state_dict().items()
    }
