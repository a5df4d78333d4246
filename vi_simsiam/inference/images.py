"""Images of any kind as a source, read a bounded number at a time, ahead of the network."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vi_simsiam.config import DecodeConfig
from vi_simsiam.data.channels import Pixels
from vi_simsiam.data.files import find_images
from vi_simsiam.data.items import DatasetSource, as_source
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.pixels import Loss, is_animated, loss_lines, losses
from vi_simsiam.data.sources import (
    ArraySource,
    FileSource,
    ImageSource,
    Unreadable,
    UnreadableError,
    close_kept,
)
from vi_simsiam.data.workers import PATIENCE, no_answer
from vi_simsiam.errors import ImageWarning, InputError
from vi_simsiam.paths import user_path
from vi_simsiam.text import counted

_One = Image.Image | str | Path
Images = ImageSource | Dataset[Any] | Tensor | NDArray[np.uint8] | _One | Sequence[_One]
"""Accepted by `Encoder.encode`, see `open_images`; float tensors are views and are not read."""

_Read = tuple[Pixels, list[Loss]] | Unreadable
_CHUNKS_AHEAD = 2
_THREAD_SAFE = (FileSource, ArraySource, PackedImages)


class Chunk(NamedTuple):
    """Consecutive images of a source."""

    indices: list[int]
    """Numbers of the images in the source."""
    pixels: list[Pixels]
    """Result of `prepare` for each of them."""
    unreadable: list[Unreadable]
    """Images of the chunk that could not be read."""


def open_images(images: Images, decode: DecodeConfig | None = None) -> ImageSource:
    """Return images of any kind as a source; files are listed, not read.

    Args:
        images: an ImageSource, a map-style Dataset, a folder (every image in it and in the folders
            in it, sorted by name) or a single file, a PIL image, a sequence of PIL images and
            paths, a uint8 tensor (N, 3, H, W), or a uint8 array (N, H, W) or (N, H, W, 3);
            (N, H, 3) could be one image and is refused.
        decode: how files and PIL images become pixels, see `data.pixels`; None for the default. An
            ImageSource has its own. Of a PIL image the current frame is used, also where all frames
            of files are.

    Raises:
        InputError: none of these, no such file, or a folder without images.
    """
    if isinstance(images, ImageSource):
        return images
    if isinstance(images, (str, Path)):
        return _open_path(user_path("images", images), decode)
    if isinstance(images, Image.Image):
        return _Several([images], decode)
    if isinstance(images, np.ndarray):
        rgb = decode is None or decode.is_rgb
        if images.dtype != np.uint8 and (rgb or images.dtype != np.uint16):
            raise InputError(
                f"images: an array of {images.dtype} given; accepted are uint8 arrays (N, H, W, 3)"
            )
        if rgb and images.ndim == 3 and images.shape[2] == 3:
            raise InputError(
                f"images: an array of shape {images.shape} given, one RGB image or "
                f"{counted(len(images), 'gray one')} 3 pixels wide; accepted are uint8 arrays "
                "(N, H, W, 3): image[None] is that of one image"
            )
        if not rgb:
            return DatasetSource(images, "images", decode)  # type: ignore[arg-type]
        return ArraySource(images, name="images")
    if isinstance(images, Tensor):
        if decode is not None and not decode.is_rgb and not images.is_floating_point():
            return DatasetSource(images, "images", decode)  # type: ignore[arg-type]
        fits = images.ndim == 4 and images.shape[1] == 3 and 0 not in images.shape[2:]
        if images.dtype != torch.uint8 or not fits:
            raise InputError(
                f"images: a tensor of {images.dtype}, shape {tuple(images.shape)} given; accepted "
                "are uint8 (N, 3, H, W), float (N, 3, H, W) and float (N, V, 3, H, W)"
            )
        return DatasetSource(images, name="images")  # type: ignore[arg-type]
    if isinstance(images, (list, tuple)):
        return _Several(images, decode)
    if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        raise InputError(
            f"images: {type(images).__name__} given; accepted are an ImageSource, a map-style "
            "Dataset, a folder, a file, PIL images and paths (one or a list), and uint8 arrays and "
            "tensors"
        )
    return as_source(images, decode)  # type: ignore[arg-type]


def _open_path(path: Path, decode: DecodeConfig | None) -> ImageSource:
    name = os.fspath(path)
    if path.is_file():
        return FileSource([path], name=name, decode=decode)
    if not path.is_dir():
        raise InputError(f"images: {path} is not there; give a folder of images or an image")
    found = find_images(path, arrays=decode is not None and not decode.is_rgb)
    note = found.note()
    if not found.paths:
        message = f"images: {path} holds no image that Pillow opens."
        raise InputError(f"{message} {note}" if note else message)
    notes = [f"{path}: {note}"] if note else []
    return FileSource(found.paths, name=name, decode=decode, notes=notes)


class _Several(ImageSource):
    """PIL images and paths, in any mixture."""

    def __init__(self, images: Sequence[_One], decode: DecodeConfig | None) -> None:
        self.name, self.labels, self.classes = "images", None, None
        self.decode = decode or DecodeConfig()
        memory = DatasetSource(images, "images", decode)  # type: ignore[arg-type]
        self._places: list[tuple[ImageSource, int]] = []
        animated = 0
        for number, image in enumerate(images):
            if isinstance(image, (str, Path)):
                file = FileSource([user_path("images", image)], decode=self.decode)
                self._places += [(file, frame) for frame in range(len(file))]
            elif isinstance(image, Image.Image):
                self._places.append((memory, number))
                with contextlib.suppress(Exception):  # reading a damaged one names it
                    animated += self.decode.frames == "all" and is_animated(image)
            else:
                raise InputError(
                    f"images: item {number} is a {type(image).__name__}; accepted are PIL images "
                    "and paths"
                )
        if animated:
            self.notes = (
                f"images: {counted(animated, 'PIL image')} with several frames, of which the "
                "current one is used; a file's path gives all",
            )

    def __len__(self) -> int:
        return len(self._places)

    def image(self, index: int) -> Image.Image:
        source, place = self._places[index]
        return source.image(place)

    def array(self, index: int) -> Pixels:
        source, place = self._places[index]
        return source.array(place)

    def describe(self, index: int) -> str:
        source, place = self._places[index]
        return source.describe(place)


def read(
    source: ImageSource,
    prepare: Callable[[Image.Image | Pixels], Pixels],
    *,
    chunk: int,
    threads: int,
) -> Iterator[Chunk]:
    """Read all images in order in threads, at most two chunks ahead of the caller.

    Threads suffice because Pillow decodes and resizes without holding Python's lock, and unlike
    processes they need no copy of the source. A source whose own code may not be safe for several
    threads is read by one. An ImageWarning reports losses in decoding, once all images are read.

    Args:
        source: the images.
        prepare: called with `source.content` of each image; returns the array that is kept of it.
        chunk: images given at a time, at least 1.
        threads: number of reading threads, at least 1.

    Raises:
        InputError: an item of a Dataset is no image. Images that cannot be read are listed in their
            chunk instead.
        TrainingError: a thread does not answer.
    """
    lost: list[Loss] = []

    def one(index: int) -> _Read:
        try:
            image = source.content(index)
            lost = losses(image) if isinstance(image, Image.Image) else []
            return prepare(image), lost
        except UnreadableError as error:
            return error.entry
        except InputError:
            raise
        except (ValueError, OSError, MemoryError) as error:  # 1 x 100,000 pixels, say
            reason = " ".join(str(error).split()) or type(error).__name__
            return Unreadable(source.describe(index), reason)

    indices = iter(range(len(source)))
    jobs: SimpleQueue[tuple[int, Future[_Read]] | None] = SimpleQueue()
    pending: deque[Future[_Read]] = deque()
    readers = min(threads if isinstance(source, _THREAD_SAFE) else 1, len(source))
    for _ in range(readers):
        # The program would wait for an executor's threads when it ends, even for ever.
        Thread(target=_work, args=(one, jobs), name="images", daemon=True).start()

    def submit(count: int) -> None:
        for index in itertools.islice(indices, count):
            pending.append(Future())
            jobs.put((index, pending[-1]))

    try:
        submit(_CHUNKS_AHEAD * chunk)
        for start in range(0, len(source), chunk):
            found = Chunk([], [], [])
            for index in range(start, min(start + chunk, len(source))):
                result = pending.popleft().result(PATIENCE)
                submit(1)
                if isinstance(result, Unreadable):
                    found.unreadable.append(result)
                else:
                    found.indices.append(index)
                    found.pixels.append(result[0])
                    lost += result[1]
            yield found
        for line in loss_lines(source.name, lost):
            warnings.warn(line, ImageWarning, stacklevel=2)
    except TimeoutError as error:
        raise no_answer(source.name, threads=True) from error
    finally:
        for future in pending:
            future.cancel()
        for _ in range(readers):
            jobs.put(None)


def _work(one: Callable[[int], _Read], jobs: SimpleQueue[tuple[int, Future[_Read]] | None]) -> None:
    for index, future in iter(jobs.get, None):
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(one(index))
        except BaseException as error:  # raised by `Future.result`
            future.set_exception(error)
    close_kept()
