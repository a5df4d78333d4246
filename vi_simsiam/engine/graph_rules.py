"""Inputs and state of a captured step, and the rules of a CUDA graph, checked on one run of it.

A graph repeats kernels with fixed addresses and fixed launch parameters. So a step must not wait
for a value on the host, have shapes that depend on values, take data from the host, or move its
state. The check sees operations of PyTorch. CUDA finds kernels launched past PyTorch's dispatcher
only at capture.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves

from vi_simsiam.checks import require
from vi_simsiam.errors import InputError

_aten = torch.ops.aten
_TORCH, _PYTHON = os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.__file__) + os.sep
_OWN_FILES = {
    os.path.join(os.path.dirname(__file__), name) for name in ("graph.py", "graph_rules.py")
}
_PLAIN = (bool, int, float, str, bytes, Enum, torch.dtype, torch.device, type(None))
"""Values that can be compared; a recorded step keeps those it had."""


class InputsChanged(InputError):
    """Inputs that do not fit the first call's: the caller's mistake, in every mode."""


class Inputs:
    """The inputs' structure and the memory that a graph reads them from.

    Raises:
        InputError: a tensor is on another device or requires a gradient, or a leaf is of a type
            that cannot be compared.
    """

    def __init__(self, inputs: tuple[Any, ...], device: torch.device) -> None:
        paths, self._structure = tree_flatten_with_path(inputs)
        self._names = [f"inputs{keystr(path)}" for path, _ in paths]
        self._leaves: list[Any] = []
        self.device = device
        for name, (_, leaf) in zip(self._names, paths, strict=True):
            fits = isinstance(leaf, (Tensor, *_PLAIN))
            accepted = "a tensor or plain value in lists, tuples and dicts"
            require(name, type(leaf).__name__, fits, accepted)
            if isinstance(leaf, Tensor):
                here = leaf.device.type == device.type
                require(name, f"a tensor on {leaf.device}", here, f"on {device}")
                accepted = "detached; step can require a gradient of its own copy"
                require(name, "a tensor that requires a gradient", not leaf.requires_grad, accepted)
            self._leaves.append(leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)

    def tree(self) -> tuple[Any, ...]:
        """The inputs to call the step with."""
        return self._structure.unflatten(self._leaves)  # type: ignore[no-any-return]

    def tensors(self) -> list[Tensor]:
        """The static tensors."""
        return [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def match(self, inputs: tuple[Any, ...]) -> list[Any]:
        """The leaves of `inputs`, which must fit the first call's."""
        leaves, structure = tree_flatten(inputs)
        if structure != self._structure:
            given, expected = (
                str(each.unflatten(["*"] * each.num_leaves))
                for each in (structure, self._structure)
            )
            raise InputsChanged(f"inputs: {given} given, {expected} as in the first call")
        for name, expected, given in zip(self._names, self._leaves, leaves, strict=True):
            if _kind(given) != _kind(expected):
                raise InputsChanged(
                    f"{name}: {_kind(given)} given, {_kind(expected)} as in the first call is "
                    "accepted; a loader's smaller last batch is left out by drop_last=True"
                )
        return leaves

    def fill(self, inputs: tuple[Any, ...]) -> None:
        """Copy `inputs` to where the graph reads them."""
        pairs = [
            (static, given)
            for static, given in zip(self._leaves, self.match(inputs), strict=True)
            if isinstance(static, Tensor) and static is not given
        ]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_([static for static, _ in pairs], [given for _, given in pairs])


class Snapshot:
    """Values of a step's state, to be restored in place, with random numbers and gradients."""

    def __init__(self, state: Sequence[Any], device: torch.device) -> None:
        self._state, self._device = state, device
        known = (Tensor, nn.Module, torch.optim.Optimizer)
        others = [item for item in state if not isinstance(item, known)]
        self._others = [(item, copy.deepcopy(item.state_dict())) for item in others]
        self._dicts = [(holder, dict(holder)) for _, holder in _holders(state)]
        self._marks = {id(holder): _marks(holder) for holder, _ in self._dicts}
        gradients = [(t, t.grad if t.is_leaf else None) for t in held(state)]
        self._tensors = [
            (t, t.detach().clone(), gradient, None if gradient is None else gradient.clone())
            for t, gradient in gradients
        ]
        self._random = torch.get_rng_state()
        on_gpu = device.type == "cuda"
        self._cuda_random = torch.cuda.get_rng_state(device) if on_gpu else None

    def tensors(self) -> list[Tensor]:
        """The tensors that the step may write to."""
        of_others = tree_leaves([item.state_dict() for item, _ in self._others])
        known = [each for tensor, _, gradient, _ in self._tensors for each in (tensor, gradient)]
        return [leaf for leaf in (*known, *of_others) if isinstance(leaf, Tensor)]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything, and remove what was not there."""
        for holder, entries in self._dicts:
            holder.clear()
            holder.update(entries)
        for tensor, value, gradient, content in self._tensors:
            tensor.copy_(value)
            if tensor.is_leaf:
                tensor.grad = gradient
            if gradient is not None and content is not None:
                gradient.copy_(content)
        for item, saved in self._others:
            item.load_state_dict(saved)
        torch.set_rng_state(self._random)
        if self._cuda_random is not None:
            torch.cuda.set_rng_state(self._cuda_random, self._device)

    def replaced(self) -> str | None:
        """The first entry that changed in another way than by writing into its tensor."""
        for words, holder in _holders(self._state):
            before = self._marks.get(id(holder), {})
            for key, mark in _marks(holder).items():
                if before.get(key, "absent") != mark:
                    return words.format(key)
        for item, saved in self._others:
            now, then = (tree_leaves(content) for content in (item.state_dict(), saved))
            if [_plain(leaf) for leaf in now] != [_plain(leaf) for leaf in then]:
                return f"values in the state_dict of {type(item).__name__}"
        return None


def _holders(state: Sequence[Any]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The dicts in which modules and optimizers keep their state, with a name for their entries."""
    for item in state:
        for module in item.modules() if isinstance(item, nn.Module) else ():
            yield f"parameter '{{}}' of {type(module).__name__}", module._parameters
            yield f"buffer '{{}}' of {type(module).__name__}", module._buffers
        if isinstance(item, torch.optim.Optimizer):
            for holder in (*item.state.values(), *item.param_groups, item.state):
                yield f"'{{}}' in {type(item).__name__}'s state", holder


def held(state: Sequence[Any]) -> list[Tensor]:
    """Every tensor that modules, optimizers and `state` itself hold, once."""
    values = [list(holder.values()) for _, holder in _holders(state)]
    own = [item for item in state if isinstance(item, Tensor)]
    leaves = tree_leaves([*own, *values])
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())


def _marks(holder: dict[Any, Any]) -> dict[Any, Any]:
    """Marks of the entries: they stay where a tensor is written to, and change with another one."""
    return {
        key: (id(value), value.data_ptr()) if isinstance(value, Tensor) else _plain(value)
        for key, value in holder.items()
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, _PLAIN) else None


def _kind(leaf: Any) -> str:
    """A description of what must be the same in every call."""
    if isinstance(leaf, Tensor):
        dtype = str(leaf.dtype).removeprefix("torch.")
        return f"{dtype} of shape {tuple(leaf.shape)} on {leaf.device}"
    return repr(leaf)


def check_state(state: Sequence[Any], device: torch.device) -> None:
    """Check what can be seen without running the step, and what a first run leaves.

    Args:
        state: everything that the step changes.
        device: where the step runs.

    Raises:
        InputError: a module is wrapped in DistributedDataParallel, or an optimizer takes its
            learning rate or its step count from the host, which a replay does not read.
    """
    for i, item in enumerate(state):
        problem, parts = None, item.modules() if isinstance(item, nn.Module) else ()
        if any(isinstance(part, DistributedDataParallel) for part in parts):
            problem = (
                "a step with DistributedDataParallel is not captured; "
                "give mode 'off', or the module inside it"
            )
        elif isinstance(item, torch.optim.Optimizer):
            problem = _optimizer_problem(item, device)
        if problem is not None:
            raise InputError(f"state[{i}]: {problem}")


def _optimizer_problem(optimizer: torch.optim.Optimizer, device: torch.device) -> str | None:
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        lr = group.get("lr")
        if not isinstance(lr, Tensor):
            return (
                f"{name} has the number lr={lr}, which a graph would repeat whatever a scheduler "
                f"does; give lr=torch.tensor({lr}, device='{device}')"
            )
        if lr.device.type != device.type:
            return (
                f"{name} has its lr on {lr.device}, where a graph would read it once; "
                f"put it on {device}"
            )
        if group.get("capturable") is False:
            return f"{name} counts its steps on the host; give capturable=True"
        if isinstance(optimizer, torch.optim.SGD) and not group["fused"]:
            return f"{name} reads its lr on the host; give fused=True"
    for entries in optimizer.state.values():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.device.type != device.type:
                return (
                    f"{name} keeps '{key}' on {value.device}, where a replay does not count; "
                    "use an optimizer that has capturable=True"
                )
    return None


class Rules(TorchDispatchMode):
    """Runs operations, and stops at the first one that a graph cannot hold.

    Args:
        device: where the step runs.
        known: the tensors that the step may change: its state, and its own copies of the inputs.

    Raises:
        InputError: from within the step; with the operation and the user's line.
    """

    def __init__(self, device: torch.device, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._device = device
        self._thread = threading.get_ident()
        self._writable = {storage for tensor in known for storage in _storages(tensor)}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See `TorchDispatchMode`."""
        kwargs = kwargs or {}
        if reason := self._broken_rule(func, args, kwargs):
            raise InputError(f"step: {reason} ({func}, {self._line()})")
        given = {storage for leaf in tree_leaves((args, kwargs)) for storage in _storages(leaf)}
        result = func(*args, **kwargs)
        made = {storage for leaf in tree_leaves(result) for storage in _storages(leaf)}
        # A tensor from host data enters by lift_fresh: it was made past the dispatcher.
        self._writable |= made if func is _aten.lift_fresh.default else made - given
        return result

    def _broken_rule(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        leaves, sized = tree_leaves((args, kwargs)), kwargs.get("output_size") is not None
        on_device = any(self._here(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        if DistributedDataParallel._get_active_ddp_module() is not None:
            # Refused in the forward: a wrapper whose backward was broken off cannot be used again.
            return (
                "it runs a model in DistributedDataParallel, which is not captured; "
                "use the module inside it"
            )
        if func.namespace in ("c10d", "_c10d_functional"):
            return "collective operations are not captured"
        if on_device and torch.Tag.data_dependent_output in func.tags:
            return (
                "it reads a value on the host; "
                "keep it in a tensor, return that and read it after the call"
            )
        if func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
            indices = [index for index in args[1] if index is not None]
            # A write of one value is done as masked_fill.
            one_value = func is not _aten.index.Tensor and args[2].numel() == 1
            masked = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            if on_device and masked and not one_value:
                return (
                    "indexing with a mask has a shape that depends on values; "
                    "use torch.where or a product"
                )
            if any(index.device.type != args[0].device.type for index in indices):
                return "it indexes with a tensor of another device"
        elif on_device and torch.Tag.dynamic_output_shape in func.tags and not sized:
            return "the shape of its result depends on values"
        if func is _aten.lift_fresh.default and on_device:
            return (
                "it makes a tensor from data of the host; "
                "make it once before, or use torch.full, zeros or arange"
            )
        if func in (_aten._to_copy.default, _aten.copy_.default):
            target = kwargs.get("device") or args[0].device
            source = args[1].device if func is _aten.copy_.default else args[0].device
            if source.type != target.type and self._device.type in (source.type, target.type):
                return f"it copies from {source} to {target}; copy before or after the call"
        for tensor in _written(func, args, kwargs):
            if self._here(tensor) and not _storages(tensor) <= self._writable:
                return (
                    f"it changes a tensor of shape {tuple(tensor.shape)} that state does not hold; "
                    "name the tensor, or its module or optimizer, in state"
                )
        return None

    def _here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device.type

    def _line(self) -> str:
        """The user's line that is running; on a GPU backward has its own thread."""
        return (
            user_line(traceback.walk_stack(sys._getframe()))
            or user_line(traceback.walk_stack(sys._current_frames().get(self._thread)))
            or "at an unknown line"
        )


def user_line(frames: Iterable[tuple[FrameType, int]]) -> str | None:
    """The first frame outside PyTorch, Python's library and the capture, as file:line."""
    for frame, line in frames:
        file = frame.f_code.co_filename
        of_python = file.startswith(("<", _PYTHON)) and "site-packages" not in file
        if not (of_python or file.startswith(_TORCH) or file in _OWN_FILES):
            return f"{file}:{line}"
    return None


def explain(error: BaseException) -> str:
    """The first line of the original error, and the user's line that raised it.

    A capture that went wrong raises again where it ends; its cause is the context of that error.
    """
    while error.__context__ is not None:
        error = error.__context__
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    line = user_line(reversed(list(traceback.walk_tb(error.__traceback__))))
    return f"{text} ({line})" if line else text


def _storages(value: Any) -> set[int]:
    """The identity of a tensor's memory; empty for values that have no single one."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return set()
    return {value.untyped_storage()._cdata}


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to, by its schema."""
    found: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            positional = i < len(args) and not argument.kwarg_only
            found.append(args[i] if positional else kwargs.get(argument.name))
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
