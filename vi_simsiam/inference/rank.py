"""Images in the order of the model's certainty: a table of all, and a picture of both ends."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.data.contact_sheet import thumbnails
from vi_simsiam.engine.checkpoint import write_atomically
from vi_simsiam.errors import InputError
from vi_simsiam.inference.embed import Table


def extremes(values: NDArray[Any], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the `count` lowest values, ascending, and of the `count` highest, descending.

    Equal values keep their order. No index is in both: of fewer than 2 `count` values the lower
    half is in the first.
    """
    order = np.argsort(values, kind="stable")
    low = min(count, -(-len(values) // 2))
    high = min(count, len(values) - low)
    return order[:low], order[::-1][:high]


def write_ranking(table: Table, out: Path) -> None:
    """Write all images as CSV, atomically: rank (1 is the least certain), path, kappa, uncertainty.

    Paths are written as bytes of the file system, which Python reads with
    errors="surrogateescape".

    Raises:
        InputError: the table is a SimSiam run's.
    """
    concentration, uncertainty = _predicted(table)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "path", "kappa", "uncertainty"])
    for rank, row in enumerate(np.argsort(concentration, kind="stable").tolist(), 1):
        kappa, share = f"{concentration[row]:.9g}", f"{uncertainty[row]:.9g}"
        writer.writerow([rank, table.path(row), kappa, share])
    content = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomically(out, lambda file: file.write(content))


def draw_ranking(table: Table, dim: int, k: int) -> Image.Image:
    """Draw the k least and the k most certain images, with kappa/(D - 1) under each.

    See `extremes`.

    Args:
        table: the images.
        dim: D.
        k: at least 1.

    Raises:
        InputError: k is below 1, the table is a SimSiam run's, or an image can no longer be read.
    """
    if k < 1:
        raise InputError(f"k: {k} must be at least 1")
    values = _predicted(table)[0].astype(np.float64) / (dim - 1)
    titles = ("Least certain: lowest κ / (D − 1)", "Most certain: highest κ / (D − 1)")
    groups = []
    for title, rows in zip(titles, extremes(values, k), strict=True):
        images = [table.source.image(int(index)) for index in table.indices[rows]]
        if images:
            groups.append((title, list(zip(images, map(shown, values[rows]), strict=True))))
    return thumbnails(groups)


def save_picture(picture: Image.Image, out: Path) -> None:
    """Write a picture as PNG, atomically."""
    write_atomically(out, lambda file: picture.save(file, format="PNG", optimize=True))


def shown(value: float) -> str:
    """A number of at least 0 for a caption: three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _predicted(table: Table) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if table.concentration is None or table.uncertainty is None:
        raise InputError(
            "rank: a SimSiam run predicts no concentration to rank by; train with --method "
            "vi-simsiam"
        )
    return table.concentration, table.uncertainty
