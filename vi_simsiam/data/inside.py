"""Images inside larger files: members of tar archives, and rows of Parquet files.

Each is read on demand: a member by its place in the archive, a row with its row group, of which the
last two stay in memory.
"""

from __future__ import annotations

import io
import os
import threading
from abc import abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

from vi_simsiam.files import open_regular

_KEPT_GROUPS = 2  # threads that read in order are at two of them for a while


class Inside(str):
    """The name of an image inside a file, such as "SHARD.tar/cat.jpg"; no path on the disk."""

    file: str
    """Path of the file."""
    size: int
    """Bytes of the image; -1 where only reading it gives them."""
    place: tuple[int, ...]
    """Where it lies in the file."""

    @abstractmethod
    def read(self) -> bytes:
        """Return the image's bytes. Raises ValueError or OSError if they are not there."""


class Member(Inside):
    """An image in a tar archive: its bytes from `start` on."""

    name: str
    """The member's name."""

    def __new__(cls, file: str, name: str, start: int, size: int) -> Member:
        """Name an image."""
        self = super().__new__(cls, f"{file}/{name}")
        self.file, self.name, self.size, self.place = file, name, size, (start, size)
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # type: ignore[override]
        return self.file, self.name, *self.place

    def read(self) -> bytes:
        """Return the image's bytes."""
        with open_regular(Path(self.file)) as file:
            file.seek(self.place[0])
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError("the archive ends within it")
        return content


class Row(Inside):
    """An image in a Parquet file: row `index` of a row group, counted as `number` in the file."""

    column: str
    """The column of images."""

    def __new__(cls, file: str, column: str, number: int, group: int, index: int) -> Row:
        """Name an image."""
        self = super().__new__(cls, f"{file}:{number}")
        self.file, self.column, self.size = file, column, -1
        self.place = (number, group, index)
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:  # type: ignore[override]
        return self.file, self.column, *self.place

    def read(self) -> bytes:
        """Return the image's bytes."""
        _, group, index = self.place
        cell = _groups.column(self.file, self.column, group)[index].as_py()
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(content, bytes):
            raise ValueError("the row holds no image")
        return content


def file_of(path: str) -> str:
    """Return the file on the disk that holds an image: itself, or the one that it lies in."""
    return path.file if isinstance(path, Inside) else path


def open_image(path: str) -> BinaryIO:
    """Open an image's bytes. Raises ValueError or OSError if they are not there."""
    return io.BytesIO(path.read()) if isinstance(path, Inside) else open_regular(Path(path))


def byte_count(path: str) -> int:
    """Return the number of an image's bytes; -1 for a row, which must be read for it."""
    return path.size if isinstance(path, Inside) else os.path.getsize(path)


class _Groups:
    """The image columns of the row groups read last by this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.columns: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def column(self, file: str, column: str, group: int) -> Any:
        """Return one column of a row group, a pyarrow ChunkedArray."""
        import pyarrow.parquet as pq
        import pyarrow.types as kinds

        status = os.stat(file)
        key = (file, status.st_size, status.st_mtime_ns, column, group)
        with self.lock:
            if key not in self.columns:
                while len(self.columns) >= _KEPT_GROUPS:
                    self.columns.popitem(last=False)
                with open_regular(Path(file)) as opened:
                    kind, leaf = pq.read_schema(opened).field(column).type, column
                    while kinds.is_struct(kind):
                        kind, leaf = kind.field("bytes").type, f"{leaf}.bytes"
                    opened.seek(0)
                    # One image that many rows name would fill memory; it stays in a dictionary.
                    parquet = pq.ParquetFile(opened, read_dictionary=[leaf])
                    read = parquet.read_row_group(group, columns=[column], use_threads=False)
                self.columns[key] = read.column(0)
            self.columns.move_to_end(key)
            return self.columns[key]


_groups = _Groups()
if hasattr(os, "register_at_fork"):  # another thread may hold the lock while a process is forked
    os.register_at_fork(after_in_child=_groups.__init__)  # type: ignore[misc]
