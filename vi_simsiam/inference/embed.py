"""Encodings of all images of a folder, and a Parquet file of them with their neighbours."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from vi_simsiam import __version__
from vi_simsiam.data.sources import ImageSource, Unreadable
from vi_simsiam.engine.forward import nearest
from vi_simsiam.errors import InputError
from vi_simsiam.files import naming, write_atomically
from vi_simsiam.inference.encoder import Encoder
from vi_simsiam.inference.label_free import (
    AGREEMENT,
    NEIGHBOURS,
    Gaussian,
    knn_distances,
    lengths,
    neighbour_agreement,
)
from vi_simsiam.models import VISimSiam
from vi_simsiam.paths import printable
from vi_simsiam.text import brief_repr, counted, print_line

_ROWS = 4096
"""Rows in a row group of the file."""


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
    scores: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """(N,) each, by name: the lengths of the stages' pooled outputs ("layer1_norm"), and what
    `with_agreement` adds."""

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

    Memory is bounded, but for 32 bytes an image: embeddings (4 F bytes an image, 2 kB for a
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
    norms: list[dict[str, Tensor]] = []
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
            norms.append(encoding.layer_norms)
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
    scores = {
        f"{name}_norm": torch.cat([each[name] for each in norms]).numpy() for name in norms[0]
    }
    concentration = uncertainty = None
    if predicted:
        concentration, uncertainty = map(np.concatenate, zip(*predicted, strict=True))
    return Table(source, numbers, kept, concentration, uncertainty, skipped, scores)


def with_agreement(
    tables: Sequence[Table], references: Sequence[Table] | None, device: torch.device
) -> Table:
    """The first table with the score "neighbour_agreement" of all, see `label_free`.

    There is none of a single table, or where images have no neighbours.

    Args:
        tables: of the same images by several runs.
        references: images that neighbours are among, by the same runs; None for those of `tables`.
        device: where neighbours are computed.

    Raises:
        InputError: an image could be read for one run only.
    """
    among = tables if references is None else references
    for parts in (tables, among):
        if any(not np.array_equal(part.indices, parts[0].indices) for part in parts):
            raise InputError(
                f"images: {parts[0].source.name} changed while the runs read it; start again"
            )
    first, count = tables[0], len(among[0].indices) - (references is None)
    if len(tables) == 1 or count == 0:
        return first
    keys = [None if references is None else table.embedding for table in among]
    column = neighbour_agreement([table.embedding for table in tables], keys, device)
    return dataclasses.replace(first, scores={**first.scores, AGREEMENT: column.astype(np.float32)})


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
    (float32, its length), the table's `scores` (float32), knn_distance (float32, 1 minus the mean
    cosine to the 20 nearest images), mahalanobis (float32, the squared distance to the mean of all
    images, see `Gaussian`), neighbours (list of strings, their paths) and similarities (list of
    float32, their cosines). The last two and knn_distance are null for 0 neighbours; a single image
    has no knn_distance. Strings must be UTF-8: other bytes of a path are escaped.

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
        **dict.fromkeys(table.scores, number),
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
        values |= {name: score[rows.start : rows.stop] for name, score in table.scores.items()}
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
