"""Loaders: the same batches however they are made, resuming, and failures that reach the user in one line."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data import loader as data_loader
from vi_simsiam.data.loader import Batch, MultiViewLoader, epoch_order, eval_loader
from vi_simsiam.data.sources import ArraySource, FileSource
from vi_simsiam.data.views import RandomView, eval_view, view_seed
from vi_simsiam.errors import InputError

POLICY = AugmentConfig(size=12, local_views=1, local_size=8)
ROOT = Path(__file__).resolve().parent.parent


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


def loader(source: ArraySource | FileSource, workers: int = 0, batch_size: int = 4, seed: int = 1) -> MultiViewLoader:
    return MultiViewLoader(source, POLICY, batch_size=batch_size, seed=seed, workers=workers)


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
        assert [tuple(view.shape) for view in batch.views] == [(4, 3, 12, 12), (4, 3, 12, 12), (4, 3, 8, 8)]
        assert all(view.dtype == torch.float32 and view.is_contiguous() for view in batch.views)
        assert batch.index.dtype == torch.int64
        assert batch.index.tolist() == order[4 * step : 4 * step + 4].tolist()
    sample = int(order[5])
    views = [RandomView(POLICY, 12, (0.2, 1.0))] * 2 + [RandomView(POLICY, 8, (0.05, 0.14))]
    for number, view in enumerate(views):
        expected = view(source.image(sample), view_seed(1, 2, sample, number))
        assert torch.equal(loaded[1].views[number][1], expected)


def test_epochs_and_seeds_differ(source: ArraySource) -> None:
    orders = {tuple(epoch_order(seed, epoch, 22)) for seed in range(3) for epoch in range(5)}
    assert len(orders) == 15
    # A run resumed with another release must go on in the same order.
    assert epoch_order(0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    first = {
        int(i): view for batch in loader(source).epoch(0) for i, view in zip(batch.index, batch.views[0], strict=True)
    }
    again = {
        int(i): view for batch in loader(source).epoch(1) for i, view in zip(batch.index, batch.views[0], strict=True)
    }
    common = first.keys() & again.keys()
    assert len(common) >= 18
    assert not any(torch.equal(first[i], again[i]) for i in common)


def test_every_position_is_equally_likely() -> None:
    places = np.array([epoch_order(0, epoch, 10) for epoch in range(1000)])
    counts = np.array([np.bincount(places[:, place], minlength=10) for place in range(10)])
    assert np.abs(counts - 100).max() <= 5 * np.sqrt(1000 * 0.1 * 0.9)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(source: ArraySource, workers: int) -> None:
    alone, helped = loader(source), loader(source, workers)
    for epoch in (3, 0):
        assert_same(alone.epoch(epoch), helped.epoch(epoch))
    assert_same(alone.epoch(1, start=3), helped.epoch(1, start=3))


def test_spawned_workers_change_nothing(source: ArraySource) -> None:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert_same(loader(source).epoch(4, start=3), loader(source, workers=1).epoch(4, start=3))
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_start_skips_batches(source: ArraySource) -> None:
    whole = list(loader(source).epoch(6))
    assert_same(loader(source).epoch(6, start=2), iter(whole[2:]))
    assert list(loader(source).epoch(6, start=5)) == []


def test_an_abandoned_epoch_leaves_no_trace(source: ArraySource) -> None:
    helped = loader(source, workers=2)
    abandoned = helped.epoch(0)
    next(abandoned)
    assert_same(helped.epoch(1), loader(source).epoch(1))
    with pytest.raises(RuntimeError, match="another one was started"):
        next(abandoned)


def test_workers_are_kept_between_epochs(source: ArraySource) -> None:
    helped = loader(source, workers=2)
    began = {process.pid for process in multiprocessing.active_children()}
    list(helped.epoch(0))
    first = {process.pid for process in multiprocessing.active_children()}
    assert len(first - began) == 2
    list(helped.epoch(1))
    assert {process.pid for process in multiprocessing.active_children()} == first


def test_closing_ends_the_workers(source: ArraySource) -> None:
    began = set(multiprocessing.active_children())
    helped = loader(source, workers=2)
    list(helped.epoch(0))
    assert len(set(multiprocessing.active_children()) - began) == 2
    helped.close()
    assert not set(multiprocessing.active_children()) - began
    assert_same(helped.epoch(1), loader(source).epoch(1))


def test_global_generators_are_left_alone(source: ArraySource) -> None:
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    for workers in (0, 1):
        list(loader(source, workers).epoch(0))
        list(eval_loader(source, 8, 5, workers))
    assert torch.equal(states[0], torch.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()


def test_numbers_out_of_range_are_named(source: ArraySource) -> None:
    with pytest.raises(InputError, match="batch_size: 23 must be at most 22, the images in array"):
        loader(source, batch_size=23)
    with pytest.raises(InputError, match="batch_size: 0 must be at least 1"):
        loader(source, batch_size=0)
    with pytest.raises(InputError, match="workers: -1"):
        loader(source, workers=-1)
    with pytest.raises(InputError, match="seed: -3"):
        loader(source, seed=-3)
    with pytest.raises(InputError, match="epoch: -1"):
        loader(source).epoch(-1)
    with pytest.raises(InputError, match="start: 6 must lie between 0 and 5"):
        loader(source).epoch(0, start=6)
    with pytest.raises(InputError, match="size: 0"):
        eval_loader(source, 0, 4, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_damaged_later_is_named(files: list[Path], workers: int) -> None:
    began = set(multiprocessing.active_children())
    loaded = loader(FileSource(files), workers)
    assert len(list(loaded.epoch(0))) == 2
    files[5].unlink()
    with pytest.raises(InputError) as caught:
        list(loaded.epoch(1))
    assert str(caught.value) == f"{files[5]}: cannot be read as an image (No such file or directory)"
    assert set(multiprocessing.active_children()) <= began
    files[5].write_bytes(files[4].read_bytes()[:40])
    with pytest.raises(InputError) as caught:
        list(eval_loader(FileSource(files), 8, 4, workers))
    assert str(caught.value).startswith(f"{files[5]}: cannot be read as an image (")
    assert "\n" not in str(caught.value)
    assert set(multiprocessing.active_children()) <= began
    files[5].write_bytes(files[4].read_bytes())
    assert len(list(loaded.epoch(2))) == 2


def test_every_tensor_of_a_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 100)
    pinned = pin_memory(Batch([torch.tensor([1.0]), torch.tensor([2.0])], torch.tensor([3])))
    assert [view.item() for view in pinned.views] == [101, 102]
    assert pinned.index.item() == 103


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="would check that batches arrive in page-locked memory")
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_arrive_pinned(source: ArraySource, workers: int) -> None:
    batches = MultiViewLoader(source, POLICY, batch_size=4, seed=1, workers=workers, pin_memory=True).epoch(0)
    for batch, expected in zip(batches, loader(source).epoch(0), strict=True):
        assert batch.index.is_pinned()
        assert all(view.is_pinned() for view in batch.views)
        assert all(torch.equal(a, b) for a, b in zip(batch.views, expected.views, strict=True))


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


def test_workers_ignore_interrupts(source: ArraySource) -> None:
    helped = loader(source, workers=1)
    started = helped.epoch(0)
    next(started)
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)
    assert_same(helped.epoch(1), loader(source).epoch(1))


def test_an_interrupt_before_a_worker_is_ready_is_harmless(
    source: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = data_loader._start_worker

    def interrupted(worker: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        start(worker)

    monkeypatch.setattr(data_loader, "_start_worker", interrupted)
    assert_same(loader(source, workers=1).epoch(0), loader(source).epoch(0))


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a process group, as a terminal does for Ctrl-C")
def test_ctrl_c_prints_no_traceback_of_a_worker() -> None:
    program = textwrap.dedent(
        """
        import itertools, numpy as np
        from vi_simsiam.config import AugmentConfig
        from vi_simsiam.data.loader import MultiViewLoader
        from vi_simsiam.data.sources import ArraySource

        source = ArraySource(np.zeros((64, 14, 14), np.uint8))
        loader = MultiViewLoader(source, AugmentConfig(size=12), batch_size=4, seed=0, workers=2)
        try:
            for epoch in itertools.count():
                for batch in loader.epoch(epoch):
                    print("batch", flush=True)
        except KeyboardInterrupt:
            print("stopped", flush=True)
        """
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "batch\n"
            os.killpg(process.pid, signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert output.endswith("stopped\n")
    assert "Traceback" not in errors
    assert process.returncode == 0
