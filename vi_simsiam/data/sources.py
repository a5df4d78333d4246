"""Where images come from: arrays in memory, or files that are decoded when asked for.

A source gives every image as 8-bit RGB, whatever it is stored as, so nothing after it knows about file formats.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from vi_simsiam.data.pixels import is_animated, to_rgb, upright_size
from vi_simsiam.errors import InputError
from vi_simsiam.text import counted

_TOLERATED_SHARE = 0.01
_kept = threading.local()
"""The file that a thread reads frame by frame, open: a frame is reached through all before it."""


def close_kept() -> None:
    """Close the file that this thread has kept open, if any."""
    _, files, _ = _kept.__dict__.pop("file", (None, contextlib.ExitStack(), None))
    files.close()


class Unreadable(NamedTuple):
    """A file that cannot be decoded, and why."""

    path: str
    reason: str


class UnreadableError(InputError):
    """An image cannot be decoded: where it is, and why."""

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
    """How files become pixels; the default where there are none."""
    notes: tuple[str, ...] = ()
    """What a user should hear of how the images were found: sentences, without a full stop."""

    def __repr__(self) -> str:
        classes = (
            "" if self.classes is None else f", {counted(len(self.classes), 'class', 'classes')}"
        )
        return f"{type(self).__name__}({self.name!r}, {counted(len(self), 'image')}{classes})"

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Return image `index` in mode RGB. Raises UnreadableError, naming the file, if it cannot be read."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Return where image `index` is to be found: a path, or a name such as "fashion-mini/train/17"."""

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return height and width of image `index` in pixels. Raises UnreadableError if it cannot be read."""
        width, height = self.image(index).size
        return height, width

    def fingerprint(self) -> str | None:
        """Return a digest that changes when the images or labels do; None if that takes reading all of them."""
        return None

    def _label(
        self, labels: NDArray[np.int64] | None, classes: Sequence[str] | None, count: int
    ) -> None:
        if (labels is None) != (classes is None):
            raise InputError("labels and classes: give both or neither")
        if labels is not None and classes is not None:
            if labels.shape != (count,):
                raise InputError(
                    f"labels: shape {labels.shape} must be ({count},), one for each image"
                )
            if count and not 0 <= labels.min() <= labels.max() < len(classes):
                raise InputError(
                    f"labels: values must lie in [0, {len(classes)}), one for each class name"
                )
        self.labels = None if labels is None else labels.astype(np.int64)
        self.classes = None if classes is None else tuple(classes)


class ArraySource(ImageSource):
    """Images in memory: uint8, (N, H, W) gray or (N, H, W, 3) RGB.

    Raises TypeError for another dtype and InputError for another shape or labels that do not fit.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64] | None = None,
        classes: Sequence[str] | None = None,
        name: str = "array",
    ) -> None:
        if images.dtype != np.uint8:
            raise TypeError(f"images: dtype {images.dtype} must be uint8")
        if (
            not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3))
            or 0 in images.shape[1:]
        ):
            raise InputError(f"images: shape {images.shape} must be (N, H, W) or (N, H, W, 3)")
        self.name = name
        self.images = images
        self._label(labels, classes, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """Return image `index` in mode RGB."""
        return Image.fromarray(self.images[index]).convert("RGB")

    def describe(self, index: int) -> str:
        """Return "NAME/INDEX"."""
        return f"{self.name}/{index}"


class FileSource(ImageSource):
    """Images in files, decoded each time they are asked for.

    Args:
        paths: of the files.
        labels: class of every image, see `ImageSource`.
        classes: class names.
        name: short name.
        decode: how files become pixels, see `data.pixels`. With all frames every frame of a file is an image; the files
            are opened to count them.
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
        """Which frame of its file each image is."""
        self._uncounted: dict[str, str] = {}  # files whose frames cannot be counted, and why
        if self.decode.frames == "all":
            counts = [self._count_frames(index) for index in range(len(self.paths))]
            self.paths = tuple(
                path for path, count in zip(self.paths, counts, strict=True) for _ in range(count)
            )
            self.frames = tuple(frame for count in counts for frame in range(count))
            self.labels = None if self.labels is None else np.repeat(self.labels, counts)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """Decode image `index`. Raises UnreadableError, naming the file, if that fails."""
        with self._opened(index, self.frames[index]) as image:
            return to_rgb(image, self.decode)

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return height and width of image `index` from its header. Raises UnreadableError if that cannot be read."""
        with self._opened(index) as image:
            return upright_size(image)

    def take(self, indices: NDArray[np.int64], name: str) -> FileSource:
        """The images at `indices` (K,), in that order, as a source."""
        labels = None if self.labels is None else self.labels[indices]
        first = dataclasses.replace(self.decode, frames="first")  # they are counted already
        part = FileSource(
            [self.paths[i] for i in indices],
            labels,
            self.classes,
            name,
            decode=first,
            notes=self.notes,
        )
        part.decode, part.frames = self.decode, tuple(self.frames[i] for i in indices)
        part._uncounted = self._uncounted
        return part

    @contextlib.contextmanager
    def _opened(self, index: int, frame: int = 0) -> Iterator[Image.Image]:
        path = self.paths[index]
        # Damaged files make Pillow's decoders raise almost any exception, SyntaxError and struct.error among them.
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, for ever
                raise ValueError("no regular file")
            if path in self._uncounted:
                raise ValueError(self._uncounted[path])
            # A process that was forked shares its parent's place in an open file.
            key = (os.getpid(), path, status.st_ino, status.st_size, status.st_mtime_ns)
            kept, files, image = _kept.__dict__.pop("file", (None, contextlib.ExitStack(), None))
            with files:
                if kept != key or image.tell() > frame:  # Pillow does not find every way back
                    files.close()
                    # Given the path, Pillow maps an uncompressed TIFF and reads turned ones in rows of the wrong length.
                    file = files.enter_context(open(path, "rb"))  # noqa: SIM115
                    image = files.enter_context(Image.open(file, formats=formats(path)))
                image.seek(frame)
                yield image
                # Its next frame. Once loaded, a frame of a PNG that is to be undone is left in those after it by Pillow.
                if image.format != "PNG" and self.paths[index + 1 : index + 2] == (path,):
                    _kept.file = key, files.pop_all(), image
        except Exception as error:
            raise UnreadableError(self.describe(index), _reason(path, error)) from error

    def _count_frames(self, index: int) -> int:
        try:
            with self._opened(index) as image:
                return image.n_frames if is_animated(image) else 1  # type: ignore[attr-defined]
        except UnreadableError as error:
            self._uncounted[self.paths[index]] = (
                f"its frames cannot be counted: {error.entry.reason}"
            )
            return 1  # to be reported when it is read

    def fingerprint(self) -> str:
        """Return a digest of every path, file size and time of change, of the labels and classes, and how they are decoded."""
        digest = hashlib.blake2b(digest_size=20)
        for path in self.paths:
            try:
                status = os.stat(path)
                facts = (status.st_size, status.st_mtime_ns)
            except OSError:
                facts = (-1, -1)  # to be reported as unreadable
            digest.update(repr((os.path.abspath(path), *facts)).encode())
        digest.update(
            repr((self.classes, self.decode, self.frames if any(self.frames) else ())).encode()
        )
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()

    def describe(self, index: int) -> str:
        """Return the file's path, and # and the number of the frame after the first."""
        frame = self.frames[index]
        return f"{self.paths[index]}#{frame}" if frame else self.paths[index]


class DatasetSource(ImageSource):
    """The images of any map-style torch Dataset; labels are not taken over.

    An item is an image or a tuple or list that begins with one, and an image is a PIL image, uint8 (H, W), (H, W, 1) or
    (H, W, 3) in a numpy array, or uint8 (1, H, W) or (3, H, W) in a torch tensor. Random transforms belong after this.

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
                f"source: {type(dataset).__name__} must be an ImageSource or a map-style Dataset, with a length and "
                "items by number (vi_simsiam.data.datasets.open_dataset opens data sets by name)"
            ) from error

    def __len__(self) -> int:
        return self._count

    def image(self, index: int) -> Image.Image:
        """Return item `index` in mode RGB.

        Raises:
            InputError: the item is of another kind.
            UnreadableError: the data set raises an exception.
        """
        try:
            item = self.dataset[index]
        except Exception as error:
            raise UnreadableError(
                self.describe(index), f"{type(error).__name__}: {_one_line(error)}"
            ) from error
        return _item_to_rgb(item, self.describe(index), self.decode)

    def describe(self, index: int) -> str:
        """Return "NAME/INDEX"."""
        return f"{self.name}/{index}"


def as_source(
    images: ImageSource | Dataset[Any], decode: DecodeConfig | None = None
) -> ImageSource:
    """Return a source as it is, and a map-style torch Dataset as a DatasetSource. Raises InputError for others."""
    return images if isinstance(images, ImageSource) else DatasetSource(images, decode=decode)


def _item_to_rgb(item: Any, place: str, decode: DecodeConfig) -> Image.Image:
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image, decode)
        except Exception as error:  # a file that is read only now, and damaged
            raise UnreadableError(place, _one_line(error) or type(error).__name__) from error
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
            f"{place}: {given} must be a PIL image, a uint8 numpy array (H, W) or (H, W, 3), a uint8 torch tensor "
            "(3, H, W), or a tuple that begins with one of these"
        )
    pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def left_out(failures: Sequence[Unreadable]) -> str:
    """One line that names every image left out and why, at least one."""
    names = ", ".join(f"{failure.path} ({failure.reason})" for failure in failures)
    return f"{counted(len(failures), 'unreadable image')} left out: {names}"


def check_readable(source: ImageSource, failures: Sequence[Unreadable]) -> None:
    """Raise InputError if more than 1 % of a source's images are unreadable, naming the first."""
    if len(failures) > _TOLERATED_SHARE * len(source):
        first = "; ".join(f"{failure.path} ({failure.reason})" for failure in failures[:3])
        more = ", ..." if len(failures) > 3 else ""
        raise InputError(
            f"{source.name}: {len(failures):,} of {counted(len(source), 'image')} cannot be read, at most 1 % may be: "
            f"{first}{more}"
        )


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return (
            "an empty file"
            if os.path.getsize(path) == 0
            else f"not a {', '.join(formats(path))} file"
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _one_line(error) or type(error).__name__


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
