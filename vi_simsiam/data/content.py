"""The images of a run apart from where they lie: saved with its checkpoints, compared when it is resumed.

Pixels count as they are decoded, so a copy elsewhere is the same, whatever its dates, and so is a pack of the files.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.text import counted

_SHOWN = 3


def listed(splits: Splits) -> dict[str, Any]:
    """The part of `content` that needs no decoding: number of images, classes, and number and labels of validation images.

    Of a pack with unreadable validation images their number, "left_out", too.
    """
    val = splits.val
    return {
        "images": len(splits.train),
        "classes": None if splits.train.classes is None else list(splits.train.classes),
        "validation": None
        if val is None
        else {"images": len(val), "labels": _labels(val), **_left_out(val)},
    }


def content(splits: Splits, train: PackedImages) -> dict[str, Any]:
    """What is trained and evaluated on, in plain values: numbers, classes, digests of labels, sizes and pixels.

    Args:
        splits: the data set.
        train: its training images, decoded, without those that cannot be.
    """
    return listed(splits) | {
        "images": len(train),
        "labels": _labels(train),
        "sizes": _digest(train.heights, train.widths),
        "pixels": _digest(np.array(train.pixel_checksums(), np.uint32)),
    }


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first thing in which `now` is other than `before`, as a phrase; None if what both hold is the same.

    Args:
        before: a run's `content`; of a run that kept none, the number of images alone.
        now: a `content`, or what is `listed` only: then more images are no difference, as some may be unreadable.
    """
    images = now["images"]
    if images < before["images"] or ("pixels" in now and images != before["images"]):
        return f"{counted(images, 'readable training image')}, not {before['images']:,}"
    if "classes" in before and before["classes"] != now["classes"]:
        return _classes(before["classes"] or [], now["classes"] or [])
    words = {"labels": "labels", "sizes": "sizes of images", "pixels": "pixels"}
    other = [
        words[part]
        for part in words
        if part in before and part in now and before[part] != now[part]
    ]
    if (
        "validation" in before
        and "validation" in now
        and not _same_validation(before["validation"], now["validation"])
    ):
        other.append("validation images")
    return next((f"other {part}" for part in other), None)


def _same_validation(before: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    if before is None or now is None:
        return before is now
    if all(before[part] == now[part] for part in ("images", "labels")):
        return True
    # Files are not decoded here, so those that a pack left out as unreadable are among them, with their labels.
    left_out = [each.get("left_out", 0) for each in (before, now)]
    totals = {
        each["images"] + missing for each, missing in zip((before, now), left_out, strict=True)
    }
    return left_out[0] != left_out[1] and len(totals) == 1


def _classes(before: list[str], now: list[str]) -> str:
    gone = [name for name in before if name not in now][:_SHOWN]
    new = [name for name in now if name not in before][:_SHOWN]
    changes = [f"without {', '.join(gone)}"] * bool(gone) + [f"with {', '.join(new)}"] * bool(new)
    return f"other classes ({' and '.join(changes) or 'in another order'})"


def _left_out(source: ImageSource) -> dict[str, int]:
    return (
        {"left_out": len(source.unreadable)}
        if isinstance(source, PackedImages) and source.unreadable
        else {}
    )


def _labels(source: ImageSource) -> str | None:
    return None if source.labels is None else _digest(source.labels)


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
