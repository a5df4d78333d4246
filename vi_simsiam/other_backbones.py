"""timm's models and modules of one's own as backbones.

Views are normalised by ImageNet's mean and deviation everywhere. A timm model with others converts
its input: the state dict keeps timm's names.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import packages_distributions
from typing import Any

import torch
from torch import Tensor, nn

from vi_simsiam.config import Constants
from vi_simsiam.downloads import downloading
from vi_simsiam.errors import InputError, cut, did_you_mean
from vi_simsiam.normalisation import PerViewBatchNorm2d
from vi_simsiam.text import one_line

TRUSTED = "VI_SIMSIAM_TRUST_MODULES"
"""Environment variable: modules, separated by commas, that runs from elsewhere may import."""
_FILE = "model.safetensors"


def timm_settings(name: str) -> Any:
    """timm's description of a model: its input size, mean, deviation and weights.

    Raises:
        InputError: timm has no model, or no weights, of that name.
    """
    import timm

    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        known = timm.list_models()
        raise InputError(
            f"backbone: timm has no model {cut(repr(name))} ({len(known)} in all, see "
            f"timm.list_models()){did_you_mean(model, known)}"
        )
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{model}.*")]
        raise InputError(
            f"backbone: timm has no weights {cut(repr(tag))} of {model}; it has "
            f"{', '.join(tags) or 'none'}{did_you_mean(tag, tags)}"
        ) from None


def build_timm(
    name: str, sizes: Sequence[int], *, pretrained: bool = False, channels: int = 3
) -> nn.Module:
    """A timm model without its classifier.

    Plain BatchNorm layers become this package's, so that views of one size can pass together.

    Args:
        name: the model, also with a tag of its weights: resnet10t or resnet10t.c3_in1k.
        sizes: sides of the views in pixels, the first one those of a transformer of fixed size;
            empty for the model's own.
        pretrained: load timm's weights, which `fetch_timm` has brought here.
        channels: of the images.

    Raises:
        InputError: no such model, or one that cannot take views of these sizes.
    """
    import timm

    settings = timm_settings(name)
    own = settings.input_size[-1]
    options = size_options(name, sizes)
    if pretrained:
        # The Hub's file by its name: timm would also take pickles and formats of others.
        file = fetch_timm(name, download=False)
        options |= {"pretrained_cfg_overlay": {"file": file, "custom_load": False}}
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=0, in_chans=channels, **options
        )
    except Exception as error:  # each model has checks of its own
        if "img_size" not in options:
            raise InputError(f"backbone: timm:{name} cannot be built ({_line(error)})") from error
        raise InputError(
            f"backbone: timm:{name} cannot take views of {_pixels(sizes)} ({_line(error)}); its "
            f"own size is --size {own} without local views"
        ) from error
    for module in network.modules():
        if type(module) is nn.BatchNorm2d and module.momentum is not None:
            module.__class__ = PerViewBatchNorm2d
    return network


def size_options(name: str, sizes: Sequence[int]) -> dict[str, Any]:
    """timm's arguments that let a model of fixed size take views of these sides, in pixels."""
    settings = timm_settings(name)
    if not settings.fixed_input_size or not set(sizes) - {settings.input_size[-1]}:
        return {}
    dynamic = {"dynamic_img_size": True} if len(set(sizes)) > 1 else {}
    return {"img_size": sizes[0], **dynamic}


def fetch_timm(name: str, *, download: bool) -> str:
    """The file with a timm model's pretrained weights, downloaded from the Hugging Face Hub.

    Args:
        name: as for `build_timm`.
        download: False to look in the Hub's cache only.

    Raises:
        InputError: timm has none for this model, or they are not here and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    settings = timm_settings(name)
    repository, filename = settings.hf_hub_id, settings.hf_hub_filename or _FILE
    if not repository or not filename.endswith(".safetensors"):
        raise InputError(f"pretrained: the Hugging Face Hub has no weights of timm:{name}")
    try:
        return str(hf_hub_download(repository, filename, local_files_only=True))
    except LocalEntryNotFoundError:
        if not download:
            raise InputError(
                f"pretrained: no copy of {repository} found in the Hugging Face Hub's cache, and "
                "downloading is off"
            ) from None
    url = f"https://huggingface.co/{repository}"
    verbosity = logging.get_verbosity()
    logging.set_verbosity(50)  # critical; else it prints a line on each of its attempts
    try:
        with downloading("pretrained", url, "give a copy of the weights with --init"):
            try:
                return str(hf_hub_download(repository, filename))
            except LocalEntryNotFoundError:  # its text is about caches
                raise OSError("the Hugging Face Hub cannot be reached") from None
    finally:
        logging.set_verbosity(verbosity)


def build_module(name: str) -> nn.Module:
    """The module that a callable returns, which is named as package.module.attribute.

    Raises:
        InputError: it cannot be imported or called, or returns something else.
    """
    path, _, attribute = name.rpartition(".")
    if not path:
        raise InputError(
            f"backbone: module:{name} is not accepted; it must be module:PACKAGE.ATTRIBUTE"
        )
    try:
        found = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise InputError(
            f"backbone: {error} (PYTHONPATH names the folders of one's own modules)"
        ) from error
    except Exception as error:  # of the user's module
        raise InputError(f"backbone: {path} cannot be imported ({_line(error)})") from error
    if not hasattr(found, attribute):
        similar = did_you_mean(attribute, dir(found))
        raise InputError(f"backbone: {path} has no {attribute!r}{similar}")
    try:
        network = getattr(found, attribute)()
    except Exception as error:
        text = f"{name}() does not run ({_line(error)}); it is called without arguments"
        raise InputError(f"backbone: {text}") from error
    if not isinstance(network, nn.Module):
        text = f"{name}() returns {type(network).__name__}; it must return a torch.nn.Module"
        raise InputError(f"backbone: {text}")
    return network


def refuse_code(origin: str, backbone: str) -> None:
    """Refuse a module as the backbone of a file from elsewhere, unless the user trusts its code.

    `TRUSTED` names the module, or the user's program has imported it and it is of no installed
    package: this package imports many of those, and their functions do anything. So does the main
    module, which is that of the command line, or runs on import.

    Args:
        origin: the file or folder, for the message.
        backbone: the name of any backbone.

    Raises:
        InputError: it is refused.
    """
    kind, _, name = backbone.partition(":")
    path = name.rpartition(".")[0]
    if kind != "module":
        return
    if path in os.environ.get(TRUSTED, "").split(","):
        return
    top = path.partition(".")[0]
    if (
        path not in sys.modules
        or top in {"__main__", __name__.partition(".")[0], *sys.stdlib_module_names}
        or top in packages_distributions()
    ):
        raise InputError(
            f"run: {origin} is from elsewhere or was changed, and would run code of {cut(backbone)}"
            f"; where you trust that code, set {TRUSTED}={cut(path)}"
        )


def pooled_width(
    network: nn.Module,
    name: str,
    sizes: Sequence[int],
    channels: int = 3,
    advice: str = "give views of another size",
    device: torch.device | None = None,
) -> int:
    """The width F of a backbone's features on views of each size in eval mode.

    Nothing is computed where the network runs on the meta device: the views of a file from
    elsewhere may be of any size.

    Args:
        network: takes images (B, channels, size, size).
        name: the argument and the backbone, for messages: "backbone: resnet18".
        sizes: sides of the views in pixels.
        channels: of the images.
        advice: the end of the message where it takes no such views.
        device: of the network; None for that of its first parameter.

    Raises:
        InputError: the network takes no views of a size, or gives anything else than (B, F) floats.
    """
    widths: dict[int, int] = {}
    for size in sizes:
        try:
            features = _features(network, (2, channels, size, size), device)
        except Exception as error:  # of any layer
            raise InputError(
                f"{name} cannot take views of {_pixels([size])} ({_line(error)}); {advice}"
            ) from error
        is_tensor = isinstance(features, Tensor)
        if not is_tensor or features.shape[:-1] != (2,) or not features.is_floating_point():
            found = f"shape {tuple(features.shape)}" if is_tensor else type(features).__name__
            raise InputError(
                f"{name} gives {found} for 2 images; it must give pooled features, "
                "floating-point numbers of shape (2, F)"
            )
        widths[size] = features.shape[1]
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{width} for {size} pixels" for size, width in widths.items())
        raise InputError(f"{name} gives features of another width per size ({found})")
    return next(iter(widths.values()))


@torch.no_grad()
def _features(network: nn.Module, shape: tuple[int, ...], device: torch.device | None) -> Any:
    """The features of zeros in eval mode: on the meta device, or where the network is."""
    with contextlib.suppress(Exception):  # a copy or a layer that the meta device does not have
        # The copy shares no state, in which layers may keep tensors for the next call.
        tensors = (*network.parameters(), *network.buffers())
        copied = copy.deepcopy(network, {id(tensor): tensor.to("meta") for tensor in tensors})
        return copied.eval()(torch.zeros(shape, device="meta"))
    training = {module: module.training for module in network.modules()}
    network.eval()
    if device is None and (weight := next(network.parameters(), None)) is not None:
        device = weight.device
    try:
        return network(torch.zeros(shape, device=device))
    finally:
        for module, mode in training.items():
            module.training = mode


def timm_constants(name: str) -> Constants:
    """Mean and deviation by which a timm model's images are normalised."""
    settings = timm_settings(name)
    return tuple(settings.mean), tuple(settings.std)


def renormalise(network: nn.Module, given: Constants, wanted: Constants) -> None:
    """Let a network convert images that are normalised by one mean and deviation to another."""
    if [*map(tuple, given)] == [*map(tuple, wanted)]:
        return
    (mean, std), (own_mean, own_std) = (
        torch.tensor(each, dtype=torch.float32).view(2, 1, -1, 1, 1) for each in (given, wanted)
    )
    network.register_buffer("input_factor", std / own_std, persistent=False)
    network.register_buffer("input_shift", (mean - own_mean) / own_std, persistent=False)
    network.register_forward_pre_hook(_converted)


def _converted(network: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = inputs
    return (x * network.input_factor.to(x.dtype) + network.input_shift.to(x.dtype),)


def _pixels(sizes: Sequence[int]) -> str:
    return f"{' and '.join(map(str, dict.fromkeys(sizes)))} pixels"


def _line(error: Exception) -> str:
    """The first line of an error, or its type."""
    return cut(one_line((str(error).splitlines() or [""])[0])) or type(error).__name__
