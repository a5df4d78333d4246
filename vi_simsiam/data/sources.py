"""Where images come from: arrays in memory, or files that are decoded when asked for.

A source gives every image as 8-bit RGB, whatever it is stored as, so nothing after it knows about file formats.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vi_simsiam.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
"""File names that are taken for images, in lower or upper case."""

# Named so that a file is never handed to a decoder that runs other programs (EPS starts Ghostscript).
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_TOLERATED_SHARE = 0.01


class Unreadable(NamedTuple):
    """A file that cannot be decoded, and why."""

    path: str
    reason: str


class ImageSource(ABC):
    """A fixed sequence of RGB images, with labels or without."""

    name: str
    """Short name, such as "fashion-mini/train"."""
    labels: NDArray[np.int64] | None
    """Class of every image, (N,) int64 in [0, len(classes)); None without labels."""
    classes: tuple[str, ...] | None
    """Class names; None without labels."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Return image `index` in mode RGB. Raises InputError, naming the file, if it cannot be read."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Return where image `index` is to be found: a path, or a name such as "fashion-mini/train/17"."""

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
        """Decode image `index`. Raises InputError, naming the file, if that fails."""
        path = self.paths[index]
        try:
            return _decode(path)
        except Exception as error:
            raise InputError(f"{path}: cannot be read as an image ({_reason(path, error)})") from error

    def describe(self, index: int) -> str:
        """Return the file's path."""
        return self.paths[index]

    def readable(self, workers: int) -> tuple[FileSource, list[Unreadable]]:
        """Decode every file completely, in `workers` threads; return a source of those that can be, and the others."""
        with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            reasons = list(pool.map(_why_unreadable, self.paths))
        keep = np.array([reason is None for reason in reasons], dtype=bool)
        failures = [Unreadable(path, why) for path, why in zip(self.paths, reasons, strict=True) if why is not None]
        paths = [path for path, kept in zip(self.paths, keep, strict=True) if kept]
        labels = None if self.labels is None else self.labels[keep]
        return FileSource(paths, labels, self.classes, self.name), failures


def scan(source: ImageSource, workers: int | None = None) -> tuple[ImageSource, list[Unreadable]]:
    """Find the images of a source that cannot be read, before a training run meets them.

    Returns the source without them, and their list. `workers` threads decode; None for one a CPU core. Images in
    memory are all readable. Raises InputError if more than 1 % are unreadable: then something is wrong with the
    folder rather than with a few files.
    """
    if not isinstance(source, FileSource):
        return source, []
    cleaned, failures = source.readable(os.cpu_count() or 1 if workers is None else workers)
    if len(failures) > _TOLERATED_SHARE * len(source):
        first = "; ".join(f"{failure.path} ({failure.reason})" for failure in failures[:3])
        more = ", ..." if len(failures) > 3 else ""
        raise InputError(
            f"{source.name}: {len(failures)} of {len(source)} images cannot be read, at most 1 % may be: {first}{more}"
        )
    return cleaned, failures


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
    """Whether the entry is named like an image and is a file, or a broken link (which a scan will then report)."""
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


def _decode(path: str) -> Image.Image:
    with Image.open(path, formats=_FORMATS) as image:
        return to_rgb(image)


def _why_unreadable(path: str) -> str | None:
    # Damaged files make Pillow's decoders raise almost any exception, SyntaxError and struct.error among them.
    try:
        _decode(path)
    except Exception as error:
        return _reason(path, error)
    return None


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "an empty file" if os.path.getsize(path) == 0 else f"not a {', '.join(_FORMATS)} file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
