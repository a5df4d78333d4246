"""Batches of random views for training, and batches in order for evaluation, prepared by worker processes.

What a batch holds is a function of (seed, epoch, step) alone: the order of an epoch and every view are keyed, so the
number of workers and the place where a run was resumed change nothing, bit for bit.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.data.views import RandomView, eval_view, view_seed
from vi_simsiam.errors import InputError

GLOBAL_VIEWS = 2


@dataclass(frozen=True)
class Batch:
    """Views of a batch of images and the images' places in the source."""

    views: list[Tensor]
    """Per view (B, 3, h, w) float32, normalised: the two global views, then the local ones."""
    index: Tensor
    """(B,) int64."""

    def pin_memory(self) -> Batch:
        """Return a copy in page-locked memory; DataLoader calls this."""
        return Batch([view.pin_memory() for view in self.views], self.index.pin_memory())


@dataclass(frozen=True)
class _Failure:
    """What a worker gives in place of a batch that it cannot read: raised there, it would come with a traceback."""

    message: str


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the permutation of range(count) that an epoch goes through, (count,) int64, keyed by (seed, epoch)."""
    # Sorting raw generator output: numpy promises that to be the same in every release, unlike `permutation`.
    keys = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64)


class _EpochSteps(Sampler[tuple[int, NDArray[np.int64]]]):
    """The steps of an epoch as (epoch, indices of the batch). Persistent workers learn the epoch from these."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.count // self.batch_size - self.start

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        order = epoch_order(self.seed, self.epoch, self.count)
        for step in range(self.start, self.count // self.batch_size):
            yield self.epoch, order[step * self.batch_size : (step + 1) * self.batch_size]


class _ViewBatches(Dataset[Batch | _Failure]):
    """Maps (epoch, indices) to a batch of views."""

    def __init__(self, source: ImageSource, augment: AugmentConfig, seed: int) -> None:
        self.source = source
        self.seed = seed
        self.views = [RandomView(augment, augment.size, augment.crop_scale)] * GLOBAL_VIEWS
        self.views += [RandomView(augment, augment.local_size, augment.local_scale)] * augment.local_views

    def __getitem__(self, key: tuple[int, NDArray[np.int64]]) -> Batch | _Failure:
        epoch, indices = key
        rows: list[list[Tensor]] = [[] for _ in self.views]
        for index in indices.tolist():
            try:
                image = self.source.image(index)
            except InputError as error:
                return _Failure(str(error))
            for number, view in enumerate(self.views):
                rows[number].append(view(image, view_seed(self.seed, epoch, index, number)))
        return Batch([torch.stack(row) for row in rows], torch.from_numpy(indices.copy()))


class MultiViewLoader:
    """Endless supply of training batches: `GLOBAL_VIEWS` global views and `augment.local_views` local ones per image.

    Workers are started by the first epoch and kept until `close`, an error, or the end of this object. `workers=0`
    prepares batches in the calling process, with the same result. torch's and numpy's global generators are neither used nor changed. Raises InputError for a batch larger
    than the source, or numbers out of range.
    """

    def __init__(
        self,
        source: ImageSource,
        augment: AugmentConfig,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        _check_sizes(batch_size, workers)
        if batch_size > len(source):
            raise InputError(f"batch_size: {batch_size} must be at most {len(source)}, the images in {source.name}")
        if seed < 0:
            raise InputError(f"seed: {seed} must be at least 0")
        self.source = source
        self.batch_size = batch_size
        self.steps_per_epoch = len(source) // batch_size
        """Batches in an epoch; the images left over come in other epochs."""
        self._steps = _EpochSteps(len(source), batch_size, seed)
        self._dataset = _ViewBatches(source, augment, seed)
        self._workers = workers
        self._pin_memory = pin_memory
        self._loader: DataLoader[Any] | None = None
        self._runs = 0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Return the batches of an epoch, from step `start` on (to resume).

        One epoch is read at a time: asking a second iterator for a batch ends the first. Raises InputError for numbers
        out of range, and while iterating if an image cannot be read, naming it.
        """
        if epoch < 0:
            raise InputError(f"epoch: {epoch} must be at least 0")
        if not 0 <= start <= self.steps_per_epoch:
            raise InputError(f"start: {start} must lie between 0 and {self.steps_per_epoch}, the steps of an epoch")
        return self._run(epoch, start)

    def _run(self, epoch: int, start: int) -> Iterator[Batch]:
        self._steps.epoch, self._steps.start = epoch, start
        self._runs += 1
        run = self._runs
        if self._loader is None:
            self._loader = _data_loader(self._dataset, self._steps, self._workers, self._pin_memory, keep=True)
        try:
            for batch in _batches(self._loader):
                yield batch
                if run != self._runs:
                    break
        except (Exception, KeyboardInterrupt):
            self.close()
            raise
        if run != self._runs:
            raise RuntimeError("this epoch's iterator ended when another one was started on the same loader")

    def close(self) -> None:
        """End the workers. Another epoch would start new ones."""
        self._loader = None


class _OrderedImages(Dataset[tuple[Tensor, Tensor] | _Failure]):
    """Maps a range of images to (images, labels)."""

    def __init__(self, source: ImageSource, size: int) -> None:
        self.source = source
        self.view = eval_view(size)

    def __getitem__(self, key: range) -> tuple[Tensor, Tensor] | _Failure:
        try:
            images = torch.stack([self.view(self.source.image(index)) for index in key])
        except InputError as error:
            return _Failure(str(error))
        labels = self.source.labels
        if labels is None:
            return images, torch.full((len(key),), -1)
        return images, torch.from_numpy(labels[key.start : key.stop].copy())


class _Ranges(Sampler[range]):
    """Consecutive ranges of at most `batch_size` that cover range(count)."""

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, batch_size

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[range]:
        for start in range(0, self.count, self.batch_size):
            yield range(start, min(start + self.batch_size, self.count))


def eval_loader(source: ImageSource, size: int, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return batches of all images in order: images (B, 3, size, size) float32, labels (B,) int64.

    The last batch may be smaller; labels are -1 if the source has none. Raises InputError for numbers out of range, and
    while iterating if an image cannot be read, naming it.
    """
    _check_sizes(batch_size, workers)
    if size < 1:
        raise InputError(f"size: {size} must be at least 1")
    steps = _Ranges(len(source), batch_size)
    return _batches(_data_loader(_OrderedImages(source, size), steps, workers, pin_memory=False, keep=False))


def _check_sizes(batch_size: int, workers: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size} must be at least 1")
    if workers < 0:
        raise InputError(f"workers: {workers} must be at least 0")


def _data_loader(
    dataset: Dataset[Any], steps: Sampler[Any], workers: int, pin_memory: bool, keep: bool
) -> DataLoader[Any]:
    # The dataset makes whole batches, hence batch_size=None. The generator of its own keeps DataLoader from drawing
    # its base seed from torch's global one.
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
        persistent_workers=keep and workers > 0,
    )


def _batches(loader: DataLoader[Any]) -> Iterator[Any]:
    with _interrupts_blocked() if loader.num_workers else contextlib.nullcontext():
        batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, _Failure):
                raise InputError(batch.message)
            yield batch
    finally:
        # A traceback keeps this frame. Workers end at once when the last reference goes, but if it goes in a garbage
        # collection their queues are closed before they hear of it, and they are waited for in vain, 5 seconds each.
        del batches, loader


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
def _interrupts_blocked() -> Iterator[None]:
    """Keep SIGINT from workers until they ignore it: they inherit the mask of the thread that starts them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
