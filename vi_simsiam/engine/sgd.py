"""Fused SGD on a CPU without copies of gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from vi_simsiam.errors import InputError

_LAYOUT = torch.channels_last
_OPTIONS = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")


class CPUFusedSGD(torch.optim.SGD):
    """torch's fused SGD for parameters on a CPU.

    Momentum begins at 0: without dampening the first step is that of torch, which begins with the
    first gradient.

    torch's operator copies every gradient in channels_last, makes no use of the copy, and updates
    in the order of the memory. Here it gets what is in channels_last as contiguous tensors.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient. A closure is not accepted.

        Raises:
            InputError: a momentum buffer of another shape or dtype than its parameter.
        """
        assert closure is None
        for group in self.param_groups:
            updated = [
                _in_order(parameter, parameter.grad, *self._momentum(parameter, group["momentum"]))
                for parameter in group["params"]
                if parameter.grad is not None
            ]
            if not updated:
                continue
            columns = [list(tensors) for tensors in zip(*updated, strict=True)]
            parameters, gradients, momenta = (*columns, [])[:3]  # without momentum there are none
            options: dict[str, Any] = {option: group[option] for option in _OPTIONS}
            found_inf = getattr(self, "found_inf", None)
            sgd(parameters, gradients, momenta, fused=True, found_inf=found_inf, **options)

    def _momentum(self, parameter: Tensor, momentum: float) -> tuple[Tensor, ...]:
        """The parameter's buffer, which is made here if there is none; empty without momentum."""
        if not momentum:
            return ()
        state = self.state[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = state["momentum_buffer"] = torch.zeros_like(parameter)
        # torch's operator reads as many numbers as the parameter has.
        if buffer.shape != parameter.shape or buffer.dtype != parameter.dtype:
            found, expected = (f"{x.dtype} {tuple(x.shape)}" for x in (buffer, parameter))
            raise InputError(f"momentum_buffer: {found} must be {expected}, as its parameter")
        return (buffer,)


def _in_order(*tensors: Tensor) -> list[Tensor]:
    """The tensors, as contiguous ones if all are in channels_last."""
    if all(each.dim() == 4 and each.is_contiguous(memory_format=_LAYOUT) for each in tensors):
        return [each.permute(0, 2, 3, 1) for each in tensors]
    return list(tensors)
