"""One training step, made of device operations only, so that a CUDA graph can replay it.

Values that change from step to step lie on the device: a counter, the learning rate that the
counter selects from the schedule, and the losses, which the host reads later. A latch closes at the
first loss that is not finite: from then on no update is made, so that weights and momentum are
still those of the last good step when the host reads the losses.

The step calls the network with the project's kernels, compiled, or in DistributedDataParallel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vi_simsiam.checks import require
from vi_simsiam.config import TrainConfig
from vi_simsiam.data.device import DeviceFeed
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.network import Network, backward, training_network, wrap
from vi_simsiam.engine.sgd import CPUFusedSGD
from vi_simsiam.errors import InputError
from vi_simsiam.models import Output, SimSiam

State = tuple[nn.Module | torch.optim.Optimizer | Tensor, ...]

_MOST_STEPS = 10**8


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
        accumulate: number of parts that a batch is computed in, see `network.backward`.
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
        accumulate: int = 1,
        network: Network | None = None,
        world: World | None = None,
    ) -> None:
        self.model = model
        self.network = model if network is None else network  # a compiled one has no truth value
        self.loss_scale, self.backend, self.bf16 = loss_scale, backend, bf16
        self.clip_norm, self._ema, self._accumulate = clip_norm, ema, accumulate
        self._world = world or World()
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
        output, loss = backward(
            self.network,
            lambda output: self.model.loss(output, self.backend, self.loss_scale),
            views,
            parts=self._accumulate,
            bf16=self.bf16,
        )
        loss = self._world.all_mean(loss)  # not finite on one rank: on all
        torch.maximum(self.failed, (~torch.isfinite(loss)).float(), out=self.failed)
        if self.clip_norm is not None:
            self._norm.copy_(self._total_norm())
            torch.nn.utils.clip_grads_with_norm_(self._trained, self.clip_norm, self._norm)
        self.optimizer.step()
        if self._ema is not None:
            self.model.update_target((1 - self._ema) * (1 - self.failed))
        self.losses.index_copy_(0, self.counter.view(1), loss.view(1))
        self.counter += 1
        return output

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
        accumulate=config.accumulate,
        network=wrap(network, world),
        world=world,
    )


def check_step(config: TrainConfig, world: World) -> None:
    """Check, before a run begins, what a step needs.

    Raises:
        InputError: a run of `fit_concentration`; capture "on", torch.compile or SyncBatchNorm
            cannot be used here; or the batch cannot be divided into `config.accumulate` parts.
    """
    accepted = "mlp: a run of fit-kappa has no projector to train"
    require("projector", config.model.projector, config.model.projector == "mlp", accepted)
    images, parts = world.local_batch(config.batch_size), config.accumulate
    divides = images % parts == 0 and images // parts >= 2
    ranks = "" if world.size == 1 else f" of each of {world.size} ranks"
    accepted = f"a divisor of the {images} images in a batch{ranks} that leaves 2 or more to a part"
    require("accumulate", parts, divides, accepted)
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
