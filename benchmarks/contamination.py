"""A labelled set of images with known problems: copies, blank and foreign images, wrong labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from vi_simsiam.data.sources import FileSource, ImageSource

EXACT, ENCODED, CROPPED = "exact copy", "re-encoded copy", "cropped copy"
BLANK, FOREIGN, LABEL = "blank image", "foreign image", "wrong label"
COPIES = (EXACT, ENCODED, CROPPED)
KINDS = (*COPIES, BLANK, FOREIGN, LABEL)
_SHARE = 20  # clean images for each image of a kind


class Contaminated(NamedTuple):
    """N images, the clean ones first."""

    source: FileSource
    kind: NDArray[np.str_]
    """(N,) of `KINDS`, "" for clean images."""
    origin: NDArray[np.int64]
    """(N,) the image that a copy is one of, -1 for no copy."""


def contaminate(
    source: ImageSource, foreign: ImageSource, folder: Path, *, images: int, seed: int
) -> Contaminated:
    """Write images of a set and a twentieth of them with each kind of problem as files.

    Re-encoded copies are resized to 60 to 100 % of the sides and saved as JPEG of quality 40 to 90.
    Cropped copies keep 80 to 98 % of each side, drawn apart; every other one is enlarged to the
    image's size; they are JPEG of quality 60 to 90. Blank images are of one colour, uniform noise,
    or blurred by a tenth to a quarter of the side. Wrong labels are drawn from the other classes.

    Args:
        source: labelled images, at least as many as `images`.
        foreign: images of another set.
        folder: an empty folder for the files.
        images: number of images taken from the source, at least 20.
        seed: of all draws.
    """
    if source.labels is None or source.classes is None:
        raise ValueError("the source needs labels")
    generator = np.random.default_rng(seed)
    count, classes = images // _SHARE, len(source.classes)
    rows = generator.permutation(len(source))[:images]
    labels = source.labels[rows].tolist()
    kinds, origins = [""] * images, [-1] * images
    paths: list[Path] = []

    def keep(image: Image.Image, **options: Any) -> None:
        # JPEG where a quality is given.
        paths.append(folder / f"{len(paths):06d}.{'jpg' if options else 'png'}")
        image.save(paths[-1], **options)

    for row in rows.tolist():
        keep(source.image(row))
    for row in generator.choice(images, count, replace=False).tolist():
        labels[row] = (labels[row] + int(generator.integers(1, classes))) % classes
        kinds[row] = LABEL
    for kind in COPIES:
        clean = [row for row in range(images) if not kinds[row]]
        for number, row in enumerate(generator.choice(clean, count, replace=False).tolist()):
            image = source.image(int(rows[row]))
            if kind == EXACT:
                keep(image)
            elif kind == ENCODED:
                keep(_resized(image, generator), quality=int(generator.integers(40, 91)))
            else:
                part = _cropped(image, generator)
                if number % 2:
                    part = part.resize(image.size, Image.Resampling.BICUBIC)
                keep(part, quality=int(generator.integers(60, 91)))
            kinds.append(kind)
            origins.append(row)
            labels.append(labels[row])
    for number, row in enumerate(generator.choice(rows, count, replace=False).tolist()):
        keep(_blank(source.image(row), number, generator))
        kinds.append(BLANK)
    for row in generator.choice(len(foreign), count, replace=False).tolist():
        keep(foreign.image(row))
        kinds.append(FOREIGN)
    origins += [-1] * (len(kinds) - len(origins))
    labels += generator.integers(0, classes, len(kinds) - len(labels)).tolist()
    made = FileSource(paths, np.array(labels), source.classes, source.name)
    return Contaminated(made, np.array(kinds), np.array(origins))


def _resized(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    share = generator.uniform(0.6, 1)
    width, height = (max(1, round(share * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _cropped(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    width, height = (round(float(generator.uniform(0.8, 0.98)) * side) for side in image.size)
    left = int(generator.integers(0, image.width - width + 1))
    top = int(generator.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _blank(image: Image.Image, number: int, generator: np.random.Generator) -> Image.Image:
    if number % 3 == 0:
        return Image.new("RGB", image.size, tuple(generator.integers(0, 256, 3).tolist()))
    if number % 3 == 1:
        size = (image.height, image.width, 3)
        return Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8))
    radius = generator.uniform(0.1, 0.25) * max(image.size)
    return image.filter(ImageFilter.GaussianBlur(radius))
