"""Launches of the fused multi-view loss: tensors in, addresses, strides and streams out to the backend's kernels."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vi_simsiam.ops.backends import extension

ROW_MULTIPLE = 16
"""Rows that start at multiples of this many elements can be moved 16 bytes at a time."""


_TICKETS = 2**20
"""Tickets of each GPU, 4 MB. Captured launches keep theirs: a loss benchmark takes some 100,000, a training a few."""


class LossCall(NamedTuple):
    """What a launch needs beside its tensors."""

    backend: str
    distribution: str
    dtype: torch.dtype
    """Of the arithmetic and the loss: float32 or float64."""
    scale: float
    minimum: float
    factor: float
    """On the loss, and so on the gradient."""
    link: str
    gain: float
    cosine: float
    """Weight of SimSiam's loss beside the density's."""
    mean: bool
    """The loss is the mean over the samples, and so is what the gradient belongs to."""
    wants_gradient: bool


def padded_width(columns: int) -> int:
    """The least multiple of `ROW_MULTIPLE` that holds `columns`."""
    return -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE


def new_gradient(predictions: Sequence[Tensor], call: LossCall) -> Tensor:
    """Room for a gradient (V, B, W) with aligned rows, in the dtype that it is kept in until backward."""
    first = predictions[0]
    # float16 would lose a gradient divided by a large batch.
    narrow = first.dtype == torch.bfloat16 and call.dtype == torch.float32
    return _padded_rows(
        first, (len(predictions), *first.shape), first.dtype if narrow else call.dtype
    )


def _padded_rows(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    *outer, width = shape
    return like.new_empty((*outer, padded_width(width)), dtype=dtype)[..., :width]


def launch_loss(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    concentration: Tensor | None,
    loss: Tensor,
    mean: Tensor | None,
    gradient: Tensor | None,
    concentration_gradient: Tensor | None,
    call: LossCall,
) -> None:
    """Write the loss (B,) and what else is given: its mean, and the gradients of the one or the other.

    `concentration` and its gradient (V, B) are contiguous and in the dtype of the arithmetic.
    """
    views, batch = len(predictions), len(loss)
    weight = 2 * call.factor / (len(targets) * (views - 1))
    numbers = {
        "scale": call.scale,
        "minimum": call.minimum,
        "gain": call.gain,
        "cosine": call.cosine,
        "weight": weight,
        "gradient_weight": weight / batch if call.mean else weight,
    }
    if call.backend == "triton":
        from vi_simsiam.kernels import multiview_loss as kernel

        kernel.multiview_loss(
            _rows(predictions),
            _rows(targets),
            concentration,
            loss,
            mean,
            None if mean is None else _ticket(loss.device),
            gradient,
            concentration_gradient,
            distribution=call.distribution,
            link=call.link,
            **numbers,
        )
        return
    p, z = _rows(predictions, call), _rows(targets, call)
    if (
        call.backend == "cuda" and z[0].dtype != p[0].dtype
    ):  # compiled for equal dtypes, and for float32 targets
        z = [x.to(call.dtype, memory_format=torch.contiguous_format) for x in z]
    if call.distribution == "cosine":
        form = "cosine"
    else:
        form = "raw_concentration" if concentration is None else "given_concentration"
    problem: dict[str, Any] = {
        "predictions": [x.data_ptr() for x in p],
        "targets": [x.data_ptr() for x in z],
        "concentration": _address(concentration),
        "loss": loss.data_ptr(),
        "mean": _address(mean),
        "gradient": _address(gradient),
        "concentration_gradient": _address(concentration_gradient),
        "batch": batch,
        "dim": z[0].shape[1],
        "width": p[0].shape[1],
        "prediction_stride": p[0].stride(0),
        "target_stride": z[0].stride(0),
        "gradient_strides": (0, 0) if gradient is None else gradient.stride()[:2],
        "form": form,
        "link": call.link,
        **numbers,
    }
    module: Any = extension()
    if call.backend == "cpu":
        module.multiview_loss_cpu(
            **problem,
            prediction_dtype=_name(p[0].dtype),
            target_dtype=_name(z[0].dtype),
            threads=torch.get_num_threads(),
        )
        return
    with torch.cuda.device(loss.device):
        module.multiview_loss_cuda(
            **problem,
            prediction_dtype=_name(p[0].dtype),
            target_dtype=_name(z[0].dtype),
            gradient_dtype=_name(call.dtype if gradient is None else gradient.dtype),
            ticket=0 if mean is None else _ticket(loss.device).data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )


def launch_scale(
    gradient: Tensor,
    concentration_gradient: Tensor | None,
    factor: Tensor,
    call: LossCall,
    dtype: torch.dtype,
    concentration_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients times the factor, () or (B,), in the dtypes of what they belong to. Uses the given ones up."""
    if call.backend == "cpu":
        number = factor[:, None] if factor.dim() else factor.item()
        if factor.dim() or number != 1:
            gradient.mul_(number)
            if concentration_gradient is not None:
                concentration_gradient.mul_(factor)
    elif gradient.numel():
        half = dtype == torch.float16 and gradient.dtype == torch.float32
        out = _padded_rows(gradient, gradient.shape, dtype) if half else gradient
        if call.backend == "triton":
            from vi_simsiam.kernels import multiview_loss as kernel

            kernel.scale_gradient(gradient, factor, out, concentration_gradient)
        else:
            module: Any = extension()
            with torch.cuda.device(gradient.device):
                module.scale_gradient_cuda(
                    gradient=gradient.data_ptr(),
                    out=out.data_ptr(),
                    concentration_gradient=_address(concentration_gradient),
                    factor=factor.data_ptr(),
                    views=gradient.shape[0],
                    batch=gradient.shape[1],
                    width=gradient.shape[2],
                    gradient_strides=gradient.stride()[:2],
                    out_strides=out.stride()[:2],
                    factor_stride=factor.stride(0) if factor.dim() else 0,
                    gradient_dtype=_name(gradient.dtype),
                    out_dtype=_name(out.dtype),
                    stream=torch.cuda.current_stream().cuda_stream,
                )
        gradient = out
    if concentration_gradient is not None and concentration_dtype is not None:
        concentration_gradient = concentration_gradient.to(concentration_dtype)
    return gradient.to(dtype), concentration_gradient


def _rows(views: Sequence[Tensor], call: LossCall | None = None) -> Sequence[Tensor]:
    """The views with one row stride and neighbouring columns; with a call, in a dtype that its compiled backend knows."""
    first = views[0]
    unknown = call is not None and (
        call.dtype == torch.float64 or (call.backend == "cpu" and first.dtype == torch.float16)
    )
    if call is not None and unknown and first.dtype != call.dtype:
        return [x.to(call.dtype, memory_format=torch.contiguous_format) for x in views]
    stride = first.stride(0)
    if all(x.stride(0) == stride and x.stride(1) == 1 for x in views):
        return views
    return [x.contiguous() for x in views]


class _Tickets:
    """Numbers on a GPU by which the last program of a launch knows that it is the last; 0 before and after a launch.

    Two launches that may run at the same time need two. Launches of one stream follow each other and share one; torch
    neither destroys its streams nor uses the stream that is another one in every thread. A
    captured one may be replayed on any stream and has one of its own, taken from memory that was set to 0 before: a
    node of the graph to do so would take as long as the loss of a small batch. Launches that add up by columns take
    several at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.zeros(_TICKETS, dtype=torch.int32, device=device)
        torch.cuda.current_stream().synchronize()  # once: other streams will use the zeros
        self._taken = 0
        self._taking = threading.Lock()
        self._of_streams: dict[tuple[int, int], Tensor] = {}

    def take(self, capturing: bool, count: int = 1) -> Tensor:
        """Tickets for a launch on the current stream."""
        if capturing:
            return self._new(count)
        key = torch.cuda.current_stream().cuda_stream, count
        if key not in self._of_streams:
            self._of_streams[key] = self._new(count)
        return self._of_streams[key]

    def _new(self, count: int) -> Tensor:
        with self._taking:
            if self._taken + count > len(self._memory):
                return torch.zeros(count, dtype=torch.int32, device=self._memory.device)
            first, self._taken = self._taken, self._taken + count
        return self._memory[first : first + count]


_tickets: dict[int, _Tickets] = {}


@torch.compiler.assume_constant_result
def prepare(device_type: str, index: int | None) -> None:
    """Set tickets aside while a graph is traced: compiled code may run for the first time with a CUDA graph's memory.

    torch.export calls this with its modes at work, under which memory would be fake.
    """
    if device_type == "cuda" and torch.cuda.is_available():
        with _disable_current_modes():
            _ticket(
                torch.device(device_type, torch.cuda.current_device() if index is None else index)
            )


def _ticket(device: torch.device) -> Tensor:
    return new_tickets(device, 1)


def new_tickets(device: torch.device, count: int) -> Tensor:
    """Tickets for a launch on the device's current stream."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
        index = torch.cuda.current_device()
        if index not in _tickets:
            if capturing:  # the very first launch: memory cannot be set aside now
                return torch.zeros(count, dtype=torch.int32, device=device)
            _tickets[index] = _Tickets(device)
        return _tickets[index].take(capturing, count)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
