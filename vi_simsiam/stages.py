"""The stages of any backbone, and the lengths of their outputs during a pass."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import Permute

MOST = 4
RESNET = ("layer1", "layer2", "layer3", "layer4")
NAMES = (*RESNET, "stage1", "stage2", "stage3", "stage4")
"""The names that stages have."""


def stages(backbone: nn.Module) -> dict[str, str]:
    """The stages of a backbone in their order: name, and place in the module ("blocks.2").

    A ResNet has layer1 to layer4. Of a timm model they are the places that timm takes features from
    (`feature_info`), of another module its parts with weights; a module around a single part has
    that part's stages. They are named stage1, stage2 and so on. Of more than four, four are chosen
    at equal distances, the last one among them: of a transformer's 12 blocks the 3rd, 6th, 9th and
    12th.
    """
    places = _places(backbone)
    count = min(len(places), MOST)
    chosen = [places[math.ceil((i + 1) * len(places) / count) - 1] for i in range(count)]
    names = [place.rpartition(".")[2] for place in chosen]
    if tuple(names) != RESNET:
        names = [f"stage{number}" for number in range(1, count + 1)]
    return dict(zip(names, chosen, strict=True))


@contextlib.contextmanager
def recorded(backbone: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the lengths of the outputs of all stages: by name, (B,), those of the last pass.

    An output is averaged over its positions or tokens first, as the last one is to give an
    embedding. A stage that the pass does not call, or that gives no tensor of floats, has none.
    """
    found: dict[str, Tensor] = {}
    thread = threading.get_ident()  # others may pass their images through the network meanwhile
    # Maps (B, H, W, C) by timm's name and by torchvision's last step, also in a part of a module.
    channels_last = any(
        getattr(part, "output_fmt", None) == "NHWC"
        or isinstance(getattr(part, "permute", None), Permute)
        for part in backbone.modules()
    )

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if threading.get_ident() != thread or not isinstance(output, Tensor):
            return
        if output.ndim > 1 and output.is_floating_point():
            tokens = channels_last or output.ndim == 3
            positions = range(1, output.ndim - 1) if tokens else range(2, output.ndim)
            found[name] = (output.mean(tuple(positions)) if positions else output).norm(dim=1)

    with contextlib.ExitStack() as hooks:
        for name, place in stages(backbone).items():
            part = backbone.get_submodule(place)
            hook = part.register_forward_hook(functools.partial(keep, name))
            hooks.callback(hook.remove)
        yield found


def _children(network: nn.Module) -> dict[str, nn.Module]:
    """The parts of a module by name, but for TorchScript's, which take no hooks."""
    named = network.named_children()
    return {name: part for name, part in named if not isinstance(part, torch.jit.ScriptModule)}


def _places(network: nn.Module) -> list[str]:
    children = _children(network)
    if all(name in children for name in RESNET):
        return list(RESNET)
    if isinstance(known := getattr(network, "feature_info", None), list):
        modules = {name for name, _ in network.named_modules() if name}
        places = [str(entry.get("module")) for entry in known if isinstance(entry, dict)]
        if places and modules.issuperset(places):
            return list(dict.fromkeys(places))
    parts: dict[str, nn.Module] = {}
    for name, child in children.items():
        if isinstance(child, nn.ModuleList):  # it is no step of the pass, its entries are
            parts |= {f"{name}.{entry}": part for entry, part in _children(child).items()}
        else:
            parts[name] = child
    found = [name for name, part in parts.items() if next(part.parameters(), None) is not None]
    if len(found) == 1:
        (name,) = found
        return [f"{name}.{place}" for place in _places(parts[name])] or found
    return found
