"""Encodings of all images of a folder: a Parquet file with neighbours, or a ranking by a score."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vi_simsiam import __version__
from vi_simsiam.data.contact_sheet import thumbnails
from vi_simsiam.data.sources import ImageSource, Unreadable
from vi_simsiam.engine.forward import nearest
from vi_simsiam.errors import InputError
from vi_simsiam.files import naming, write_atomically
from vi_simsiam.inference.encoder import Encoder
from vi_simsiam.inference.label_free import (
    NEIGHBOURS,
    SCORES,
    Gaussian,
    Score,
    knn_distances,
    lengths,
    measured,
)
from vi_simsiam.models import VISimSiam
from vi_simsiam.paths import printable
from vi_simsiam.text import brief_repr, counted, print_line

_ROWS = 4096
"""Rows in a row group of the file."""
# Beginnings of a formula in a cell, full-width ones included (OWASP, "CSV Injection").
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


@dataclass(frozen=True)
class Table:
    """Encodings of N images by a run, in the order of their source."""

    source: ImageSource
    indices: NDArray[np.int64]
    """(N,) numbers of the images in the source."""
    embedding: NDArray[np.float32]
    """(N, F); `collect` keeps it in a temporary file, mapped into memory."""
    concentration: NDArray[np.float32] | None
    """(N,) kappa; None for SimSiam."""
    uncertainty: NDArray[np.float32] | None
    """(N,) 1 - E[mu.z]; None for SimSiam."""
    skipped: list[Unreadable] = field(default_factory=list)
    """Images that cannot be read."""

    __repr__ = brief_repr

    def path(self, row: int) -> str:
        """The path of a row's image, as returned by `os.fsdecode`."""
        return self.source.describe(int(self.indices[row]))


def collect(
    encoder: Encoder,
    source: ImageSource,
    folder: Path,
    *,
    views: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    embeddings: bool = True,
    console: Console | None = None,
) -> Table:
    """Encode all images that can be read.

    Memory is bounded, but for 16 bytes an image: embeddings (4 F bytes an image, 2 kB for a
    ResNet-18) go to a file without a name in `folder`, which vanishes with the table.

    Args:
        encoder: the run.
        source: N images.
        folder: where the temporary file is made.
        views, seed, batch_size: see `Encoder.encode`.
        embeddings: keep them; if False, the table's are (N, 0).
        console: shows progress and skipped images ("skipped: PATH (reason)"); None for no output.

    Raises:
        InputError: the source is empty, none of its images can be read, or outputs are not finite.
    """
    if len(source) == 0:
        raise InputError(f"images: {source.name} holds no images")
    skipped: list[Unreadable] = []
    indices: list[NDArray[np.int64]] = []
    predicted: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    with _progress(console) as progress, naming(folder), tempfile.TemporaryFile(dir=folder) as file:
        task = progress.add_task("encoding", total=len(source))

        def skip(entry: Unreadable) -> None:
            skipped.append(entry)
            progress.advance(task)
            if console is not None:
                print_line(console, printable(f"skipped: {entry.path} ({entry.reason})"))

        for batch, encoding in encoder.stream(
            source, views=views, seed=seed, batch_size=batch_size, skipped=skip
        ):
            indices.append(batch.numpy())
            if embeddings:
                file.write(encoding.embedding.numpy().tobytes())
            if encoding.concentration is not None:
                predicted.append((encoding.concentration.numpy(), encoding.uncertainty.numpy()))
            progress.advance(task, len(batch))
        if not indices:
            raise InputError(
                f"images: {source.name} has {counted(len(source), 'image')}, but none that can be "
                f"read: {skipped[0].path} ({skipped[0].reason})"
            )
        numbers = np.concatenate(indices)
        kept = np.empty((len(numbers), 0), np.float32)
        if embeddings:
            file.flush()
            kept = np.memmap(file, np.float32, "r", shape=(len(numbers), encoder.model.features))
    if not predicted:
        return Table(source, numbers, kept, None, None, skipped)
    concentration, uncertainty = map(np.concatenate, zip(*predicted, strict=True))
    return Table(source, numbers, kept, concentration, uncertainty, skipped)


def write_parquet(
    table: Table,
    out: Path,
    *,
    neighbours: int = 5,
    reference: Table | None = None,
    device: torch.device,
    metadata: dict[str, Any],
    console: Console | None = None,
) -> None:
    """Write a table with the neighbours of its images, atomically, 4,096 rows in a group.

    Columns: path (string), path_bytes (binary, the path's bytes in the file system), embedding
    (list of float32), concentration and uncertainty (float32, null for SimSiam), embedding_norm
    (float32, its length), knn_distance (float32, 1 minus the mean cosine to the 20 nearest images),
    mahalanobis (float32, the squared distance to the mean of all images, see `Gaussian`),
    neighbours (list of strings, their paths) and similarities (list of float32, their cosines). The
    last two and knn_distance are null for 0 neighbours; a single image has no knn_distance. Strings
    must be UTF-8: other bytes of a path are escaped.

    Args:
        table: the images.
        out: the file.
        neighbours: of every image; 0 for none, which saves N^2 F operations. The covariance takes
            N F^2 in any case.
        reference: images that neighbours and the mean are of; None for the table's own, of which
            none is its own neighbour.
        device: where neighbours are computed.
        metadata: kept as JSON in the schema's metadata, under the key "vi_simsiam".
        console: shows progress; None for no output.
    """
    import pyarrow as pa
    from pyarrow import parquet

    text, number = pa.string(), pa.float32()
    columns = {
        "path": text,
        "path_bytes": pa.binary(),
        "embedding": pa.list_(number),
        "concentration": number,
        "uncertainty": number,
        "embedding_norm": number,
        "knn_distance": number,
        "mahalanobis": number,
        "neighbours": pa.list_(text),
        "similarities": pa.list_(number),
    }
    schema = pa.schema(columns, metadata={"vi_simsiam": json.dumps(metadata)})
    among = table if reference is None else reference
    keys = None if reference is None else reference.embedding
    most = max(neighbours, NEIGHBOURS)
    found = nearest(table.embedding, keys, most, device=device, block=_ROWS)
    gaussian = Gaussian(among.embedding)
    total = len(table.indices)

    def lists(rows: NDArray[np.float32]) -> Any:
        offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
        return pa.ListArray.from_arrays(offsets, np.ravel(rows))

    def group(rows: range) -> dict[str, Any]:
        values: dict[str, Any] = {name: pa.nulls(len(rows), kind) for name, kind in columns.items()}
        paths = [table.path(row) for row in rows]
        values["path"] = list(map(printable, paths))
        values["path_bytes"] = list(map(os.fsencode, paths))
        embedding = table.embedding[rows.start : rows.stop]
        values["embedding"] = lists(embedding)
        values["embedding_norm"] = lengths(embedding).astype(np.float32)
        values["mahalanobis"] = gaussian.distances(embedding).astype(np.float32)
        if table.concentration is not None and table.uncertainty is not None:
            values["concentration"] = table.concentration[rows.start : rows.stop]
            values["uncertainty"] = table.uncertainty[rows.start : rows.stop]
        if neighbours:
            which, cosines = (each.cpu().numpy() for each in next(found))
            if cosines.shape[1]:  # a single image has no neighbour
                values["knn_distance"] = knn_distances(cosines).astype(np.float32)
            which, cosines = which[:, :neighbours], cosines[:, :neighbours]
            values["neighbours"] = [[printable(among.path(row)) for row in near] for near in which]
            values["similarities"] = lists(cosines)
        return values

    def write(file: IO[bytes]) -> None:
        with _progress(console) as progress, parquet.ParquetWriter(file, schema) as writer:
            task = progress.add_task("neighbours" if neighbours else "writing", total=total)
            for start in range(0, total, _ROWS):
                rows = range(start, min(start + _ROWS, total))
                writer.write_table(pa.table(group(rows), schema=schema), row_group_size=_ROWS)
                progress.advance(task, len(rows))

    write_atomically(out, write)


def describe(encoder: Encoder, source: ImageSource, views: int | None, seed: int) -> dict[str, Any]:
    """The metadata of a table: the run, its method and dimensions, the view, and versions."""
    size = encoder.size
    view = f"shorter side resized to {size} pixels (bicubic), centre crop"
    if views is not None:
        view = (
            f"{counted(views, 'random global view')} of {size} pixels by the run's policy "
            f"(seed {seed}), product of experts"
        )
    return {
        "run": str(encoder.run.path.absolute()),
        "method": encoder.config.method,
        "trained_on": encoder.config.data,
        "images": source.name,
        "dim": encoder.model.dim,
        "features": encoder.model.features,
        "predicts_concentration": isinstance(encoder.model, VISimSiam),
        "view": view,
        "versions": {
            "vi-simsiam": __version__,
            **{name: version(name) for name in ("torch", "torchvision", "pillow", "pyarrow")},
        },
    }


def extremes(values: NDArray[Any], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the `count` lowest values, ascending, and of the `count` highest, descending.

    Equal values keep their order. No index is in both: of fewer than 2 `count` values the lower
    half is in the first.
    """
    order = np.argsort(values, kind="stable")
    low = min(count, -(-len(values) // 2))
    high = min(count, len(values) - low)
    return order[:low], order[::-1][:high]


def score_values(table: Table, by: Score, device: torch.device) -> NDArray[np.float64]:
    """The values of a score of all images of a table, (N,) float64; see `label_free.measured`.

    Raises:
        InputError: a single image has no neighbours.
    """
    if by == "kappa":
        assert table.concentration is not None
        return table.concentration.astype(np.float64)
    if by == "knn_distance" and len(table.indices) < 2:
        raise InputError("by: knn_distance needs at least 2 images; 1 can be read")
    return measured(by, table.embedding, device)


def write_ranking(table: Table, by: Score, values: NDArray[np.float64], out: Path) -> None:
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
    table: Table, by: Score, values: NDArray[np.float64], dim: int, k: int
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


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console is None or not console.is_terminal,
    )
