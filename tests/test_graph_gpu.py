"""The captured step on a GPU: agreement with eager runs, random numbers, and failed captures."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graph_cases import OPTIMIZERS, Reads, Training, batches
from torch import Tensor, nn

from vi_simsiam.engine.graph import capture
from vi_simsiam.errors import InputError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device: captured and eager steps, and failed captures, are not run",
    ),
]


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """The same kernels in eager and captured runs, which add in the same order."""
    options = {"benchmark": False, "deterministic": True, "allow_tf32": False}
    with torch.backends.cudnn.flags(enabled=True, **options):
        yield


def run(training: Training, step: Callable[..., Any], count: int = 10) -> list[list[Tensor]]:
    """Loss, logits and state after each of `count` steps with a falling learning rate."""
    found = []
    for batch in batches(count, "cuda"):
        outputs = step(*batch)
        values = [outputs["loss"], outputs["more"][0], *training.everything()]
        found.append([x.detach().clone() for x in values])
        training.scheduler.step()
    return found


def compare(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for i, (step, wanted) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            step, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, i=i: f"step {i + 1}: {text}"
        )


def autocast(training: Training) -> None:
    forward = training.model.forward

    def mixed(images: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return forward(images)

    training.model.forward = mixed  # type: ignore[method-assign]


def compiled(training: Training) -> None:
    torch._dynamo.reset()
    training.model.forward = torch.compile(training.model.forward)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("optimizer", "change"),
    [*((name, None) for name in OPTIMIZERS), ("sgd", autocast), ("sgd", compiled)],
)
def test_captured_and_eager_steps_agree(
    optimizer: str, change: Callable[[Training], None] | None
) -> None:
    """Outputs, weights, buffers, gradients and momentum, with dropout and a schedule."""
    runs = []
    for captured in (False, True):
        training = Training(optimizer, "cuda")
        if change is not None:
            change(training)
        step = training.step
        if captured:
            step = capture(step, state=training.state, mode="on")
        runs.append(run(training, step))
        assert not captured or step.captured  # type: ignore[union-attr]
    compare(runs[1], runs[0])


def test_every_replay_draws_other_random_numbers() -> None:
    """The same that an eager run draws."""

    def step(x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)

    ones = torch.ones(10_000, device="cuda")
    torch.manual_seed(0)
    eager = [step(ones) for _ in range(6)]
    torch.manual_seed(0)
    captured = capture(step, mode="on", warmup=1)
    masks = [captured(ones).clone() for _ in range(6)]
    assert captured.captured
    assert all(torch.equal(a, b) for a, b in zip(masks, eager, strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert all(4700 <= int((mask > 0).sum()) <= 5300 for mask in masks)


BROKEN: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), "reads a value on the host.*_local_scalar_dense"),
    "cpu": (lambda x: x.cpu(), "copies from cuda:0 to cpu"),
    "cuda": (lambda x: torch.ones(2).to(x.device), "copies from cpu to cuda"),
    "tensor": (lambda x: torch.tensor([1.0], device=x.device), "a tensor from data of the host"),
    "backward": (lambda x: Reads.apply(x.requires_grad_()).sum().backward(), "reads a value"),
    "synchronize": (lambda x: torch.cuda.synchronize(), "as a CUDA graph: .*captur"),
    "unjoined": (lambda x: _unjoined(x), "cannot be captured as a CUDA graph: .*"),
}
SIDE: list[torch.cuda.Stream] = []


def _unjoined(x: Tensor) -> Tensor:
    """Work on another stream that is never waited for."""
    SIDE.extend([torch.cuda.Stream()] * (not SIDE))
    SIDE[0].wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(SIDE[0]):
        return x + 1


@pytest.mark.parametrize("rule", BROKEN)
def test_a_step_that_cannot_be_captured_leaves_the_process_usable(rule: str) -> None:
    """It is refused with the reason; afterwards eager training and another capture succeed."""
    breaks, message = BROKEN[rule]
    expected = run(eager := Training(device="cuda"), eager.step)
    training = Training(device="cuda")

    def broken(images: Tensor, labels: dict[str, Tensor]) -> Any:
        outputs = training.step(images, labels)
        breaks(images[0, 0])
        return outputs

    stream = torch.cuda.current_stream()
    captured = capture(broken, state=training.state, mode="on", warmup=1)
    with pytest.raises(InputError, match=message) as caught:
        run(training, captured, 2)
    if rule in ("item", "cpu", "cuda", "tensor", "synchronize"):
        assert f"{__file__}:{inspect.getsourcelines(breaks)[1]})" in str(caught.value)
    torch.cuda.synchronize()
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    again = Training(device="cuda")
    compare(run(again, again.step), expected)
    again = Training(device="cuda")
    step = capture(again.step, state=again.state, mode="on")
    compare(run(again, step), expected)
    assert step.captured


def test_a_failed_capture_gives_its_memory_back() -> None:
    """256 MB that the capture took before it failed can be allocated by others."""

    def step(x: Tensor) -> Tensor:
        room = torch.ones(2**26, device="cuda")
        torch.cuda.synchronize()
        return x + room[0]

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    captured = capture(step, warmup=1)
    x = torch.ones(1, device="cuda")
    captured(x)
    with pytest.warns(UserWarning, match="the step runs without a CUDA graph"):
        assert captured(x).item() == 2
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 2**27


def test_work_on_another_stream() -> None:
    """Forked and joined inside the step, with memory allocated there."""
    side = torch.cuda.Stream()

    def step(x: Tensor) -> Tensor:
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            doubled = (x * 2).sin()
        here = x.cos()
        current.wait_stream(side)
        doubled.record_stream(current)
        return here + doubled

    captured = capture(step, mode="on")
    for i in range(8):
        x = torch.randn(1000, device="cuda")
        torch.testing.assert_close(captured(x), x.cos() + (x * 2).sin(), msg=f"call {i + 1}")
    assert captured.captured


def test_a_replay_is_one_launch() -> None:
    """The host launches the graph and the copies of inputs; the graph launches the kernels."""
    training = Training(device="cuda")
    step = capture(training.step, state=training.state, mode="on", warmup=1)
    for batch in batches(3, "cuda"):
        step(*batch)
    (batch,) = batches(1, "cuda")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(*batch)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert "aten::_foreach_copy_" in names
    assert not any("conv" in name or "sgd" in name for name in names)
