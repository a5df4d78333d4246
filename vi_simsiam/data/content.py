"""Digests of a run's images: saved with its checkpoints, and compared when it is resumed.

Decoded pixels count, so a copy elsewhere is the same, whatever its dates, and so is a pack.
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
    """Return the part of `content` that needs no decoding.

    It has the number of images, the classes, and the number and labels of the validation images, in
    a pack also the number of those that were unreadable, "left_out".
    """
    val, classes = splits.val, splits.train.classes
    validation: dict[str, Any] | None = None
    if val is not None:
        validation = {"images": len(val), "labels": _labels(val)}
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
        "labels": _labels(train),
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
    totals = {before["images"] + left_out, now["images"] + others}
    return left_out != others and len(totals) == 1


def _classes(before: list[str], now: list[str]) -> str:
    gone = [name for name in before if name not in now][:_SHOWN]
    new = [name for name in now if name not in before][:_SHOWN]
    changes = [f"without {', '.join(gone)}"] * bool(gone) + [f"with {', '.join(new)}"] * bool(new)
    return f"other classes ({' and '.join(changes) or 'in another order'})"


def _labels(source: ImageSource) -> str | None:
    return None if source.labels is None else _digest(source.labels)


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
