"""Views and images that pipelines, steps and whole trainings are measured on.

Images are files in a folder, or generated ones, as JPEG.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.config import AugmentConfig
from vi_simsiam.config import policy as named_policy
from vi_simsiam.data.datasets import ACCEPTED, Splits, open_dataset
from vi_simsiam.data.sources import FileSource, ImageSource
from vi_simsiam.data.subsets import subset
from vi_simsiam.errors import InputError

_OCTAVES = (3, 6, 12, 24, 48)
"""Sizes of the random fields in a generated image; coarse ones are stronger, as in photographs."""
_QUALITY = 90
_Tint = tuple[int, int, int]
_TINTS: tuple[_Tint, ...] = ((40, 0, 0), (0, 40, 0), (0, 0, 40), (0, 0, 0))
"""Added to red, green and blue; the classes of generated images."""
_CLASSES = [f"tint {i}" for i in range(len(_TINTS))]


@dataclass(frozen=True)
class ViewCase:
    """Two global views of `size` pixels and `local_views` of `local_size`, for `batch` images."""

    batch: int
    size: int
    local_views: int = 0
    local_size: int = 0
    sides: tuple[int, int] = (160, 213)
    """Shorter and longer side of generated images, in pixels."""

    @property
    def label(self) -> str:
        """Readable name of the views, such as "2x128+6x64"."""
        local = f"+{self.local_views}x{self.local_size}" if self.local_views else ""
        return f"2x{self.size}{local}"

    @property
    def name(self) -> str:
        """Name of the case in results; unique."""
        return f"{self.label} batch {self.batch}"

    @property
    def views(self) -> int:
        """Views of all images of a batch."""
        return self.batch * (2 + self.local_views)

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Shapes of the views of a batch, global ones first."""
        sizes = [self.size] * 2 + [self.local_size] * self.local_views
        return [(self.batch, 3, size, size) for size in sizes]

    @property
    def policy(self) -> AugmentConfig:
        """SimSiam's views, or multi-crop's where there are local ones."""
        if self.local_views == 0:
            return dataclasses.replace(named_policy("simsiam"), size=self.size)
        return dataclasses.replace(
            named_policy("multicrop"),
            size=self.size,
            local_views=self.local_views,
            local_size=self.local_size,
        )


SMALL_IMAGES = ViewCase(64, 32, sides=(32, 32))
"""CIFAR-10's."""

_LARGE = (320, 427)
_FULL = {
    "cuda": tuple(
        case
        for batch in (64, 256)
        for case in (
            ViewCase(batch, 128),
            ViewCase(batch, 224, sides=_LARGE),
            ViewCase(batch, 128, 6, 64),
            ViewCase(batch, 224, 6, 96, _LARGE),
        )
    ),
    "cpu": (SMALL_IMAGES, ViewCase(64, 128, sides=(128, 128))),
}
_TELLING = {"cuda": _FULL["cuda"][:2], "cpu": _FULL["cpu"][:1]}


def view_cases(device_type: str, *, short: bool) -> tuple[ViewCase, ...]:
    """The cases in the order in which they are measured, the telling ones first."""
    return (_TELLING if short else _FULL)[device_type]


def image_files(data: str, folder: Path, *, count: int, sides: tuple[int, int]) -> list[str]:
    """Paths of `count` image files, with repeats where there are fewer.

    They are those of "folder:PATH", or "generated" ones of these `sides` in pixels, written into
    `folder`.

    Raises:
        InputError: other data, no such folder, or one without images.
    """
    if data != "generated" and (data == "folder:" or not data.startswith("folder:")):
        raise InputError(f"data: {data!r} must be generated or folder:PATH")
    if data == "generated":
        paths = generate(folder, count=min(count, 256), sides=sides)
    else:
        source = open_dataset(data).train
        chosen = _evenly(source, count)  # files are listed class by class
        paths = [chosen.describe(i) for i in range(len(chosen))]
    return [paths[i % len(paths)] for i in range(count)]


def labelled_images(
    data: str, root: Path, folder: Path, *, images: int | None, side: int
) -> Splits:
    """Training and validation images with labels, at most `images` of each, evenly spread.

    `data` is as in `vi-simsiam train --data`, downloaded to `root`, or "generated": 256 images of
    `side` pixels, or `images`, written into `folder`.

    Raises:
        InputError: no such data set, or one without labels or validation images.
    """
    if data == "generated":
        count, sources = images or 256, []
        for seed, split in enumerate(("train", "val")):
            paths = generate(
                folder / split, count=count, sides=(side, side), seed=seed, tints=_TINTS
            )
            labels = np.arange(count) % len(_TINTS)
            sources.append(FileSource(paths, labels, _CLASSES, f"generated/{split}"))
        return Splits(data, *sources)
    try:
        found = open_dataset(data, root=root)
    except InputError as error:
        if not str(error).startswith("data:"):
            raise
        raise InputError(f"data: {data!r} must be generated, {ACCEPTED}") from None
    if found.val is None or found.train.labels is None or found.val.labels is None:
        raise InputError(f"data: {data!r} must have labels and validation images")
    return Splits(found.name, _evenly(found.train, images), _evenly(found.val, images))


def _evenly(source: ImageSource, count: int | None) -> ImageSource:
    """`count` evenly spread images; all for None, and if there are no more."""
    if count is None or count >= len(source):
        return source
    return subset(source, np.linspace(0, len(source) - 1, count).astype(np.int64))


def generate(
    folder: Path,
    *,
    count: int,
    sides: tuple[int, int],
    seed: int = 0,
    tints: Sequence[_Tint] = ((0, 0, 0),),
) -> list[str]:
    """Write random JPEG images that have structure at every scale, and return their paths.

    `sides` are the shorter and longer side in pixels; every other image is upright. `tints` are
    added to red, green and blue, image by image in turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = [str(folder / f"{i:05d}.jpg") for i in range(count)]
    for i, path in enumerate(paths):
        width, height = sides if i % 2 else sides[::-1]
        picture = _picture(generator, width, height, tints[i % len(tints)])
        Image.fromarray(picture).save(path, quality=_QUALITY)
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
