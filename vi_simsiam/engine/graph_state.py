"""Inputs and state of a captured step: what it reads and what it changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
)

from vi_simsiam.checks import require
from vi_simsiam.errors import InputError

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
            given, expected = _outline(structure), _outline(self._structure)
            raise InputsChanged(f"inputs: {given} given, {expected} as in the first call")
        for name, expected, given in zip(self._names, self._leaves, leaves, strict=True):
            if not _fits(given, expected):
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
        self._device = device
        self._modules = [m for item in state if isinstance(item, nn.Module) for m in item.modules()]
        self._optimizers = [item for item in state if isinstance(item, torch.optim.Optimizer)]
        known = (Tensor, nn.Module, torch.optim.Optimizer)
        self._others = [
            (item, copy.deepcopy(item.state_dict()))
            for item in state
            if not isinstance(item, known)
        ]
        held = list(self.held(state))
        self._values = [(tensor, tensor.detach().clone()) for tensor in held]
        self._gradients = [
            (t, t.grad, None if t.grad is None else t.grad.clone()) for t in held if t.is_leaf
        ]
        self._entries = [(*entry, _mark(entry[-1])) for entry in self._named_entries()]
        self._optimizer_states = [
            {parameter: dict(entries) for parameter, entries in optimizer.state.items()}
            for optimizer in self._optimizers
        ]
        self._random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @staticmethod
    def held(state: Sequence[Any]) -> Iterator[Tensor]:
        """Every tensor that modules, optimizers and `state` itself hold, once."""
        seen: set[int] = set()
        for item in state:
            found: Any = ()
            if isinstance(item, Tensor):
                found = item
            elif isinstance(item, nn.Module):
                found = (*item.parameters(), *item.buffers())
            elif isinstance(item, torch.optim.Optimizer):
                found = (item.param_groups, list(item.state.values()))
            for tensor in tree_leaves(found):
                if isinstance(tensor, Tensor) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor

    def tensors(self) -> list[Tensor]:
        """The tensors that the step may write to."""
        leaves = [
            *(tensor for tensor, _ in self._values),
            *(gradient for _, gradient, _ in self._gradients),
            *tree_leaves([item.state_dict() for item, _ in self._others]),
        ]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything, and remove what was not there."""
        for holder, key, _, value, _ in self._entries:
            holder[key] = value
        for optimizer, states in zip(self._optimizers, self._optimizer_states, strict=True):
            optimizer.state.clear()
            optimizer.state.update({p: dict(entries) for p, entries in states.items()})
        for tensor, value in self._values:
            tensor.copy_(value)
        for tensor, gradient, content in self._gradients:
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
        before = {(id(holder), key): mark for holder, key, _, _, mark in self._entries}
        for holder, key, name, value in self._named_entries():
            if before.get((id(holder), key), "absent") != _mark(value):
                return name
        for item, saved in self._others:
            now, then = (tree_leaves(content) for content in (item.state_dict(), saved))
            if [_plain(leaf) for leaf in now] != [_plain(leaf) for leaf in then]:
                return f"values in the state_dict of {type(item).__name__}"
        return None

    def _named_entries(self) -> Iterator[tuple[dict[Any, Any], Any, str, Any]]:
        """Entries of the dicts in modules and optimizers: the dict, the key, a name, the value."""
        for module in self._modules:
            for kind, holder in (("parameter", module._parameters), ("buffer", module._buffers)):
                for key, tensor in holder.items():
                    yield holder, key, f"{kind} '{key}' of {type(module).__name__}", tensor
        for optimizer in self._optimizers:
            for holder in (*optimizer.state.values(), *optimizer.param_groups):
                for key, value in holder.items():
                    if key != "params":
                        yield holder, key, f"'{key}' in {type(optimizer).__name__}'s state", value


def has_state_dict(item: Any) -> bool:
    """True if an object gives and takes its state as modules do."""
    methods = (getattr(item, name, None) for name in ("state_dict", "load_state_dict"))
    return all(callable(method) for method in methods)


def _mark(value: Any) -> Any:
    """A mark that stays the same when a tensor is written to, and changes when it is replaced."""
    return (id(value), value.data_ptr()) if isinstance(value, Tensor) else _plain(value)


def _plain(value: Any) -> Any:
    return value if isinstance(value, _PLAIN) else None


def _fits(given: Any, expected: Any) -> bool:
    """True if an input is that of the first call, except for the values in a tensor."""
    if isinstance(given, Tensor) and isinstance(expected, Tensor):
        return _kind(given) == _kind(expected)
    return type(given) is type(expected) and bool(given == expected)


def _kind(leaf: Any) -> str:
    """A description of what must be the same in every call."""
    if isinstance(leaf, Tensor):
        dtype = str(leaf.dtype).removeprefix("torch.")
        return f"{dtype} of shape {tuple(leaf.shape)} on {leaf.device}"
    return repr(leaf)


def _outline(structure: TreeSpec) -> str:
    return str(structure.unflatten(["*"] * structure.num_leaves))
