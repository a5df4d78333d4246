"""Where images come from: arrays in memory, or files that are decoded when asked for.

A source gives every image as 8-bit RGB, whatever it is stored as, so nothing after it knows about file formats.
"""

from __future__ import annotations

import hashlib
import os
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

from vi_simsiam.errors import InputError
from vi_simsiam.text import counted

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
"""File names that are taken for images, in lower or upper case."""

# Named so that a file is never handed to a decoder that runs other programs (EPS starts Ghostscript).
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_TOLERATED_SHARE = 0.01


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

    def __repr__(self) -> str:
        classes = "" if self.classes is None else f", {counted(len(self.classes), 'class', 'classes')}"
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

    def _label(self, labels: NDArray[np.int64] | None, classes: Sequence[str] | None, count: int) -> None:
        if (labels is None) != (classes is None):
            raise InputError("labels and classes: give both or neither")
        if labels is not None and classes is not None:
            if labels.shape != (count,):
                raise InputError(f"labels: shape {labels.shape} must be ({count},), one for each image")
            if count and not 0 <= labels.min() <= labels.max() < len(classes):
                raise InputError(f"labels: values must lie in [0, {len(classes)}), one for each class name")
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
        if not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)) or 0 in images.shape[1:]:
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
    """Images in files, decoded each time they are asked for. Raises InputError for labels that do not fit."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: NDArray[np.int64] | None = None,
        classes: Sequence[str] | None = None,
        name: str = "files",
    ) -> None:
        self.name = name
        self.paths = tuple(os.fspath(path) for path in paths)
        self._label(labels, classes, len(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """Decode image `index`. Raises UnreadableError, naming the file, if that fails."""
        path = self.paths[index]
        # Damaged files make Pillow's decoders raise almost any exception, SyntaxError and struct.error among them.
        try:
            with Image.open(path, formats=_FORMATS) as image:
                return to_rgb(image)
        except Exception as error:
            raise UnreadableError(path, _reason(path, error)) from error

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return height and width of image `index` from its header. Raises UnreadableError if that cannot be read."""
        path = self.paths[index]
        try:
            with Image.open(path, formats=_FORMATS) as image:
                return image.height, image.width
        except Exception as error:
            raise UnreadableError(path, _reason(path, error)) from error

    def fingerprint(self) -> str:
        """Return a digest of every path, file size and time of change, and of the labels and classes."""
        digest = hashlib.blake2b(digest_size=20)
        for path in self.paths:
            try:
                status = os.stat(path)
                facts = (status.st_size, status.st_mtime_ns)
            except OSError:
                facts = (-1, -1)  # to be reported as unreadable
            digest.update(repr((os.path.abspath(path), *facts)).encode())
        digest.update(repr(self.classes).encode())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()

    def describe(self, index: int) -> str:
        """Return the file's path."""
        return self.paths[index]


class DatasetSource(ImageSource):
    """The images of any map-style torch Dataset; labels are not taken over.

    An item is an image or a tuple or list that begins with one, and an image is a PIL image, uint8 (H, W), (H, W, 1) or
    (H, W, 3) in a numpy array, or uint8 (1, H, W) or (3, H, W) in a torch tensor. Random transforms belong after this.

    Raises:
        InputError: the data set has no length or no items by number.
    """

    def __init__(self, dataset: Dataset[Any], name: str | None = None) -> None:
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
            raise UnreadableError(self.describe(index), f"{type(error).__name__}: {_one_line(error)}") from error
        return _item_to_rgb(item, self.describe(index))

    def describe(self, index: int) -> str:
        """Return "NAME/INDEX"."""
        return f"{self.name}/{index}"


def as_source(images: ImageSource | Dataset[Any]) -> ImageSource:
    """Return a source as it is, and a map-style torch Dataset as a DatasetSource. Raises InputError for others."""
    return images if isinstance(images, ImageSource) else DatasetSource(images)


def _item_to_rgb(item: Any, place: str) -> Image.Image:
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    if isinstance(image, Image.Image):
        return to_rgb(image)
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


def find_images(folder: str | Path) -> list[str]:
    """Return the paths of all images in a folder and the folders in it, sorted by name level by level.

    Hidden files and folders are skipped; links are followed, each folder being visited once. Raises InputError if a
    folder cannot be listed.
    """
    return list(_walk(os.fspath(folder), set()))


def _walk(folder: str, visited: set[tuple[int, int]]) -> Iterator[str]:
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for entry in list_folder(folder):
        if entry.is_dir():
            yield from _walk(entry.path, visited)
        elif is_image(entry):
            yield entry.path


def list_folder(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder that are not hidden, sorted by name. Raises InputError if it cannot be listed."""
    try:
        with os.scandir(os.fspath(folder)) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror})") from error


def is_image(entry: os.DirEntry[str]) -> bool:
    """Whether the entry is named like an image and is a file, or a broken link (which is reported when it is read)."""
    named_so = entry.name.lower().endswith(IMAGE_SUFFIXES)
    return named_so and (entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any Pillow mode as 8-bit RGB.

    16-bit gray, which Pillow opens as "I;16" or "I", is scaled by 1/257, so that 65535 becomes 255; floating-point gray
    is scaled from its smallest and largest finite value. Transparency is dropped. Raises ValueError for a mode that has
    no RGB equivalent.
    """
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        finite = np.isfinite(values)
        low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
        scaled = np.where(finite, values - low, 0.0) * (255.0 / (high - low) if high > low else 0.0)
        return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")
    # Pillow warns about the direct conversion of these, once for every image of such a set.
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "an empty file" if os.path.getsize(path) == 0 else f"not a {', '.join(_FORMATS)} file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _one_line(error) or type(error).__name__


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
