"""Names of data sets as they are saved: a published set's, or KIND:PLACE."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from vi_simsiam.errors import InputError, cut
from vi_simsiam.paths import user_path

NAMED_DATA = ("fashion-mini", "cifar10", "imagenette", "imagewoof")
"""Data sets with a name."""

LISTING_KINDS = ("list", "csv", "parquet", "tar")
"""Kinds of files that name images or hold them."""

FOREIGN_KINDS = ("near", "far")
"""Kinds of images that a run was not trained on, by their distance from its own."""

_KINDS = ("folder", "pack", *LISTING_KINDS)
_COLUMNS = re.compile(r"\?(path|label|split)=.*$")
"""Names of columns behind a CSV file's path."""
_BY_SUFFIX = {".txt": "list", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".tar": "tar"}


def data_spec(text: str) -> str:
    """Name a data set as it is saved: an existing folder as folder:PATH, a file by its suffix.

    A file without one of the suffixes of lists and archives is a pack, pack:FILE.
    """
    if text in NAMED_DATA or not text:
        return text
    kind, colon, path = text.partition(":")
    if colon and kind in ("folders", *_KINDS):
        return _each(text, lambda place: str(user_path("data", place))) if path else text
    place = user_path("data", text)
    if place.is_dir():
        return f"folder:{place}"
    return f"{_BY_SUFFIX.get(place.suffix.lower(), 'pack')}:{place}" if place.is_file() else text


def located_spec(text: str) -> str:
    """The same with absolute paths."""
    return _each(data_spec(text), lambda place: str(Path(place).absolute()))


def foreign_spec(text: str) -> tuple[str, str]:
    """Kind and data set of near=DATA and far=DATA; of DATA alone the kind is "given"."""
    kind, equals, data = text.partition("=")
    return (kind, data) if equals and kind in FOREIGN_KINDS else ("given", text)


def joined_spec(folders: Sequence[str | os.PathLike[str]]) -> str:
    """One name for several folders of images, folders:[...]; a single name is left as it is.

    Raises:
        InputError: no folder is given, or one of them is something else.
    """
    names = [os.fspath(folder) for folder in folders]
    if len(names) == 1:
        return names[0]
    specs = [data_spec(name) for name in names]
    for name, spec in zip(names, specs, strict=True):
        kind, colon, _ = spec.partition(":")
        if spec in NAMED_DATA or (colon and kind in ("folders", *_KINDS) and kind != "folder"):
            raise InputError(f"data: {name} is no folder; several names must be folders of images")
    if not specs:
        raise InputError("data: an empty list is not accepted; it must be a name or folders")
    return f"folders:{json.dumps([spec.removeprefix('folder:') for spec in specs])}"


def data_label(data: str) -> str:
    """A data set without the folders above it: folder:NAME for folder:/some/where/NAME."""
    kind, colon, _ = data.partition(":")
    names = (Path(_COLUMNS.sub("", place)).name for place in data_places(data))
    return f"{kind}:{'+'.join(names)}" if colon else data


def data_places(data: str) -> list[str]:
    """The places in KIND:PLACE, of which folders:[...] has several; none in a published name.

    Raises:
        InputError: the list of folders is no JSON list of paths.
    """
    kind, colon, place = data.partition(":")
    if kind != "folders":
        return [place] if colon else []
    try:
        places = json.loads(place)
    except (ValueError, RecursionError):
        places = None
    if not isinstance(places, list) or not all(isinstance(x, str) and x for x in places):
        raise InputError(f"data: {cut(data)} is not accepted; it must be folders:[PATH, PATH, ...]")
    return places


def _each(spec: str, change: Callable[[str], str]) -> str:
    kind, colon, place = spec.partition(":")
    if not colon or not place or kind not in ("folders", *_KINDS):
        return spec
    if kind == "folders":
        return f"folders:{json.dumps([change(each) for each in data_places(spec)])}"
    return f"{kind}:{change(place)}"
