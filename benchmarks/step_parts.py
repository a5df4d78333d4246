"""The training step of a case, whole and in parts, and the plain loop that it is compared with."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vi_simsiam.config import Method, TrainConfig
from vi_simsiam.data.device import byte_tensor
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.engine.graph import capture
from vi_simsiam.engine.network import Network, training_network
from vi_simsiam.engine.step import OverlappedStep, TrainStep
from vi_simsiam.models import Output, SimSiam, VISimSiam, build_model
from vi_simsiam.ops.backends import why_unavailable

from .augment import augmented, placed_table
from .cases import ViewCase
from .harness import synchronize

_LR: dict[Method, float] = {"vi-simsiam": 4e-3, "simsiam": 1.6e-2}
"""Learning rates at which the losses of the checked steps show the updates, but not rounding that
the updates amplify. A cosine moves less than a likelihood."""
_MOMENTUM, _WEIGHT_DECAY = 0.9, 1e-4
_MOST_STEPS = 2**17
"""Length of the learning rate table: more steps than are ever measured."""
Layers = Literal["torch, view by view", "torch", "torch.compile", "kernels"]
"""Layers of the network: torch's, view by view or all views of a size in one pass, or others."""
STEPS = {"cuda": 30, "cpu": 8}
"""Steps of one measurement of the whole step."""

# Dense bfloat16 with float32 accumulation, from the data sheets.
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 80GB HBM3": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


@dataclass(frozen=True)
class StepCase:
    """Views and the method that trains on them."""

    views: ViewCase
    method: Method

    @property
    def name(self) -> str:
        """Name of the case in results; unique."""
        return f"{self.method} {self.views.name}"

    @property
    def config(self) -> TrainConfig:
        """The default network, on these views."""
        views = self.views
        return TrainConfig(method=self.method, batch_size=views.batch, augment=views.policy)


def peak_flops(device: torch.device) -> float | None:
    """Peak bfloat16 operations per second of the device; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_FLOPS.items() if known in name), None)


def training_layers(device: torch.device) -> Layers:
    """The layers that training prefers: the kernels where they can run, or torch's."""
    backend = "triton" if device.type == "cuda" else "cpu"
    return "kernels" if why_unavailable(backend, device.type) is None else "torch"


class Parts:
    """The parts of a step on views at hand, each a function of the views."""

    def __init__(self, case: StepCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.bf16 = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.default = training_layers(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build_model(case.config)
        self.model: SimSiam = model.to(device).to(memory_format=torch.channels_last).train()
        self._plain = copy.deepcopy(self.model)
        self._network = self._with(self.model, self.default)
        self.loss_scale = 1 / (model.dim - 1) if isinstance(model, VISimSiam) else 1.0
        self._parameters = list(self.model.parameters())

    def train_step(self, layers: Layers | None = None) -> TrainStep:
        """Our step on a copy of the network, so that every caller starts with the same weights."""
        model = copy.deepcopy(self._plain)
        return TrainStep(
            model,
            torch.full((_MOST_STEPS,), _LR[self.case.method]),
            momentum=_MOMENTUM,
            weight_decay=_WEIGHT_DECAY,
            loss_scale=self.loss_scale,
            bf16=self.bf16,
            network=self._with(model, layers or self.default),
        )

    def losses(self, step: TrainStep, batches: Sequence[list[Tensor]]) -> list[float]:
        """Losses of the first steps on these batches, before they are scaled."""
        for views in batches:
            step(views)
        return _unscaled_losses(step, len(batches))

    def plain_losses(self, batches: Sequence[list[Tensor]]) -> list[float]:
        """Losses of a plain loop with torch's own SGD, before they are scaled; in float64 on a CPU,
        where float32 may be as far from them as the layers that are checked."""
        model = copy.deepcopy(self._plain)
        if not self.bf16:
            model.double()
            batches = [[view.double() for view in views] for views in batches]
        rate = _LR[self.case.method]
        optimizer = torch.optim.SGD(
            model.parameters(), lr=rate, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY
        )
        losses = []
        for views in batches:
            with self._autocast():
                loss = model.loss(model(views), "eager", self.loss_scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() / self.loss_scale)
        return losses

    def forward(self, views: Sequence[Tensor]) -> Output:
        """The network."""
        with self._autocast():
            return self._network(views)

    def forward_loss(self, views: Sequence[Tensor]) -> Tensor:
        """The network and the loss."""
        output = self.forward(views)
        with self._autocast():
            return self.model.loss(output, "auto", self.loss_scale)

    def forward_loss_backward(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The network and the loss, and the gradient of all weights."""
        return torch.autograd.grad(self.forward_loss(views), self._parameters)

    def network_alone(self, layers: Layers) -> Callable[[Sequence[Tensor]], object]:
        """Forward and backward of the network, for a random gradient of its predictions."""
        model = copy.deepcopy(self._plain)
        network, parameters = self._with(model, layers), list(model.parameters())
        seeds: list[Tensor] = []

        def call(views: Sequence[Tensor]) -> object:
            with self._autocast():
                predictions = network(views).predictions
            if not seeds:
                seeds.extend(torch.randn_like(prediction) for prediction in predictions)
            return torch.autograd.grad(predictions, parameters, seeds)

        return call

    def optimiser(self) -> Callable[[object], None]:
        """The update alone, for random gradients."""
        step = self.train_step()
        for parameter in step.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return lambda _: step.optimizer.step() and None

    def flops(self, views: Sequence[Tensor]) -> int:
        """Floating-point operations of forward and backward, counted by torch."""
        with FlopCounterMode(display=False) as counter:
            self.network_alone("torch")(views)
        return int(counter.get_total_flops())

    def random_views(self, seed: int) -> list[Tensor]:
        """Random tensors like a batch of views."""
        generator = torch.Generator(self.device).manual_seed(seed)
        shapes = self.case.views.shapes
        views = [torch.randn(shape, device=self.device, generator=generator) for shape in shapes]
        layout = torch.channels_last
        return [view.to(self.dtype).contiguous(memory_format=layout) for view in views]

    def loader(self, images: PackedImages) -> MultiViewLoader:
        """The loader of training."""
        views = self.case.views
        return MultiViewLoader(images, views.policy, views.batch, self.device, dtype=self.dtype)

    def batches(self, images: PackedImages, count: int) -> list[list[Tensor]]:
        """The views of the first `count` batches."""
        with contextlib.closing(self.loader(images)) as loader:
            return [batch.views for batch in itertools.islice(loader.epoch(0), count)]

    def augmentation(self, images: PackedImages) -> tuple[Callable[[Tensor], object], list[Tensor]]:
        """The augmentation of a batch on the training device, and the tables to call it with."""
        views = self.case.views
        pixels = byte_tensor(images.pixels).to(self.device)
        table = torch.from_numpy(placed_table(images, views.policy, np.arange(views.batch)))
        call = partial(augmented, pixels, views.policy, dtype=self.dtype)
        return call, [table.to(self.device)]

    def _with(self, model: SimSiam, layers: Layers) -> Network:
        if layers == "torch, view by view":
            return model
        if layers == "torch.compile":
            torch.compiler.reset()
        return training_network(
            model, kernels=layers == "kernels", compiled=layers == "torch.compile", bf16=self.bf16
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


class WholeStep:
    """Our training step with its data: overlapped on a GPU, fed by worker processes on a CPU."""

    def __init__(
        self, parts: Parts, images: PackedImages, *, captured: bool, view_priority: int = 0
    ) -> None:
        self.device = parts.device
        self.loader = parts.loader(images)
        self.step = parts.train_step()
        self._done = 0
        self._replay: Callable[[], Any] | None = None
        if self.loader.feed is not None:
            whole = OverlappedStep(self.step, self.loader.feed, view_priority=view_priority)
            whole.prepare(0)
            self._replay = capture(whole, state=whole.state, mode="on" if captured else "off")

    def losses(self, count: int) -> list[float]:
        """Train `count` steps from the start; return the loss of each, before it is scaled."""
        for _ in itertools.islice(self._steps(), count):
            pass
        return _unscaled_losses(self.step, count)

    def measure(self) -> float:
        """Microseconds a step; the clock starts after one."""
        start = 0.0
        for number, _ in enumerate(itertools.islice(self._steps(), 1 + STEPS[self.device.type])):
            if number == 0:
                synchronize(self.device)
                start = perf_counter()
        synchronize(self.device)
        return (perf_counter() - start) / number * 1e6

    def _steps(self) -> Iterator[None]:
        while self.loader.feed is not None and self._replay is not None:
            self.loader.feed.load(self._done + 1)
            self._replay()
            self._done += 1
            yield
        for batch in self.loader:
            self.step(batch.views)
            yield


def _unscaled_losses(step: TrainStep, count: int) -> list[float]:
    """Losses of the first `count` steps, before they are scaled."""
    return (step.losses[:count] / step.loss_scale).tolist()  # type: ignore[no-any-return]
