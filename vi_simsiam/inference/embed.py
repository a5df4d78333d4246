"""All images of a folder as a table: embedding, concentration, uncertainty and nearest neighbours, in a Parquet file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
from torch.nn import functional as F

from vi_simsiam import __version__
from vi_simsiam.data.sources import ImageSource, Unreadable
from vi_simsiam.engine.checkpoint import naming, write_atomically
from vi_simsiam.errors import InputError
from vi_simsiam.inference.encoder import Encoder
from vi_simsiam.models import VISimSiam
from vi_simsiam.paths import printable
from vi_simsiam.text import brief_repr, counted, one_line

_ROWS = 4096
"""Rows of a row group of the file, and images whose neighbours are looked for at a time."""
_KEYS = 16384
"""Images among which neighbours are looked for at a time."""


@dataclass(frozen=True)
class Table:
    """N images as a run encodes them, in the order of their source."""

    source: ImageSource
    indices: NDArray[np.int64]
    """(N,), which images of the source these are."""
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
        """Where the image of a row is to be found, as `os.fsdecode` has it."""
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

    Memory is bounded, but for 16 bytes an image: embeddings (4 F bytes an image, 2 kB for a ResNet-18) go to a file without
    a name in `folder`, which vanishes with the table.

    Args:
        encoder: the run.
        source: N images.
        folder: where the temporary file is made.
        views: see `Encoder.encode`.
        seed: see `Encoder.encode`.
        batch_size: see `Encoder.encode`.
        embeddings: whether to keep them; the table's are (N, 0) without.
        console: where progress and skipped images ("skipped: PATH (reason)") are shown; None for nowhere.

    Raises:
        InputError: the source is empty, none of its images can be read, or outputs are not finite.
    """
    if len(source) == 0:
        raise InputError(f"images: {source.name} holds no images")
    width = encoder.model.features if embeddings else 0
    skipped: list[Unreadable] = []
    indices: list[NDArray[np.int64]] = []
    concentration: list[NDArray[np.float32]] = []
    uncertainty: list[NDArray[np.float32]] = []
    with _progress(console) as progress, naming(folder), tempfile.TemporaryFile(dir=folder) as file:
        task = progress.add_task("encoding", total=len(source))

        def skip(entry: Unreadable) -> None:
            skipped.append(entry)
            progress.advance(task)
            if console is not None:
                line = one_line(printable(f"skipped: {entry.path} ({entry.reason})"))
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        for batch, encoding in encoder.stream(
            source, views=views, seed=seed, batch_size=batch_size, skipped=skip
        ):
            indices.append(batch.numpy())
            if embeddings:
                file.write(encoding.embedding.numpy().tobytes())
            if encoding.concentration is not None:
                concentration.append(encoding.concentration.numpy())
                uncertainty.append(encoding.uncertainty.numpy())
            progress.advance(task, len(batch))
        if not indices:
            first = f"{skipped[0].path} ({skipped[0].reason})"
            raise InputError(
                f"images: {source.name} has {counted(len(source), 'image')}, but none that can be read: {first}"
            )
        file.flush()
        count = sum(len(batch) for batch in indices)
        kept = (
            np.memmap(file, np.float32, "r", shape=(count, width))
            if width
            else np.empty((count, 0), np.float32)
        )
    predicted = bool(concentration)
    return Table(
        source,
        np.concatenate(indices),
        kept,
        np.concatenate(concentration) if predicted else None,
        np.concatenate(uncertainty) if predicted else None,
        skipped,
    )


def nearest(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32] | None,
    count: int,
    *,
    device: torch.device,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """The keys of largest cosine to every query, found block by block; exact, in N x K x F operations.

    Args:
        queries: (N, F), on the disk or in memory; a row of zeros has cosine 0 to everything.
        keys: (K, F); None for the queries themselves, of which none is its own neighbour.
        count: of neighbours; there are fewer where there are fewer keys.
        device: where to compute.

    Yields:
        For each block of 4,096 queries (the last may be smaller): which keys, (B, count) int64, and the cosines, (B, count)
        float32, falling; equal ones in the order of the keys.
    """
    own = keys is None
    keys = queries if keys is None else keys
    count = min(count, len(keys) - own)
    for start in range(0, len(queries), _ROWS):
        rows = _unit(queries[start : start + _ROWS], device)
        best = rows.new_empty((len(rows), 0))
        which = torch.empty((len(rows), 0), dtype=torch.int64, device=device)
        for first in range(0, len(keys), _KEYS):
            cosine = rows @ _unit(keys[first : first + _KEYS], device).mT
            if own:
                mine = torch.arange(start, start + len(rows), device=device)
                inside = (mine >= first) & (mine < first + cosine.shape[1])
                cosine[inside.nonzero().squeeze(1), mine[inside] - first] = -torch.inf
            values, places = cosine.topk(min(count, cosine.shape[1]), dim=1)
            # Ordered by place first, so that the stable sort by cosine keeps that order among equal ones.
            places, by_place = places.sort(dim=1)
            which = torch.cat([which, places + first], dim=1)
            best, order = torch.cat([best, values.gather(1, by_place)], dim=1).sort(
                dim=1, descending=True, stable=True
            )
            which = which.gather(1, order)[:, :count]
            best = best[:, :count]
        yield which.cpu().numpy(), best.cpu().numpy()


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
    """Write a table with the neighbours of its images, whole or not at all, 4,096 rows in a group.

    Columns: path (string), path_bytes (binary, the path as the file system has it), embedding (list of float32),
    concentration and uncertainty (float32, null for SimSiam), neighbours (list of strings, their paths) and similarities
    (list of float32, their cosines; both null for 0 neighbours). Strings must be UTF-8: other bytes of a path are escaped.

    Args:
        table: the images.
        out: the file.
        neighbours: of every image; 0 for none, which saves N^2 F operations.
        reference: among which images; None for the table's own.
        device: where neighbours are computed.
        metadata: kept as JSON in the schema's metadata, under the key "vi_simsiam".
        console: where progress is shown; None for nowhere.
    """
    import pyarrow as pa
    from pyarrow import parquet

    text, number = pa.string(), pa.float32()
    schema = pa.schema(
        [
            ("path", text),
            ("path_bytes", pa.binary()),
            ("embedding", pa.list_(number)),
            ("concentration", number),
            ("uncertainty", number),
            ("neighbours", pa.list_(text)),
            ("similarities", pa.list_(number)),
        ],
        metadata={"vi_simsiam": json.dumps(metadata)},
    )
    among = table if reference is None else reference
    keys = None if reference is None else reference.embedding
    found = nearest(table.embedding, keys, neighbours, device=device) if neighbours else None

    def write(file: IO[bytes]) -> None:
        with _progress(console) as progress, parquet.ParquetWriter(file, schema) as writer:
            task = progress.add_task(
                "neighbours" if neighbours else "writing", total=len(table.indices)
            )
            for start in range(0, len(table.indices), _ROWS):
                rows = slice(start, min(start + _ROWS, len(table.indices)))
                count = rows.stop - start
                which, cosine = (None, None) if found is None else next(found)
                paths = [table.path(row) for row in range(start, rows.stop)]
                columns = [
                    pa.array(map(printable, paths), text),
                    pa.array(map(os.fsencode, paths), pa.binary()),
                    _lists(pa, table.embedding[rows]),
                    *(
                        pa.nulls(count, number)
                        if column is None
                        else pa.array(column[rows], number)
                        for column in (table.concentration, table.uncertainty)
                    ),
                    pa.nulls(count, pa.list_(text))
                    if which is None
                    else pa.array(
                        [[printable(among.path(row)) for row in near] for near in which.tolist()],
                        pa.list_(text),
                    ),
                    pa.nulls(count, pa.list_(number)) if cosine is None else _lists(pa, cosine),
                ]
                writer.write_table(pa.table(columns, schema=schema), row_group_size=_ROWS)
                progress.advance(task, count)

    write_atomically(out, write)


def describe(encoder: Encoder, source: ImageSource, views: int | None, seed: int) -> dict[str, Any]:
    """What a table was made with: the run, its method and dimensions, the view, and versions."""
    size = encoder.size
    fixed = f"shorter side resized to {size} pixels (bicubic), centre crop"
    drawn = f"{counted(views or 0, 'random global view')} of {size} pixels by the run's policy (seed {seed}), product of experts"
    return {
        "run": str(encoder.run.path.absolute()),
        "method": encoder.config.method,
        "trained_on": encoder.config.data,
        "images": source.name,
        "dim": encoder.model.dim,
        "features": encoder.model.features,
        "predicts_concentration": isinstance(encoder.model, VISimSiam),
        "view": fixed if views is None else drawn,
        "versions": {
            "vi-simsiam": __version__,
            **{name: version(name) for name in ("torch", "torchvision", "pillow", "pyarrow")},
        },
    }


def _unit(rows: NDArray[np.float32], device: torch.device) -> Tensor:
    return F.normalize(torch.from_numpy(np.array(rows)).to(device), dim=1)


def _lists(pa: Any, rows: NDArray[np.float32]) -> Any:
    """Rows of a matrix as an Arrow array of lists."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(np.ravel(rows), pa.float32())
    )


@contextmanager
def _progress(console: Console | None) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    shown = console is not None and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        yield progress
