"""Loaders: the same batches however they are made, resuming, and failures as one line."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_augment import BATCH_ROUNDING
from torch.utils.data import Dataset

from vi_simsiam.config import POLICIES, AugmentConfig
from vi_simsiam.data import Batch, MultiViewLoader
from vi_simsiam.data import loader as data_loader
from vi_simsiam.data.cache import in_memory, pack
from vi_simsiam.data.loader import eval_loader
from vi_simsiam.data.packed import PackedImages, open_pack
from vi_simsiam.data.sources import ArraySource, FileSource, ImageSource, Unreadable
from vi_simsiam.data.views import add_offsets, draw_table, epoch_order, eval_view
from vi_simsiam.errors import InputError, TrainingError
from vi_simsiam.ops.augment import eager_augment

POLICY = AugmentConfig(size=12, local_views=1, local_size=8)


@pytest.fixture(scope="module")
def source() -> ArraySource:
    images = np.random.default_rng(0).integers(0, 256, (22, 14, 14, 3), dtype=np.uint8)
    return ArraySource(images, np.arange(22) % 3, ("a", "b", "c"))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(path)
    return paths


def loader(
    source: ImageSource, workers: int = 0, batch_size: int = 4, seed: int = 1, **options: Any
) -> MultiViewLoader:
    return MultiViewLoader(source, POLICY, batch_size, seed=seed, workers=workers, **options)


def assert_same(left: Iterator[Batch], right: Iterator[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.index, b.index)
        assert len(a.views) == len(b.views)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_batches_hold_the_keyed_views(source: ArraySource) -> None:
    loaded = list(loader(source).epoch(2))
    assert len(loaded) == 5
    order = epoch_order(1, 2, 22)
    assert sorted(order.tolist()) == list(range(22))
    for step, batch in enumerate(loaded):
        assert [view.shape[-1] for view in batch.views] == [12, 12, 8]
        assert all(view.shape == (4, 3, *view.shape[-1:] * 2) for view in batch.views)
        assert all(view.dtype == torch.float32 for view in batch.views)
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
        assert batch.index.dtype == torch.int64
        assert batch.index.tolist() == order[4 * step : 4 * step + 4].tolist()
    # The views of one image, on its own.
    images, sample = in_memory(source), order[5:6]
    sizes = {"heights": images.heights[sample], "widths": images.widths[sample]}
    table = draw_table(POLICY, seed=1, epoch=2, samples=sample, **sizes)
    add_offsets(table, images.offsets[sample])
    pixels = torch.from_numpy(images.pixels.copy())
    for number, view in enumerate(loaded[1].views):
        rows = torch.from_numpy(table[number : number + 1])
        expected = eager_augment(pixels, rows, view.shape[-1], torch.float32)[0, 0]
        torch.testing.assert_close(view[1], expected, rtol=0, atol=BATCH_ROUNDING)


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(seed, epoch, 22)) for seed in range(3) for epoch in range(5)}
    assert len(orders) == 15
    # A run resumed with another release must go on in the same order.
    assert epoch_order(0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]


def test_workers_and_a_start_within_the_epoch_change_nothing(source: ArraySource) -> None:
    alone, helped = loader(source), loader(source, workers=2)
    for epoch in (3, 0):
        assert_same(alone.epoch(epoch), helped.epoch(epoch))
    whole = list(alone.epoch(1))
    for each in (alone, helped):
        assert_same(each.epoch(1, start=3), iter(whole[3:]))
        assert list(each.epoch(1, start=5)) == []


def test_workers_are_kept_between_epochs_and_end_when_closed(source: ArraySource) -> None:
    began = set(multiprocessing.active_children())
    helped = loader(source, workers=2)
    list(helped.epoch(0))
    first = set(multiprocessing.active_children())
    assert len(first - began) == 2
    abandoned = helped.epoch(0)
    next(abandoned)
    assert_same(helped.epoch(1), loader(source).epoch(1))
    with pytest.raises(RuntimeError, match="another one was started"):
        next(abandoned)
    left = helped.epoch(2)
    next(left)
    left.close()
    assert set(multiprocessing.active_children()) == first
    helped.close()
    assert not set(multiprocessing.active_children()) - began
    assert_same(helped.epoch(1), loader(source).epoch(1))


def test_iterating_gives_one_epoch_after_the_other(source: ArraySource) -> None:
    loaded = loader(source)
    assert len(loaded) == loaded.steps_per_epoch == 5
    for epoch in range(2):
        assert_same(iter(loaded), loader(source).epoch(epoch))


def test_ranks_share_the_batch_of_one(source: ArraySource) -> None:
    epochs = [loader(source, rank % 2, rank=rank, world_size=4).epoch(1) for rank in range(4)]
    for whole, *shares in zip(loader(source).epoch(1), *epochs, strict=True):
        assert [len(share.index) for share in shares] == [1] * 4
        assert torch.equal(torch.cat([share.index for share in shares]), whole.index)
        for number, view in enumerate(whole.views):
            together = torch.cat([share.views[number] for share in shares])
            torch.testing.assert_close(together, view, rtol=0, atol=BATCH_ROUNDING)


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """A data set as users have them."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[index]).permute(2, 0, 1), 7


def test_every_kind_of_source_gives_the_same_batches(
    source: ArraySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VI_SIMSIAM_CACHE", str(tmp_path / "cache"))
    paths = [tmp_path / f"{number:02d}.png" for number in range(len(source))]
    for number, path in enumerate(paths):
        source.image(number).save(path)
    pack(source, tmp_path / "images.pack")
    expected = list(loader(source).epoch(0))
    packed = open_pack(tmp_path / "images.pack")
    for given in (FileSource(paths), Pictures(source.images), in_memory(source), packed):
        loaded = loader(given)
        assert isinstance(loaded.source, PackedImages)
        assert_same(loaded.epoch(0), iter(expected))
    assert_same(loader(packed, workers=1).epoch(0), iter(expected))


def test_unreadable_images_are_left_out_with_a_warning(
    source: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = in_memory(source)
    images.unreadable = (Unreadable("/there/1.png", "an empty file"),)
    monkeypatch.setattr(data_loader, "cached", lambda source: (images, list(images.unreadable)))
    with pytest.warns(UserWarning, match=r"left out: /there/1\.png \(an empty file\)"):
        loader(source)


def test_a_policy_can_be_given_by_name(source: ArraySource) -> None:
    named = MultiViewLoader(source, "lightly-imagenette", 2, seed=1, workers=0)
    given = MultiViewLoader(source, POLICIES["lightly-imagenette"], 2, seed=1, workers=0)
    assert_same(named.epoch(0, start=9), given.epoch(0, start=9))
    with pytest.raises(InputError, match="policy: 'strong' is none of"):
        MultiViewLoader(source, "strong", 2)


def test_a_worker_that_dies_ends_the_epoch_in_one_line(source: ArraySource) -> None:
    before = set(multiprocessing.active_children())
    helped = loader(source, workers=2)
    batches = helped.epoch(0)
    next(batches)
    # The caller's own work goes on: the news comes with the next batch.
    (set(multiprocessing.active_children()) - before).pop().kill()
    time.sleep(0.3)
    with pytest.raises(TrainingError) as caught:
        list(batches)
    message = "workers: a process that prepares images has ended (killed by signal: Killed); it may"
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not set(multiprocessing.active_children()) - before
    assert_same(helped.epoch(1), loader(source).epoch(1))


def test_workers_by_default_are_one_for_four_cores(
    source: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cores, workers in ((1, 0), (3, 0), (4, 1), (16, 4), (128, 16)):
        monkeypatch.setattr(data_loader, "cores", lambda cores=cores: cores)
        assert MultiViewLoader(source, POLICY, 4).workers == workers


def test_threads_and_global_generators_are_left_alone(source: ArraySource) -> None:
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for workers in (0, 1):
            list(loader(source, workers).epoch(0))
            list(eval_loader(source, 8, 5, workers))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(states[0], torch.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 23, "seed": -1}, "batch_size: 23 must be at most 22, the images in array"),
        ({"batch_size": 0}, "batch_size: 0 .* at least 1"),
        ({"workers": -1}, "workers: -1"),
        ({"seed": -3}, "seed: -3"),
        ({"world_size": 0}, "world_size: 0 .* at least 1"),
        ({"world_size": 3}, "batch_size: 4 .* a multiple of 3"),
        ({"rank": 4, "world_size": 4}, "rank: 4 .* between 0 and 3, for world_size 4"),
        ({"dtype": torch.float16}, r"dtype: torch\.float16 is neither"),
        ({"device": "meta"}, "device: 'meta' is none of cpu, cuda"),
        ({"device": "gpu"}, "device: 'gpu' is none of cpu, cuda"),
        ({"device": "cuda:99"}, r"device: 'cuda:99' is not here \(\d+ CUDA devices found\)"),
        ({"memory": "disk"}, "memory: 'disk' is none of auto, gpu, host"),
        ({"backend": "triton"}, "backend: 'triton' needs a CUDA device"),
    ],
)
def test_options_that_cannot_be_used_are_named(
    source: ArraySource, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        loader(source, **options)


def test_numbers_out_of_range_are_named(source: ArraySource) -> None:
    with pytest.raises(InputError, match="epoch: -1"):
        loader(source).epoch(-1)
    with pytest.raises(InputError, match="start: 6 .* between 0 and 5"):
        loader(source).epoch(0, start=6)
    with pytest.raises(InputError, match="size: 0"):
        eval_loader(source, 0, 4, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_names_a_file_that_is_damaged(files: list[Path], workers: int) -> None:
    began = set(multiprocessing.active_children())
    files[5].write_bytes(files[4].read_bytes()[:40])
    with pytest.raises(InputError) as caught:
        list(eval_loader(FileSource(files), 8, 4, workers))
    assert str(caught.value).startswith(f"{files[5]}: cannot be read as an image (")
    assert "\n" not in str(caught.value)
    assert set(multiprocessing.active_children()) <= began


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_batches_are_in_order_and_complete(source: ArraySource, workers: int) -> None:
    batches = list(eval_loader(source, 10, 8, workers))
    assert [len(images) for images, _ in batches] == [8, 8, 6]
    assert torch.cat([labels for _, labels in batches]).tolist() == [i % 3 for i in range(22)]
    expected = torch.stack([eval_view(10)(source.image(i)) for i in range(22)])
    assert torch.equal(torch.cat([images for images, _ in batches]), expected)
    unlabelled = list(eval_loader(ArraySource(source.images), 10, 22, workers))
    assert unlabelled[0][1].tolist() == [-1] * 22
    assert unlabelled[0][1].dtype == torch.int64


def train_until_interrupted(source: ArraySource, begun: Event) -> None:
    os.setsid()
    helped = loader(source, workers=2)
    try:
        for epoch in itertools.count():
            for _ in helped.epoch(epoch):
                begun.set()
    except KeyboardInterrupt:
        sys.exit(7)


@pytest.mark.skipif(os.name != "posix", reason="a terminal's Ctrl-C is sent to a process group")
def test_ctrl_c_prints_no_traceback_of_a_worker(
    source: ArraySource, capfd: pytest.CaptureFixture[str]
) -> None:
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=train_until_interrupted, args=(source, begun))
    process.start()
    try:
        assert begun.wait(60)
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGINT)
        process.join(60)
    finally:
        process.kill()
    assert process.exitcode == 7
    assert "Traceback" not in capfd.readouterr().err
