"""What a step changes: kept, put back, and compared with what it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

PLAIN = (bool, int, float, str, bytes, Enum, torch.dtype, torch.device, type(None))
"""Values that can be compared; a recorded step keeps those it had."""


class Snapshot:
    """Values of a step's state, to be put back into the same tensors; random numbers and gradients included."""

    def __init__(self, state: Sequence[Any], device: torch.device) -> None:
        self._device = device
        self._modules = [
            module for item in state if isinstance(item, nn.Module) for module in item.modules()
        ]
        self._optimizers = [item for item in state if isinstance(item, torch.optim.Optimizer)]
        self._others = [
            (item, copy.deepcopy(item.state_dict())) for item in state if _is_other(item)
        ]
        self._aliases = [
            t for item in state if _is_other(item) for t in tree_leaves(item.state_dict())
        ]
        held = list(self.held(state))
        self._values = [(tensor, tensor.detach().clone()) for tensor in held]
        self._gradients = [
            (t, t.grad, None if t.grad is None else t.grad.clone()) for t in held if t.is_leaf
        ]
        self._entries = [(*entry, _mark(entry[-1])) for entry in self._named_entries()]
        self._optimizer_states = [
            {p: dict(s) for p, s in o.state.items()} for o in self._optimizers
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
        """What the step may write to."""
        gradients = [gradient for _, gradient, _ in self._gradients if gradient is not None]
        return [
            *(t for t, _ in self._values),
            *gradients,
            *(t for t in self._aliases if isinstance(t, Tensor)),
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; what was not there is removed."""
        for holder, key, _, value, _ in self._entries:
            holder[key] = value
        for optimizer, states in zip(self._optimizers, self._optimizer_states, strict=True):
            optimizer.state.clear()
            optimizer.state.update(
                {parameter: dict(entries) for parameter, entries in states.items()}
            )
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
        """The first thing that a step has changed in another way than by writing into a tensor that was there."""
        before = {(id(holder), key): mark for holder, key, _, _, mark in self._entries}
        for holder, key, name, value in self._named_entries():
            if before.get((id(holder), key), "absent") != _mark(value):
                return name
        for item, saved in self._others:
            if [_plain(leaf) for leaf in tree_leaves(item.state_dict())] != [
                _plain(leaf) for leaf in tree_leaves(saved)
            ]:
                return f"values in the state_dict of {type(item).__name__}"
        return None

    def _named_entries(self) -> Iterator[tuple[dict[Any, Any], Any, str, Any]]:
        """What modules and optimizers keep in dicts: the dict, the key, a name and the value."""
        for module in self._modules:
            for kind, holder in (("parameter", module._parameters), ("buffer", module._buffers)):
                for key, tensor in holder.items():
                    yield holder, key, f"{kind} '{key}' of {type(module).__name__}", tensor
        for optimizer in self._optimizers:
            for holder in (*optimizer.state.values(), *optimizer.param_groups):
                for key, value in holder.items():
                    if key != "params":
                        yield holder, key, f"'{key}' in {type(optimizer).__name__}'s state", value


def _mark(value: Any) -> Any:
    """What stays the same while a tensor is written to, and changes when it is replaced."""
    return (id(value), value.data_ptr()) if isinstance(value, Tensor) else _plain(value)


def _plain(value: Any) -> Any:
    return value if isinstance(value, PLAIN) else None


def has_state_dict(item: Any) -> bool:
    """Whether an object gives and takes its state as modules do."""
    return callable(getattr(item, "state_dict", None)) and callable(
        getattr(item, "load_state_dict", None)
    )


def _is_other(item: Any) -> bool:
    return not isinstance(item, Tensor | nn.Module | torch.optim.Optimizer)
