"""Batches made on the device: the same as the workers', from any step, and failures as one line.

Without a GPU the feed runs on the CPU, where copies are immediate; `LateTransfers` makes them as
late as a GPU may.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from test_augment import BATCH_ROUNDING
from torch import Tensor

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data import Batch, DeviceFeed, MultiViewLoader, device
from vi_simsiam.data.packed import Contents, PackedImages
from vi_simsiam.data.views import Schedule
from vi_simsiam.errors import InputError, TrainingError

PLAIN = AugmentConfig(size=12)
MULTICROP = AugmentConfig(size=12, local_views=2, local_size=8)
MEMORIES = ("gpu", "host")
MakeFeed = Callable[..., DeviceFeed]


def packed(count: int = 26) -> PackedImages:
    """Images of many sizes."""
    generator = np.random.default_rng(0)
    heights, widths = generator.integers(6, 24, (2, count), dtype=np.int32)
    pixels = generator.integers(0, 256, int((3 * heights * widths).sum()), dtype=np.uint8)
    return PackedImages(pixels, Contents("ragged", heights, widths))


IMAGES = packed()


@pytest.fixture
def make_feed(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeFeed]:
    feeds: list[DeviceFeed] = []

    def make(policy: AugmentConfig = PLAIN, **options: Any) -> DeviceFeed:
        options = {"batch_size": 4, "device": "cpu", "segment": 8} | options
        place, segment = torch.device(options.pop("device")), options.pop("segment")
        shares = {"batch_size", "rank", "world_size"} & options.keys()
        schedule = Schedule(IMAGES, policy, seed=3, **{name: options.pop(name) for name in shares})
        monkeypatch.setattr(device, "_SEGMENT_BYTES", segment * 64 * schedule.views * schedule.rows)
        feeds.append(DeviceFeed(schedule, place, **options))
        return feeds[-1]

    yield make
    for feed in feeds:
        feed.close()


def batch(feed: DeviceFeed, step: int) -> Batch:
    feed.load(step)
    return feed.make(torch.tensor(step, device=feed.device))


@functools.cache
def expected(
    policy: AugmentConfig = PLAIN, batch_size: int = 4, epochs: int = 3, **options: Any
) -> list[Batch]:
    """The batches of a worker in the first epochs."""
    loader = MultiViewLoader(IMAGES, policy, batch_size, seed=3, workers=0, **options)
    return [each for epoch in range(epochs) for each in loader.epoch(epoch)]


def assert_same(left: Batch, right: Batch) -> None:
    assert torch.equal(left.index, right.index)
    assert len(left.views) == len(right.views)
    assert all(torch.equal(a, b) for a, b in zip(left.views, right.views, strict=True))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    ("policy", "batch_size", "dtype"),
    [(PLAIN, 1, torch.float32), (MULTICROP, 4, torch.bfloat16), (PLAIN, 26, torch.float32)],
)
def test_batches_are_those_of_the_workers(
    make_feed: MakeFeed, memory: str, policy: AugmentConfig, batch_size: int, dtype: torch.dtype
) -> None:
    feed = make_feed(policy=policy, batch_size=batch_size, memory=memory, dtype=dtype)
    assert feed.memory == memory
    for step, each in enumerate(expected(policy, batch_size, epochs=2, dtype=dtype)):
        made = batch(feed, step)
        assert made.views[0].dtype == dtype
        assert_same(made, each)
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in made.views)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("segment", [1, 7])
def test_steps_may_jump_wherever_segments_of_the_table_end(
    make_feed: MakeFeed, memory: str, segment: int
) -> None:
    batches = expected()
    feed = make_feed(memory=memory, segment=segment)
    for step in (*range(18), 9, 10, 11, 12, 3, 4, 4, 17, 0, 1, 2, 16, 15):
        assert_same(batch(feed, step), batches[step])


@pytest.mark.parametrize("memory", MEMORIES)
def test_ranks_share_the_batch_of_one(make_feed: MakeFeed, memory: str) -> None:
    options = {"policy": MULTICROP, "memory": memory, "world_size": 4, "segment": 4}
    ranks = [make_feed(rank=rank, **options) for rank in range(4)]
    for step, whole in enumerate(expected(MULTICROP, epochs=1)):
        shares = [batch(feed, step) for feed in ranks]
        assert torch.equal(torch.cat([share.index for share in shares]), whole.index)
        for number, view in enumerate(whole.views):
            together = torch.cat([share.views[number] for share in shares])
            torch.testing.assert_close(together, view, rtol=0, atol=BATCH_ROUNDING)


class LateTransfers(device.Transfers):
    """Makes a copy when the computation waits for it; unfinished until the host waits, too."""

    unfinished: ClassVar[list[tuple[Tensor, Tensor, Tensor]]] = []

    def copy(self, to: Tensor, given: Tensor, after: Any) -> Any:
        self.unfinished.append((to, given, given.clone()))
        return self.unfinished[-1]

    def wait(self, event: Any) -> None:
        to, given, _ = event
        to.copy_(given)

    def settle(self, event: Any) -> None:
        if event is not None:
            self.check(event)
            self.unfinished[:] = [other for other in self.unfinished if other is not event]

    def done(self, event: Any) -> bool:
        return not any(other is event for other in self.unfinished)

    @staticmethod
    def check(event: tuple[Tensor, Tensor, Tensor]) -> None:
        _, given, then = event
        assert torch.equal(given, then), "what is copied was overwritten"


def test_bytes_stay_until_their_copy_to_the_device_is_made(
    make_feed: MakeFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "Transfers", LateTransfers)
    feed = make_feed(memory="host")
    batches = expected()
    for step in (*range(18), 5, 6, 7, 2, 3):
        assert_same(batch(feed, step), batches[step])
    feed.close()
    assert LateTransfers.unfinished
    for event in LateTransfers.unfinished:
        LateTransfers.check(event)


@pytest.mark.parametrize(("busy", "least", "most"), [(False, 0.05, 5.0), (True, 0.0, 0.0)])
def test_waiting_counts_where_the_device_runs_out_of_work(
    make_feed: MakeFeed, monkeypatch: pytest.MonkeyPatch, busy: bool, least: float, most: float
) -> None:
    feed = make_feed(memory="host")

    def slow(step: int, into: Tensor) -> int:
        time.sleep(0.2)  # longer than a busy machine may take to come here
        return 0

    monkeypatch.setattr(feed, "_gather", slow)
    monkeypatch.setattr(feed._transfers, "done", lambda event: not busy)
    feed.load(0)
    assert least <= feed.waited <= most


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_step_beyond_those_loaded_reads_only_what_is_there(
    make_feed: MakeFeed, memory: str
) -> None:
    """Warming up a captured step runs ahead of the counter that was loaded."""
    feed = make_feed(memory=memory, segment=2)
    feed.load(1)
    for step in (2, 3, 100):
        made = feed.make(torch.tensor(step))
        assert all(torch.isfinite(view).all() for view in made.views)
    assert_same(feed.make(torch.tensor(1)), expected(epochs=1)[1])


def test_memory_is_chosen_by_the_free_bytes_of_the_device(
    make_feed: MakeFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(IMAGES.pixels)
    for free, memory in ((2 * size, "gpu"), (2 * size - 2, "host")):
        monkeypatch.setattr(device.Transfers, "free_memory", lambda self, free=free: free)
        assert make_feed(memory="auto").memory == memory
    monkeypatch.setattr(device.Transfers, "free_memory", lambda self: 10_000)
    with pytest.raises(InputError, match="^memory: .* 0.00 GB and cpu has .*--data-memory host"):
        make_feed(memory="gpu")
    with pytest.raises(InputError, match="^batch_size: .* in batches of 26 takes .* smaller"):
        make_feed(memory="host", batch_size=26)


@pytest.mark.parametrize("memory", MEMORIES)
def test_failures_of_the_threads_reach_the_caller(
    make_feed: MakeFeed, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, batches = make_feed(memory=memory, segment=3), expected(epochs=1)
    assert_same(batch(feed, 0), batches[0])
    with monkeypatch.context() as patch:
        gone = mock.Mock(side_effect=OSError("the disk is gone"))
        patch.setattr(feed.schedule, "table", gone)
        with pytest.raises(OSError, match="^the disk is gone$"):
            feed.load(3)
    assert_same(batch(feed, 2), batches[2])


def test_a_thread_that_gives_nothing(make_feed: MakeFeed, monkeypatch: pytest.MonkeyPatch) -> None:
    feed, goes_on = make_feed(memory="host"), threading.Event()
    monkeypatch.setattr(device, "PATIENCE", 0.1)
    monkeypatch.setattr(feed, "_gather", lambda step, into: goes_on.wait(60))
    since = time.monotonic()
    with pytest.raises(TrainingError, match="^data: no images have come from the threads for"):
        feed.load(0)
    goes_on.set()
    assert time.monotonic() - since < 30  # of 60


def feed_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("vi-simsiam-feed")}


def test_closing_ends_the_threads(make_feed: MakeFeed) -> None:
    before = feed_threads()
    feed = make_feed(memory="host", segment=1)
    batches = expected(epochs=1)
    assert_same(batch(feed, 0), batches[0])
    assert feed_threads() - before
    feed.close()
    assert not feed_threads() - before
    assert_same(batch(feed, 1), batches[1])


def on_gpu(what: str) -> Callable[..., Any]:
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason=f"would check that {what}")
    return lambda test: pytest.mark.gpu(skip(test))


def assert_near(made: Batch, each: Batch) -> None:
    """The tolerance between two implementations of the same table."""
    assert torch.equal(made.index.cpu(), each.index)
    for left, right in zip(made.views, each.views, strict=True):
        assert left.is_contiguous(memory_format=torch.channels_last)
        # 1e-4 in [0, 1], which normalisation divides by 0.225 at the least.
        torch.testing.assert_close(left.cpu(), right, rtol=0, atol=5e-4)


@on_gpu("batches made on a GPU are those of the workers, also after jumps")
@pytest.mark.parametrize("memory", MEMORIES)
def test_gpu_batches_are_those_of_the_workers(make_feed: MakeFeed, memory: str) -> None:
    feed = make_feed(policy=MULTICROP, memory=memory, device="cuda", segment=4)
    batches = expected(MULTICROP)
    for step in (*range(18), 5, 6, 7, 2, 3):
        assert_near(batch(feed, step), batches[step])


@on_gpu("one CUDA graph makes every batch, by its counter")
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_replayed_graph_makes_every_batch(make_feed: MakeFeed, memory: str) -> None:
    feed = make_feed(policy=MULTICROP, memory=memory, device="cuda", segment=4)
    batches = expected(MULTICROP)
    counter = torch.zeros((), dtype=torch.int64, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    feed.load(0)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        feed.make(counter)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        made = feed.make(counter)
        counter += 1
    results = []
    counter.zero_()
    for step in range(18):  # the host runs far ahead of the device
        feed.load(step)
        graph.replay()
        results.append(Batch([view.clone() for view in made.views], made.index.clone()))
    for result, each in zip(results, batches, strict=True):
        assert_near(result, each)


@on_gpu("making a batch never waits for the device, and that what is copied is page-locked")
@pytest.mark.parametrize("memory", MEMORIES)
def test_making_a_batch_never_waits_for_the_device(make_feed: MakeFeed, memory: str) -> None:
    feed = make_feed(policy=MULTICROP, memory=memory, device="cuda", backend="triton")
    counter = torch.zeros((), dtype=torch.int64, device="cuda")
    feed.load(0)
    feed.make(counter)  # compiles
    for step in range(1, 8):
        feed.load(step)
        counter += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            feed.make(counter)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert feed._drawn_rows.is_pinned()
    assert all(slot.host.is_pinned() for slot in feed._slots)


@on_gpu("a loader's batches are complete before the caller reads them, and stay whole meanwhile")
@pytest.mark.parametrize("memory", MEMORIES)
def test_gpu_loader_hands_its_batches_over(memory: str) -> None:
    loader = MultiViewLoader(IMAGES, MULTICROP, 4, "cuda", seed=3, memory=memory)
    batches = expected(MULTICROP)
    busy = torch.randn(2048, 2048, device="cuda")
    results = []
    for made in (each for epoch in range(3) for each in loader.epoch(epoch)):
        for _ in range(20):  # a step that takes longer than the next batch
            busy = torch.nn.functional.normalize(busy @ busy)
        results.append(Batch([view.clone() for view in made.views], made.index.clone()))
    loader.close()
    for result, each in zip(results, batches, strict=True):
        assert_near(result, each)
