"""Weights from files of other programs, matched to a backbone by name and shape.

A file is a state dict, also within others ("state_dict", "teacher"), in safetensors or as torch
saves it, of which tensors alone are read: no pickle is executed.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vi_simsiam.errors import InputError, cut
from vi_simsiam.files import open_regular
from vi_simsiam.paths import utf8_path
from vi_simsiam.text import counted, one_line

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin")
_LEAST = 0.9
"""Share of the backbone's tensors that a file must hold: one of another network has few."""
_SHOWN = 3
_DEEPEST = 4


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file by their names; those in inner dictionaries have their path's.

    Raises:
        InputError: there is no such file, it is of another kind, or it is damaged.
    """
    if path.suffix.lower() not in SUFFIXES:
        accepted = f"a run folder, or a file that ends in {', '.join(SUFFIXES)}"
        raise InputError(f"init: {path} is not accepted; it must be {accepted}")
    try:
        open_regular(path).close()
        with utf8_path(path) as named:
            if path.suffix.lower() == ".safetensors":
                from safetensors.torch import load_file

                return dict(load_file(named))
            mapped = zipfile.is_zipfile(named)  # torch's older format cannot be mapped
            saved = torch.load(named, map_location="cpu", weights_only=True, mmap=mapped)
    except InputError as error:
        raise InputError(f"init: {path} {error}") from None
    except MemoryError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"init: {path} cannot be read ({reason})") from error
    except Exception as error:  # readers of tensors raise many unrelated types
        raise InputError(
            f"init: {path} cannot be read: it is damaged, or holds other objects than tensors, "
            "which are not loaded"
        ) from error
    return _flat(saved)


def load_backbone(backbone: nn.Module, tensors: dict[str, Tensor], origin: str) -> str:
    """Load a state dict into a backbone, whatever prefix its names have.

    The prefix is that with the most tensors of the backbone's names and shapes; of equal ones a
    teacher's, else the first. A classifier and other parts of the file are left out.

    Args:
        backbone: a network without its classifier.
        tensors: of a file, by name.
        origin: the file, for messages.

    Returns:
        A line with the number of tensors that matched.

    Raises:
        InputError: they are of another network or kind, or not finite.
    """
    own = {
        name: tensor
        for name, tensor in backbone.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    prefix = _prefix(own, tensors)
    found = {name: tensors[prefix + name] for name in own if prefix + name in tensors}
    others = [name for name in found if found[name].shape != own[name].shape]
    if others:
        name = others[0]
        here, there = (tuple(each[name].shape) for each in (own, found))
        raise InputError(
            f"init: {origin} is of another network: {counted(len(others), 'tensor')} of another "
            f"shape, such as {cut(name)}, {there} and not {here}{_advice(name)}"
        )
    missing = [name for name in own if name not in found]
    if len(found) < _LEAST * len(own) or not found:
        shown = ", ".join(missing[:_SHOWN]) + (", ..." if missing[_SHOWN:] else "")
        raise InputError(
            f"init: {origin} is of another network: it has {len(found)} of the {len(own)} tensors "
            f"of the backbone; {shown} {'is' if len(missing) == 1 else 'are'} missing"
        )
    for name, tensor in found.items():
        floats = tensor.is_floating_point() and own[name].is_floating_point()
        if tensor.is_meta or tensor.is_quantized or not (floats or tensor.dtype == own[name].dtype):
            raise InputError(
                f"init: {origin}: {cut(name)} is of {tensor.dtype}; it must be of {own[name].dtype}"
            )
    if not all(bool(torch.isfinite(tensor.float()).all()) for tensor in found.values()):
        raise InputError(f"init: {origin} has weights that are not finite")
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
    unused = len(tensors) - len(found) - sum("num_batches_tracked" in name for name in tensors)
    under = f" under {cut(prefix)[:-1]}" if prefix else ""
    left = f", without {', '.join(missing[:_SHOWN])}" if missing else ""
    return one_line(
        f"init: {len(found)} of the backbone's {counted(len(own), 'tensor')} are those of {origin}"
        f"{under}{left}; {counted(unused, 'other tensor')} in it not used"
    )


def _flat(saved: Any, depth: int = _DEEPEST) -> dict[str, Tensor]:
    """The tensors of nested dictionaries; names are joined by dots."""
    found: dict[str, Tensor] = {}
    for key, value in saved.items() if isinstance(saved, dict) else ():
        if isinstance(value, Tensor) and value.layout == torch.strided:
            found[str(key)] = value.detach()
        elif isinstance(value, dict) and depth > 0:
            found |= {f"{key}.{name}": x for name, x in _flat(value, depth - 1).items()}
    return found


def _prefix(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> str:
    """The beginning of the names that the backbone's tensors have in a file."""
    fitting: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts = name.split(".")
        for i in range(len(parts)):
            inner = ".".join(parts[i:])
            if inner in own:
                # A name alone counts little: it finds the tensor that has another shape.
                fits = own[inner].shape == tensor.shape
                fitting[name.removesuffix(inner)] += 1000 if fits else 1
    return max(fitting, key=lambda each: (fitting[each], "teacher" in each), default="")


def _advice(name: str) -> str:
    if name == "conv1.weight":
        return "; --stem chooses the first layers"
    return "; --size changes it" if "pos_embed" in name else ""
