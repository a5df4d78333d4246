"""Images that files name or hold: lists of paths, CSV, Parquet and tar archives.

    list:FILE       one path a line
    csv:FILE        a header, and a line for each image; ?path=COLUMN&label=COLUMN&split=COLUMN
    parquet:PATH    files in the layout of Hugging Face's data sets, see `data.parquet`
    tar:PATH        archives in WebDataset's layout, see `data.tar`

PATH is a file, a folder, or a pattern such as train-*.tar or train-{000..012}.tar. Files are listed
here; images are read when they are decoded.
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

import numpy as np

from vi_simsiam.config import DecodeConfig
from vi_simsiam.data.sources import FileSource
from vi_simsiam.errors import InputError, cut
from vi_simsiam.files import read_bytes
from vi_simsiam.text import counted

_PATH_COLUMNS = ("path", "file", "filename", "filepath", "file_name", "image", "image_path")
_LABEL_COLUMNS = ("label", "class", "category", "target")
_SPLIT_COLUMNS = ("split", "part", "fold")
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_MOST_BYTES = 1 << 30
_MOST_FILES = 1_000_000
_SHOWN = 3


class Entry(NamedTuple):
    """An image of a data set."""

    path: str
    """The file, or an `Inside`."""
    label: str | None = None
    """Class name; None without one."""
    part: str = ""
    """The part that it belongs to: train, val, test, or empty where no part is named."""


class Listed(NamedTuple):
    """The images of a data set."""

    entries: list[Entry]
    classes: Sequence[str] = ()
    """Class names in their order, where the files give one."""
    notes: Sequence[str] = ()
    """See `ImageSource`."""


def sources(
    name: str, listed: Listed, decode: DecodeConfig
) -> tuple[FileSource, FileSource | None]:
    """Return the training images and the validation images, None without any.

    Images without a part are training images, and so are all of them where none is. Test images are
    the validation part where there is no other, and else left out, with a note. A path counts once
    in each part. Classes are the labels of both parts, in the order of `listed`, or else by number,
    if all of them are numbers, or by name.

    Raises:
        InputError: there is no image, or some images of a part have a label and others have none.
    """
    parts: dict[str, dict[str, str | None]] = {"train": {}, "val": {}, "test": {}}
    contradicted: list[str] = []
    for path, label, part in listed.entries:
        if parts[part or "train"].setdefault(path, label) != label:
            contradicted.append(path)
    notes = list(listed.notes)
    if contradicted:
        notes.append(
            f"{name}: {counted(len(contradicted), 'image')} with two labels, of which the first is "
            f"used, such as {contradicted[0]}"
        )
    if repeated := len(listed.entries) - sum(map(len, parts.values())):
        notes.append(f"{name}: {counted(repeated, 'further mention')} of the same image left out")
    if not parts["train"]:  # a part on its own, named by the user
        parts = {"train": parts["val"] | parts["test"], "val": {}, "test": {}}
    if not parts["train"]:
        raise InputError(f"data: {name} names no image")
    if parts["test"] and parts["val"]:
        notes.append(f"{name}: {counted(len(parts['test']), 'image')} of the test part left out")
    used = {"train": parts["train"], "val": parts["val"] or parts["test"]}
    if both := [path for path in used["val"] if path in used["train"]]:
        notes.append(
            f"{name}: {counted(len(both), 'image')} in the training and the validation part, such "
            f"as {both[0]}; --distinct leaves them out of both"
        )
    for part, images in used.items():
        without = [path for path, label in images.items() if label is None]
        if 0 < len(without) < len(images):
            raise InputError(
                f"data: {name}: {len(without):,} of {len(images):,} {part} images have no label, "
                f"such as {without[0]}; label all of them or none"
            )
    found = {label for images in used.values() for label in images.values() if label is not None}
    classes = [each for each in listed.classes if each in found]
    if not found <= set(classes):
        numbers = all(re.fullmatch(r"-?\d{1,18}", label) for label in found)
        classes = sorted(found, key=int if numbers else str)
    labelled = any(label is not None for label in parts["train"].values())
    numbers_of = {label: number for number, label in enumerate(classes)}

    def source(part: str) -> FileSource:
        images = used[part]
        has_labels = labelled and None not in images.values()
        labels = [numbers_of[label] for label in images.values() if label is not None]
        return FileSource(
            list(images),
            np.array(labels, np.int64) if has_labels else None,
            classes if has_labels else None,
            f"{name}/{part}" if used["val"] else name,
            decode=decode,
            notes=notes if part == "train" else (),
        )

    return source("train"), source("val") if used["val"] else None


def read_list(place: str) -> Listed:
    """Read a text file of paths, relative to its folder; blank lines are skipped."""
    lines = (line.strip() for line in _text(place).splitlines())
    return Listed([Entry(_beside(place, line)) for line in lines if line])


def read_csv(place: str) -> Listed:
    """Read a table with a header; its columns are named in `place` or recognised by their names.

    Values are separated by commas, semicolons or tabs, whichever the header has most of.

    Raises:
        InputError: no such file, no column of paths, or a value that is no part.
    """
    columns: dict[str, str] = {}
    if not os.path.exists(place) and (match := re.fullmatch(r"(.+?)\?(.*)", place, re.DOTALL)):
        place, columns = match[1], dict(parse_qsl(match[2]))
        if unknown := columns.keys() - {"path", "label", "split"}:
            raise InputError(
                f"data: csv: {', '.join(sorted(unknown))} is not accepted; columns are named by "
                "?path=COLUMN&label=COLUMN&split=COLUMN"
            )
    text = _text(place)
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        header = [name.strip() for name in next(table, [])]
        path = _column(place, header, columns.get("path"), _PATH_COLUMNS)
        label = _column(place, header, columns.get("label"), _LABEL_COLUMNS)
        split = _column(place, header, columns.get("split"), _SPLIT_COLUMNS)
        if path is None:
            raise InputError(
                f"data: {place} has no column {' or '.join(_PATH_COLUMNS)}; its columns are "
                f"{cut(', '.join(header)) or 'none'}; name that of the paths: "
                f"csv:{place}?path=COLUMN"
            )
        entries = []
        for row in filter(None, table):
            if len(row) != len(header):
                raise InputError(
                    f"data: {place}: line {table.line_num:,} has {counted(len(row), 'value')}, "
                    f"the header has {len(header):,}"
                )
            part = "" if split is None else row[split].strip()
            if part.lower() not in ("", *_PARTS):
                raise InputError(
                    f"data: {place}: line {table.line_num:,}: {cut(part)!r} is no part; accepted "
                    f"are {', '.join(_PARTS)}"
                )
            own = None if label is None else row[label].strip() or None
            file = _beside(place, row[path].strip())
            entries.append(Entry(file, own, _PARTS.get(part.lower(), "")))
    except csv.Error as error:
        line = f"line {table.line_num:,}"
        raise InputError(f"data: {place} is no CSV file ({line}: {error})") from None
    return Listed(entries)


def matching(place: str, suffix: str) -> list[str]:
    """Return the files of a path: itself, those with this suffix in a folder, or a pattern's.

    Raises:
        InputError: there is none, or one of those that braces name is not there.
    """
    if os.path.isdir(place):
        pattern = os.path.join(glob.escape(place), "**", f"*{suffix}")
        files = sorted(glob.iglob(pattern, recursive=True))
        if not files:
            raise InputError(f"data: {place} holds no *{suffix} file")
        return files
    if os.path.exists(place):
        return [place]
    files, missing = [], []
    for pattern in itertools.islice(_expanded(place), _MOST_FILES):
        found = sorted(glob.glob(pattern, recursive=True))
        files += found
        if not found:
            missing.append(pattern)
    if missing:
        names = ", ".join(missing[:_SHOWN]) + ", ..." * (len(missing) > _SHOWN)
        raise InputError(f"data: no such file: {cut(names)}")
    return list(dict.fromkeys(files))


def part_of(file: str) -> str:
    """Return the part that a file's name, or else its folder's, begins with or ends in."""
    for name in (Path(file).stem, Path(file).parent.name):
        words = re.split(r"[-_.]", name.lower())
        for word in (words[0], words[-1]):
            if word in _PARTS:
                return _PARTS[word]
    return ""


def _expanded(pattern: str) -> Iterator[str]:
    """The names that braces stand for: {000..012} counts, up or down, {a,b} has alternatives."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    for name in _counting(first, last) if words is None else words.split(","):
        yield from _expanded(f"{pattern[: match.start()]}{name}{pattern[match.end() :]}")


def _counting(first: str, last: str) -> Iterator[str]:
    """Numbers from one to another, as a shell counts: all of one length if an end begins with 0."""
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    start, stop = int(first), int(last)
    step = 1 if start <= stop else -1
    return (f"{number:0{width}}" for number in range(start, stop + step, step))


def _text(place: str) -> str:
    content = read_bytes(Path(place), "data", most=_MOST_BYTES)
    if b"\0" in content:
        raise InputError(f"data: {place} is no text file")
    return content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def _beside(place: str, path: str) -> str:
    return os.path.join(os.path.dirname(place), path)


def _column(place: str, header: list[str], named: str | None, known: tuple[str, ...]) -> int | None:
    if named is not None and named not in header:
        columns = cut(", ".join(header))
        raise InputError(f"data: {place} has no column {cut(named)!r}; its columns are {columns}")
    lower = [name.lower() for name in header]
    found = [header.index(named)] if named is not None else []
    return next(iter(found or [lower.index(name) for name in known if name in lower]), None)
