"""Parquet files in the layout of Hugging Face's data sets.

Images are a column of binary values, or of structs with a binary field "bytes"; labels are one of
integers or strings. The names of integer labels are those of the feature ClassLabel, which the
library `datasets` writes into the schema's metadata under "huggingface".
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from vi_simsiam.data.inside import Row
from vi_simsiam.data.listing import Entry, Listed, matching, part_of
from vi_simsiam.errors import InputError, cut
from vi_simsiam.files import open_regular, parse_json
from vi_simsiam.text import counted

_MOST_BYTES = 1 << 32
"""Bytes of a row group's images, and of a file's labels."""
_LABELS = ("label", "labels", "class", "category", "target", "fine_label")


def read_parquet(place: str) -> Listed:
    """List the images in Parquet files: of each row group the number of rows, and all labels.

    Raises:
        InputError: no such file, one that is damaged or holds no images, or a row group of more
            than 4 GiB.
    """
    entries: list[Entry] = []
    classes: dict[str, None] = {}
    notes = []
    for file in matching(place, ".parquet"):
        try:
            with open_regular(Path(file)) as opened:
                found, names, note = _read(file, opened)
        except InputError as error:
            raise InputError(f"data: {file} {error}") from None
        # pyarrow has exceptions of its own and Python's, among them OSError without a number.
        except Exception as error:
            reason = cut(" ".join(str(error).split())) or type(error).__name__
            raise InputError(f"data: {file} is no Parquet file, or damaged ({reason})") from error
        entries += found
        classes |= dict.fromkeys(names)
        notes += note
    return Listed(entries, tuple(classes), notes)


def _read(file: str, opened: Any) -> tuple[list[Entry], list[str], list[str]]:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(opened)
    schema, metadata = parquet.schema_arrow, parquet.metadata
    features = _features(schema)
    images = [field.name for field in schema if _holds_images(field.type)]
    declared = [name for name in images if features.get(name, {}).get("_type") == "Image"]
    if not images:
        columns = cut(", ".join(schema.names))
        raise InputError(f"holds no images: no column of bytes among {columns or 'none'}")
    column = (declared or images)[0]
    notes = []
    if others := [name for name in declared or images if name != column]:
        notes.append(f"{file}: images are read from column {column}, not {cut(', '.join(others))}")
    label = next(
        (name for name, each in features.items() if each.get("_type") == "ClassLabel"),
        next((name for name in _LABELS if name in schema.names), None),
    )
    # A damaged or made-up header could count more rows than memory holds.
    if metadata.num_rows > os.fstat(opened.fileno()).st_size:
        raise InputError(f"names {metadata.num_rows:,} rows, more than it has bytes")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    read = {name: [_bytes(group, name) for group in groups] for name in (column, label) if name}
    if max((*read[column], sum(read.get(label or "", []))), default=0) > _MOST_BYTES:
        raise InputError(
            f"has a row group of more than {_MOST_BYTES >> 30} GiB of images, or more of labels; "
            "write it again with fewer rows a group"
        )
    names = features.get(label or "", {}).get("names", [])
    labels: list[str | None] = [None] * metadata.num_rows
    if label is not None and label in schema.names:
        labels = _labels(opened, label, names)
    part = part_of(file)
    places = (
        (number, index) for number, group in enumerate(groups) for index in range(group.num_rows)
    )
    entries = [
        Entry(Row(file, column, row, group, index), name, part)
        for row, ((group, index), name) in enumerate(zip(places, labels, strict=True))
    ]
    return entries, names, notes


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds_images(kind.field(at).type)
    return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind)) or str(kind) == "binary_view"


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The features that `datasets` has declared, by column; empty without any."""
    encoded = (schema.metadata or {}).get(b"huggingface", b"")
    with contextlib.suppress(ValueError):
        content = parse_json(encoded, dict[str, dict[str, dict[str, Any]]])
        features = content.get("info", {}).get("features", {})
        found = {name: each for name, each in features.items() if isinstance(each, dict)}
        if all(
            isinstance(names := each.get("names", []), list)
            and all(isinstance(name, str) for name in names)
            for each in found.values()
        ):
            return found
    return {}


def _labels(opened: Any, label: str, names: list[str]) -> list[str | None]:
    """The labels of all rows; those below 0 are `datasets`' sign for an unknown one."""
    import pyarrow.parquet as pq
    import pyarrow.types as kinds

    opened.seek(0)
    # Strings stay numbers of a dictionary: written once and named often, they could fill memory.
    parquet = pq.ParquetFile(opened, read_dictionary=[label])
    column = parquet.read(columns=[label], use_threads=False).column(0)
    labels: list[str | None] = []
    for chunk in column.chunks:
        values: list[str | None] | None = None
        if kinds.is_null(chunk.type):
            labels += [None] * len(chunk)
            continue
        if kinds.is_dictionary(chunk.type):
            values, chunk = chunk.dictionary.to_pylist(), chunk.indices
        if not kinds.is_integer(chunk.type) or (values and not isinstance(values[0], str)):
            raise InputError(
                f"has labels of type {chunk.type} in column {label}; accepted are integers and text"
            )
        for number in chunk.to_pylist():
            if number is None or (values is None and number < 0):
                labels.append(None)
            elif values is not None:
                labels.append(values[number])
            elif names and number >= len(names):
                classes = counted(len(names), "class", "classes")
                raise InputError(f"has the label {number}, but names for {classes}")
            else:
                labels.append(names[number] if names else str(number))
    return labels


def _bytes(group: Any, name: str) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(
        each.total_uncompressed_size
        for each in columns
        if each.path_in_schema == name or each.path_in_schema.startswith(f"{name}.")
    )
