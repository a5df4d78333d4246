"""The captured step without CUDA: a stand-in records a call and repeats it on static tensors.

Errors for broken rules have the operation and the line, and the state stays.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import graph_cases
import pytest
import torch
from graph_cases import OPTIMIZERS, Reads, Training, Unrecordable, batches, same, with_stand_in
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vi_simsiam.engine.graph import Captured, capture
from vi_simsiam.engine.graph_rules import check_state
from vi_simsiam.errors import InputError


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_captured_and_eager_steps_agree(optimizer: str) -> None:
    """Ten steps with a schedule: outputs, state, gradients and random numbers."""
    eager = Training(optimizer)
    expected = []
    for batch in batches(10):
        outputs = eager.step(*batch)
        losses = [outputs["loss"].detach(), outputs["more"][0].detach()]
        expected.append([*losses, *eager.everything()])
        eager.scheduler.step()
    training = Training(optimizer)
    step = with_stand_in(training.step, training.state, warmup=2)
    for i, batch in enumerate(batches(10)):
        outputs = step(*batch)
        assert step.captured == (i >= 2)
        assert same([outputs["loss"], outputs["more"][0], *training.everything()], expected[i]), i
        assert outputs["more"][1][1] == "a word"
        assert not outputs["loss"].requires_grad
        training.scheduler.step()
    assert not same(expected[0], expected[9])


def test_gradients_that_are_never_cleared_add_up() -> None:
    """From those that were there before the first call on."""
    totals = []
    for captured in (False, True):
        weight = nn.Parameter(torch.arange(3.0))
        weight.grad = torch.ones(3)

        def step(x: Tensor, weight: nn.Parameter = weight) -> None:
            (weight.square() * x).sum().backward()

        run = with_stand_in(step, [weight]) if captured else step
        for i in range(4):
            run(torch.full((3,), float(i + 1)))
        totals.append(weight.grad.tolist())
    assert totals[0] == totals[1] == [1.0, 21.0, 41.0]


def test_a_model_is_compiled_after_the_check() -> None:
    """The check needs single operations; what is warmed up and recorded is the compiled model."""
    ran = []

    def backend(module: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran.append(1)
            return module(*args)

        return run

    torch._dynamo.reset()
    training = Training()
    training.model.forward = torch.compile(training.model.forward, backend=backend)
    step = with_stand_in(training.step, training.state, warmup=2)
    for count, batch in enumerate(batches(4), 1):
        step(*batch)
        assert len(ran) == count
    expected = Training()
    for batch in batches(4):
        expected.step(*batch)
    assert same(training.everything(), expected.everything())


class Meter:
    def __init__(self) -> None:
        self.sum, self.calls = torch.zeros(()), 0

    def state_dict(self) -> dict[str, Any]:
        return vars(self)

    def load_state_dict(self, content: dict[str, Any]) -> None:
        self.sum.copy_(content["sum"])
        self.calls = content["calls"]


def test_objects_with_a_state_dict_are_put_back() -> None:
    meter = Meter()

    def step(x: Tensor, count: int) -> Tensor:
        meter.calls += count
        meter.sum += x.sum()
        return meter.sum

    captured = with_stand_in(step, [meter])
    for _ in range(3):
        captured(torch.ones(2), 0)
    assert meter.sum == 6
    captured = with_stand_in(step, [meter])
    captured(torch.ones(2), 1)
    with pytest.raises(InputError, match="the step replaces values in the state_dict of Meter"):
        captured(torch.ones(2), 1)
    assert (meter.sum.item(), meter.calls) == (8, 1)


def test_auto_falls_back_with_one_warning() -> None:
    """The first call is step 1 of the training also then."""
    expected, training = Training(), Training()

    def step(images: Tensor, labels: dict[str, Tensor]) -> float:
        return training.step(images, labels)["loss"].item()  # type: ignore[no-any-return]

    captured = with_stand_in(step, training.state, mode="auto")
    torch.manual_seed(5)
    losses = [expected.step(*batch)["loss"].item() for batch in batches(3)]
    torch.manual_seed(5)
    message = "capture: the step runs without a CUDA graph: step: it reads a value"
    with pytest.warns(UserWarning, match=message) as caught:
        assert [captured(*batch) for batch in batches(3)] == losses
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert same(training.everything(), expected.everything())
    assert not captured.captured
    assert captured.reason is not None
    assert "aten._local_scalar_dense" in captured.reason


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_capture_that_fails_changes_nothing(mode: str) -> None:
    expected, training = Training(), Training()
    step = Captured(training.step, state=training.state, mode=mode, warmup=1, backend=Unrecordable)
    torch.manual_seed(5)
    losses = [expected.step(*batch)["loss"].item() for batch in batches(3)]
    torch.manual_seed(5)
    first, second, third = batches(3)
    assert step(*first)["loss"].item() == losses[0]
    message = f"as a CUDA graph: operation not permitted .*capturing .{graph_cases.__file__}:"
    if mode == "on":
        before = training.everything()
        with pytest.raises(InputError, match=message):
            step(*second)
        assert same(training.everything(), before)
        assert not step.captured
    else:
        with pytest.warns(UserWarning, match=message):
            assert step(*second)["loss"].item() == losses[1]
        assert step(*third)["loss"].item() == losses[2]
        assert same(training.everything(), expected.everything())


@pytest.mark.parametrize("mode", ["on", "auto"])
@pytest.mark.parametrize("calls", [1, 4], ids=["warming up", "captured"])
def test_changed_inputs_are_named(calls: int, mode: str) -> None:
    captured = with_stand_in(lambda batch, scale, word: batch["x"] * scale, mode=mode, warmup=2)
    good = {"x": torch.ones(4, 2)}
    for _ in range(calls):
        captured(good, 2.0, "a")
    assert captured.captured == (calls == 4)
    small, double = {"x": torch.ones(3, 2)}, {"x": torch.ones(4, 2).double()}
    for inputs, message in (
        ((small, 2.0, "a"), r"inputs\[0\]\['x'\]: float32 of shape \(3, 2\) .* \(4, 2\) on cpu as"),
        ((double, 2.0, "a"), r"inputs\[0\]\['x'\]: float64 of shape"),
        ((good, 3.0, "a"), r"inputs\[1\]: 3.0 given, 2.0 as in the first call"),
        (({"y": good["x"]}, 2.0, "a"), "inputs: .*'y'.* given, .*'x'.* as in the first call"),
    ):
        with pytest.raises(InputError, match=message):
            captured(*inputs)
    assert torch.equal(captured(good, 2.0, "a"), torch.full((4, 2), 2.0))
    captured.reset()
    assert not captured.captured
    assert captured(small, 3.0, "b").shape == (3, 2)


ON_META = [torch.ones(1), torch.ones(1, device="meta")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (ON_META, r"\[1\]: a tensor on meta is not accepted; it must be on cpu"),
        (torch.ones(1, requires_grad=True), ": a tensor that requires a gradient .* detached"),
        (torch.ones(1).numpy(), ": ndarray is not accepted; .* a tensor or plain value"),
    ],
)
def test_inputs_that_cannot_be_used(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"inputs\[0\]{message}"):
        with_stand_in(lambda x: x)(value)


def test_arguments_that_cannot_be_used() -> None:
    number: list[Any] = [nn.Linear(1, 1), 4]
    for arguments, message in (
        ({"mode": "always"}, "mode: 'always' is none of auto, on, off"),
        ({"warmup": 0}, "warmup: 0 .* a whole number of calls, at least 1"),
        ({"state": nn.Linear(1, 1)}, "state: Linear .* a list or tuple"),
        ({"state": number}, r"state\[1\]: int .* a module, optimizer, tensor or object"),
    ):
        with pytest.raises(InputError, match=message):
            capture(lambda x: x, **arguments)  # type: ignore[arg-type]
    message = "capture: autocast around the call.*put it into step"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match=message):
        with_stand_in(lambda x: x)(torch.ones(1))


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="capture: 'on' needs a CUDA device and none was found"):
        capture(lambda x: x, mode="on")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode, reason in (("auto", "no CUDA device"), ("off", "capture is off")):
            step = capture(lambda x: x.sum().item(), mode=mode)
            assert [step(torch.ones(n)) for n in (1, 2)] == [1.0, 2.0]
            assert step.reason == reason
            assert not step.captured


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
