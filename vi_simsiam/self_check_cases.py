"""The checks of `vi-simsiam info --check`: each operation that has kernels with its gradients, and
a training step, beside its reference.

A reference is plain PyTorch on the CPU, in float64 but for views and training: a new card, driver
or compiler has no part in it. Its inputs are those of the check, as they were rounded to the
check's dtype. A captured step is held to itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam.backbones import build_backbone
from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.views import add_offsets, draw_table
from vi_simsiam.engine.graph import capture
from vi_simsiam.engine.step import TrainStep, training_network
from vi_simsiam.models import SimSiam, VISimSiam
from vi_simsiam.ops.augment import augment
from vi_simsiam.ops.backends import BACKENDS, interpreting
from vi_simsiam.ops.batch_norm import batch_norm_act
from vi_simsiam.ops.multiview_loss import LossForm, multiview_loss
from vi_simsiam.ops.multiview_loss_fused import padded_width
from vi_simsiam.ops.stem_convolution import stem_convolution
from vi_simsiam.ops.stem_pool import batch_norm_relu_max_pool

CALLS = 8
"""Calls of each check; a captured step is replayed from the fifth on, and an update that it misses
shows in the calls after."""
_SUMS = 1e-5
"""Error allowed for sums of some thousand terms in float32, of which most roundings cancel, and for
a GPU's approximate exp and division."""
_COLOURS = 4e-5
"""Error allowed for views: a change of hue divides by the difference of channels, and the reference
is rounded as they are."""
_CONVOLUTION = 1e-4
"""Error allowed for a convolution: cuDNN may take an algorithm with transforms, which are rounded
more often."""
_STEPS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Error allowed for the losses of a few steps: BatchNorm of few samples enlarges roundings, and
each step takes over those before."""
_BATCH, _RATE = 8, 4e-3
_DIM, _SIDE, _HEIGHT, _WIDTH = 200, 34, 53, 61

Tensors = Sequence[Tensor]


class Case(NamedTuple):
    """A check with its inputs drawn and its reference computed."""

    run: Callable[[], Tensors]
    """One call on the device; its results."""
    expected: Sequence[Tensors]
    """Results of every call, float64 on the CPU."""
    allowed: float = _SUMS
    """Error relative to the largest value, beside what rounding to a result's dtype takes."""


class Operation(NamedTuple):
    """An operation with its gradients."""

    backends: Sequence[str]
    draw: Callable[[torch.dtype], Tensors]
    """Inputs on the CPU."""
    call: Callable[[Tensors, str], Tensors]
    """Results of inputs by a backend; the inputs stay as they are."""
    allowed: float = _SUMS

    def case(self, backend: str, device: torch.device, dtype: torch.dtype) -> Case:
        """Hold a backend to "eager"."""
        inputs = self.draw(dtype)
        exact = self.call([x.double() if x.is_floating_point() else x for x in inputs], "eager")
        there = [x.to(device) for x in inputs]
        calls = 1 if interpreting() else CALLS  # an interpreter is slow, and equally so each time
        return Case(
            partial(self.call, there, backend), [[x.double() for x in exact]] * calls, self.allowed
        )


def _random(*shape: int) -> Tensor:
    x = torch.randn(shape)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _with_gradients(call: Callable[..., Tensor], inputs: Tensors, gradient: Tensor) -> Tensors:
    """Results of `call`, and the gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def _draw_loss(form: LossForm, dtype: torch.dtype) -> Tensors:
    """Three views and two targets of nine images in rows that are padded, and a factor for the loss
    of each image."""
    images, columns = _random(9, _DIM), _DIM + (form.distribution == "power_spherical")
    predictions = torch.zeros(3, 9, padded_width(columns))
    predictions[..., :_DIM] = images + _random(3, 9, _DIM)
    predictions[..., _DIM:columns] = 4 * _random(3, 9, columns - _DIM)
    return (
        predictions.to(dtype),
        (images + 0.3 * _random(2, 9, _DIM)).to(dtype),
        torch.rand(9) + 0.5,
    )


def _loss(form: LossForm, inputs: Tensors, backend: str) -> Tensors:
    """The losses and their mean. A factor on the gradient is a kernel of its own."""
    predictions, targets, factor = inputs
    each, mean = (
        partial(multiview_loss, targets=targets, form=form, reduction=r, backend=backend)
        for r in ("none", "mean")
    )
    return *_with_gradients(each, [predictions], factor), *_with_gradients(
        mean, [predictions], factor[0]
    )


def _draw_views(dtype: torch.dtype) -> Tensors:
    """Images, the table of two views of each, and a number in the dtype of the views."""
    return _draw_pixels(2), _table(2), torch.zeros(1, dtype=dtype)


def _draw_pixels(images: int) -> Tensor:
    return torch.randint(256, (images * _HEIGHT * _WIDTH * 3,), dtype=torch.uint8)


def _table(images: int, step: int = 0) -> Tensor:
    """The views of a step, (2, images, 16)."""
    samples = np.arange(images)
    sizes = {"heights": np.full(images, _HEIGHT), "widths": np.full(images, _WIDTH)}
    policy = AugmentConfig(size=_SIDE, grayscale_prob=0.5)
    table = draw_table(policy, seed=3, epoch=step, samples=samples, **sizes)
    add_offsets(table, samples * (_HEIGHT * _WIDTH * 3))
    return torch.from_numpy(table)


def _views(inputs: Tensors, backend: str) -> Tensors:
    pixels, table, number = inputs
    dtype = torch.bfloat16 if number.dtype == torch.bfloat16 else torch.float32
    return (augment(pixels, table, _SIDE, dtype=dtype, backend=backend),)


def _draw_norm(shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    """The gradient, x and what is added; weight, bias and running statistics stay float32."""
    channels = torch.linspace(-1, 2, shape[1])
    rows = _random(*shape), 2 * _random(*shape) + 1, _random(*shape)
    return (
        *(x.to(dtype) for x in rows),
        channels + 0.05,
        channels.flip(0) / 2,
        channels,
        channels.abs() + 1,
    )


def _norm(inputs: Tensors, backend: str) -> Tensors:
    """Features have nothing added, as in a projector: one launch does it all."""
    gradient, x, added, weight, bias, *running = inputs
    running = [statistic.clone() for statistic in running]

    def call(x: Tensor, weight: Tensor, bias: Tensor, *added: Tensor) -> Tensor:
        residual = added[0] if added else None
        return batch_norm_act(
            x, weight, bias, *running, groups=2, residual=residual, backend=backend
        )

    return *_with_gradients(
        call, [x, weight, bias, *([added] if x.dim() == 4 else [])], gradient
    ), *running


def _draw_pool(dtype: torch.dtype) -> Tensors:
    _, x, _, *parameters = _draw_norm((4, 20, 13, 15), dtype)
    return _random(4, 20, 7, 8).to(dtype), x, *parameters


def _pool(inputs: Tensors, backend: str) -> Tensors:
    gradient, x, weight, bias, *running = inputs
    mean, variance = (statistic.clone() for statistic in running)
    call = partial(
        batch_norm_relu_max_pool, running_mean=mean, running_var=variance, groups=2, backend=backend
    )
    return *_with_gradients(call, [x, weight, bias], gradient), mean, variance


def _draw_convolution(dtype: torch.dtype) -> Tensors:
    return [_random(*shape).to(dtype) for shape in ((2, 16, 19, 15), (2, 3, 37, 29), (16, 3, 7, 7))]


def _convolution(inputs: Tensors, backend: str) -> Tensors:
    gradient, images, weight = inputs
    convolve = partial(F.conv2d, stride=2, padding=3) if backend == "eager" else stem_convolution
    return _with_gradients(partial(convolve, images), [weight], gradient)


_SPHERICAL = LossForm(
    "power_spherical", _DIM - 1, factor=1 / (_DIM - 1), link="quadratic", gain=0.25, cosine=1.0
)
_COSINE = LossForm("cosine")
OPERATIONS = {
    "VI-SimSiam loss": Operation(
        BACKENDS, partial(_draw_loss, _SPHERICAL), partial(_loss, _SPHERICAL)
    ),
    "SimSiam loss": Operation(BACKENDS, partial(_draw_loss, _COSINE), partial(_loss, _COSINE)),
    "augmentation": Operation(("triton",), _draw_views, _views, _COLOURS),
    "BatchNorm + add + ReLU": Operation(("triton",), partial(_draw_norm, (6, 20, 27, 27)), _norm),
    "BatchNorm + ReLU": Operation(("triton",), partial(_draw_norm, (38, 72)), _norm),
    "BatchNorm + ReLU + max-pool": Operation(("triton",), _draw_pool, _pool),
    "first convolution": Operation(("triton",), _draw_convolution, _convolution, _CONVOLUTION),
}
"""Sizes fill several programs, the last one in part."""


def training_step(device: torch.device, kernels: bool) -> Case:
    """Steps in float32, held to a plain loop that passes the views one by one and has PyTorch's own
    SGD."""
    model, pixels = _small_model(), _draw_pixels(_BATCH)
    batches = [augment(pixels, _table(_BATCH, step), _SIDE).unbind() for step in range(CALLS)]
    step, views = _new_step(model, device, kernels, torch.float32), iter(batches)

    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=_RATE, momentum=0.9)
    losses = []
    for batch in batches:
        loss = plain.loss(plain(batch), "eager", step.loss_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    def run() -> Tensors:
        step([view.to(device) for view in next(views)])
        return (step.losses[: step.counter],)

    return Case(run, _growing(torch.stack(losses)), _STEPS[torch.float32])


def captured_step(device: torch.device) -> Case:
    """Views and step in bfloat16 as one CUDA graph, compared with the same functions uncaptured."""
    model, pixels = _small_model(), _draw_pixels(_BATCH).to(device)
    plain, step = (_new_step(model, device, True, torch.bfloat16) for _ in range(2))
    tables = [_table(_BATCH, number).to(device) for number in range(CALLS)]

    def whole(step: TrainStep, table: Tensor) -> None:
        step(augment(pixels, table, _SIDE, dtype=torch.bfloat16).unbind())

    for table in tables:
        whole(plain, table)
    captured, coming = capture(partial(whole, step), state=step.state, mode="on"), iter(tables)

    def run() -> Tensors:
        captured(next(coming))
        return (step.losses[: step.counter],)

    return Case(run, _growing(plain.losses), _STEPS[torch.bfloat16])


def _growing(losses: Tensor) -> list[Tensors]:
    """Losses up to each step: the largest of them is the measure, since one may be near 0."""
    return [(losses[: step + 1].double().cpu(),) for step in range(CALLS)]


def _small_model() -> SimSiam:
    """The first half of a ResNet-18, and heads."""
    backbone, _ = build_backbone("resnet18")
    backbone.layer3 = backbone.layer4 = nn.Identity()
    return VISimSiam(
        backbone, features=128, dim=_DIM, projector_hidden=64, predictor_hidden=64
    ).train()


def _new_step(model: SimSiam, device: torch.device, kernels: bool, dtype: torch.dtype) -> TrainStep:
    """A step of a copy of the model, made as the trainer makes it."""
    model, bf16 = (
        copy.deepcopy(model).to(device).to(memory_format=torch.channels_last),
        dtype == torch.bfloat16,
    )
    network = training_network(model, kernels=kernels, bf16=bf16)
    rates = torch.full((CALLS,), _RATE)
    return TrainStep(model, rates, loss_scale=1 / (_DIM - 1), bf16=bf16, network=network)
