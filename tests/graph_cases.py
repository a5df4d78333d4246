"""A toy training and a stand-in for a CUDA graph, for the tests of the captured step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vi_simsiam.engine.graph import Captured, CudaGraph


class StandIn(CudaGraph):
    """Repeats the recorded call. Recording runs the call, and the first replay does not."""

    device_type = "cpu"

    def __init__(self, device: torch.device) -> None:
        self.recorded: Callable[[], Any] | None = None

    def warm(self, call: Callable[[], Any]) -> Any:
        return call()

    def record(self, call: Callable[[], Any]) -> Any:
        self.recorded, self.done, self.outputs = call, True, call()
        return self.outputs

    @torch.no_grad()
    def replay(self) -> None:
        assert self.recorded is not None
        if not self.done:
            with torch.enable_grad():
                outputs = self.recorded()
            for static, new in zip(tree_leaves(self.outputs), tree_leaves(outputs), strict=True):
                if isinstance(static, Tensor):
                    static.copy_(new)
        self.done = False


class Unrecordable(StandIn):
    """Fails after the work is done, as a capture that cannot be ended."""

    def record(self, call: Callable[[], Any]) -> Any:
        try:
            call()
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error


class Reads(torch.autograd.Function):
    """Reads a value on the host in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * gradient.sum().item()


class Momentum(torch.optim.Optimizer):
    """A user's own optimizer, which updates its state in place."""

    def __init__(self, parameters: Any, lr: Tensor) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                entries = self.state[parameter]
                if not entries:
                    entries["average"] = torch.ones_like(parameter)
                entries["average"].mul_(0.8).add_(parameter.grad)
                parameter.sub_(group["lr"] * entries["average"])


OPTIMIZERS: dict[str, Callable[[Any, Tensor], torch.optim.Optimizer]] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=1e-3, fused=True),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True, capturable=True),
    "own": Momentum,
}


class Training:
    """A small network with BatchNorm and dropout, its optimizer and its step."""

    def __init__(self, optimizer: str = "sgd", device: str = "cpu") -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()]
        self.model = nn.Sequential(*layers, nn.Linear(6 * 36, 4)).to(device)
        lr = torch.tensor(0.02, device=device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), lr)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.8)

    @property
    def state(self) -> list[Any]:
        return [self.model, self.optimizer, self.seen]

    def step(self, images: Tensor, labels: dict[str, Tensor]) -> dict[str, Any]:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(images)
        loss = nn.functional.cross_entropy(logits, labels["class"])
        loss.backward()
        self.optimizer.step()
        self.seen += len(images)
        return {"loss": loss, "more": [logits, (self.seen, "a word")]}

    def everything(self) -> list[Tensor]:
        """Weights, buffers, gradients, the optimizer's tensors and the generator."""
        gradients = [parameter.grad for parameter in self.model.parameters()]
        states = [self.model.state_dict(), self.optimizer.state_dict(), torch.get_rng_state()]
        leaves = tree_leaves([*states, gradients, self.seen])
        return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]


def batches(count: int, device: str = "cpu") -> list[tuple[Tensor, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(5, 3, 8, 8, generator=generator).to(device),
            {"class": torch.randint(4, (5,), generator=generator).to(device)},
        )
        for _ in range(count)
    ]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def with_stand_in(
    step: Callable[..., Any], state: Any = (), mode: str = "on", warmup: int = 1
) -> Captured:
    return Captured(step, state=state, mode=mode, warmup=warmup, backend=StandIn)
