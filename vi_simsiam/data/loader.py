"""Batches of random views for training, and batches in order for evaluation.

On a CPU worker processes prepare the views, on a GPU the device itself does (see `data.device`);
either way a batch is the same function of (seed, epoch, step), see `data.views`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vi_simsiam.checks import choice, require
from vi_simsiam.config import AugmentConfig, Constants, DataMemory
from vi_simsiam.config import policy as named_policy
from vi_simsiam.data.cache import cached
from vi_simsiam.data.channels import Pixels
from vi_simsiam.data.decoding import cores
from vi_simsiam.data.device import DeviceFeed, byte_tensor, find_device
from vi_simsiam.data.items import as_source
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.data.statistics import with_statistics
from vi_simsiam.data.views import (
    GLOBAL_VIEWS,
    IMAGENET,
    Batch,
    Schedule,
    add_offsets,
    eval_square,
    normalised,
)
from vi_simsiam.data.workers import Workers, results
from vi_simsiam.errors import ImageWarning, InputError
from vi_simsiam.ops.augment import eager_augment
from vi_simsiam.text import counted


class MultiViewLoader:
    """Batches of 2 global and `policy.local_views` local views per image, for any training loop.

    Iterating over it gives one epoch after the other; `epoch` gives a certain one, from any step
    on. A batch is a function of (seed, epoch, step) alone, whatever the device, memory and workers.
    The global generators of torch and numpy are neither used nor changed.

    On a CPU, workers are started by the first epoch and kept until `close`, an error, or the end of
    this object; `workers=0` prepares batches in the calling process. On a CUDA device the batches
    are made there, one ahead, on a stream of its own; see `DeviceFeed`.

    Args:
        source: images. Unless they are `PackedImages`, they are decoded once: files into the cache,
            anything else into memory. A warning names files that cannot be read.
        policy: the views, or the name of a policy in `config.POLICIES`.
        batch_size: images in the batch of all ranks together.
        device: device of the batches: "cpu", "cuda" or "cuda:N".
        seed: key of the order and of every view.
        workers: processes that prepare views on a CPU; None for cores // 4, at most
            16, and 0 with a GPU.
        dtype: of the views: float32 or bfloat16.
        memory: place of the images with a GPU: "gpu", "host", or "auto": "gpu" if they fit well.
        rank: this process among `world_size`; its rows are [rank * B / N, (rank + 1) * B / N).
        world_size: processes that share a batch.
        backend: of the views on a GPU: "auto", "eager" or "triton".

    Raises:
        InputError: a batch larger than the source, numbers out of range, or images that cannot be
            used or do not fit.
    """

    def __init__(
        self,
        source: ImageSource | Dataset[Any],
        policy: AugmentConfig | str,
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        seed: int = 0,
        workers: int | None = None,
        dtype: torch.dtype = torch.float32,
        memory: DataMemory = "auto",
        rank: int = 0,
        world_size: int = 1,
        backend: str = "auto",
    ) -> None:
        device = find_device(device)
        choice("memory", memory, get_args(DataMemory))
        if workers is None:
            # They share the cores with the network's threads, and a thread that waits at a barrier
            # for one that a worker has displaced spins: workers pay only where cores are idle.
            workers = 0 if device.type == "cuda" else min(cores() // 4, 16)
        _check_sizes(batch_size, workers)
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"dtype: {dtype} is neither torch.float32 nor torch.bfloat16")
        if device.type == "cpu" and backend not in ("auto", "eager"):
            raise InputError(
                f"backend: {backend!r} needs a CUDA device; on a CPU it must be auto or eager"
            )
        policy = named_policy(policy) if isinstance(policy, str) else policy
        self.source = _packed(source)
        """The images that can be read; `Batch.index` counts these."""
        self.batch_size = batch_size
        self.policy = with_statistics(policy, self.source)
        """The views, with the numbers by which they are normalised."""
        self._schedule = Schedule(
            self.source,
            self.policy,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        self.feed: DeviceFeed | None = None
        """Makes the batches on a CUDA device; None on a CPU."""
        self._side: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.feed = DeviceFeed(
                self._schedule, device, dtype=dtype, memory=memory, backend=backend
            )
            self._side = torch.cuda.Stream(device)
            self.feed.record_stream(self._side)  # an epoch may be left with a batch on its way
        self.steps_per_epoch = self._schedule.steps_per_epoch
        """Batches in an epoch; the images left over come in other epochs."""
        self.workers = workers
        self._dtype = dtype
        self._workers: Workers | None = None
        self._next_epoch = 0
        self._runs = 0

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __repr__(self) -> str:
        steps = f"{counted(self.steps_per_epoch, 'batch', 'batches')} an epoch"
        return f"MultiViewLoader({self.source!r}, batch_size={self.batch_size}, {steps})"

    def __iter__(self) -> Iterator[Batch]:
        """Return the batches of the next epoch: of epoch 0 the first time, then of epoch 1."""
        self._next_epoch += 1
        return self.epoch(self._next_epoch - 1)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Return the batches of an epoch, from step `start` on (to resume).

        One epoch is read at a time: the first batch of a second iterator ends the first iterator.

        Raises:
            InputError: numbers out of range.
            TrainingError: while iterating, if a worker process died.
        """
        require("epoch", epoch, epoch >= 0, "at least 0")
        steps = self.steps_per_epoch
        require(
            "start", start, 0 <= start <= steps, f"between 0 and {steps}, the steps of an epoch"
        )
        return self._run(epoch, start)

    def _run(self, epoch: int, start: int) -> Iterator[Batch]:
        self._runs += 1
        run = self._runs
        read = self._from_workers if self.feed is None else self._from_device
        try:
            for batch in read(epoch, start):
                yield batch
                if run != self._runs:
                    break
        except (Exception, KeyboardInterrupt):
            self.close()
            raise
        if run != self._runs:
            raise RuntimeError(
                "this epoch's iterator ended when another one was started on the same loader"
            )

    def _from_workers(self, epoch: int, start: int) -> Iterator[Batch]:
        if self._workers is None:
            make = functools.partial(_make_views, self._schedule, self._dtype)
            self._workers = Workers(make, self.workers)
        steps = ((epoch, step) for step in range(start, self.steps_per_epoch))
        for views, index in self._workers.results(steps):
            sizes = (torch.from_numpy(x).view(self._dtype).permute(0, 1, 4, 2, 3) for x in views)
            yield Batch([view for each in sizes for view in each], torch.from_numpy(index))

    def _from_device(self, epoch: int, start: int) -> Iterator[Batch]:
        feed, side = self.feed, self._side
        assert feed is not None
        assert side is not None
        with torch.cuda.stream(side):
            counter = torch.zeros((), dtype=torch.int64, device=feed.device)

        def prepare(step: int) -> tuple[Batch, torch.cuda.Event]:
            # Begins after the caller's previous step: no more than two batches are in memory.
            side.wait_stream(torch.cuda.current_stream(feed.device))
            with torch.cuda.stream(side):
                feed.load(step)
                counter.fill_(step)
                return feed.make(counter), side.record_event()

        first, end = epoch * self.steps_per_epoch + start, (epoch + 1) * self.steps_per_epoch
        ahead = prepare(first) if first < end else None
        for step in range(first, end):
            assert ahead is not None
            batch, made = ahead
            current = torch.cuda.current_stream(feed.device)
            ahead = prepare(step + 1) if step + 1 < end else None
            current.wait_event(made)
            for tensor in (*batch.views, batch.index):
                tensor.record_stream(current)  # its memory was allocated for the other stream
            yield batch

    def close(self) -> None:
        """End the workers and threads. Another epoch would start new ones."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        if self.feed is not None:
            self.feed.close()


def eval_loader(
    source: ImageSource,
    size: int,
    batch_size: int,
    workers: int,
    constants: Constants = IMAGENET,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return batches of all images in order: images (B, C, size, size) float32 in channels_last,
    with which convolutions are faster, and labels (B,) int64.

    The last batch may be smaller; labels are -1 if the source has none. `constants` are mean and
    standard deviation of the C channels.

    Raises:
        InputError: numbers out of range; while iterating, an image that cannot be read.
    """
    channels, fits = source.decode.channels, len(constants[0])
    require("channels", channels, channels == fits, f"{fits} in {source.name}, as the run's")
    finish = normalised(constants)
    return (
        (finish(torch.from_numpy(x).permute(0, 3, 1, 2)), torch.from_numpy(y))
        for x, y in eval_pixels(source, size, batch_size, workers)
    )


def eval_pixels(
    source: ImageSource, size: int, batch_size: int, workers: int
) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
    """Batches of `eval_loader` before normalisation, (B, size, size, C), and their labels."""
    _check_sizes(batch_size, workers)
    require("size", size, size >= 1, "at least 1")
    count = len(source)
    ranges = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    read = functools.partial(_read_squares, source, eval_square(size))
    return results(read, ranges, workers)


def _packed(source: ImageSource | Dataset[Any]) -> PackedImages:
    if isinstance(source, PackedImages):
        return source
    images, _ = cached(as_source(source))
    for text in images.warnings:
        warnings.warn(text, ImageWarning, stacklevel=3)
    return images


def _check_sizes(batch_size: int, workers: int) -> None:
    require("batch_size", batch_size, batch_size >= 1, "at least 1")
    require("workers", workers, workers >= 0, "at least 0")


def _make_views(
    schedule: Schedule, dtype: torch.dtype, epoch_and_step: tuple[int, int]
) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
    """Bytes of the global views (2, B, h, w, C), of the local ones if any, and the images (B,)."""
    epoch, step = epoch_and_step
    samples = schedule.samples(epoch, step, step + 1)[0]
    images, policy = schedule.images, schedule.policy
    table = schedule.table(epoch, samples)
    add_offsets(table, images.offsets[samples])
    pixels, rows = byte_tensor(images.pixels), torch.from_numpy(table)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operations on single views are too short to share
    try:
        make = functools.partial(eager_augment, dtype=dtype, layout=schedule.layout)
        views = [make(pixels, rows[:GLOBAL_VIEWS], policy.size)]
        if policy.local_views:
            views.append(make(pixels, rows[GLOBAL_VIEWS:], policy.local_size))
    finally:
        torch.set_num_threads(threads)
    # As bytes, since numpy has no bfloat16, and in the order that they have in memory.
    content = [each.permute(0, 1, 3, 4, 2).view(torch.uint8).numpy() for each in views]
    return content, samples.copy()


def _read_squares(
    source: ImageSource, square: Callable[[Image.Image | Pixels], Any], indices: range
) -> tuple[Pixels, NDArray[np.int64]]:
    """Squares (B, size, size, C) and labels (B,) of a range of images."""
    images = np.stack([np.asarray(square(source.content(index))) for index in indices])
    if source.labels is None:
        return images, np.full(len(indices), -1)
    return images, source.labels[indices.start : indices.stop].copy()
