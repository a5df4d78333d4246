"""Decoding all images of a source in order, in processes, a bounded number of bytes at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from vi_simsiam.data.pixels import Losses
from vi_simsiam.data.sources import FileSource, ImageSource, Unreadable, UnreadableError
from vi_simsiam.errors import InputError, TrainingError

_SAMPLED = 64
_CHUNK_BYTES = 8 << 20
_CHUNK_IMAGES = 256
# So that places within one image fit in 32 bits.
_MOST_BYTES = 2**31 - 1
_SECONDS_TO_END = 5.0
PATIENCE = 600.0
"""Seconds that are waited for the next images of a process or thread, however slow the disk and large the batch."""


class Chunk(NamedTuple):
    """Consecutive images of a source, decoded."""

    pixels: bytes
    """Image after image, (height, width, 3) uint8."""
    sizes: list[tuple[int, int]]
    """Height and width of each image."""
    kept: list[int]
    """Which images of the source these are."""
    unreadable: list[Unreadable]
    """Those that could not be decoded."""
    losses: Losses
    """What the decoding of the others lost."""


def bytes_per_image(source: ImageSource, shorter_side: int | None = None) -> float:
    """Return the mean of decoded bytes over at most 64 images across the source, read from their headers."""
    sizes = [fitted(height, width, shorter_side) for height, width in _sampled(source)]
    return float(np.mean([3.0 * height * width for height, width in sizes])) if sizes else 0.0


def median_side(source: ImageSource) -> int | None:
    """Return the median of the shorter sides, in pixels, of the same images; None if none can be read."""
    sides = [min(size) for size in _sampled(source)]
    return int(np.median(sides)) if sides else None


def _sampled(source: ImageSource) -> list[tuple[int, int]]:
    """Height and width of at most 64 images across the source, without those that cannot be read."""
    sizes = []
    for index in np.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).astype(int).tolist():
        with contextlib.suppress(UnreadableError):
            sizes.append(source.dimensions(index))
    return sizes


def fitted(height: int, width: int, shorter_side: int | None) -> tuple[int, int]:
    """Return an image's size once its shorter side has at most `shorter_side` pixels, the aspect ratio being kept."""
    shorter = min(height, width)
    if shorter_side is None or shorter <= shorter_side:
        return height, width
    return round(height * shorter_side / shorter), round(width * shorter_side / shorter)


def decode(
    source: ImageSource,
    *,
    workers: int | None = None,
    shorter_side: int | None = None,
    mean_bytes: float = 0.0,
) -> Generator[Chunk, None, None]:
    """Decode all images in order.

    About 8 MiB times (workers + 2) are held at once, whatever the number of images.

    Args:
        source: the images. One that cannot be pickled (it holds an open file, say) is decoded in this process.
        workers: processes; None for one a CPU core that this process may use. 0 and 1 decode in this process.
        shorter_side: see `fitted`; None for images as they are.
        mean_bytes: about the bytes of one image, from `bytes_per_image`.

    Raises:
        InputError: `workers` is negative, or an item of a Dataset is no image.
        TrainingError: processes cannot be started, or one was killed or does not answer.
    """
    if workers is not None and workers < 0:
        raise InputError(f"workers: {workers} must be at least 0")
    step = int(np.clip(_CHUNK_BYTES / max(mean_bytes, 1.0), 1, _CHUNK_IMAGES))
    chunks = [range(start, min(start + step, len(source))) for start in range(0, len(source), step)]
    workers = min(cores() if workers is None else workers, len(chunks))
    if workers <= 1 or not _can_be_pickled(source):
        return (_decode(source, chunk, shorter_side) for chunk in chunks)
    return _decode_in_processes(source, chunks, workers, shorter_side)


def _decode_in_processes(
    source: ImageSource, chunks: list[range], workers: int, shorter_side: int | None
) -> Generator[Chunk, None, None]:
    pending: deque[Future[Chunk]] = deque()
    check_processes()
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(source, shorter_side))
    finished = False
    try:
        for chunk in chunks:
            with interrupts_blocked():  # submitting starts workers
                pending.append(_submit(pool, chunk))
            if len(pending) >= workers + 2:
                yield pending.popleft().result(PATIENCE)
        while pending:
            yield pending.popleft().result(PATIENCE)
        finished = True
    except TimeoutError as error:
        raise no_answer(source.name) from error
    except BrokenProcessPool as error:
        raise TrainingError(
            f"{source.name}: a process that decodes images was killed, most likely because memory ran out; use fewer "
            "workers"
        ) from error
    finally:
        if not finished:  # whoever leaves early does not wait for what is not wanted any more
            kill((pool._processes or {}).values())
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, chunk: range) -> Future[Chunk]:
    try:
        return pool.submit(_decode_in_worker, chunk)
    except OSError as error:
        raise no_processes(error) from error


def check_processes() -> None:
    """Raise TrainingError where there is no place for the semaphores of a queue between processes."""
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise no_processes(error) from error


def no_processes(error: OSError) -> TrainingError:
    """The error where this machine starts no processes, or has no shared memory for their semaphores."""
    reason = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    return TrainingError(
        f"workers: processes cannot be started here ({reason}; they need /dev/shm); --workers 0 works without them"
    )


def no_answer(place: str, *, threads: bool = False) -> TrainingError:
    """The error where processes live and give nothing, or threads."""
    if threads:
        return TrainingError(
            f"{place}: no images have come from the threads for {PATIENCE:.0f} s; a disk may not answer"
        )
    return TrainingError(
        f"{place}: no images have come from the workers for {PATIENCE:.0f} s; a disk may not answer, or a process be "
        "stopped; --workers 0 works without them"
    )


def kill(processes: Iterable[BaseProcess]) -> None:
    """End processes that do not answer, and might be waited for at the end of the program."""
    processes = list(processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join(_SECONDS_TO_END)


def _decode(source: ImageSource, chunk: range, shorter_side: int | None) -> Chunk:
    parts, sizes, kept, unreadable, losses = [], [], [], [], Losses()
    for index in chunk:
        try:
            image = source.image(index)
            height, width = fitted(image.height, image.width, shorter_side)
            if not 0 < 3 * height * width <= _MOST_BYTES:
                raise UnreadableError(source.describe(index), f"{width} x {height} pixels")
        except UnreadableError as error:
            unreadable.append(error.entry)
            continue
        losses.add(image)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        parts.append(image.tobytes())
        sizes.append((height, width))
        kept.append(index)
    return Chunk(b"".join(parts), sizes, kept, unreadable, losses)


def _can_be_pickled(source: ImageSource) -> bool:
    if isinstance(source, FileSource):
        return True
    try:
        pickle.Pickler(_Nowhere()).dump(source)
    except Exception:  # pickling runs the source's own code
        return False
    return True


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: bytes) -> int:
        return len(data)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# What a worker decodes, set when it starts: a source may be too large to send with every chunk.
_work: tuple[ImageSource, int | None]


def _start_worker(source: ImageSource, shorter_side: int | None) -> None:
    global _work
    _work = source, shorter_side
    # Ctrl-C reaches every process of a terminal; the one that asked decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that is killed cannot end its workers, which would wait for it forever.
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _decode_in_worker(chunk: range) -> Chunk:
    return _decode(_work[0], chunk, _work[1])


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Keep SIGINT from workers until they ignore it: they inherit the mask of the thread that starts them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
