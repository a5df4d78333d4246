"""A part of a data set to train on, and a part that is kept from training.

What is drawn depends on the seed and the labels alone: every image has a random key, and of every class those with the
smallest keys are taken. So the images of a smaller draw are, class by class, among those of a larger one, and the images
held out are the same however many are trained on.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.packed import Checksums, Contents, PackedImages
from vi_simsiam.data.sources import ArraySource, FileSource, ImageSource
from vi_simsiam.errors import InputError
from vi_simsiam.text import counted


def select(
    splits: Splits,
    *,
    images: int | None = None,
    held_out: float = 0.0,
    seed: int = 0,
    distinct: bool = True,
) -> Splits:
    """Choose the images to train on and to validate on.

    Classes keep their shares: each gets the whole part of its quota, and the classes with the largest remainders one image
    more until the number is reached (Hamilton's method). Without labels it is a plain draw. Images keep their order.

    Args:
        splits: the data set.
        images: how many to train on; None for all that are left.
        held_out: share of the training images to hold out first, in [0, 1). They become the validation part.
        seed: which images.
        distinct: whether files that both parts hold, byte for byte, are left out of both first, and with `held_out` second
            copies within the training part, too. Arrays and packed images are not compared.

    Raises:
        InputError: there are fewer images than asked for, or none would be held out or be left to train on.
    """
    train, val = splits.train, splits.val
    if distinct:
        train, val = _without_copies(train, val, within=held_out > 0)
    keys = np.random.PCG64(seed).random_raw(len(train))  # numpy keeps this stream in all versions
    if (
        train.decode.frames == "all"
    ):  # the frames of a file are near copies of each other, and go together
        files: Iterable[str] = (
            re.sub(r"#\d+$", "", train.describe(index)) for index in range(len(train))
        )
        if isinstance(train, FileSource):
            files = train.paths
        first: dict[str, int] = {}
        keys = keys[[first.setdefault(path, index) for index, path in enumerate(files)]]
    rest = np.ones(len(train), dtype=bool)
    if held_out > 0:
        count = round(held_out * len(train))
        if count == 0:
            raise InputError(
                f"held_out: {held_out} is not accepted; of {counted(len(train), 'image')} that is none"
            )
        if count == len(train):
            raise InputError(
                f"held_out: {held_out} is not accepted; of {counted(len(train), 'image')} it leaves none to train on"
            )
        chosen = _draw(rest, count, keys, train.labels)
        rest[chosen] = False
        val = subset(train, chosen, f"{train.name}-held-out")
    available = int(rest.sum())
    if images is not None:
        if images > available:
            raise InputError(
                f"images: {images} is not accepted; {splits.name} has {available:,} to train on"
            )
        train = subset(train, _draw(rest, images, keys, train.labels))
    elif available < len(train):
        train = subset(train, np.flatnonzero(rest))
    return replace(splits, train=train, val=val)


def duplicates(splits: Splits) -> list[tuple[str, str]]:
    """Files of the training part and of the validation part that are equal byte for byte, as (training, validation).

    Files are read only where their sizes agree. Without a validation part, or where one is not of files, there are none.
    """
    train, val = splits.train, splits.val
    if not (isinstance(train, FileSource) and isinstance(val, FileSource)):
        return []
    validation = set(val.paths)
    groups = _copies([*train.paths, *val.paths])
    pairs = [
        (a, b)
        for group in groups
        for a in group
        if a not in validation
        for b in group
        if b in validation
    ]
    return pairs + [(path, path) for path in train.paths if path in validation]


def subset(source: ImageSource, indices: NDArray[np.int64], name: str | None = None) -> ImageSource:
    """The images at `indices` (K,) of a source, in that order, as a source of the same kind where that is of use.

    Files stay files, so that the decoded ones are cached; arrays are copied; packed images share the pixels of the whole.

    Args:
        source: the images.
        indices: (K,) int64, in [0, N).
        name: of the new source; None for the old one's.
    """
    name = source.name if name is None else name
    if isinstance(source, PackedImages):
        return _PackedSubset(source, indices, name)
    if isinstance(source, FileSource):
        return source.take(indices, name)
    if isinstance(source, ArraySource):
        return _ArraySubset(source, indices, name)
    return _Subset(source, indices, name)


class _Subset(ImageSource):
    """Some images of a source of any kind."""

    def __init__(self, source: ImageSource, indices: NDArray[np.int64], name: str) -> None:
        self.source, self.indices, self.name = source, indices, name
        self.decode, self.notes = source.decode, source.notes
        self._label(
            None if source.labels is None else source.labels[indices], source.classes, len(indices)
        )

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        """As `ImageSource`."""
        return self.source.image(int(self.indices[index]))

    def describe(self, index: int) -> str:
        """Where the image is to be found in the whole source."""
        return self.source.describe(int(self.indices[index]))

    def dimensions(self, index: int) -> tuple[int, int]:
        """As `ImageSource`."""
        return self.source.dimensions(int(self.indices[index]))

    def fingerprint(self) -> str | None:
        """A digest of the source's and the choice; None if the source has none."""
        whole = self.source.fingerprint()
        if whole is None:
            return None
        return hashlib.blake2b(whole.encode() + self.indices.tobytes(), digest_size=20).hexdigest()


class _ArraySubset(ArraySource):
    """Some images of an array, described by their places in the whole."""

    def __init__(self, source: ArraySource, indices: NDArray[np.int64], name: str) -> None:
        labels = None if source.labels is None else source.labels[indices]
        super().__init__(source.images[indices], labels, source.classes, name)
        self._places = [source.describe(int(index)) for index in indices]

    def describe(self, index: int) -> str:
        """Where the image is to be found in the whole source."""
        return self._places[index]


class _PackedSubset(PackedImages):
    """Some packed images: all pixels, and where the chosen ones lie in them. Pickled as path and choice, if there is a file."""

    def __init__(self, source: PackedImages, indices: NDArray[np.int64], name: str) -> None:
        labels = None if source.labels is None else source.labels[indices]
        heights, widths = source.heights[indices], source.widths[indices]
        contents = Contents(
            name,
            heights,
            widths,
            labels,
            source.classes,
            (),
            source.unreadable,
            source.decode,
            source.notes,
        )
        # Checked and laid out as images that lie one after the other; their bytes are the whole's.
        super().__init__(
            np.broadcast_to(np.uint8(0), int((3 * heights.astype(np.int64) * widths).sum())),
            contents,
        )
        self.pixels, self.offsets = source.pixels, source.offsets[indices]
        self.path, self.checksum = source.path, source.checksum
        self._source, self._indices = source, indices

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        return _PackedSubset, (self._source, self._indices, self.name)

    def pixel_checksums(self) -> list[int]:
        """As of packed images that are these only; the pixels are read."""
        checksums = Checksums()
        for start, height, width in zip(
            self.offsets.tolist(), self.heights.tolist(), self.widths.tolist(), strict=True
        ):
            checksums.append(self.pixels[start : start + 3 * height * width].data)
        return checksums.values

    def describe(self, index: int) -> str:
        """Where the image is to be found in the whole source."""
        return self._source.describe(int(self._indices[index]))


def _draw(
    candidates: NDArray[np.bool_],
    count: int,
    keys: NDArray[np.uint64],
    labels: NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    """`count` of the candidates (N,), each class by its share and with the smallest keys, in rising order."""
    classes = np.zeros(len(candidates), np.int64) if labels is None else labels
    sizes = np.bincount(classes[candidates])
    # Whole numbers, so that equal remainders are equal; ties go to the first classes.
    quotas, remainders = np.divmod(count * sizes, max(1, sizes.sum()))
    quotas[np.argsort(-remainders, kind="stable")[: count - quotas.sum()]] += 1
    chosen = []
    for label, quota in enumerate(quotas):
        members = np.flatnonzero(candidates & (classes == label))
        chosen.append(members[np.argsort(keys[members], kind="stable")[:quota]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _without_copies(
    train: ImageSource, val: ImageSource | None, *, within: bool
) -> tuple[ImageSource, ImageSource | None]:
    """Both parts without the files that both hold; with `within` only the first of equal training files stays."""
    if not isinstance(train, FileSource):
        return train, val
    left_out: set[str] = set()
    if isinstance(val, FileSource):
        left_out = {path for pair in duplicates(Splits("", train, val)) for path in pair}
        val = _keep(val, left_out)
    if within:
        left_out |= {path for group in _copies(train.paths) for path in group[1:]}
    return _keep(train, left_out), val


def _keep(source: FileSource, left_out: set[str]) -> ImageSource:
    kept = [index for index, path in enumerate(source.paths) if path not in left_out]
    return source if len(kept) == len(source) else subset(source, np.array(kept, np.int64))


def _copies(paths: Iterable[str]) -> list[list[str]]:
    """Groups of two or more different paths whose files hold the same bytes; what cannot be read is equal to nothing."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        try:
            by_size[os.stat(path).st_size].append(path)
        except OSError:
            continue  # to be reported as unreadable
    by_content: dict[bytes, list[str]] = defaultdict(list)
    for group in by_size.values():
        for path in group if len(group) > 1 else ():
            try:
                by_content[
                    hashlib.blake2b(Path(path).read_bytes(), digest_size=20).digest()
                ].append(path)
            except OSError:
                continue
    return [group for group in by_content.values() if len(group) > 1]
