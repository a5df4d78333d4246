"""One training step, made of device operations only: nothing in it asks the host, so that a CUDA graph can replay it.

What changes from step to step lies on the device: a counter, the learning rate that it selects from the schedule, and
the losses, which the host reads when it likes. A latch closes at the first loss that is not finite: from that step on no
update is made, so that the weights and the momentum are still those of the last good step when the host notices.
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


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> Tensor:
    """The learning rate of every step of a run, (steps,) float32.

    Linear warm-up to the peak, then a cosine to 0 (Loshchilov and Hutter, arXiv 1608.03983, without restarts).
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
        momentum: of SGD.
        weight_decay: of SGD.
        loss_scale: as the model's `loss` takes it.
        backend: implementation of the loss.
        bf16: whether the network computes in bfloat16 (autocast).
        clip_norm: largest norm of the gradient; None for no clipping.
        ema: momentum of the model's target network, if it has one.
        network: what maps views to an `Output` in the place of `model`: the model compiled, or in DistributedDataParallel.
        world: the ranks that train together; None for a single process.
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
        self.loss_scale, self.backend, self.bf16, self.clip_norm = (
            loss_scale,
            backend,
            bf16,
            clip_norm,
        )
        self._ema = ema
        self._world = world or World()
        self.device = next(model.parameters()).device
        self.rates = rates.to(self.device)
        self.counter = torch.zeros((), dtype=torch.int64, device=self.device)
        """Steps done."""
        self.failed = torch.zeros((), device=self.device)
        """1 from the first loss on that is not finite, before that 0."""
        self.losses = torch.zeros_like(self.rates)
        """Loss of every step done over the batch of all ranks, (steps,)."""
        self._rate = torch.zeros((), device=self.device)
        self._norm = torch.zeros((), device=self.device)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Fused SGD takes a learning rate on the device and leaves weights and momentum alone where found_inf is 1.
        self.optimizer = torch.optim.SGD(
            self._trained, lr=self._rate, momentum=momentum, weight_decay=weight_decay, fused=True
        )
        self.optimizer.found_inf = self.failed  # type: ignore[attr-defined]
        if momentum:
            # Momentum that starts at zero is what SGD makes of its first step, and lies where a graph can find it.
            for parameter in self._trained:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def __call__(self, views: Sequence[Tensor]) -> Output:
        """Train on V views (B, 3, height, width) of a batch, or of this rank's part; what the model made of them is valid until the next step."""
        self._rate.copy_(self.rates.index_select(0, self.counter.view(1)).squeeze(0))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.network(views)
            loss = self.model.loss(output, self.backend, self.loss_scale)
        loss.backward()
        loss = self._world.all_mean(
            loss.detach().float()
        )  # not finite on any rank: not finite on all
        torch.maximum(self.failed, (~torch.isfinite(loss)).float(), out=self.failed)
        if self.clip_norm is not None:
            self._norm.copy_(torch.nn.utils.get_total_norm(self._gradients()))
            torch.nn.utils.clip_grads_with_norm_(self._trained, self.clip_norm, self._norm)
        self.optimizer.step()
        if self._ema is not None:
            self.model.update_target((1 - self._ema) * (1 - self.failed))
        self.losses.index_copy_(0, self.counter.view(1), loss.view(1))
        self.counter += 1
        return Output(tuple(x.detach() for x in output.predictions), output.targets)

    def gradient_norm(self) -> Tensor:
        """Norm of the last step's gradient before clipping, a scalar."""
        return (
            self._norm
            if self.clip_norm is not None
            else torch.nn.utils.get_total_norm(self._gradients())
        )

    @property
    def state(self) -> tuple[nn.Module | torch.optim.Optimizer | Tensor, ...]:
        """All that a step changes, for `vi_simsiam.engine.capture`."""
        return (
            self.model,
            self.optimizer,
            self.counter,
            self.failed,
            self.losses,
            self._rate,
            self._norm,
        )

    def resume(self, step: int) -> None:
        """Go on after `step` steps, once a checkpoint's weights and momentum were loaded."""
        self.counter.fill_(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate  # loading put another tensor there

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._trained if parameter.grad is not None]


class OverlappedStep:
    """A step that trains on views while the next step's views are made, on a second stream of the same GPU.

    A whole training step as one function without arguments: it can be captured in a CUDA graph as it is. The finished
    views are copied to where the next step looks for them, since a graph reads the same addresses at every replay.

    Args:
        step: trains on the views.
        feed: makes them.
        view_priority: of the stream on which views are made, 0 or less. A captured step has `GRAPH_PRIORITY`: with 0 views
            take what the network leaves of the GPU.
    """

    def __init__(self, step: TrainStep, feed: DeviceFeed, *, view_priority: int = 0) -> None:
        self.step, self.feed = step, feed
        on_gpu = step.device.type == "cuda"
        self._side = torch.cuda.Stream(step.device, priority=view_priority) if on_gpu else None
        self._views: list[Tensor] | None = None

    def prepare(self, step: int) -> None:
        """Make the views of step `step`, which is the next one."""
        self.feed.load(step)
        views = self.feed.make(self.step.counter).views
        if self._views is None:
            self._views = [torch.empty_like(view) for view in views]
        torch._foreach_copy_(self._views, views)

    def __call__(self) -> Output:
        """Train on the views at hand. Before it is launched, `feed.load` must have been called for the step after it."""
        assert self._views is not None
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
    def state(self) -> tuple[nn.Module | torch.optim.Optimizer | Tensor, ...]:
        """All that a call changes, for `vi_simsiam.engine.capture`."""
        return *self.step.state, *(self._views or ())
