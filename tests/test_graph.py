"""The captured step without CUDA: a stand-in records a call and repeats it on static tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import graph_cases
import pytest
import torch
from graph_cases import OPTIMIZERS, Training, Unrecordable, batches, same, with_stand_in
from torch import Tensor, nn

from vi_simsiam.engine.graph import Captured, capture
from vi_simsiam.errors import InputError


@pytest.mark.parametrize(
    ("optimizer", "clear_last"), [*((name, False) for name in OPTIMIZERS), ("sgd", True)]
)
def test_captured_and_eager_steps_agree(optimizer: str, clear_last: bool) -> None:
    """Ten steps with a schedule: outputs, state, gradients and random numbers."""
    eager = Training(optimizer, clear_last=clear_last)
    expected = []
    for batch in batches(10):
        outputs = eager.step(*batch)
        expected.append(
            [outputs["loss"].detach(), outputs["more"][0].detach(), *eager.everything()]
        )
        eager.scheduler.step()
    training = Training(optimizer, clear_last=clear_last)
    step = with_stand_in(training.step, training.state, warmup=2)
    for i, batch in enumerate(batches(10)):
        outputs = step(*batch)
        assert step.captured == (i >= 2)
        assert same([outputs["loss"], outputs["more"][0], *training.everything()], expected[i]), i
        assert outputs["more"][1][1] == "a word"
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


def test_outputs_are_overwritten_and_carry_no_graph() -> None:
    training = Training()
    step = with_stand_in(training.step, training.state)
    first, second, third = batches(3)
    kept = step(*first)["loss"].clone()
    replayed = step(*second)["loss"]
    value = replayed.clone()
    assert step(*third)["loss"] is replayed
    assert not torch.equal(replayed, value)
    assert not torch.equal(kept, value)
    assert not replayed.requires_grad


def test_inputs_are_copied_and_left_alone() -> None:
    total = torch.zeros(3)

    def step(x: Tensor) -> Tensor:
        total.add_(x.mul_(2))
        return total

    captured = with_stand_in(step, [total])
    given = [torch.full((3,), float(i)) for i in range(1, 5)]
    for x in given:
        captured(x)
    assert total.tolist() == [20.0] * 3
    # Only the first call, which runs the step as it is, has the caller's own tensor.
    assert [x[0].item() for x in given] == [2.0, 2.0, 3.0, 4.0]


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["on", "auto"])
def test_a_users_own_error_is_raised_unchanged(mode: str) -> None:
    def step(x: Tensor) -> Tensor:
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        with_stand_in(step, mode=mode)(torch.ones(1))


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
