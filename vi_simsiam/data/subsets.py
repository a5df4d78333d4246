"""The images of a run: a part of a data set to train on, and a part that is held out.

A draw depends on the seed and the labels alone: every image has a random key, and of every class
the images with the smallest keys are taken. So a smaller draw lies within a larger one, class by
class, and the images held out are the same however many are trained on.

Digests of the images are saved with a run's checkpoints and compared when it is resumed. Decoded
pixels count, so a copy elsewhere is the same, whatever its dates, and so is a pack.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.data.channels import Pixels
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.inside import byte_count, open_image
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ArraySource, FileSource, ImageSource
from vi_simsiam.errors import InputError
from vi_simsiam.text import counted

_SHOWN = 3


def select(
    splits: Splits,
    *,
    images: int | None = None,
    held_out: float = 0.0,
    seed: int = 0,
    distinct: bool = True,
) -> Splits:
    """Choose the images to train on and to validate on.

    Classes keep their shares: each gets the whole part of its quota, and the classes with the
    largest remainders get one image more until the number is reached (Hamilton's method). Without
    labels it is a plain draw. Images keep their order.

    Args:
        splits: the data set.
        images: how many to train on; None for all that are left.
        held_out: share in [0, 1) of the training images to hold out first, as validation part.
        seed: of the draw.
        distinct: first leave out files that both parts hold, byte for byte, and with `held_out`
            also second copies within the training part. Arrays and packed images are not compared.

    Raises:
        InputError: `images` is more than there are, or none would be held out or left to train on.
    """
    train, val = splits.train, splits.val
    if distinct:
        train, val = _without_copies(train, val, within=held_out > 0)
    keys = np.random.PCG64(seed).random_raw(len(train))  # numpy keeps this stream in all versions
    if train.decode.frames == "all":  # frames of one file are near copies, and go together
        files = [re.sub(r"#\d+$", "", train.describe(index)) for index in range(len(train))]
        if isinstance(train, FileSource):
            files = list(train.paths)
        first: dict[str, int] = {}
        keys = keys[[first.setdefault(path, index) for index, path in enumerate(files)]]
    rest = np.ones(len(train), dtype=bool)
    if held_out > 0:
        count = round(held_out * len(train))
        if count in (0, len(train)):
            effect = "it leaves none to train on" if count else "that is none"
            raise InputError(
                f"held_out: {held_out} is not accepted; of {counted(len(train), 'image')} {effect}"
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


def at_most(source: ImageSource, images: int | None, seed: int = 0) -> ImageSource:
    """At most so many images, drawn class by class and the same every time; None for all."""
    if images is None or len(source) <= images:
        return source
    drawn = select(Splits(source.name, source, None), images=images, seed=seed, distinct=False)
    return drawn.train


def labelled_splits(splits: Splits) -> dict[str, ImageSource]:
    """The sources "train" and "val" of a data set, on which runs can be evaluated.

    Raises:
        InputError: one of them is missing, empty or has no labels, there are fewer than two
            classes, or the two parts have other classes.
    """
    name, train, val = splits.name, splits.train, splits.val
    needs = "evaluation needs class folders under train/ and val/ (figures and training do not)"
    if train.labels is None:
        raise InputError(f"data: {name} has no labels; {needs}")
    if len(train) == 0:
        raise InputError(f"data: {name} has no training images; {needs}")
    if val is None or len(val) == 0:
        raise InputError(
            f"data: {name} has no validation images; {needs}; training with --held-out 0.2 sets a "
            "fifth apart"
        )
    if val.labels is None:
        raise InputError(f"data: the validation images of {name} have no labels; {needs}")
    if len(train.classes or ()) < 2:
        raise InputError(f"data: {name} has one class; evaluation needs at least two")
    check_classes(name, train, val)
    return {"train": train, "val": val}


def check_classes(name: str, train: ImageSource, val: ImageSource) -> None:
    """Raise InputError unless the parts of the data set `name` have the same classes in order."""
    if train.classes != val.classes:
        others = sorted(set(train.classes or ()) ^ set(val.classes or ())) or ["their order"]
        raise InputError(
            f"data: training and validation images of {name} differ in their classes "
            f"({', '.join(others)}); both must have the same ones in the same order"
        )


def subset(source: ImageSource, indices: NDArray[np.int64], name: str | None = None) -> ImageSource:
    """Return the images at `indices`, (K,) int64, of a source, in that order.

    Files stay files, so that the decoded ones are cached; arrays are copied; packed images share
    the pixels of the whole. `name` is that of the new source, None for the old one's.
    """
    name = source.name if name is None else name
    if isinstance(source, (FileSource, PackedImages)):
        return source.take(indices, name)
    if isinstance(source, ArraySource):
        places = [source.describe(index) for index in indices.tolist()]
        labels = _labels(source, indices)
        return ArraySource(source.images[indices], labels, source.classes, name, places)
    return _Subset(source, indices, name)


class _Subset(ImageSource):
    """Some images of a source of any kind."""

    def __init__(self, source: ImageSource, indices: NDArray[np.int64], name: str) -> None:
        self.source, self.indices, self.name = source, indices, name
        self.decode, self.notes = source.decode, source.notes
        self._label(_labels(source, indices), source.classes, len(indices))

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image.Image:
        return self.source.image(int(self.indices[index]))

    def array(self, index: int) -> Pixels:
        return self.source.array(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))

    def dimensions(self, index: int) -> tuple[int, int]:
        return self.source.dimensions(int(self.indices[index]))


def _labels(source: ImageSource, indices: NDArray[np.int64]) -> NDArray[np.int64] | None:
    return None if source.labels is None else source.labels[indices]


def _draw(
    candidates: NDArray[np.bool_],
    count: int,
    keys: NDArray[np.uint64],
    labels: NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    """Draw `count` of the candidates (N,): each class by its share, the smallest keys; sorted."""
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
    """Drop files that both parts hold; with `within` keep the first of equal training files."""
    if not isinstance(train, FileSource):
        return train, val
    left_out: set[str] = set()
    if isinstance(val, FileSource):
        trained, validation = set(train.paths), set(val.paths)
        left_out = trained & validation
        for group in _copies([*train.paths, *val.paths]):
            if not (trained.isdisjoint(group) or validation.isdisjoint(group)):
                left_out |= set(group)
        val = _keep(val, left_out)
    if within:
        left_out |= {path for group in _copies(train.paths) for path in group[1:]}
    return _keep(train, left_out), val


def _keep(source: FileSource, left_out: set[str]) -> ImageSource:
    kept = [index for index, path in enumerate(source.paths) if path not in left_out]
    return source if len(kept) == len(source) else subset(source, np.array(kept, np.int64))


def _copies(paths: Iterable[str]) -> list[list[str]]:
    """Groups of two or more paths whose files hold the same bytes, without unreadable files."""

    def content(path: str) -> bytes:
        with open_image(path) as file:
            return hashlib.blake2b(file.read(), digest_size=20).digest()

    sizes = _groups(dict.fromkeys(paths), byte_count)
    return [copies for paths in sizes for copies in _groups(paths, content)]


def _groups(paths: Iterable[str], key: Callable[[str], Hashable]) -> list[list[str]]:
    """Groups of two or more paths with an equal key."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # to be reported as unreadable
            groups[key(path)].append(path)
    return [group for group in groups.values() if len(group) > 1]


class _Validation(TypedDict):
    images: int
    labels: str | None
    left_out: NotRequired[int]


class Content(TypedDict):
    """The result of `content` or `listed`, as checkpoints have it; older ones lack parts."""

    images: NotRequired[int]
    classes: NotRequired[list[str] | None]
    validation: NotRequired[_Validation | None]
    labels: NotRequired[str | None]
    sizes: NotRequired[str | None]
    pixels: NotRequired[str | None]


def listed(splits: Splits) -> dict[str, Any]:
    """Return the part of `content` that needs no decoding.

    In a pack the validation images include the number of those that were unreadable, "left_out".
    """
    val, classes = splits.val, splits.train.classes
    validation: dict[str, Any] | None = None
    if val is not None:
        validation = {"images": len(val), "labels": _digest(val.labels)}
        if isinstance(val, PackedImages) and val.unreadable:
            validation["left_out"] = len(val.unreadable)
    return {
        "images": len(splits.train),
        "classes": None if classes is None else list(classes),
        "validation": validation,
    }


def content(splits: Splits, train: PackedImages) -> dict[str, Any]:
    """Return numbers, classes, and digests of the labels, sizes and pixels of a data set.

    `train` are its decoded training images, without the unreadable ones.
    """
    return listed(splits) | {
        "images": len(train),
        "labels": _digest(train.labels),
        "sizes": _digest(train.heights, train.widths),
        "pixels": _digest(np.array(train.pixel_checksums(), np.uint32)),
    }


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return the first difference of `now` from `before` as a phrase, None without any.

    Args:
        before: a run's `content`; the number of images alone if it kept none.
        now: a `content`, or only `listed`: then more images are no difference, as some may be
            unreadable.
    """
    images = now["images"]
    if images < before["images"] or ("pixels" in now and images != before["images"]):
        return f"{counted(images, 'readable training image')}, not {before['images']:,}"
    if "classes" in before and before["classes"] != now["classes"]:
        return _classes(before["classes"] or [], now["classes"] or [])
    both = before.keys() & now.keys()
    for part, words in (("labels", "labels"), ("sizes", "sizes of images"), ("pixels", "pixels")):
        if part in both and before[part] != now[part]:
            return f"other {words}"
    if "validation" in both and not _same_validation(before["validation"], now["validation"]):
        return "other validation images"
    return None


def _same_validation(before: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    if before is None or now is None:
        return before is now
    if all(before[part] == now[part] for part in ("images", "labels")):
        return True
    # Files are not decoded here, so they include those that a pack left out as unreadable.
    left_out, others = before.get("left_out", 0), now.get("left_out", 0)
    same: bool = left_out != others and before["images"] + left_out == now["images"] + others
    return same


def _classes(before: list[str], now: list[str]) -> str:
    gone = [name for name in before if name not in now][:_SHOWN]
    new = [name for name in now if name not in before][:_SHOWN]
    changes = [f"without {', '.join(gone)}"] * bool(gone) + [f"with {', '.join(new)}"] * bool(new)
    return f"other classes ({' and '.join(changes) or 'in another order'})"


def _digest(*arrays: NDArray[Any] | None) -> str | None:
    digest = hashlib.blake2b(digest_size=20)
    for array in arrays:
        if array is None:
            return None
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
