"""Images in the order of the model's certainty: a table of all of them, and a picture of the two ends."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.data.contact_sheet import thumbnails
from vi_simsiam.engine.checkpoint import write_atomically
from vi_simsiam.errors import InputError
from vi_simsiam.inference.embed import Table


def order(concentration: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rows from the least certain image (lowest kappa) to the most certain, (N,); equal ones as they come."""
    return np.argsort(concentration, kind="stable")


def write_ranking(table: Table, out: Path) -> None:
    """Write all images as CSV, atomically: rank (1 is the least certain), path, kappa, uncertainty.

    Paths are written as the bytes that the file system has, which Python reads with errors="surrogateescape".

    Raises:
        InputError: the table is a SimSiam run's.
    """
    concentration, uncertainty = _predicted(table)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "path", "kappa", "uncertainty"])
    for rank, row in enumerate(order(concentration).tolist(), 1):
        writer.writerow(
            [rank, table.path(row), f"{concentration[row]:.9g}", f"{uncertainty[row]:.9g}"]
        )
    write_atomically(
        out, lambda file: file.write(text.getvalue().encode("utf-8", "surrogateescape"))
    )


def draw_ranking(table: Table, dim: int, k: int) -> Image.Image:
    """Draw the k least and the k most certain images, the extreme one first, with kappa/(D - 1) under each.

    No image is in both groups: of fewer than 2 k images the less certain half is in the first.

    Args:
        table: the images.
        dim: D.
        k: at least 1.

    Raises:
        InputError: k is below 1, the table is a SimSiam run's, or an image cannot be read any more.
    """
    if k < 1:
        raise InputError(f"k: {k} must be at least 1")
    concentration, _ = _predicted(table)
    values, rows = concentration.astype(np.float64) / (dim - 1), order(concentration)
    low = min(k, -(-len(rows) // 2))
    high = min(k, len(rows) - low)
    groups = [
        (
            title,
            [
                (table.source.image(int(table.indices[row])), shown(float(values[row])))
                for row in chosen.tolist()
            ],
        )
        for title, chosen in (
            ("Least certain: lowest κ / (D − 1)", rows[:low]),
            ("Most certain: highest κ / (D − 1)", rows[::-1][:high]),
        )
        if len(chosen)
    ]
    return thumbnails(groups)


def save_picture(picture: Image.Image, out: Path) -> None:
    """Write a picture as PNG, atomically."""

    def write(file: IO[bytes]) -> None:
        picture.save(file, format="PNG", optimize=True)

    write_atomically(out, write)


def shown(value: float) -> str:
    """A number of at least 0 for a caption: three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _predicted(table: Table) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if table.concentration is None or table.uncertainty is None:
        raise InputError(
            "rank: a SimSiam run predicts no concentration to rank by; train with --method vi-simsiam"
        )
    return table.concentration, table.uncertainty
