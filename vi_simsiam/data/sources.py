"""Sources of images: arrays in memory, or files that are decoded on demand.

A source gives every image as 8-bit RGB, or as channels of 8 or 16 bits where its `decode` asks for
others, so nothing after it depends on file formats.
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
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vi_simsiam.config import MOST_CHANNELS, DecodeConfig
from vi_simsiam.data.channels import Pixels, file_size, picture, read_file
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
    """A fixed sequence of images, with labels or without."""

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
        """Return image `index` in mode RGB: itself, or a picture of its channels for people.

        Raises UnreadableError if it cannot be read.
        """

    def array(self, index: int) -> Pixels:
        """Return the pixels of image `index`, (height, width, channels), as `decode` describes.

        Raises UnreadableError if it cannot be read.
        """
        return np.asarray(self.image(index))

    def content(self, index: int) -> Image.Image | Pixels:
        """Return image `index` as it enters views: `image` if it is RGB, otherwise `array`."""
        return self.image(index) if self.decode.is_rgb else self.array(index)

    def describe(self, index: int) -> str:
        """Return the place of image `index`: a path, or NAME/INDEX, as "fashion-mini/train/17"."""
        return f"{self.name}/{index}"

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return height and width of image `index`. Raises UnreadableError if it is unreadable."""
        height, width = self.array(index).shape[:2]
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
    """Images in memory: uint8 or uint16, (N, H, W) gray or (N, H, W, C) of 1 to 16 channels.

    Gray uint8 (N, H, W) becomes RGB. `places` are the origins of the images, empty for NAME/INDEX.
    Raises TypeError for another dtype and InputError for another shape or labels that do not fit.
    """

    def __init__(
        self,
        images: Pixels,
        labels: NDArray[np.int64] | None = None,
        classes: Sequence[str] | None = None,
        name: str = "array",
        places: Sequence[str] = (),
    ) -> None:
        if images.dtype not in (np.uint8, np.uint16):
            raise TypeError(f"images: dtype {images.dtype} must be uint8 or uint16")
        shape = images.shape
        if len(shape) not in (3, 4) or 0 in shape[1:] or max(shape[3:], default=1) > MOST_CHANNELS:
            accepted = f"(N, H, W) or (N, H, W, C) with C of 1 to {MOST_CHANNELS}"
            raise InputError(f"images: shape {shape} must be {accepted}")
        if images.dtype == np.uint16 and len(shape) == 3:
            images = images[..., None]
        if images.ndim == 4:
            self.decode = DecodeConfig(channels=images.shape[3], bits=8 * images.dtype.itemsize)
        self.name, self.images, self._places = name, images, places
        self._label(labels, classes, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """Return image `index` in mode RGB."""
        if not self.decode.is_rgb:
            return picture(self.images[index])
        return Image.fromarray(self.images[index]).convert("RGB")

    def array(self, index: int) -> Pixels:
        """Return the pixels of image `index`."""
        return super().array(index) if self.decode.is_rgb else self.images[index]

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
        if not self.decode.is_rgb:
            return picture(self.array(index))
        with self._opened(index, self.frames[index]) as image:
            return to_rgb(image, self.decode)

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return height and width of image `index`, from its header."""
        if not self.decode.is_rgb:
            with self._named(index) as path:
                return file_size(path)
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

    def array(self, index: int) -> Pixels:
        """Return the pixels of image `index`. Raises UnreadableError if that fails."""
        if self.decode.is_rgb:
            return super().array(index)
        with self._named(index) as path:
            return read_file(path, self.decode)

    @contextlib.contextmanager
    def _named(self, index: int) -> Iterator[str]:
        try:
            yield self.paths[index]
        except Exception as error:  # of damaged files, almost any
            reason = _reason(self.paths[index], error)
            raise UnreadableError(self.describe(index), reason) from error

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
        # RGB keeps the keys, and so the caches, from before there were other channels.
        settings = repr((self.classes, self.decode, frames)).replace(", channels=3, bits=8", "")
        digest.update(settings.encode())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()

    def describe(self, index: int) -> str:
        """Return the file's path, and # and the number of the frame after the first.

        An image inside a file is FILE/NAME or FILE:ROW.
        """
        frame = self.frames[index]
        return f"{self.paths[index]}#{frame}" if frame > 0 else str(self.paths[index])


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
    return one_line_of(error) or type(error).__name__


def one_line_of(error: Exception) -> str:
    """Return an exception's message in one line."""
    return " ".join(str(error).split())
