"""Images that a run was not trained on: other data sets, and two built-in ones.

    SPEC            any data set of `open_dataset`, of kind "given"
    near=SPEC       the same, of kind "near": like the run's own data (other breeds of dog)
    far=SPEC        the same, of kind "far": unlike it

Built in, and "far" from any training data: `noise`, uniform random pixels, and `digits`, the 8 x 8
handwritten digits that come with scikit-learn, enlarged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vi_simsiam.config import TrainConfig
from vi_simsiam.data.datasets import Splits, open_dataset
from vi_simsiam.data.inside import file_of
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ArraySource, FileSource, ImageSource
from vi_simsiam.data_names import data_label, foreign_spec
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.corruptions import Tones
from vi_simsiam.paths import printable
from vi_simsiam.text import counted

BUILTIN_IMAGES = 500
"""Most images of a built-in set."""
_SAMPLED_BYTES = 1024


@dataclass(frozen=True)
class Foreign:
    """A set of images to compare with the run's own."""

    name: str
    kind: str
    """near, far or given."""
    source: ImageSource
    builtin: bool = False


def open_sets(specs: Sequence[str], own: Splits, config: TrainConfig) -> list[Foreign]:
    """Open the data sets that a user names: their validation images, or else training images.

    Args:
        specs: see the head of this module.
        own: the run's data.
        config: the run's, with the name of its data, the folder of downloads, and how files are
            decoded.

    Raises:
        InputError: a data set that cannot be opened, is given twice, or is the run's own, by name
            or by its files.
    """
    root, download, decode = config.data_root, not config.offline, config.decode
    given = [foreign_spec(spec) for spec in specs]
    if len({named for _, named in given}) != len(given):
        raise InputError(f"ood: {', '.join(specs)} names a data set twice; give each one once")
    taken = {"noise", "digits", "validation"}
    sets = []
    for kind, named in given:
        is_own = named in (own.name, config.data)
        splits = own if is_own else open_dataset(named, root=root, download=download, decode=decode)
        if splits is own or _files(splits) & _files(own):
            raise InputError(
                f"ood: {named} holds images of the run's own data, {own.name}; give another data "
                "set"
            )
        source = splits.val if splits.val is not None and len(splits.val) else splits.train
        name = _free_name(named, taken)
        taken.add(name)
        sets.append(Foreign(name, kind, source))
    return sets


def builtin_sets(config: TrainConfig, images: int, seed: int) -> list[Foreign]:
    """The sets `noise` and `digits`, of at most `images` images of a run's size and channels.

    The noise of 8-bit RGB takes all levels, that of other images has the mean and deviation of
    each channel. Digits go from black to white, see `Tones`.
    """
    from sklearn.datasets import load_digits

    images, size = min(images, BUILTIN_IMAGES), config.augment.size
    decode, tones, draw = config.decode, Tones.of(config), np.random.default_rng(seed)
    shape = (images, size, size, decode.channels)
    bunch = load_digits()
    # Spread over the file, which has runs of one writer.
    chosen = np.linspace(0, len(bunch.images) - 1, min(images, len(bunch.images))).astype(int)
    drawn = [
        Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
        for digit in np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    ]
    digits = np.stack([*map(np.asarray, drawn)])
    if decode.is_rgb:
        pixels = draw.integers(0, 256, shape, dtype=np.uint8)
    else:
        most = 2**decode.bits - 1
        mean, std = (most * np.array(each) for each in config.augment.constants)
        levels = (
            mean + math.sqrt(3) * std * draw.uniform(-1, 1, shape),
            tones.grey + tones.white * (digits[..., None] / 255 - 0.5),
        )
        kind = np.dtype(f"u{decode.bits // 8}")
        pixels, digits = (np.rint(each).clip(0, most).astype(kind) for each in levels)
    labels, classes = bunch.target[chosen].astype(np.int64), [f"digit {i}" for i in range(10)]
    return [
        Foreign("noise", "far", ArraySource(pixels, name="noise"), builtin=True),
        Foreign("digits", "far", ArraySource(digits, labels, classes, "digits"), builtin=True),
    ]


def refuse_own_images(foreign: Foreign, images: PackedImages, own: Sequence[PackedImages]) -> int:
    """Refuse a set that holds the run's own images under another name.

    Images are compared by their size and a thousand of their bytes. Returns the number of images
    that are among `own`, at most half.

    Raises:
        InputError: more than half of the images are among `own`.
    """
    known = {digest for packed in own for digest in _digests(packed)}
    found = sum(digest in known for digest in _digests(images))
    if found > len(images) / 2:
        raise InputError(
            f"ood: {found:,} of {counted(len(images), 'image')} of {foreign.name} are the run's "
            "own, pixel by pixel; give another data set"
        )
    return found


def _digests(images: PackedImages) -> list[tuple[int, int, bytes]]:
    digests = []
    for start, height, width in zip(images.offsets, images.heights, images.widths, strict=True):
        count = images.decode.pixel_bytes * int(height) * int(width)
        sample = images.pixels[start : start + count : max(1, count // _SAMPLED_BYTES)]
        digests.append((int(height), int(width), sample.tobytes()))
    return digests


def _files(splits: Splits) -> set[str]:
    sources = [source for source in (splits.train, splits.val) if isinstance(source, FileSource)]
    return {os.path.realpath(file_of(path)) for source in sources for path in source.paths}


def _free_name(spec: str, taken: set[str]) -> str:
    """A data set's name without the folder of its files; numbered where it is taken."""
    stem = printable((data_label(spec).partition(":")[2] or spec).removesuffix(".pack"))
    names = (stem, *(f"{stem}-{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)
