"""One training step, made of device operations only, so that a CUDA graph can replay it.

Values that change from step to step lie on the device: a counter, the learning rate that the
counter selects from the schedule, and the losses, which the host reads later. A latch closes at the
first loss that is not finite: from then on no update is made, so that weights and momentum are
still those of the last good step when the host reads the losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vi_simsiam.config import TrainConfig
from vi_simsiam.data.device import DeviceFeed
from vi_simsiam.engine.distributed import World
from vi_simsiam.models import Output, SimSiam

State = tuple[nn.Module | torch.optim.Optimizer | Tensor, ...]


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> Tensor:
    """The learning rate of every step of a run, (steps,) float32.

    Linear warm-up to the peak, then a cosine to 0 (Loshchilov and Hutter, arXiv 1608.03983, without
    restarts).
    """
    total = config.epochs * steps_per_epoch
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
        network: Callable[[Sequence[Tensor]], Output] | None = None,
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
        self.optimizer = torch.optim.SGD(
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

    def resume(self, step: int) -> None:
        """Go on after `step` steps, with the weights and momentum of a checkpoint loaded."""
        self.counter.fill_(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate  # loading put another tensor there


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
        self._views = self._views or [torch.empty_like(view) for view in views]
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
