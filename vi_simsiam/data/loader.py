"""Batches of random views for training, and batches in order for evaluation.

On a CPU worker processes prepare the views, on a GPU the device itself does (see `data.device`); either way a batch is
the same function of (seed, epoch, step), see `data.batches`.

Workers hand over numpy arrays, which go through a pipe. Tensors would need shared memory, of which containers have little,
and sockets in the temporary folder, whose path may be too long; a worker that lacks either waits for ever.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from vi_simsiam.config import AugmentConfig, DataMemory
from vi_simsiam.config import policy as named_policy
from vi_simsiam.data.batches import Batch, Schedule
from vi_simsiam.data.cache import cached
from vi_simsiam.data.decoding import (
    PATIENCE,
    check_processes,
    cores,
    interrupts_blocked,
    kill,
    no_answer,
    no_processes,
)
from vi_simsiam.data.device import DeviceFeed, byte_tensor, check_memory, find_device
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ImageSource, as_source
from vi_simsiam.data.views import GLOBAL_VIEWS, eval_square, normalised, place
from vi_simsiam.errors import ImageWarning, InputError, TrainingError
from vi_simsiam.ops.augment import eager_augment
from vi_simsiam.text import counted


class MultiViewLoader:
    """Batches of `GLOBAL_VIEWS` global views and `policy.local_views` local ones per image, for any training loop.

    Iterating over it gives one epoch after the other; `epoch` gives a certain one, from any step on. What a batch holds
    is a function of (seed, epoch, step) alone, whatever the device, memory and workers. torch's and numpy's global
    generators are neither used nor changed.

    On a CPU, workers are started by the first epoch and kept until `close`, an error, or the end of this object;
    `workers=0` prepares batches in the calling process. On a CUDA device the batches are made there, one ahead, on a
    stream of its own; see `DeviceFeed`.

    Args:
        source: images. They are decoded once: files into the cache, anything else into memory, unless they are
            `PackedImages` already. A file that cannot be read is left out, with a warning.
        policy: the views, or the name of a policy in `config.POLICIES`.
        batch_size: images in the batch of all ranks together.
        device: where the batches are: "cpu", "cuda" or "cuda:N".
        seed: key of the order and of every view.
        workers: processes that prepare views on a CPU; None for `default_workers`. A GPU needs none.
        dtype: of the views: float32 or bfloat16.
        memory: where the images are with a GPU: "gpu", "host", or "auto": on the GPU if they fit well.
        rank: this process among `world_size`; it gets rows [rank * B / N, (rank + 1) * B / N) of each batch.
        world_size: processes that share a batch.
        backend: how views are made on a GPU: "auto", "eager" or "triton".

    Raises:
        InputError: a batch larger than the source, numbers out of range, or images that cannot be used or do not fit.
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
        check_memory(memory)
        _check_sizes(batch_size, 0 if workers is None else workers)
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"dtype: {dtype} is neither torch.float32 nor torch.bfloat16")
        if device.type == "cpu" and backend not in ("auto", "eager"):
            raise InputError(
                f"backend: {backend!r} needs a CUDA device; on a CPU it must be auto or eager"
            )
        policy = named_policy(policy) if isinstance(policy, str) else policy
        images = _packed(source)
        self.source = images
        """The images that can be read; `Batch.index` counts these."""
        self.batch_size = batch_size
        self.feed: DeviceFeed | None = None
        """Makes the batches on a CUDA device; None on a CPU."""
        if device.type == "cuda":
            self.feed = DeviceFeed(
                images,
                policy,
                batch_size=batch_size,
                seed=seed,
                device=device,
                dtype=dtype,
                memory=memory,
                rank=rank,
                world_size=world_size,
                backend=backend,
            )
            schedule = self.feed.schedule
        else:
            schedule = Schedule(
                images, policy, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size
            )
        self.steps_per_epoch = schedule.steps_per_epoch
        """Batches in an epoch; the images left over come in other epochs."""
        if workers is None:
            workers = 0 if self.feed else default_workers()
        self.workers = workers
        self._steps = _EpochSteps(schedule)
        self._dataset = _ViewBatches(schedule, dtype)
        self._loader: DataLoader[Any] | None = None
        self._side = torch.cuda.Stream(device) if self.feed else None
        if self.feed is not None and self._side is not None:
            self.feed.record_stream(self._side)  # an epoch may be left with a batch on its way
        self._next_epoch = 0
        self._runs = 0

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __repr__(self) -> str:
        steps = f"{counted(self.steps_per_epoch, 'batch', 'batches')} an epoch"
        return f"MultiViewLoader({self.source!r}, batch_size={self.batch_size}, {steps})"

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the next epoch: of epoch 0 the first time, then of epoch 1, and so on."""
        self._next_epoch += 1
        return self.epoch(self._next_epoch - 1)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Return the batches of an epoch, from step `start` on (to resume).

        One epoch is read at a time: asking a second iterator for a batch ends the first. Raises InputError for numbers
        out of range, and TrainingError while iterating if a worker process died.
        """
        if epoch < 0:
            raise InputError(f"epoch: {epoch} must be at least 0")
        if not 0 <= start <= self.steps_per_epoch:
            raise InputError(
                f"start: {start} must lie between 0 and {self.steps_per_epoch}, the steps of an epoch"
            )
        return self._run(epoch, start)

    def _run(self, epoch: int, start: int) -> Iterator[Batch]:
        self._runs += 1
        run = self._runs
        batches = (
            self._from_workers(epoch, start)
            if self.feed is None
            else self._from_device(epoch, start, self.feed)
        )
        try:
            for batch in batches:
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
        self._steps.epoch, self._steps.start = epoch, start
        if self._loader is None:
            self._loader = _data_loader(self._dataset, self._steps, self.workers, keep=True)
        for views, index in _batches(self._loader):
            sizes = (
                torch.from_numpy(x).view(self._dataset.dtype).permute(0, 1, 4, 2, 3) for x in views
            )
            yield Batch(
                [view for same_size in sizes for view in same_size.unbind(0)],
                torch.from_numpy(index),
            )

    def _from_device(self, epoch: int, start: int, feed: DeviceFeed) -> Iterator[Batch]:
        side = self._side
        assert side is not None
        with torch.cuda.stream(side):
            counter = torch.zeros((), dtype=torch.int64, device=feed.device)

        def prepare(step: int) -> tuple[Batch, torch.cuda.Event]:
            # Begins when the caller's step before the one at hand has ended: no more than two batches are in memory.
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
        self._loader = None
        if self.feed is not None:
            self.feed.close()


def default_workers() -> int:
    """Processes that prepare views for a network on a CPU: one for every four cores, at most 16; none below four.

    They take turns with the network's threads on the cores, and a thread that waits at one of its barriers for another
    that a worker has displaced spins: workers pay only where the network leaves cores idle.
    """
    return min(cores() // 4, 16)


def _packed(source: ImageSource | Dataset[Any]) -> PackedImages:
    if isinstance(source, PackedImages):
        return source
    images, _ = cached(as_source(source))
    for text in images.warnings:
        warnings.warn(text, ImageWarning, stacklevel=3)
    return images


@dataclass(frozen=True)
class _Failure:
    """What a worker gives in place of a batch that it cannot read: raised there, it would come with a traceback."""

    message: str


class _EpochSteps(Sampler[tuple[int, NDArray[np.int64]]]):
    """The steps of an epoch as (epoch, images of the batch). Persistent workers learn the epoch from these."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.schedule.steps_per_epoch - self.start

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for samples in self.schedule.samples(self.epoch, self.start, self.schedule.steps_per_epoch):
            yield self.epoch, samples


class _ViewBatches(Dataset[tuple[list[NDArray[np.uint8]], NDArray[np.int64]]]):
    """Maps (epoch, images) to the bytes of the global views (2, B, h, w, 3), those of local ones if there are any, and the images."""

    def __init__(self, schedule: Schedule, dtype: torch.dtype) -> None:
        self.schedule, self.dtype = schedule, dtype

    def __getitem__(
        self, key: tuple[int, NDArray[np.int64]]
    ) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
        epoch, samples = key
        images, policy = self.schedule.images, self.schedule.policy
        table = self.schedule.table(epoch, samples)
        place(table, images.offsets[samples])
        pixels, rows = byte_tensor(images.pixels), torch.from_numpy(table)
        with _one_thread():
            views = [eager_augment(pixels, rows[:GLOBAL_VIEWS], policy.size, self.dtype)]
            if policy.local_views:
                views.append(
                    eager_augment(pixels, rows[GLOBAL_VIEWS:], policy.local_size, self.dtype)
                )
        # As bytes, since numpy has no bfloat16, and in the order that they have in memory.
        return [
            each.permute(0, 1, 3, 4, 2).view(torch.uint8).numpy() for each in views
        ], samples.copy()


class _OrderedImages(Dataset[tuple[NDArray[np.uint8], NDArray[np.int64]] | _Failure]):
    """Maps a range of images to their squares (B, size, size, 3) and labels (B,)."""

    def __init__(self, source: ImageSource, square: v2.Compose) -> None:
        self.source, self.square = source, square

    def __getitem__(self, key: range) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | _Failure:
        try:
            images = np.stack([np.asarray(self.square(self.source.image(index))) for index in key])
        except InputError as error:
            return _Failure(str(error))
        labels = self.source.labels
        return images, np.full(len(key), -1) if labels is None else labels[
            key.start : key.stop
        ].copy()


class _Ranges(Sampler[range]):
    """Consecutive ranges of at most `batch_size` that cover range(count)."""

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, batch_size

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[range]:
        for start in range(0, self.count, self.batch_size):
            yield range(start, min(start + self.batch_size, self.count))


def eval_loader(
    source: ImageSource, size: int, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return batches of all images in order: images (B, 3, size, size) float32, labels (B,) int64.

    The last batch may be smaller; labels are -1 if the source has none. Raises InputError for numbers out of range, and
    while iterating if an image cannot be read, naming it.
    """
    finish = normalised()
    return (
        (finish(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()), torch.from_numpy(y))
        for x, y in eval_pixels(source, size, batch_size, workers)
    )


def eval_pixels(
    source: ImageSource, size: int, batch_size: int, workers: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Return the batches of `eval_loader` before normalisation, (B, size, size, 3) uint8, and their labels."""
    _check_sizes(batch_size, workers)
    if size < 1:
        raise InputError(f"size: {size} must be at least 1")
    steps = _Ranges(len(source), batch_size)
    return _batches(
        _data_loader(_OrderedImages(source, eval_square(size)), steps, workers, keep=False)
    )


def _check_sizes(batch_size: int, workers: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size} must be at least 1")
    if workers < 0:
        raise InputError(f"workers: {workers} must be at least 0")


def _data_loader(
    dataset: Dataset[Any], steps: Sampler[Any], workers: int, keep: bool
) -> DataLoader[Any]:
    # The dataset makes whole batches, hence batch_size=None. The generator of its own keeps DataLoader from drawing
    # its base seed from torch's global one.
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
        timeout=PATIENCE if workers else 0,
        persistent_workers=keep and workers > 0,
    )


def _batches(loader: DataLoader[Any]) -> Iterator[Any]:
    deaths = _Deaths(loader.num_workers)
    if loader.num_workers:
        check_processes()  # torch prints a traceback of its own where it fails half-way
    try:
        with interrupts_blocked() if loader.num_workers else contextlib.nullcontext():
            batches = deaths.told(iter, loader)
    except OSError as error:
        raise no_processes(error) from error
    try:
        with deaths:
            while True:
                batch = deaths.told(next, batches, None)
                if batch is None:
                    return
                if isinstance(batch, _Failure):
                    raise InputError(batch.message)
                yield batch
    finally:
        # A traceback keeps this frame. Workers end at once when the last reference goes, but if it goes in a garbage
        # collection their queues are closed before they hear of it, and they are waited for in vain, 5 seconds each.
        del batches, loader


class _Deaths:
    """Keeps the death of a worker until somebody waits for a batch, and says it in one line then.

    torch's handler of SIGCHLD raises an exception wherever the program happens to be: in the caller's optimiser, or in
    the middle of a checkpoint.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._keeping = False
        self._death: RuntimeError | None = None
        self._former: Any = None

    def __enter__(self) -> _Deaths:
        if (
            self._workers
            and hasattr(signal, "SIGCHLD")
            and callable(former := signal.getsignal(signal.SIGCHLD))
        ):
            with contextlib.suppress(
                ValueError
            ):  # only the main thread sets handlers, and gets signals
                self._former = former
                signal.signal(signal.SIGCHLD, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._keeping = False  # another handler may call this one from now on
        if self._former is not None and signal.getsignal(signal.SIGCHLD) == self._handle:
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGCHLD, self._former)

    def told(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that raises a TrainingError if a worker dies or has died; keep deaths from then on."""
        self._keeping = False
        try:
            if self._death is not None:
                raise self._death
            result = function(*arguments)
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            if "timed out" in str(error):
                self._keeping = True  # of those killed now
                kill(getattr(arguments[0], "_workers", ()))
                raise no_answer("workers") from error
            reason = " ".join(str(error).split())
        else:
            self._keeping = True
            return result
        finally:
            del arguments  # for the reason given in `_batches`
        # Raised here because torch's exception holds on to the other workers' queues, too.
        raise TrainingError(
            f"workers: a process that prepares images has ended ({reason}); "
            "it may have run out of memory, and fewer workers need less"
        )

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        try:
            self._former(number, frame)
        except RuntimeError as error:
            if not self._keeping:
                raise
            self._death = error


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; the one that trains decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _report_unless_disconnected
    torch.set_num_threads(1)


def _report_unless_disconnected(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    # A process interrupted while it fetches a tensor hangs up on the worker's thread that hands tensors over; the
    # worker is well and goes on.
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: its operations on single views are so short that others would only wait, spinning."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
