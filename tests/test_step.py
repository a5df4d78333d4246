"""The training step and its network: SGD, the latch, and the same numbers with any layers, eager,
overlapped and captured."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from graph_cases import with_stand_in
from test_device_feed import IMAGES, MEMORIES, on_gpu
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes

from vi_simsiam.backbones import build_backbone
from vi_simsiam.config import AugmentConfig, TrainConfig
from vi_simsiam.data import Batch, DeviceFeed, MultiViewLoader, device
from vi_simsiam.data.views import Schedule
from vi_simsiam.engine.graph import capture
from vi_simsiam.engine.graph_rules import Rules
from vi_simsiam.engine.network import OWN_BUFFERS, Bfloat16Weights, training_network
from vi_simsiam.engine.step import OverlappedStep, TrainStep, learning_rates
from vi_simsiam.models import Output, SimSiam, VISimSiam
from vi_simsiam.ops.stem_convolution import _OverBlocks

POLICY = AugmentConfig(size=12, local_views=1, local_size=8, blur_prob=0.0)
RATES = learning_rates(TrainConfig(epochs=3, lr=0.1, warmup_epochs=0.5), 6)


def backbone() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )


def make_step(kind: type[SimSiam] = VISimSiam, device: str = "cpu", **options: object) -> TrainStep:
    torch.manual_seed(0)
    model = (
        kind(backbone(), features=32, dim=16, projector_hidden=16, predictor_hidden=8)
        .to(device)
        .train()
    )
    return TrainStep(
        model, RATES, **{"momentum": 0.9, "weight_decay": 1e-2, "loss_scale": 0.1} | options
    )  # type: ignore[arg-type]


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def views(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(8, 3, size, size, generator=generator) for size in (12, 12, 8)]


def everything(step: TrainStep) -> list[Tensor]:
    """Weights, buffers, momentum, learning rate, counter, latch and losses."""
    momenta = [entry["momentum_buffer"] for entry in step.optimizer.state.values()]
    numbers = [step.optimizer.param_groups[0]["lr"], step.counter, step.failed, step.losses]
    kept = [*step.model.state_dict().values(), *momenta, *numbers]
    return [tensor.clone() for tensor in kept]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"tensor {i}"


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_a_step_is_sgd(clip_norm: float | None) -> None:
    """Torch's unfused SGD, with learning rates as Python numbers and torch's own clipping.

    Every step begins from the same weights: six steps would amplify the rounding of the first one.
    """
    step, reference = make_step(clip_norm=clip_norm), make_step()
    model = reference.model
    plain = torch.optim.SGD(
        model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-2, foreach=False
    )
    for i in range(6):
        output = step(views(i))
        assert not any(x.requires_grad for x in (*output.predictions, *output.targets))
        assert (len(output.predictions), len(output.targets)) == (3, 2)
        plain.param_groups[0]["lr"] = RATES[i].item()
        plain.zero_grad()
        loss = model.loss(model(views(i)), "eager", 0.1)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or 1e9)
        plain.step()
        torch.testing.assert_close(step.losses[i], loss.detach())
        torch.testing.assert_close(step.gradient_norm(), norm)
        assert step.optimizer.param_groups[0]["lr"].item() == RATES[i].item()
        torch.testing.assert_close(
            step.model.state_dict(), model.state_dict(), rtol=2e-5, atol=1e-6
        )
        model.load_state_dict(step.model.state_dict())
    assert step.counter.item() == 6


def test_the_latch_keeps_what_was_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third loss is NaN; later ones are finite again and must change nothing."""
    step = make_step(weight_decay=0.1)
    loss = step.model.loss
    broken = [1.0, 1.0, float("nan"), 1.0, 1.0]
    monkeypatch.setattr(step.model, "loss", lambda *given: loss(*given) * broken[int(step.counter)])
    kept: list[Tensor] = []
    for i in range(5):
        step(views(i))
        momenta = [step.optimizer.state[p]["momentum_buffer"] for p in step.model.parameters()]
        now = [p.detach().clone() for p in (*step.model.parameters(), *momenta)]
        if i >= 2:
            assert_same(now, kept)
        elif kept:
            assert not torch.equal(now[0], kept[0])
        kept = now
    assert torch.isfinite(step.losses[:5]).tolist() == [True, True, False, True, True]
    assert step.failed.item() == 1
    assert step.counter.item() == 5


def test_learning_rate_warms_up_and_decays() -> None:
    rates = learning_rates(TrainConfig(epochs=10, warmup_epochs=2.0, lr=0.5), 5).tolist()
    assert len(rates) == 50
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert (rates[10], rates[30]) == pytest.approx((0.5, 0.25))
    assert 0 < rates[-1] < 0.002


def test_bfloat16_changes_little() -> None:
    exact, rounded = make_step(), make_step(bf16=True)
    for step in (exact, rounded):  # the whole rate learns the batch in four steps
        step.rates = RATES / 10
    for i in range(4):
        exact(views(i))
        rounded(views(i))
    assert not torch.equal(exact.losses, rounded.losses)
    torch.testing.assert_close(exact.losses[:4], rounded.losses[:4], rtol=0.05, atol=0.01)
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())


def test_a_model_in_ddp_is_refused_and_trains_on() -> None:
    """Refused in its forward: after a failed backward the wrapper would refuse every later step."""
    with group_of_one():
        step = make_step()
        step.network = DistributedDataParallel(step.model, **OWN_BUFFERS)
        call = with_stand_in(step, step.state, mode="auto")
        with pytest.warns(UserWarning, match="DistributedDataParallel, which is not captured"):
            call(views(0))
        call(views(1))
    plain = make_step()
    for i in range(2):
        plain(views(i))
    assert_same(everything(step), everything(plain))


def schedule() -> Schedule:
    return Schedule(IMAGES, POLICY, batch_size=4, seed=3)


class KernelFeed(DeviceFeed):
    """A feed whose views bypass the dispatcher, as those of a GPU's kernels do."""

    def make(self, counter: Tensor) -> Batch:
        with _disable_current_modes():
            return super().make(counter)


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], DeviceFeed]]:
    monkeypatch.setattr(device, "_SEGMENT_BYTES", 4096)
    made: list[DeviceFeed] = []

    def make(memory: str) -> DeviceFeed:
        made.append(KernelFeed(schedule(), torch.device("cpu"), memory=memory))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


@functools.cache
def by_loader(kind: type[SimSiam], steps: int) -> TrainStep:
    """The run that the overlapped ones must equal: batches from the loader, step by step."""
    step = make_step(kind)
    loader = MultiViewLoader(IMAGES, POLICY, 4, seed=3, workers=0)
    for i in range(steps):
        step(next(iter(loader.epoch(*divmod(i, loader.steps_per_epoch)))).views)
    return step


@pytest.mark.parametrize(
    ("kind", "captured", "memory"),
    [
        *((VISimSiam, captured, "host") for captured in (False, True)),
        *((kind, True, "gpu") for kind in (SimSiam, VISimSiam)),
    ],
)
def test_overlapped_and_captured_steps_train_alike(
    feed: Callable[[str], DeviceFeed], kind: type[SimSiam], captured: bool, memory: str
) -> None:
    """Ten steps across the end of an epoch and of the table's segments, bit for bit."""
    step = make_step(kind)
    whole = OverlappedStep(step, feed(memory))
    whole.prepare(0)
    call = with_stand_in(whole, whole.state, warmup=2) if captured else whole
    for i in range(10):
        whole.feed.load(i + 1)
        output = call()
        assert output.predictions[0].shape[0] == 4
        assert step.counter.item() == i + 1
    assert_same(everything(step), everything(by_loader(kind, 10)))
    assert not captured or call.captured  # type: ignore[union-attr]


def test_prepared_views_of_one_size_adjoin(feed: Callable[[str], DeviceFeed]) -> None:
    """The network takes them as one batch without a copy."""
    step, seen = make_step(), []

    def network(views: Sequence[Tensor]) -> Output:
        seen.extend(views)
        return step.model(views)  # type: ignore[no-any-return]

    step.network = network
    whole = OverlappedStep(step, feed("gpu"))
    whole.prepare(0)
    whole.feed.load(1)
    whole()
    first, second, *rest = seen
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    assert all(x.data_ptr() == rest[0].data_ptr() + i * x.nbytes for i, x in enumerate(rest))


def test_a_captured_run_is_resumed(feed: Callable[[str], DeviceFeed]) -> None:
    """Seven steps, a checkpoint, and three steps of another process."""
    expected, first = by_loader(VISimSiam, 10), by_loader(VISimSiam, 7)
    step = make_step()
    step.model.load_state_dict(first.model.state_dict())
    for name, buffer in step.momentum.items():
        buffer.copy_(first.momentum[name])
    step.counter.fill_(7)
    whole = OverlappedStep(step, feed("host"))
    whole.prepare(7)
    call = with_stand_in(whole, whole.state)
    for i in range(7, 10):
        whole.feed.load(i + 1)
        call()
    assert_same(everything(step)[:-1], everything(expected)[:-1])
    assert torch.equal(step.losses[7:], expected.losses[7:])


@on_gpu("replays make the views of the next steps on a second stream, and train as single launches")
@pytest.mark.parametrize("memory", MEMORIES)
def test_overlapped_replays_on_a_gpu(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host runs far ahead, across epochs, segments of the table and reused slots."""
    monkeypatch.setattr(device, "_SEGMENT_BYTES", 4096)
    steps = len(RATES) - 1
    made: list[list[list[Tensor]]] = []
    losses: list[Tensor] = []
    for mode in ("on", "off"):
        step = make_step(device="cuda")
        step.rates.div_(100)  # the whole rate amplifies rounding to a whole loss in eight steps
        feed = DeviceFeed(schedule(), torch.device("cuda", 0), memory=memory)  # type: ignore[arg-type]
        whole = OverlappedStep(step, feed)
        whole.prepare(0)
        call = capture(whole, state=whole.state, mode=mode)
        made.append([])
        for i in range(steps):
            feed.load(i + 1)
            call()
            assert whole._views is not None
            made[-1].append([view.clone() for view in whole._views])
        assert call.captured == (mode == "on")
        losses.append(step.losses[:8].clone())  # later ones amplify rounding
        feed.close()
    alone = DeviceFeed(schedule(), torch.device("cuda", 0), memory="gpu")
    for i in range(steps):
        alone.load(i + 1)
        expected = alone.make(torch.tensor(i + 1, device="cuda")).views
        for found in made:
            assert all(torch.equal(a, b) for a, b in zip(found[i], expected, strict=True)), (
                f"views of step {i + 1}"
            )
    alone.close()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-3)


def resnet_model() -> VISimSiam:
    torch.manual_seed(0)
    backbone, _ = build_backbone("resnet18")
    backbone.layer3 = backbone.layer4 = torch.nn.Identity()
    model = VISimSiam(
        backbone,
        features=128,
        dim=64,
        projector_hidden=32,
        predictor_hidden=16,
        local_predictor=True,
    )
    return model.to(memory_format=torch.channels_last)


def gradients(
    network: object, model: VISimSiam, views: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(network(views), "eager")  # type: ignore[operator]
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def test_bfloat16_weights_are_those_of_autocast() -> None:
    """Loss and gradients, in float32 and in the weights' layout; unused weights have none."""
    model = resnet_model()
    views = [torch.randn(4, 3, 32, 32).bfloat16() for _ in range(2)]
    plain, converted = copy.deepcopy(model), copy.deepcopy(model)
    expected, wanted = gradients(plain, plain, views)
    loss, found = gradients(Bfloat16Weights(converted), converted, views)
    torch.testing.assert_close(loss, expected)
    assert {name for name, gradient in found.items() if gradient is None} == {
        name for name in found if name.startswith("local_predictor.")
    }
    for name, weight in converted.named_parameters():
        gradient = found[name]
        if gradient is not None:
            assert gradient.dtype == torch.float32
            assert gradient.stride() == weight.stride(), name
            torch.testing.assert_close(gradient, wanted[name])


def test_layers_of_a_training_network() -> None:
    model = resnet_model()
    assert training_network(model, kernels=False, bf16=True) is model
    assert (model.shared_passes, model.fused) == (True, False)
    assert isinstance(training_network(model, kernels=True, bf16=True), Bfloat16Weights)
    assert (model.shared_passes, model.fused) == (True, True)
    assert training_network(model, kernels=True) is model
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(resnet_model())
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten()
    own = VISimSiam(torch.nn.Sequential(*layers), features=8 * 36, dim=64)
    for other in (synchronised, own):
        assert training_network(other, kernels=True, bf16=True) is other
        assert not other.shared_passes, "its BatchNorm would normalise the views as one batch"
        assert not other.fused
    compiled = training_network(model, kernels=True, compiled=True, bf16=True)
    assert not isinstance(compiled, Bfloat16Weights)
    assert not model.fused


def test_the_stems_weight_is_rearranged_on_the_device() -> None:
    """A table made on the host would be copied in every step, which a CUDA graph cannot."""
    weight = torch.empty(8, 3, 7, 7, device="meta", requires_grad=True)
    with Rules(torch.device("meta"), (weight,)):
        (gradient,) = torch.autograd.grad(_OverBlocks.apply(weight).sum(), weight)
    assert gradient.shape == weight.shape
