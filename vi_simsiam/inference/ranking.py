"""Images ordered by a score: a table of all of them, and a picture of the two ends."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.data.contact_sheet import thumbnails
from vi_simsiam.errors import InputError
from vi_simsiam.files import write_atomically
from vi_simsiam.inference.embed import Table
from vi_simsiam.inference.label_free import AGREEMENT, SCORES, Score, measured
from vi_simsiam.models import SimSiam, VISimSiam
from vi_simsiam.stages import stages

# Beginnings of a formula in a cell, full-width ones included (OWASP, "CSV Injection").
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def extremes(values: NDArray[Any], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the `count` lowest values, ascending, and of the `count` highest, descending.

    Equal values keep their order. No index is in both: of fewer than 2 `count` values the lower
    half is in the first.
    """
    order = np.argsort(values, kind="stable")
    low = min(count, -(-len(values) // 2))
    high = min(count, len(values) - low)
    return order[:low], order[::-1][:high]


def rankable(model: SimSiam, *, several: bool) -> list[str]:
    """The scores by which images can be ranked with a model; `several`: with runs beside it."""
    norms = [f"{name}_norm" for name in stages(model.backbone)]
    kappa = ["kappa"] if isinstance(model, VISimSiam) else []
    return [
        *kappa,
        "embedding_norm",
        *norms,
        *get_args(Score)[1:],
        *([AGREEMENT] if several else []),
    ]


def score_values(table: Table, by: str, device: torch.device) -> NDArray[np.float64]:
    """The values of a score of all images of a table, (N,) float64; see `label_free.measured`.

    Raises:
        InputError: a single image has no neighbours, or the network has no such score.
    """
    if by == "kappa":
        assert table.concentration is not None
        return table.concentration.astype(np.float64)
    if by in table.scores:
        return table.scores[by].astype(np.float64)
    if by in ("knn_distance", AGREEMENT) and len(table.indices) < 2:
        raise InputError(f"by: {by} needs at least 2 images; 1 can be read")
    if by not in get_args(Score):  # a stage that gives no tensor
        raise InputError(f"by: this network gives no {by}")
    return measured(cast(Score, by), table.embedding, device)


def write_ranking(table: Table, by: str, values: NDArray[np.float64], out: Path) -> None:
    """Write the images as CSV: rank (1 is the least certain), path and the score; with kappa also
    the uncertainty.

    Paths are written as bytes of the file system, which Python reads with
    errors="surrogateescape". Programs for tables take a cell that begins with = + - @, a tab or an
    end of line for a formula: such a path begins with ./ instead, which names the same file.

    Args:
        table: N images.
        by: the score.
        values: (N,) of the score.
        out: the file.
    """
    columns: dict[str, NDArray[Any]] = {by: values}
    if by == "kappa":
        assert table.uncertainty is not None
        columns["uncertainty"] = table.uncertainty
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    plain.writerow(["rank", "path", *columns])
    certainty = -values if SCORES[by].rises else values
    for rank, row in enumerate(np.argsort(certainty, kind="stable").tolist(), 1):
        path = no_formula(table.path(row))
        numbers = [f"{column[row]:.9g}" for column in columns.values()]
        # Python before 3.13 does not quote a carriage return, at which readers end the row.
        (quoted if "\r" in path else plain).writerow([rank, path, *numbers])
    content = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomically(out, lambda file: file.write(content))


def no_formula(path: str) -> str:
    """Return a path that programs for tables take for text: ./ before what begins a formula."""
    return f"./{path}" if path.startswith(_FORMULAS) else path


def draw_ranking(
    table: Table, by: str, values: NDArray[np.float64], dim: int, k: int
) -> Image.Image:
    """Draw the k >= 1 least and most certain images, see `extremes`, and the score under each.

    For kappa that is kappa/(D - 1), with D = `dim`. Other arguments are as for `write_ranking`.

    Raises:
        InputError: an image can no longer be read.
    """
    title, rises = SCORES[by]
    values = values / (dim - 1) if by == "kappa" else values
    words = ("highest", "lowest") if rises else ("lowest", "highest")
    titles = (f"Least certain: {words[0]} {title}", f"Most certain: {words[1]} {title}")
    groups = []
    for title, rows in zip(titles, extremes(-values if rises else values, k), strict=True):
        images = [table.source.image(int(index)) for index in table.indices[rows]]
        if images:
            groups.append((title, list(zip(images, map(_shown, values[rows]), strict=True))))
    return thumbnails(groups)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
