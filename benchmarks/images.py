"""The images that pipelines are measured on: files in a folder, or generated ones, as JPEG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.data.datasets import ACCEPTED, Splits, open_dataset
from vi_simsiam.data.sources import ArraySource, FileSource, ImageSource
from vi_simsiam.errors import InputError

_OCTAVES = (3, 6, 12, 24, 48)
"""Sizes of the random fields in a generated image; coarse ones are stronger, as in photographs."""
_QUALITY = 90
_Tint = tuple[int, int, int]
_TINTS: tuple[_Tint, ...] = ((40, 0, 0), (0, 40, 0), (0, 0, 40), (0, 0, 0))
"""Added to red, green and blue; the classes of generated images."""


def image_files(data: str, folder: Path, *, count: int, sides: tuple[int, int]) -> list[str]:
    """Paths of `count` image files, with repeats where there are fewer.

    Args:
        data: "generated", or "folder:PATH" for the training images of a data set.
        folder: where generated images are written.
        count: number of paths.
        sides: least and greatest side of generated images, in pixels.

    Raises:
        InputError: other data, no such folder, or one without images.
    """
    if data != "generated" and (data == "folder:" or not data.startswith("folder:")):
        raise InputError(f"data: {data!r} must be generated or folder:PATH")
    if data == "generated":
        paths = generate(folder, count=min(count, 256), sides=sides)
    else:
        source = open_dataset(data).train
        assert isinstance(source, FileSource)  # a folder is
        # Evenly spread: files are listed class by class.
        paths = [source.describe(i) for i in _spread(min(count, len(source)), len(source))]
    return [paths[i % len(paths)] for i in range(count)]


def labelled_images(
    data: str, root: Path, folder: Path, *, images: int | None, side: int
) -> Splits:
    """Training and validation images with labels, at most `images` of each, evenly spread.

    Args:
        data: "generated", or a data set as in `vi-simsiam train --data`.
        root: folder of downloaded data sets.
        folder: where generated images are written.
        images: number of each; None for all, and for 256 generated ones.
        side: of generated images, in pixels.

    Raises:
        InputError: no such data set, or one without labels or validation images.
    """
    if data == "generated":
        splits = [
            _tinted(folder / split, images or 256, side, seed)
            for seed, split in enumerate(("train", "val"))
        ]
        return Splits(data, *splits)
    try:
        found = open_dataset(data, root=root)
    except InputError as error:
        if not str(error).startswith("data:"):
            raise
        raise InputError(f"data: {data!r} must be generated, {ACCEPTED}") from None
    if found.val is None or found.train.labels is None or found.val.labels is None:
        raise InputError(f"data: {data!r} must have labels and validation images")
    return Splits(found.name, subset(found.train, images), subset(found.val, images))


def subset(source: ImageSource, count: int | None) -> ImageSource:
    """`count` evenly spread images of a source of files or arrays; all if there are no more."""
    if count is None or count >= len(source):
        return source
    chosen = _spread(count, len(source))
    labels = None if source.labels is None else source.labels[chosen]
    if isinstance(source, FileSource):
        return FileSource([source.describe(i) for i in chosen], labels, source.classes, source.name)
    if isinstance(source, ArraySource):
        return ArraySource(source.images[chosen], labels, source.classes, source.name)
    raise InputError(f"images: {source.name} can only be taken as a whole")


def _spread(count: int, length: int) -> NDArray[np.intp]:
    """Indices of `count` evenly spread ones of `length` images."""
    return np.linspace(0, length - 1, count).astype(np.intp)


def _tinted(folder: Path, count: int, side: int, seed: int) -> FileSource:
    """Generated images of four classes, each with its own tint."""
    labels = np.arange(count) % len(_TINTS)
    paths = generate(folder, count=count, sides=(side, side), seed=seed, tints=_TINTS)
    classes = [f"tint {i}" for i in range(len(_TINTS))]
    return FileSource(paths, labels, classes, f"generated/{folder.name}")


def generate(
    folder: Path,
    *,
    count: int,
    sides: tuple[int, int],
    seed: int = 0,
    tints: Sequence[_Tint] = ((0, 0, 0),),
) -> list[str]:
    """Write random JPEG images that have structure at every scale, and return their paths.

    Args:
        folder: created if it does not exist.
        count: number of images.
        sides: shorter and longer side in pixels; every other image is upright.
        seed: of the random numbers.
        tints: added to red, green and blue, image by image in turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = []
    for i in range(count):
        width, height = sides if i % 2 else sides[::-1]
        path = folder / f"{i:05d}.jpg"
        picture = _picture(generator, width, height, tints[i % len(tints)])
        Image.fromarray(picture).save(path, quality=_QUALITY)
        paths.append(str(path))
    return paths


def _picture(
    generator: np.random.Generator, width: int, height: int, tint: _Tint
) -> NDArray[np.uint8]:
    """One image (height, width, 3)."""
    total = generator.normal(0.0, 6.0, (height, width, 3)).astype(np.float32)
    total = total + 128 + np.array(tint, np.float32)
    for octave in _OCTAVES:
        field = generator.normal(0.0, 130 / octave**0.5, (3, octave, octave)).astype(np.float32)
        for channel in range(3):
            part = Image.fromarray(field[channel]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(part)
    picture: NDArray[np.uint8] = total.clip(0, 255).astype(np.uint8)
    return picture
