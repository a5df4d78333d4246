"""Rules of the captured step: errors have the operation and the line, and the state stays."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import Reads, Training, batches, same, with_stand_in
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vi_simsiam.engine.graph_rules import check_state
from vi_simsiam.errors import InputError

BROKEN: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), "reads a value on the host.*aten._local_scalar_dense"),
    "equal": (lambda x: torch.equal(x, x), "reads a value on the host.*aten.equal"),
    "nonzero": (lambda x: x.nonzero(), "shape of its result depends on values.*aten.nonzero"),
    "mask": (lambda x: x[x > 0], "indexing with a mask.*aten.index.Tensor"),
    "masked write": (lambda x: x.clone().index_put_((x > 0,), x[0]), "mask.*aten.index_put_"),
    "tensor": (lambda x: torch.tensor([1.0], device=x.device), "data of the host.*lift_fresh"),
    "copy": (lambda x: x.to("meta"), "copies from .* to meta; .*after the call.*aten._to_copy"),
    "backward": (lambda x: Reads.apply(x.requires_grad_()).sum().backward(), "reads a value"),
    "foreign": (
        lambda x: FOREIGN.view(2, 1).add_(1),
        r"a tensor of shape \(2, 1\) that state does",
    ),
}
FOREIGN = torch.zeros(2)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_names_operation_and_line(rule: str) -> None:
    """Everything is as before, though the rule is broken after the optimizer's step."""
    breaks, message = BROKEN[rule]
    training = Training()

    def step(images: Tensor, labels: dict[str, Tensor]) -> Any:
        training.step(images, labels)
        return breaks(images[0, 0])

    before, captured = training.everything(), with_stand_in(step, training.state)
    first, *_ = batches(1)
    with pytest.raises(InputError, match=message) as caught:
        captured(*first)
    place, offset = (Reads.backward, 2) if rule == "backward" else (breaks, 0)
    line = inspect.getsourcelines(place)[1] + offset
    assert f"{inspect.getsourcefile(place)}:{line})" in str(caught.value)
    assert same(training.everything(), before)
    assert all(p.grad is None for p in training.model.parameters())
    assert not training.optimizer.state
    assert torch.equal(FOREIGN, torch.zeros(2))
    assert not captured.captured


@pytest.mark.parametrize(
    "allowed",
    [
        lambda x: x[torch.arange(2, device=x.device)],
        lambda x: torch.where(x > 0, x, 0),
        lambda x: x.repeat_interleave(torch.full((8,), 2, device=x.device), dim=0, output_size=16),
        lambda x: torch.zeros_like(x).masked_fill_(x > 0, 1.0),
        lambda x: torch.zeros_like(x).index_put_((x > 0,), torch.ones((), device=x.device)),
        lambda x: torch.empty(0).set_(x.clone()).add_(1),
    ],
    ids=["index", "where", "repeat", "fill", "one value", "set"],
)
def test_what_a_graph_can_hold_is_left_alone(allowed: Callable[[Tensor], Tensor]) -> None:
    captured = with_stand_in(allowed)
    for seed in range(3):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(captured(x), allowed(x))
    assert captured.captured


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


LR = torch.tensor(0.1)


WRAPPER = DistributedDataParallel.__new__(DistributedDataParallel)
nn.Module.__init__(WRAPPER)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.optim.SGD(parameters(), lr=0.1), "SGD has the number lr=0.1.*give lr=torch.tensor"),
        (torch.optim.SGD(parameters(), lr=LR), "SGD reads its lr on the host; give fused=True"),
        (torch.optim.AdamW(parameters(), lr=LR), "AdamW .* host; give capturable=True"),
        (nn.Sequential(WRAPPER), ".* DistributedDataParallel is not captured"),
    ],
    ids=["number", "unfused", "not capturable", "distributed"],
)
def test_state_that_a_replay_would_not_follow(item: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"state\[1\]: {message}"):
        with_stand_in(lambda x: x, [torch.zeros(1), item])(torch.ones(1))


def test_optimizers_that_keep_something_on_the_host() -> None:
    sgd = torch.optim.SGD(parameters(), lr=LR, fused=True)
    with pytest.raises(InputError, match=r"state\[0\]: SGD has its lr on cpu.*put it on cuda"):
        check_state([sgd], torch.device("cuda"))
    adagrad = torch.optim.Adagrad(parameters(), lr=LR)
    adagrad.param_groups[0]["lr"] = LR.to("meta")
    with pytest.raises(InputError, match=r"state\[0\]: Adagrad keeps 'step' on cpu"):
        check_state([adagrad], torch.device("meta"))


class Replacing(nn.Module):
    """Replaces its buffer, which a graph cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.queue = self.queue + x
        return x + self.queue


class Counting(torch.optim.Optimizer):
    """Replaces its count, an entry of an optimizer's usual state, by `change(count)`."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__(parameters(), {"lr": torch.tensor(0.1)})
        self.change = change

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        entries = self.state[self.param_groups[0]["params"][0]]
        entries["count"] = self.change(entries.get("count", 0))


def test_state_that_moves_is_refused_and_put_back() -> None:
    module = Replacing()
    captured = with_stand_in(module, [module])
    captured(torch.ones(2))
    held = module.queue
    with pytest.raises(InputError, match="state: the step replaces buffer 'queue' of Replacing"):
        captured(torch.ones(2))
    assert module.queue is held
    assert held.tolist() == [1, 1]
    for change in (lambda n: n + 1, lambda n: torch.ones(()) + n):
        optimizer = Counting(change)
        captured = with_stand_in(optimizer.step, [optimizer])
        captured()
        with pytest.raises(InputError, match="the step replaces 'count' in Counting's state"):
            captured()
        assert [entries["count"] for entries in optimizer.state.values()] == [1]
