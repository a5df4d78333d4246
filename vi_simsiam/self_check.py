"""`vi-simsiam info --check`: operations that have kernels, and training steps, beside a reference.

A reference is plain PyTorch on the CPU, in float64 but for views and training: a new card, driver
or compiler has no part in it. Its inputs are those of the check, as they were rounded to the
check's dtype. A captured step is held to itself.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam.backbones import build_backbone
from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.views import add_offsets, draw_table
from vi_simsiam.engine.graph import capture
from vi_simsiam.engine.network import training_network
from vi_simsiam.engine.step import TrainStep
from vi_simsiam.info import home
from vi_simsiam.models import SimSiam, VISimSiam
from vi_simsiam.ops.augment import augment
from vi_simsiam.ops.backends import BACKENDS, interpreting
from vi_simsiam.ops.batch_norm import batch_norm_act
from vi_simsiam.ops.multiview_loss import LossForm, multiview_loss
from vi_simsiam.ops.multiview_loss_fused import padded_width
from vi_simsiam.ops.stem_convolution import stem_convolution
from vi_simsiam.ops.stem_pool import batch_norm_relu_max_pool
from vi_simsiam.text import counted

# A captured step is replayed from the fifth call on, and an update that it misses shows in those
# after.
CALLS = 8
# Errors allowed: for sums of some thousand terms in float32, of which most roundings cancel, and a
# GPU's approximate exp and division; for views, whose hue divides by the difference of channels,
# and whose reference is rounded as they are; for a convolution, for which cuDNN may take transforms
# that are rounded more often; for the losses of a few steps, since BatchNorm of few samples
# enlarges roundings, and each step takes over those before.
_SUMS, _COLOURS, _CONVOLUTION = 1e-5, 4e-5, 1e-4
_STEPS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
_BATCH, _RATE = 8, 4e-3
_DIM, _SIDE, _HEIGHT, _WIDTH = 200, 34, 53, 61

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Finding:
    """The outcome of a check, with the fields of the JSON."""

    name: str
    passed: bool | None
    """None for what cannot run here."""
    why: str | None = None
    """The reason why it failed or cannot run."""
    error: float | None = None
    """That of the result closest to its limit, relative to the result's largest value."""
    allowed: float | None = None
    """The limit of that result."""
    first_call_seconds: float | None = None
    """With compilation."""
    later_call_seconds: float | None = None

    def verdict(self) -> str:
        """The line to print behind the name."""
        word = {True: "ok", False: "FAILED", None: "skipped"}[self.passed]
        parts = [self.why or ""]
        if self.error is not None:
            parts.append(f"error {self.error:.1e} (allowed {self.allowed:.1e})")
        if self.first_call_seconds is not None:
            calls = f"first call {_time(self.first_call_seconds)}"
            if self.later_call_seconds is not None:
                calls += f", then {_time(self.later_call_seconds)}"
            parts.append(calls)
        return f"{word:8} {'   '.join(filter(None, parts))}"


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
        expected = [[x.double() for x in exact]] * calls
        return Case(partial(self.call, there, backend), expected, self.allowed)


def planned(
    backends: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, Callable[[], Case] | str]]:
    """Names of all checks, with what prepares each, or why it cannot run here.

    `backends` is as in `info.facts`.
    """
    for backend in BACKENDS:
        why = backends[backend]["why"]
        operations = [item for item in OPERATIONS.items() if backend in item[1].backends]
        if why is not None:
            yield f"{backend} ({counted(len(operations), 'operation')})", why
            continue
        device = torch.device(home(backend))
        for name, operation in operations:
            for dtype in (torch.float32, torch.bfloat16):
                case = partial(operation.case, backend, device, dtype)
                yield f"{name}, {backend}, {str(dtype).removeprefix('torch.')}", case
    device = torch.device(home("eager"))
    kernels = device.type == "cuda" and backends["triton"]["available"]
    yield "training step, float32", partial(training_step, device, kernels)
    why = backends["triton"]["why"] or "Triton is interpreted"
    yield "captured step, bfloat16", partial(captured_step, device) if kernels else why


def check(name: str, prepare: Callable[[], Case] | str) -> Finding:
    """Run one of `planned`. An extension that does not load is a failure."""
    if isinstance(prepare, str):
        passed = False if "does not load" in prepare else None
        return Finding(name, passed, f"not available: {prepare}")
    times: list[float] = []
    held: list[tuple[float, float]] = []
    try:
        with _repeatable():
            case = prepare()
            for expected in case.expected:
                start = time.perf_counter()
                results = case.run()
                if any(result.is_cuda for result in results):
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
                shapes, wanted = ([x.shape for x in each] for each in (results, expected))
                if shapes != wanted:
                    raise ValueError(f"results of the shapes {shapes}, not {wanted}")
                held += [_error(x, y, case.allowed) for x, y in zip(results, expected, strict=True)]
    except Exception as problem:  # a card, driver or compiler may raise anything
        first = str(problem).strip().splitlines()[:1]
        return Finding(name, False, ": ".join([type(problem).__name__, *first]))
    first_call = times[0]
    later = statistics.median(times[-2:]) if len(times) > 2 else None
    if not all(math.isfinite(error) for error, _ in held):
        return Finding(name, False, "results are not finite", None, None, first_call, later)
    error, allowed = max(held, key=lambda pair: pair[0] / pair[1])
    why = None if error <= allowed else "wrong results"
    return Finding(name, why is None, why, error, allowed, first_call, later)


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    verdicts = [each.passed for each in findings]
    passed, failed, skipped = (verdicts.count(verdict) for verdict in (True, False, None))
    checks = counted(passed + failed, "check")
    result = f"{failed} of {checks} failed" if failed else f"{checks} passed"
    return f"{result}, {skipped} skipped" if skipped else result


def _error(result: Tensor, exact: Tensor, allowed: float) -> tuple[float, float]:
    """Largest error relative to the largest value, and its limit, with rounding to bfloat16."""
    error = (result.cpu().double() - exact).abs().max() / exact.abs().max()
    # A gradient is rounded once, and again with its factor; the interpreter truncates, which takes
    # twice as much.
    if result.dtype == torch.bfloat16:
        allowed += torch.finfo(result.dtype).eps * (1 + interpreting())
    return error.item(), allowed


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """The same inputs everywhere, and convolutions in full precision and a fixed order."""
    flags = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
    cudnn = torch.backends.cudnn.flags(**flags)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), cudnn:
        if interpreting():  # of values in lanes that a kernel discards
            warnings.simplefilter("ignore", RuntimeWarning)
        torch.manual_seed(0)
        yield


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _random(*shape: int) -> Tensor:
    x = torch.randn(shape)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _with_gradients(call: Callable[..., Tensor], inputs: Tensors, gradient: Tensor) -> Tensors:
    """Results of `call`, and the gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def _draw_loss(form: LossForm, dtype: torch.dtype) -> Tensors:
    """Three views and two targets of nine images in padded rows, and a factor for each image."""
    images, columns = _random(9, _DIM), _DIM + (form.distribution == "power_spherical")
    predictions = torch.zeros(3, 9, padded_width(columns))
    predictions[..., :_DIM] = images + _random(3, 9, _DIM)
    predictions[..., _DIM:columns] = 4 * _random(3, 9, columns - _DIM)
    targets = images + 0.3 * _random(2, 9, _DIM)
    return predictions.to(dtype), targets.to(dtype), torch.rand(9) + 0.5


def _loss(form: LossForm, inputs: Tensors, backend: str) -> Tensors:
    """The losses and their mean. A factor on the gradient is a kernel of its own."""
    predictions, targets, factor = inputs
    loss = partial(multiview_loss, targets=targets, form=form, backend=backend)
    each = _with_gradients(partial(loss, reduction="none"), [predictions], factor)
    mean = _with_gradients(partial(loss, reduction="mean"), [predictions], factor[0])
    return *each, *mean


def _draw_views(dtype: torch.dtype) -> Tensors:
    """Images, the table of two views of each, and a number in the dtype of the views."""
    return _draw_pixels(2), _table(2), torch.zeros(1, dtype=dtype)


def _draw_pixels(images: int) -> Tensor:
    return torch.randint(256, (images * _HEIGHT * _WIDTH * 3,), dtype=torch.uint8)


def _table(images: int, step: int = 0) -> Tensor:
    """The views of a step, (2, images, 16)."""
    samples = np.arange(images)
    sizes: Any = {"heights": np.full(images, _HEIGHT), "widths": np.full(images, _WIDTH)}
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
    rows = [x.to(dtype) for x in (_random(*shape), 2 * _random(*shape) + 1, _random(*shape))]
    return *rows, channels + 0.05, channels.flip(0) / 2, channels, channels.abs() + 1


def _norm(inputs: Tensors, backend: str) -> Tensors:
    """Features have nothing added, as in a projector: one launch does it all."""
    gradient, x, added, weight, bias, *running = inputs
    mean, variance = (statistic.clone() for statistic in running)

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return batch_norm_act(
            x, weight, bias, mean, variance, groups=2, residual=residual, backend=backend
        )

    leaves = [x, weight, bias, added] if x.dim() == 4 else [x, weight, bias]
    return *_with_gradients(call, leaves, gradient), mean, variance


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
_NORMS = ("triton", "cpu")
OPERATIONS = {
    "VI-SimSiam loss": Operation(
        BACKENDS, partial(_draw_loss, _SPHERICAL), partial(_loss, _SPHERICAL)
    ),
    "SimSiam loss": Operation(BACKENDS, partial(_draw_loss, _COSINE), partial(_loss, _COSINE)),
    "augmentation": Operation(("triton",), _draw_views, _views, _COLOURS),
    "BatchNorm + add + ReLU": Operation(_NORMS, partial(_draw_norm, (6, 20, 27, 27)), _norm),
    "BatchNorm + ReLU": Operation(_NORMS, partial(_draw_norm, (38, 72)), _norm),
    "BatchNorm + ReLU + max-pool": Operation(("triton",), _draw_pool, _pool),
    "first convolution": Operation(("triton",), _draw_convolution, _convolution, _CONVOLUTION),
}
"""Sizes fill several programs, the last one in part."""


def training_step(device: torch.device, kernels: bool) -> Case:
    """Steps in float32, held to a plain loop over the views one by one with PyTorch's own SGD."""
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
    model = VISimSiam(backbone, features=128, dim=_DIM, projector_hidden=64, predictor_hidden=64)
    return model.train()


def _new_step(model: SimSiam, device: torch.device, kernels: bool, dtype: torch.dtype) -> TrainStep:
    """A step of a copy of the model, made as the trainer makes it."""
    model = copy.deepcopy(model).to(device).to(memory_format=torch.channels_last)
    bf16 = dtype == torch.bfloat16
    network = training_network(model, kernels=kernels, bf16=bf16)
    rates = torch.full((CALLS,), _RATE)
    return TrainStep(model, rates, loss_scale=1 / (_DIM - 1), bf16=bf16, network=network)
