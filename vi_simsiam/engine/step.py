"""One training step, made of device operations only, so that a CUDA graph can replay it.

Values that change from step to step lie on the device: a counter, the learning rate that the
counter selects from the schedule, and the losses, which the host reads later. A latch closes at the
first loss that is not finite: from then on no update is made, so that weights and momentum are
still those of the last good step when the host reads the losses.

The step calls the network with the project's kernels, compiled, or in DistributedDataParallel.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from vi_simsiam.checks import require
from vi_simsiam.config import TrainConfig
from vi_simsiam.data.device import DeviceFeed
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.sgd import CPUFusedSGD
from vi_simsiam.errors import InputError
from vi_simsiam.models import Output, SimSiam
from vi_simsiam.normalisation import PerView

Network = Callable[[Sequence[Tensor]], Output]
State = tuple[nn.Module | torch.optim.Optimizer | Tensor, ...]

_MOST_STEPS = 10**8
# torch 2.14 renames the option and warns of the old name.
_PARAMETERS = inspect.signature(DistributedDataParallel.__init__).parameters
_NEW_OPTION = "forward_sync_buffers" in _PARAMETERS
OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if _NEW_OPTION else "broadcast_buffers": False
}
"""Every rank keeps its own BatchNorm statistics, and rank 0's are saved. Training never reads them
(it normalises by the batch), so DistributedDataParallel need not broadcast them at every step."""


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> Tensor:
    """The learning rate of every step of a run, (steps,) float32.

    Linear warm-up to the peak, then a cosine to 0 (Loshchilov and Hutter, arXiv 1608.03983, without
    restarts).

    Raises:
        InputError: more steps than fit into memory with their learning rates and losses.
    """
    total, accepted = config.epochs * steps_per_epoch, f"at most {_MOST_STEPS // steps_per_epoch}"
    require("epochs", config.epochs, total <= _MOST_STEPS, f"{accepted} with these images")
    warmup = round(config.warmup_epochs * steps_per_epoch)
    step = torch.arange(total, dtype=torch.float64)
    rising = (step + 1) / max(warmup, 1)
    falling = 0.5 * (1 + torch.cos(math.pi * (step - warmup) / (total - warmup)))
    return (config.lr * torch.where(step < warmup, rising, falling)).float()


class TrainStep:
    """Forward, loss, backward, clipping and SGD on a batch of views.

    Args:
        model: in training mode, on the device to train on.
        rates: learning rate of every step of the run, (steps,) float32.
        momentum, weight_decay: of SGD.
        loss_scale, backend: see the model's `loss`.
        bf16: compute the network in bfloat16 (autocast).
        clip_norm: largest norm of the gradient; None for no clipping.
        ema: momentum of the model's target network, if it has one.
        network: maps views to an `Output` in place of `model`, which it wraps; None for `model`.
        world: the ranks that train together; None for a single process.

    Attributes:
        counter: steps done, int64 on the device.
        failed: 1 from the first loss on that is not finite, 0 before.
        losses: loss of every step done, over the batch of all ranks, (steps,).
    """

    def __init__(
        self,
        model: SimSiam,
        rates: Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        loss_scale: float = 1.0,
        backend: str = "auto",
        bf16: bool = False,
        clip_norm: float | None = None,
        ema: float | None = None,
        network: Network | None = None,
        world: World | None = None,
    ) -> None:
        self.model = model
        self.network = model if network is None else network  # a compiled one has no truth value
        self.loss_scale, self.backend, self.bf16 = loss_scale, backend, bf16
        self.clip_norm, self._ema, self._world = clip_norm, ema, world or World()
        self.device = next(model.parameters()).device
        self.rates = rates.to(self.device)
        self.losses = torch.zeros_like(self.rates)
        self.counter = torch.zeros((), dtype=torch.int64, device=self.device)
        self.failed = torch.zeros((), device=self.device)
        self._rate, self._norm = torch.zeros_like(self.failed), torch.zeros_like(self.failed)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Fused SGD reads the learning rate on the device, and changes nothing where found_inf is 1.
        kind = CPUFusedSGD if self.device.type == "cpu" else torch.optim.SGD
        self.optimizer = kind(
            self._trained, lr=self._rate, momentum=momentum, weight_decay=weight_decay, fused=True
        )
        self.optimizer.found_inf = self.failed  # type: ignore[attr-defined]
        if momentum:
            # As after SGD's own first step, but in place from the start, as a graph needs them.
            for parameter in self._trained:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def __call__(self, views: Sequence[Tensor]) -> Output:
        """Train on V views (B, 3, height, width) of a batch, or of this rank's part of it.

        Returns:
            The model's output without its graph, valid until the next step.
        """
        self._rate.copy_(self.rates.index_select(0, self.counter.view(1)).squeeze(0))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.network(views)
            loss = self.model.loss(output, self.backend, self.loss_scale)
        loss.backward()
        loss = self._world.all_mean(loss.detach().float())  # not finite on one rank: on all
        torch.maximum(self.failed, (~torch.isfinite(loss)).float(), out=self.failed)
        if self.clip_norm is not None:
            self._norm.copy_(self._total_norm())
            torch.nn.utils.clip_grads_with_norm_(self._trained, self.clip_norm, self._norm)
        self.optimizer.step()
        if self._ema is not None:
            self.model.update_target((1 - self._ema) * (1 - self.failed))
        self.losses.index_copy_(0, self.counter.view(1), loss.view(1))
        self.counter += 1
        return Output(tuple(x.detach() for x in output.predictions), output.targets)

    def gradient_norm(self) -> Tensor:
        """Norm of the last step's gradient before clipping, a scalar."""
        return self._total_norm() if self.clip_norm is None else self._norm

    def _total_norm(self) -> Tensor:
        gradients = [p.grad for p in self._trained if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    @property
    def state(self) -> State:
        """Everything that a step changes, for `vi_simsiam.engine.capture`."""
        numbers = (self.counter, self.failed, self.losses, self._rate, self._norm)
        return self.model, self.optimizer, *numbers

    @property
    def momentum(self) -> dict[str, Tensor]:
        """SGD's momentum buffers by the parameters' names; empty without momentum."""
        return {
            name: self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.model.named_parameters()
            if parameter in self.optimizer.state
        }


class OverlappedStep:
    """A step that trains on views while a second stream of the GPU makes the next step's views.

    It has no arguments, so that a CUDA graph can hold all of it. A graph reads the same addresses
    at every replay: the finished views are copied to where the next step reads them.

    Args:
        step: trains on the views.
        feed: makes the views.
        view_priority: priority of the stream that makes views, 0 or less. A captured step has
            `GRAPH_PRIORITY`; with 0 the views take what the network leaves of the GPU.
    """

    def __init__(self, step: TrainStep, feed: DeviceFeed, *, view_priority: int = 0) -> None:
        self.step, self.feed = step, feed
        on_gpu = step.device.type == "cuda"
        self._side = torch.cuda.Stream(step.device, priority=view_priority) if on_gpu else None
        self._views: list[Tensor] = []

    def prepare(self, step: int) -> None:
        """Make the views of `step`, the next one."""
        self.feed.load(step)
        views = self.feed.make(self.step.counter).views
        self._views = self._views or _adjacent_like(views)
        torch._foreach_copy_(self._views, views)

    def __call__(self) -> Output:
        """Train on the prepared views. `feed.load` must have been called for the next step."""
        following = self.step.counter + 1
        if self._side is None:
            upcoming = self.feed.make(following).views
            output = self.step(self._views)
        else:
            here = torch.cuda.current_stream(self.step.device)
            self._side.wait_stream(here)
            with torch.cuda.stream(self._side):
                upcoming = self.feed.make(following).views
            output = self.step(self._views)
            here.wait_stream(self._side)
        torch._foreach_copy_(self._views, upcoming)
        return output

    @property
    def state(self) -> State:
        """Everything that a call changes, for `vi_simsiam.engine.capture`."""
        return *self.step.state, *self._views


def _adjacent_like(views: Sequence[Tensor]) -> list[Tensor]:
    """Empty tensors like these; those of one shape lie one after the other in memory."""
    made: list[Tensor] = []
    for _, group in itertools.groupby(views, key=lambda view: view.shape):
        first, *rest = group
        layout = first.permute(0, 2, 3, 1)
        empty = layout.new_empty((1 + len(rest), *layout.shape))
        made += empty.permute(0, 1, 4, 2, 3).unbind(0)
    return made


def training_network(
    model: SimSiam, *, kernels: bool, compiled: bool = False, bf16: bool = False
) -> Network:
    """Choose the layers that map views to the model's `Output`; all compute the same function.

    Args:
        model: on the device to train on. From now on views of one size pass through it together,
            unless it has a BatchNorm that would see them as one batch: that of an own backbone, or
            SyncBatchNorm.
        kernels: use the project's operations for BatchNorm and its successors, the first
            convolution and the conversion of weights. Ignored with `compiled`, and where views do
            not pass together.
        compiled: pass the network through torch.compile.
        bf16: the network is called under autocast to bfloat16.
    """
    model.shared_passes = own_norm(model) is None
    model.fused = kernels and model.shared_passes and not compiled
    if compiled:
        return torch.compile(model, dynamic=False)  # type: ignore[no-any-return]
    return Bfloat16Weights(model) if model.fused and bf16 else model


def configured_step(
    config: TrainConfig,
    model: SimSiam,
    rates: Tensor,
    kernels: bool,
    world: World | None = None,
    *,
    loss_scale: float,
    backend: str,
    bf16: bool,
) -> TrainStep:
    """The step of a run.

    Args:
        config: of the run.
        model, rates, world, loss_scale, backend, bf16: see `TrainStep`.
        kernels: see `training_network`.
    """
    world = world or World(next(model.parameters()).device)
    network = training_network(model, kernels=kernels, compiled=config.compile, bf16=bf16)
    return TrainStep(
        model,
        rates,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        loss_scale=loss_scale,
        backend=backend,
        bf16=bf16,
        clip_norm=config.clip_norm,
        ema=config.ema,
        network=wrap(network, world),
        world=world,
    )


def own_norm(model: nn.Module) -> str | None:
    """The name of the first BatchNorm that would see several views as one batch, None if no layer
    does: those of this package take the views one by one."""
    norms: Iterator[str] = (
        name
        for name, module in model.named_modules()
        if (isinstance(module, _BatchNorm) or getattr(module, "running_var", None) is not None)
        and not isinstance(module, PerView)
    )
    return next(norms, None)


def check_step(config: TrainConfig, world: World) -> None:
    """Check, before a run begins, what a step needs.

    Raises:
        InputError: capture "on", torch.compile or SyncBatchNorm cannot be used here.
    """
    on_gpu = world.device.type == "cuda"
    if config.capture == "on" and not on_gpu:
        raise InputError(
            f"capture: 'on' needs a CUDA device, and this run is on {world.device}; "
            "auto and off run here"
        )
    if config.capture == "on" and not world.alone:
        raise InputError(
            "capture: 'on' is for a run without torchrun; the ranks' collectives are not captured"
        )
    if config.sync_batch_norm and not on_gpu:
        raise InputError("sync_batch_norm: SyncBatchNorm runs on GPUs only; leave it out on a CPU")
    try:
        if config.compile:
            torch.compile(torch.sin, dynamic=False)(torch.ones(8, device=world.device))
    except Exception as error:  # a missing compiler, header or library each raises its own
        text = str(error).partition(" raised:\n")[2] or str(error)
        reason = (text.splitlines() or [""])[0] or type(error).__name__
        raise InputError(
            f"compile: torch.compile does not work here ({reason}); leave --compile out, "
            "or install a C++ compiler such as g++"
        ) from error


def wrap(model: Callable[..., Any], world: World) -> Callable[..., Any]:
    """`model` with gradients averaged over the ranks; `model` itself alone.

    All ranks start from rank 0's weights and buffers. Call the wrapper with all views of a step at
    once: it prepares one reduction for one backward. Compute the loss from its output outside, as
    the mean over the rank's part of the batch: with parts of equal size the averaged gradient is
    that of the mean over the whole batch. Every parameter must take part in the loss. Save and
    restore `model`, not the wrapper.
    """
    if world.alone:
        return model
    assert isinstance(model, nn.Module)
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        **OWN_BUFFERS,
        gradient_as_bucket_view=True,  # saves one copy of all gradients
    )


class Bfloat16Weights(nn.Module):
    """A model that computes with bfloat16 copies of its convolutions' and linear layers' weights.

    The result is that of autocast. Autocast copies the weights layer by layer and converts every
    gradient on its own: two launches for each weight. Here one launch makes all copies, and one all
    gradients. Call it under autocast, which converts everything else.

    DistributedDataParallel wraps it as it wraps the model. Save and restore the model, not this.

    Args:
        model: its weights stay float32, and receive float32 gradients.
    """

    def __init__(self, model: SimSiam) -> None:
        super().__init__()
        self.model = model
        self._names = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            # Layers with a forward of their own may use the weights for more than a product.
            if type(module).forward in (nn.Conv2d.forward, nn.Linear.forward)
            for name, weight in module.named_parameters(recurse=False)
            if weight.requires_grad
        ]

    def forward(self, views: Sequence[Tensor]) -> Output:
        """The model's output for `views`."""
        weights = [self.model.get_parameter(name) for name in self._names]
        copies = dict(zip(self._names, _Converted.apply(*weights), strict=True))
        return torch.func.functional_call(self.model, copies, (views,))  # type: ignore[no-any-return]


class _Converted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _all_to(weights, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        used = iter(_all_to([g for g in gradients if g is not None], torch.float32))
        return tuple(None if gradient is None else next(used) for gradient in gradients)


def _all_to(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    converted = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if converted:
        torch._foreach_copy_(converted, list(tensors))
    return tuple(converted)
