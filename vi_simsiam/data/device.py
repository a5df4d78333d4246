"""Batches made on the GPU from image bytes and table rows that arrive ahead of the step.

`load` is the host's part of a step, `make` the device's. `make` reads buffers that keep their
addresses and finds its row by a counter on the device, so that a CUDA graph of a training step can
contain it. Only the fused kernel does all of that on the device: views of other images than 8-bit
RGB are made by torch's operations, one image at a time.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vi_simsiam.config import DataMemory
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.views import GLOBAL_VIEWS, Batch, Schedule, add_offsets
from vi_simsiam.data.workers import PATIENCE, no_answer
from vi_simsiam.errors import InputError
from vi_simsiam.ops.augment import TABLE_COLUMNS, Column, augment, is_fused
from vi_simsiam.text import counted

_SEGMENT_BYTES = 2**21
"""Table rows drawn at once: long arrays for numpy, but a short delay of the first step."""
_SLOTS = 4
"""Steps whose image bytes are on the device or on their way: the present step and three ahead."""
_GATHER_THREADS = 4


class DeviceFeed:
    """The batches of a `Schedule`, made on a device from data that is loaded ahead of time.

    Before step `step` (counted through all epochs) is launched, call `load(step)`; the step calls
    `make(counter)`, whose counter holds the same number on the device. Steps and loads go to one
    CUDA stream, each step after its load and before the next one's. Steps may start anywhere and
    jump; only jumps wait for the device.

    With memory "gpu" all images lie on the device. With "host" threads gather the bytes of a step's
    images in page-locked memory, which are copied while earlier steps compute. On a CPU everything
    works the same way, without streams.

    Args:
        schedule: the batches.
        device: device of the batches.
        dtype: of the views: float32 or bfloat16.
        memory: "gpu", "host", or "auto": "gpu" if the images take at most half of the device's
            free memory.
        backend: of `ops.augment.augment`.

    Raises:
        InputError: images that do not fit in the device's memory.
    """

    def __init__(
        self,
        schedule: Schedule,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        memory: DataMemory = "auto",
        backend: str = "auto",
    ) -> None:
        self.schedule = schedule
        self.images, self.policy = schedule.images, schedule.policy
        self.dtype, self.backend = dtype, backend
        self.steps_per_epoch = schedule.steps_per_epoch
        self.device = device
        self.fused = is_fused(backend, device.type, schedule.layout)
        """True if the fused kernel makes the views; otherwise `make` waits for the device."""
        self._transfers = Transfers(device)
        self.memory = self._choose_memory(memory)
        """Place of the images: "gpu" or "host"."""
        self.waited = 0.0
        """Seconds in which `load` waited for its threads while the device had run out of work.

        Waiting costs nothing while the GPU has work left, nor when `load` waits for the GPU."""
        self._pool: ThreadPoolExecutor | None = None
        self._next = -1

        self._slots: list[_Slot] = []
        if self.memory == "gpu":
            self._pixels = byte_tensor(self.images.pixels).to(device)
        else:
            self._pixels = self._make_slots()
        shape = (self.schedule.views, self.schedule.rows, TABLE_COLUMNS)
        steps = self._segment_steps = max(1, _SEGMENT_BYTES // (4 * math.prod(shape)))
        # Rows that name one pixel, for a counter that is ahead of what was loaded.
        self._ring = torch.zeros((2 * steps, *shape), dtype=torch.int32, device=self.device)
        self._ring[..., Column.STRIDE] = self.images.decode.pixel_bytes
        self._ring[..., Column.HEIGHT : Column.WIDTH + 1] = 1
        self._drawn_rows = self._transfers.pinned((2, steps, *shape), torch.int32)
        self._segment = -1
        self._drawn: Future[None] | None = None
        self._uploaded: Any = None
        # What was queued above is on this stream; loads and steps may come on another.
        self._transfers.settle(self._transfers.mark())
        if self._transfers.stream is not None:
            self.record_stream(self._transfers.stream)

    def load(self, step: int) -> None:
        """Queue the transfer of all data that step `step` needs, on the current stream.

        Raises:
            TrainingError: a disk does not answer.
        """
        try:
            if step != self._next:
                self._restart(step)
            self._load_table(step)
            if self._slots:
                self._load_pixels(step)
        except BaseException:
            self.close()
            raise
        self._next = step + 1

    def make(self, counter: Tensor) -> Batch:
        """Make this rank's share of the batch of a loaded step, on the device.

        With the fused kernel this only queues work on the device, and can be captured in a CUDA
        graph. `counter` is the step: () int64 on the device.
        """
        table = self._ring.index_select(0, counter.remainder(len(self._ring)).reshape(1))[0]
        views = self._augment(table[:GLOBAL_VIEWS], self.policy.size)
        if self.policy.local_views:
            views += self._augment(table[GLOBAL_VIEWS:], self.policy.local_size)
        return Batch(views, table[0, :, Column.SAMPLE].long())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep freed device memory until the work queued on `stream` by then has run.

        For streams that run loads or `make` and that nothing else waits for.
        """
        self._pixels.record_stream(stream)
        self._ring.record_stream(stream)

    def close(self) -> None:
        """End the threads once their work is done. Loading another step would start new ones."""
        self._next = -1
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _augment(self, table: Tensor, size: int) -> list[Tensor]:
        layout, backend = self.schedule.layout, self.backend
        views = augment(self._pixels, table, size, dtype=self.dtype, backend=backend, layout=layout)
        return list(views.unbind(0))

    def _choose_memory(self, memory: DataMemory) -> DataMemory:
        needed, free = len(self.images.pixels), self._transfers.free_memory()
        if memory == "auto":
            return "gpu" if needed <= free // 2 else "host"
        if memory == "gpu" and needed > free:
            raise InputError(
                f"memory: the images of {self.images.name} take {_gigabytes(needed)} and "
                f"{self.device} has {_gigabytes(free)} free; "
                'memory="host" (--data-memory host) streams them'
            )
        return memory

    def _make_slots(self) -> Tensor:
        """Allocate slots for `_SLOTS` steps on the host and on the device: (bytes,) uint8."""
        sizes = np.sort(_sizes(self.images, slice(None)))
        capacity = int(sizes[-self.schedule.rows :].sum())
        free = self._transfers.free_memory()
        if _SLOTS * capacity > free:
            raise InputError(
                f"batch_size: streaming the images of {self.images.name} in batches of "
                f"{self.schedule.rows} takes {_gigabytes(_SLOTS * capacity)} and {self.device} has "
                f"{_gigabytes(free)} free; a smaller batch fits"
            )
        host = self._transfers.pinned((_SLOTS, capacity), torch.uint8)
        pixels = torch.empty(_SLOTS * capacity, dtype=torch.uint8, device=self.device)
        self._slots = [_Slot(*pair) for pair in zip(host, pixels.split(capacity), strict=True)]
        return pixels

    def _restart(self, step: int) -> None:
        """Drop the steps that were prepared, and begin with `step`."""
        self.close()
        # Host memory that threads will write to is read by copies that may not have run yet.
        for event in (self._uploaded, *(slot.copied for slot in self._slots)):
            self._transfers.settle(event)
        launched = self._transfers.mark()
        for slot in self._slots:
            slot.step, slot.gathered, slot.copied, slot.read = -1, None, None, launched
        threads = 1 + _GATHER_THREADS if self._slots else 1
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vi-simsiam-feed")
        self._segment = -1
        self._drawn = self._pool.submit(self._draw, step // self._segment_steps)

    def _load_table(self, step: int) -> None:
        segment = step // self._segment_steps
        if segment == self._segment:
            return
        assert self._drawn is not None
        assert self._pool is not None
        self._await(self._drawn)
        half, steps = segment % 2, self._segment_steps
        rows = self._ring[half * steps : (half + 1) * steps]
        rows.copy_(self._drawn_rows[half], non_blocking=True)
        before, self._uploaded = self._uploaded, self._transfers.mark()
        # The rows to be drawn next take the place of those that the upload before this one reads.
        self._transfers.settle(before)
        self._segment = segment
        self._drawn = self._pool.submit(self._draw, segment + 1)

    def _await(self, job: Future[Any]) -> Any:
        """Return the result of a thread's job, and count the time if the device ran out of work."""
        waits, since = not job.done(), time.perf_counter()
        launched = self._transfers.mark() if waits else None
        try:
            result = job.result(PATIENCE)
        except TimeoutError as error:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None  # `close` would wait
            raise no_answer("data", threads=True) from error
        if waits and self._transfers.done(launched):
            self.waited += time.perf_counter() - since
        return result

    def _draw(self, segment: int) -> None:
        """Draw the table rows of a segment's steps into its half of the page-locked rows."""
        rows = self._drawn_rows[segment % 2].numpy()
        first, end = segment * self._segment_steps, (segment + 1) * self._segment_steps
        step = first
        while step < end:  # an epoch's part of the segment at a time
            epoch, start = divmod(step, self.steps_per_epoch)
            stop = min(self.steps_per_epoch, start + end - step)
            samples = self.schedule.samples(epoch, start, stop)
            table = self.schedule.table(epoch, samples.ravel())
            add_offsets(table, self._places(step, samples).ravel())
            by_step = table.reshape(len(table), *samples.shape, TABLE_COLUMNS).swapaxes(0, 1)
            rows[step - first : step - first + len(samples)] = by_step
            step += len(samples)

    def _places(self, step: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """First byte in `_pixels` of each image (steps, rows) of the steps from `step` on."""
        if not self._slots:
            return self.images.offsets[samples]
        sizes = _sizes(self.images, samples)
        slots = (step + np.arange(len(samples))) % _SLOTS
        return slots[:, None] * len(self._slots[0].host) + np.cumsum(sizes, axis=1) - sizes

    def _load_pixels(self, step: int) -> None:
        transfers, pool = self._transfers, self._pool
        assert pool is not None
        # Every step before this one has been launched, and reads its slot before this mark.
        self._slots[(step - 1) % _SLOTS].read = transfers.mark()
        for ahead in range(step, step + _SLOTS):
            slot = self._slots[ahead % _SLOTS]
            if slot.step == ahead:
                continue
            if ahead > step and not transfers.done(slot.copied):
                break
            transfers.settle(slot.copied)
            slot.step, slot.gathered = ahead, pool.submit(self._gather, ahead, slot.host)
        for ahead in range(step, step + _SLOTS):
            slot = self._slots[ahead % _SLOTS]
            if slot.step != ahead or slot.gathered is None:
                continue
            if ahead > step and not slot.gathered.done():
                continue
            count, slot.gathered = self._await(slot.gathered), None
            slot.copied = transfers.copy(slot.device[:count], slot.host[:count], after=slot.read)
        transfers.wait(self._slots[step % _SLOTS].copied)

    def _gather(self, step: int, into: Tensor) -> int:
        """Copy the bytes of a step's images one after the other; return how many they are."""
        epoch, start = divmod(step, self.steps_per_epoch)
        samples = self.schedule.samples(epoch, start, start + 1)[0]
        buffer, pixels, count = into.numpy(), self.images.pixels, 0
        sizes = _sizes(self.images, samples).tolist()
        for first, size in zip(self.images.offsets[samples].tolist(), sizes, strict=True):
            buffer[count : count + size] = pixels[first : first + size]
            count += size
        return count


class Transfers:
    """Page-locked memory and ordered asynchronous copies; on a CPU copies are immediate."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.stream = torch.cuda.Stream(device) if self.cuda else None

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate host memory that the device can read by itself, not initialised."""
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=self.cuda)

    def free_memory(self) -> int:
        """Return the bytes that can be allocated on a GPU; a CPU has no limit here."""
        return torch.cuda.mem_get_info(self.device)[0] if self.cuda else sys.maxsize

    def mark(self) -> Any:
        """Record an event after the work queued on the current stream so far."""
        return torch.cuda.current_stream(self.device).record_event() if self.cuda else None

    def copy(self, to: Tensor, given: Tensor, after: Any) -> Any:
        """Copy beside the current stream, after the event `after`; return the event of its end."""
        if self.stream is None:
            to.copy_(given)
            return None
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            to.copy_(given, non_blocking=True)
        return self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Make the current stream wait for the event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def settle(self, event: Any) -> None:
        """Block until the event has happened."""
        if event is not None:
            event.synchronize()

    def done(self, event: Any) -> bool:
        """Return True if the event has happened."""
        return event is None or bool(event.query())


@dataclass
class _Slot:
    """Memory for the bytes of one step's images, on the host and on the device."""

    host: Tensor
    device: Tensor
    step: int = -1
    """The step whose bytes it holds or is being filled with."""
    gathered: Future[int] | None = None
    """Bytes that a thread has filled in; None once the copy to the device has been queued."""
    copied: Any = None
    """Event: the copy to the device is complete."""
    read: Any = None
    """Event: the previous step that used the slot has read it."""


def find_device(name: torch.device | str) -> torch.device:
    """Return the CPU or a CUDA device with its number. Raises InputError if it does not exist."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: {str(name)!r} is none of cpu, cuda, cuda:N")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        found = counted(count, "CUDA device")
        raise InputError(f"device: {str(name)!r} is not here ({found} found)")
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def byte_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """Return the bytes as a tensor (bytes,) uint8 that shares their memory; do not write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(pixels)


def _sizes(images: PackedImages, samples: NDArray[np.int64] | slice) -> NDArray[np.int64]:
    """Bytes of images: int64, of the shape of `samples`."""
    areas: NDArray[np.int64] = images.heights[samples].astype(np.int64) * images.widths[samples]
    return areas * images.decode.pixel_bytes


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
