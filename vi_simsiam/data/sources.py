"""Sources of images: arrays in memory, data sets, or files that are decoded on demand.

A source gives every image as 8-bit RGB, so nothing after it depends on file formats.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from vi_simsiam.config import DecodeConfig
from vi_simsiam.data.files import formats
from vi_simsiam.data.inside import Inside, byte_count, file_of, open_image
from vi_simsiam.data.pixels import count_frames, to_rgb, upright_size
from vi_simsiam.errors import InputError
from vi_simsiam.text import counted


class _Kept(threading.local):
    """The open file that a thread reads frame by frame: a frame is reached through all before."""

    def __init__(self) -> None:
        self.key: Any = None
        self.image: Any = None
        self.files = contextlib.ExitStack()


_kept = _Kept()


def close_kept() -> None:
    """Close the file that this thread has kept open, if any."""
    _kept.key = None
    _kept.files.close()


class Unreadable(NamedTuple):
    """A file that cannot be decoded, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


class UnreadableError(InputError):
    """An image cannot be decoded; `entry` holds its path and the reason."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.entry = Unreadable(path, reason)

    def __str__(self) -> str:
        return f"{self.entry.path}: cannot be read as an image ({self.entry.reason})"


class ImageSource(ABC):
    """A fixed sequence of RGB images, with labels or without."""

    name: str
    """Short name, such as "fashion-mini/train"."""
    labels: NDArray[np.int64] | None
    """Class of every image, (N,) int64 in [0, len(classes)); None without labels."""
    classes: tuple[str, ...] | None
    """Class names; None without labels."""
    decode = DecodeConfig()
    """Settings by which files become pixels."""
    notes: tuple[str, ...] = ()
    """Remarks for the user on how the images were found: sentences, without a full stop."""

    def __repr__(self) -> str:
        parts = [repr(self.name), counted(len(self), "image")]
        if self.classes is not None:
            parts.append(counted(len(self.classes), "class", "classes"))
        return f"{type(self).__name__}({', '.join(parts)})"

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Return image `index` in mode RGB. Raises UnreadableError if it cannot be read."""

    def describe(self, index: int) -> str:
        """Return the place of image `index`: a path, or NAME/INDEX, as "fashion-mini/train/17"."""
        return f"{self.name}/{index}"

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return height and width of image `index`. Raises UnreadableError if it is unreadable."""
        width, height = self.image(index).size
        return height, width

    def fingerprint(self) -> str | None:
        """Return a digest of images and labels; None if that takes reading all of them."""
        return None

    def _label(
        self, labels: NDArray[np.int64] | None, classes: Sequence[str] | None, count: int
    ) -> None:
        self.labels = self.classes = None
        if labels is None and classes is None:
            return
        if labels is None or classes is None:
            raise InputError("labels and classes: give both or neither")
        if labels.shape != (count,):
            raise InputError(f"labels: shape {labels.shape} must be ({count},), one for each image")
        if count and not 0 <= labels.min() <= labels.max() < len(classes):
            raise InputError(
                f"labels: values must lie in [0, {len(classes)}), one for each class name"
            )
        self.labels, self.classes = labels.astype(np.int64), tuple(classes)


class ArraySource(ImageSource):
    """Images in memory: uint8, (N, H, W) gray or (N, H, W, 3) RGB.

    `places` are the origins of the images, empty for NAME/INDEX.
    Raises TypeError for another dtype and InputError for another shape or labels that do not fit.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64] | None = None,
        classes: Sequence[str] | None = None,
        name: str = "array",
        places: Sequence[str] = (),
    ) -> None:
        if images.dtype != np.uint8:
            raise TypeError(f"images: dtype {images.dtype} must be uint8")
        shape = images.shape
        if not (len(shape) == 3 or shape[3:] == (3,)) or 0 in shape[1:]:
            raise InputError(f"images: shape {shape} must be (N, H, W) or (N, H, W, 3)")
        self.name, self.images, self._places = name, images, places
        self._label(labels, classes, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """Return image `index` in mode RGB."""
        return Image.fromarray(self.images[index]).convert("RGB")

    def describe(self, index: int) -> str:
        """Return the place of image `index`."""
        return self._places[index] if self._places else super().describe(index)


class FileSource(ImageSource):
    """Images in files, decoded on every access.

    Args:
        paths: of the files; an image in a larger file is an `Inside`.
        labels: class of every image, see `ImageSource`.
        classes: class names.
        name: short name.
        decode: how files become pixels, see `data.pixels`. With all frames every frame of a file is
            an image; the files are opened to count them.
        notes: see `ImageSource`.

    Raises:
        InputError: labels do not fit.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: NDArray[np.int64] | None = None,
        classes: Sequence[str] | None = None,
        name: str = "files",
        *,
        decode: DecodeConfig | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.decode = decode or DecodeConfig()
        self.notes = tuple(notes)
        self.paths = tuple(os.fspath(path) for path in paths)
        self._label(labels, classes, len(self.paths))
        self.frames: tuple[int, ...] = (0,) * len(self.paths)
        """Number of each image's frame in its file; -1 for a file whose frames are uncountable."""
        if self.decode.frames == "all":
            counts = [self._count_frames(index) for index in range(len(self.paths))]
            files = np.repeat(np.arange(len(counts)), [max(1, count) for count in counts])
            self.paths = tuple(self.paths[file] for file in files)
            self.frames = tuple(frame for count in counts for frame in range(count) or (-1,))
            self.labels = None if self.labels is None else self.labels[files]

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """Decode image `index`. Raises UnreadableError if that fails."""
        with self._opened(index, self.frames[index]) as image:
            return to_rgb(image, self.decode)

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return height and width of image `index`, from its header."""
        with self._opened(index) as image:
            return upright_size(image)

    def take(self, indices: NDArray[np.int64], name: str) -> FileSource:
        """Return the images at `indices` (K,), in that order, as a source."""
        part = copy.copy(self)  # frames are counted already
        part.name = name
        part.paths = tuple(self.paths[i] for i in indices)
        part.frames = tuple(self.frames[i] for i in indices)
        part.labels = None if self.labels is None else self.labels[indices]
        return part

    @contextlib.contextmanager
    def _opened(self, index: int, frame: int = 0) -> Iterator[Image.Image]:
        path, keep = self.paths[index], False
        # For damaged files Pillow raises almost any exception, such as SyntaxError or struct.error.
        try:
            status = os.stat(file_of(path))
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would block forever
                raise ValueError("no regular file")
            # A forked process shares its parent's position in an open file.
            key = (os.getpid(), path, status.st_ino, status.st_size, status.st_mtime_ns)
            if _kept.key != key or _kept.image.tell() > frame:  # not all formats seek backwards
                close_kept()
                # Given the path, Pillow maps a TIFF, and misreads the rows of a turned one.
                file = _kept.files.enter_context(open_image(path))
                _kept.image = _kept.files.enter_context(Image.open(file, formats=formats(path)))
            _kept.key, image = key, _kept.image
            if frame < 0:
                count_frames(image)  # raises the reason, if it is still there
                raise ValueError("its frames cannot be counted")
            image.seek(frame)
            yield image
            # A PNG's frame leaves traces in those after it: by its disposal once it is loaded,
            # and by its transparent colour, which decoding changes.
            traces = image.format == "PNG" and (
                image.info.get("disposal") or "transparency" in image.info
            )
            keep = not traces and self.paths[index + 1 : index + 2] == (path,)
        except Exception as error:
            raise UnreadableError(self.describe(index), _reason(path, error)) from error
        finally:
            if not keep:
                close_kept()

    def _count_frames(self, index: int) -> int:
        try:
            with self._opened(index) as image:
                return count_frames(image)
        except UnreadableError:
            return 0  # to be reported when it is read

    def fingerprint(self) -> str:
        """Return a digest of all paths, file sizes, modification times, labels and settings."""
        digest = hashlib.blake2b(digest_size=20)
        last, facts = "", (-1, -1)
        for path in self.paths:
            if (file := file_of(path)) != last:
                last, facts = file, _facts(file)
            inside = (str(path), path.place) if isinstance(path, Inside) else ()
            digest.update(repr((os.path.abspath(file), *facts, *inside)).encode())
        frames = self.frames if any(self.frames) else ()
        digest.update(repr((self.classes, self.decode, frames)).encode())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()

    def describe(self, index: int) -> str:
        """Return the file's path, and # and the number of the frame after the first.

        An image inside a file is FILE/NAME or FILE:ROW.
        """
        frame = self.frames[index]
        return f"{self.paths[index]}#{frame}" if frame > 0 else str(self.paths[index])


class DatasetSource(ImageSource):
    """The images of any map-style torch Dataset, without labels.

    An item is an image or a tuple or list that begins with one. An image is a PIL image, a uint8
    numpy array (H, W), (H, W, 1) or (H, W, 3), or a uint8 torch tensor (1, H, W) or (3, H, W).
    Random transforms belong after this.

    Raises:
        InputError: the data set has no length or no items by number.
    """

    def __init__(
        self, dataset: Dataset[Any], name: str | None = None, decode: DecodeConfig | None = None
    ) -> None:
        self.decode = decode or DecodeConfig()
        self.name = type(dataset).__name__ if name is None else name
        self.labels = self.classes = None
        self.dataset = dataset
        try:
            if isinstance(dataset, (str, bytes)) or not hasattr(dataset, "__getitem__"):
                raise TypeError
            self._count = len(dataset)  # type: ignore[arg-type]
        except TypeError as error:
            raise InputError(
                f"source: {type(dataset).__name__} must be an ImageSource or a map-style Dataset, "
                "with a length and items by number "
                "(vi_simsiam.data.datasets.open_dataset opens data sets by name)"
            ) from error

    def __len__(self) -> int:
        return self._count

    def image(self, index: int) -> Image.Image:
        """Return item `index` in mode RGB.

        Raises:
            InputError: the item is of another kind.
            UnreadableError: the data set or decoding raises an exception.
        """
        try:
            item = self.dataset[index]
            image = item[0] if isinstance(item, (tuple, list)) and item else item
            if isinstance(image, Image.Image):
                return to_rgb(image, self.decode)
        except Exception as error:
            reason = f"{type(error).__name__}: {_one_line(error)}"
            raise UnreadableError(self.describe(index), reason) from error
        pixels: Any = None
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
            pixels = image.permute(1, 2, 0).cpu().numpy()
        elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
            pixels = image[:, :, None] if image.ndim == 2 else image
        if pixels is None or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
            given = type(image).__name__
            if isinstance(image, (Tensor, np.ndarray)):
                given += f" of {image.dtype}, shape {tuple(image.shape)}"
            raise InputError(
                f"{self.describe(index)}: {given} must be a PIL image, a uint8 numpy array (H, W) "
                "or (H, W, 3), a uint8 torch tensor (3, H, W), or a tuple that begins with one of "
                "these"
            )
        pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
        return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def as_source(
    images: ImageSource | Dataset[Any], decode: DecodeConfig | None = None
) -> ImageSource:
    """Return a source as it is, a map-style Dataset as a DatasetSource; else raise InputError."""
    return images if isinstance(images, ImageSource) else DatasetSource(images, decode=decode)


def left_out(failures: Sequence[Unreadable]) -> str:
    """Return one line that names every image left out and why, at least one."""
    names = ", ".join(map(str, failures))
    return f"{counted(len(failures), 'unreadable image')} left out: {names}"


def _facts(file: str) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return -1, -1  # to be reported as unreadable
    return status.st_size, status.st_mtime_ns


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        empty = byte_count(path) == 0
        return "an empty file" if empty else f"not a {', '.join(formats(path))} file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _one_line(error) or type(error).__name__


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
