"""BatchNorm of two views, an addition and a ReLU: the network's operation against PyTorch's.

Each view is normalised by its own statistics, and updates the running ones. A provider takes the
views as one batch, or one after the other as a plain loop does. What training needs is timed: the
result ("forward"), and the result with the gradients of x, residual, weight and bias
("forward_backward"), for a gradient of the result made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.ops.backends import why_unavailable
from vi_simsiam.ops.batch_norm import batch_norm_act

from . import modes
from .cases import BOTH, FORWARD
from .harness import Suite, SuiteOptions, Timer
from .modes import Operation, Outcome
from .results import COMPILED, EAGER

VIEWS = 2
_LARGEST = 4
"""How many of a network's norms are measured."""
_EXTENTS = {"cuda": ((128, 64), (128, 128)), "cpu": ((32, 64), (128, 64))}
"""Pixels of the views and batch, the telling ones first."""
_DTYPES = {"cuda": "bfloat16", "cpu": "float32"}
_UNITS = {FORWARD: 3, BOTH: 8}
_UNITS_WITH_RESIDUAL = {FORWARD: 4, BOTH: 11}
"""Reads and writes of a tensor like x: forward reads x for its statistics and again to normalise
it; backward reads the gradient and x twice. A residual is read and has a gradient, and backward
reads the result for the ReLU."""
_SHORT_SECONDS = {"cuda": 100.0, "cpu": 90.0}


@dataclass(frozen=True)
class Options(SuiteOptions):
    """Options of `vi-simsiam bench batch_norm`."""

    only: str = ""
    """Only cases whose name contains this, such as 2x32, 64@16 or residual; a name is
    "2x32 batch 64 64@8 residual float32", views x size, then channels @ height. What no name
    contains lists all names."""


@dataclass(frozen=True)
class NormCase:
    """A norm for two views of `size` pixels of each of `batch` images."""

    size: int
    batch: int
    channels: int
    side: int
    residual: bool
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Name of the case in results; unique."""
        added = " residual" if self.residual else ""
        norm = f"{self.channels}@{self.side}{added}"
        return f"{VIEWS}x{self.size} batch {self.batch} {norm} {self.dtype}"

    @property
    def label(self) -> str:
        """Readable name of the case."""
        extent = f"{self.channels} x {self.side} x {self.side}"
        added = ", residual" if self.residual else ""
        return f"{VIEWS}x{self.size}, batch {self.batch}: {extent}{added}, {self.dtype}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of x, which holds all views."""
        return VIEWS * self.batch, self.channels, self.side, self.side

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of x, residual and gradient; weight, bias and statistics are float32."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def least_bytes(self, mode: str) -> int:
        """Bytes that must move, where x is too large to stay in a cache."""
        units = (_UNITS_WITH_RESIDUAL if self.residual else _UNITS)[mode]
        return units * torch.Size(self.shape).numel() * self.torch_dtype.itemsize


def norms(size: int) -> list[tuple[int, int, bool]]:
    """Channels, height and residual of the norms of a ResNet-18 that a ReLU follows, largest first.

    The first follows a convolution of stride 2. Then come a pool and four stages; their blocks have
    a norm inside and one at the end, where the residual is added.
    """
    stages = [(64 * 2**i, size // 2 ** (2 + i)) for i in range(4)]
    blocks = [(*stage, residual) for stage in stages for residual in (True, False)]
    return [(64, size // 2, False), *blocks]


def norm_cases(device_type: str, *, short: bool) -> tuple[NormCase, ...]:
    """The cases in the order in which they are measured, the telling ones first."""
    return tuple(
        NormCase(size, batch, *norm, _DTYPES[device_type])
        for size, batch in _EXTENTS[device_type][: 1 if short else None]
        for norm in norms(size)[:_LARGEST]
    )


class Views(NamedTuple):
    """Views that pass through the layers as one batch, and the gradient of the result."""

    x: Tensor
    residual: Tensor | None
    gradient: Tensor


class Inputs(NamedTuple):
    """Inputs of a case; the views together and apart are the same memory."""

    together: list[Views]
    apart: list[Views]
    affine: list[Tensor]
    """Weight and bias."""
    running: list[Tensor]
    """Running mean and variance."""


class Provider(NamedTuple):
    """Layers on x, residual, weight, bias, running mean and variance."""

    layers: Callable[..., Tensor]
    apart: bool = False
    """The views pass one by one."""


def draw_inputs(case: NormCase, device: torch.device, generator: torch.Generator) -> Inputs:
    """Random inputs in channels_last."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def images() -> Tensor:
        return normal(*case.shape).to(case.torch_dtype, memory_format=torch.channels_last)

    x, gradient, residual = images(), images(), images() if case.residual else None
    affine = [normal(case.channels).abs() + 0.5, normal(case.channels)]
    weight, bias, added = (each if each is None else each.double() for each in (*affine, residual))
    before = batch_norm_act(
        x.double(),
        weight,
        bias,
        None,
        None,
        groups=VIEWS,
        residual=added,
        relu=False,
        backend="eager",
    )
    # Where the ReLU's input is so close to 0 that rounding decides its sign, nothing flows back.
    margin = max(1e-4, 16 * torch.finfo(case.torch_dtype).eps)
    gradient.masked_fill_(before.abs() < margin, 0.0)
    running = [torch.zeros_like(affine[0]), torch.ones_like(affine[0])]
    return _inputs(x, residual, gradient, affine, running)


def _inputs(
    x: Tensor,
    residual: Tensor | None,
    gradient: Tensor,
    affine: list[Tensor],
    running: list[Tensor],
) -> Inputs:
    def leaves(pieces: int) -> list[Views]:
        parts = [part.detach().requires_grad_() for part in x.chunk(pieces)]
        added: Sequence[Tensor | None] = [None] * pieces
        if residual is not None:
            added = [part.detach().requires_grad_() for part in residual.chunk(pieces)]
        return list(map(Views, parts, added, gradient.chunk(pieces)))

    affine = [each.detach().requires_grad_() for each in affine]
    return Inputs(leaves(1), leaves(VIEWS), affine, running)


def torch_layers(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    views: int = VIEWS,
) -> Tensor:
    """PyTorch's layers as the plain network has them."""
    parts = [F.batch_norm(part, mean, variance, weight, bias, True) for part in x.chunk(views)]
    y = parts[0] if views == 1 else torch.cat(parts)
    if residual is not None:
        y += residual
    return y.relu_()


def _without_cudnn(*tensors: Tensor) -> Tensor:
    with torch.backends.cudnn.flags(enabled=False):
        return torch_layers(*tensors)


def _ours(x: Tensor, residual: Tensor | None, *others: Tensor, backend: str) -> Tensor:
    weight, bias, mean, variance = others
    options: dict[str, Any] = {"groups": VIEWS, "residual": residual, "backend": backend}
    return batch_norm_act(x, weight, bias, mean, variance, **options)


def make_providers(device: torch.device) -> dict[str, Provider | str]:
    """All providers on `device`, or the reason for those that cannot run; resets torch.compile."""
    torch.compiler.reset()
    view_by_view, together, without_cudnn = EAGER
    made: dict[str, Provider | str] = {
        view_by_view: Provider(partial(torch_layers, views=1), apart=True),
        together: Provider(torch_layers),
    }
    if device.type == "cuda":
        made[without_cudnn] = Provider(_without_cudnn)
    made[COMPILED[0]] = Provider(torch.compile(torch_layers, fullgraph=True, dynamic=False))
    name = "triton" if device.type == "cuda" else "cpu"
    reason = why_unavailable(name, device.type)
    ours = Provider(partial(_ours, backend=name))
    made[name] = ours if reason is None else f"not available: {reason}"
    return made


def results(provider: Provider, inputs: Inputs) -> Outcome:
    """Results of a provider: output and gradients view by view, and new running statistics."""
    running = [each.clone() for each in inputs.running]
    outputs, gradients = _with_gradients(provider, inputs._replace(running=running))

    def by_view(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [part for each in tensors for part in each.detach().chunk(VIEWS // len(outputs))]

    return {
        "output": by_view(outputs),
        "gradient": by_view(gradients[:-2]),
        "parameter gradient": gradients[-2:],
        "running statistics": running,
    }


def reference(inputs: Inputs, dtype: torch.dtype) -> Outcome:
    """Results of PyTorch's layers; weight, bias and statistics in at least float32."""
    (given,) = inputs.together
    x, residual, gradient = (each if each is None else each.detach().to(dtype) for each in given)
    assert x is not None
    assert gradient is not None
    wide = torch.promote_types(dtype, torch.float32)
    affine, running = ([each.to(wide) for each in part] for part in inputs[2:])
    return results(Provider(torch_layers), _inputs(x, residual, gradient, affine, running))


def _outputs(provider: Provider, inputs: Inputs) -> list[Tensor]:
    passes = inputs.apart if provider.apart else inputs.together
    parameters = (*inputs.affine, *inputs.running)
    return [provider.layers(each.x, each.residual, *parameters) for each in passes]


def _forward(provider: Provider, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return _outputs(provider, inputs)


def _with_gradients(provider: Provider, inputs: Inputs) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    passes = inputs.apart if provider.apart else inputs.together
    outputs = _outputs(provider, inputs)
    leaves = [each.x for each in passes]
    leaves += [each.residual for each in passes if each.residual is not None]
    gradients = [each.gradient for each in passes]
    return outputs, torch.autograd.grad(outputs, [*leaves, *inputs.affine], gradients)


def run(options: Options) -> dict[str, Any]:
    """Measure the cases, see `modes.run`."""
    suite = Suite("batch_norm", options)
    cases = norm_cases(suite.device.type, short=options.short)
    return modes.run(
        suite,
        cases,
        _SHORT_SECONDS,
        lambda case: make_providers(suite.device),
        COMPILED[0],
        measure_case,
    )


def measure_case(
    case: NormCase,
    device: torch.device,
    providers: dict[str, Provider | str],
    timer: Timer,
    *,
    rounds: int,
) -> dict[str, Any]:
    """The case, with the figures of all providers, see `modes.measure`."""
    generator = torch.Generator(device).manual_seed(0)
    operation = Operation(
        ("output", "gradient", "parameter gradient", "running statistics"),
        lambda: draw_inputs(case, device, generator),
        reference,
        results,
        {FORWARD: _forward, BOTH: _with_gradients},
    )
    return {
        **{"name": case.name, "label": case.label, "shape": case.shape, "dtype": case.dtype},
        **modes.measure(case, operation, providers, device, timer, rounds=rounds),
    }
