"""Views that the fused kernel does not make, on the device: the batches and steps of a CPU run.

Without a GPU the feed and the trainer run on the CPU, as in `test_device_feed`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_backbone
from graph_cases import with_stand_in
from rich.console import Console
from test_channels import FIVE, SIZE, config, deep, folder
from test_device_feed import MEMORIES, LateTransfers, assert_near, assert_same, batch, on_gpu
from torch import Tensor

from vi_simsiam.config import AugmentConfig, TrainConfig
from vi_simsiam.data import Batch, DeviceFeed, MultiViewLoader, device
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.statistics import print_views, with_statistics
from vi_simsiam.data.views import Schedule
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError
from vi_simsiam.ops.augment import RGB, Layout, is_fused

IMAGES = in_memory(ArraySource(deep(10, 5)))
POLICY = with_statistics(AugmentConfig(size=SIZE, local_views=2, local_size=8), IMAGES)
DEEP = Layout(16, (0.5,), (0.5,))


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_SEGMENT_BYTES", 4096)


def make_feed(memory: str, place: str = "cpu") -> DeviceFeed:
    schedule = Schedule(IMAGES, POLICY, batch_size=4, seed=3)
    return DeviceFeed(schedule, torch.device(place), memory=memory)  # type: ignore[arg-type]


def expected() -> list[Batch]:
    loader = MultiViewLoader(IMAGES, POLICY, 4, seed=3, workers=0)
    return [each for epoch in range(3) for each in loader.epoch(epoch)]


@pytest.mark.parametrize("memory", MEMORIES)
def test_batches_are_those_of_the_workers(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "Transfers", LateTransfers)
    feed, batches = make_feed(memory), expected()
    assert batches[0].views[0].shape == (4, 5, SIZE, SIZE)
    for step in (*range(6), 3, 4, 0):
        assert_same(batch(feed, step), batches[step])
    feed.close()


def test_the_kernel_is_for_8_bit_rgb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vi_simsiam.ops.backends.why_unavailable", lambda name, device: None)
    assert is_fused("auto", "cuda", RGB)
    assert not is_fused("auto", "cuda", DEEP)
    assert not is_fused("auto", "cuda", RGB._replace(mean=(0.5, 0.5, 0.5)))
    assert not is_fused("eager", "cuda", RGB)
    with pytest.raises(InputError, match="^backend: triton makes views of 8-bit RGB alone"):
        is_fused("triton", "cuda", DEEP)


def trained(
    settings: TrainConfig, place: Path, capture: Callable[..., Any] | None, feed: bool = True
) -> tuple[list[Tensor], str]:
    """Weights of a run on the batches of a feed or of the loader, and what was printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        if capture is not None:
            patch.setattr("vi_simsiam.engine.graph.capture", capture)
        trainer = Trainer(settings, place, console=Console(file=printed, width=400))
        if feed:
            schedule = trainer.loader._schedule
            trainer.loader.feed = DeviceFeed(schedule, torch.device("cpu"), memory="host")
        trainer.fit()
    return [tensor.clone() for tensor in trainer.model.state_dict().values()], printed.getvalue()


def test_a_run_on_the_batches_of_a_feed_is_that_of_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vi_simsiam.models.build_backbone", small_backbone)
    settings = config(folder(tmp_path / "five", 5), FIVE, cache_dir=tmp_path / "cache")
    whole, printed = trained(settings, tmp_path / "workers", None, feed=False)
    assert "fused" not in printed
    assert "16 bits" in printed
    made: list[Any] = []

    def stand_in(step: Any, state: Any, mode: str) -> Any:
        made.append(with_stand_in(step, state))
        return made[-1]

    for name, capture in (("launched", None), ("captured", stand_in)):
        found, printed = trained(settings, tmp_path / name, capture)
        assert all(torch.equal(*pair) for pair in zip(found, whole, strict=True))
        assert printed.count("made by torch's operations: the fused kernel takes 8-bit RGB") == 1
    assert [call.captured for call in made] == [True]


def test_the_line_is_printed_for_views_that_are_normalised_otherwise() -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=400)
    print_views(TrainConfig(), True, console)
    assert not printed.getvalue()
    own = AugmentConfig(mean=(0.5,) * 3, std=(0.5,) * 3)
    print_views(TrainConfig(augment=own), True, console)
    assert "3 channels of 8 bits" in printed.getvalue()
    assert "hue" not in printed.getvalue()


@on_gpu("batches of five channels of 16 bits made on a GPU are those of the workers")
@pytest.mark.parametrize("memory", MEMORIES)
def test_gpu_batches_are_those_of_the_workers(memory: str) -> None:
    feed, batches = make_feed(memory, "cuda"), expected()
    assert not feed.fused
    for step in (*range(6), 3, 4, 0):
        assert_near(batch(feed, step), batches[step])
    feed.close()


@on_gpu("a run of five channels trains on a GPU, its step in a graph")
def test_a_run_of_five_channels_on_a_gpu(tmp_path: Path) -> None:
    data = folder(tmp_path / "five", 5)
    settings = config(data, FIVE, cache_dir=tmp_path / "cache", method="simsiam")
    settings = TrainConfig.from_dict(settings.to_dict() | {"device": "cuda", "capture": "on"})
    trainer = Trainer(settings, tmp_path / "run", quiet=True)
    trainer.fit()
    assert torch.isfinite(trainer.train_step.losses).all()
