"""Images in a folder: files that Pillow opens, each counted once, and what is passed over."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import stat
from collections import Counter, deque
from typing import NamedTuple

from PIL import Image

from vi_simsiam.errors import InputError
from vi_simsiam.text import counted

# EPS starts Ghostscript, WMF is drawn by Windows alone, and Pillow cannot decode the others.
_NEVER = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_BY_CONTENT = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000", "HEIF")
"""Formats that are recognised by their first bytes, whatever the file's name."""
_PLUGINS = ("pillow_heif", "pillow_avif", "pillow_jxl")
"""Modules that make Pillow open further formats."""
_PLUGIN_OF = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
    ".avif": "pillow-avif-plugin",
    ".jxl": "pillow-jxl-plugin",
}
_SHOWN = 8
ARRAY = ".npy"


class Found(NamedTuple):
    """The images of a folder, and its other files."""

    paths: list[str]
    """Sorted by name, level by level."""
    passed_over: Counter[str]
    """Numbers of files that are no images, by suffix in lower case; "" without one."""
    repeated: list[tuple[str, str]]
    """Further names (links, symbolic or hard) of images and folders, with the one that counts."""

    def note(self) -> str:
        """Return one line on what is passed over; empty if nothing is."""
        parts = []
        if self.passed_over:
            common = self.passed_over.most_common(_SHOWN)
            kinds = [f"{count:,} {_kind(suffix)}" for suffix, count in common]
            if (more := len(self.passed_over) - _SHOWN) > 0:
                kinds.append(counted(more, "other suffix", "other suffixes"))
            files = counted(self.passed_over.total(), "file")
            parts.append(f"{files} passed over: {', '.join(kinds)}")
        if self.repeated:
            names = counted(len(self.repeated), "further name")
            parts.append(f"{names} (links) of images and folders left out")
        return "; ".join(parts)


def find_images(folder: str | os.PathLike[str], *, arrays: bool = False) -> Found:
    """Find all images in a folder and the folders in it.

    Hidden files and folders are skipped. Links are followed, but every folder is visited and every
    file counted once: under its own name rather than a link's, and of several names under the
    first, level by level and by name. An image that cannot be reached is counted, to be reported
    when it is read. With `arrays`, .npy files are images, too. Raises InputError if a folder cannot
    be listed.
    """
    root = os.fspath(folder)
    real_root = os.path.realpath(root)
    paths: list[str] = []
    passed_over: Counter[str] = Counter()
    repeated: list[tuple[str, str]] = []
    seen: dict[tuple[int, int], str] = {}
    folders, links = deque([root]), deque[str]()

    def is_new(path: str, status: os.stat_result) -> bool:
        first = seen.setdefault((status.st_dev, status.st_ino), path)
        if first not in (path, root):
            repeated.append((path, first))
        return first == path

    def take(path: str) -> None:
        try:
            status = os.stat(path)
        except OSError:  # a broken link, or a file in a folder that may not be entered
            if _suffix(path) in _suffixes() or (arrays and _suffix(path) == ARRAY):
                paths.append(path)
            else:
                passed_over["broken links" if os.path.islink(path) else _suffix(path)] += 1
            return
        if not stat.S_ISREG(status.st_mode):
            return
        if not is_image(path) and not (arrays and _suffix(path) == ARRAY):
            passed_over[_suffix(path)] += 1
        elif is_new(path, status):
            paths.append(path)

    while folders or links:
        if not folders:
            path = links.popleft()
            if not os.path.isdir(path):
                take(path)
            # A link to a folder that holds this one would give the images beside it, too.
            elif not real_root.startswith(os.path.join(os.path.realpath(path), "")):
                folders.append(path)
            continue
        place = folders.popleft()
        entries = list_folder(place)
        for entry in entries if is_new(place, os.stat(place)) else ():
            if entry.is_symlink():
                links.append(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            else:
                take(entry.path)
    paths.sort(key=lambda path: path[len(root) :].split(os.sep))
    return Found(paths, passed_over, repeated)


def list_folder(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return the visible entries of a folder by name. Raises InputError if it cannot be listed."""
    try:
        with os.scandir(os.fspath(folder)) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror})") from error
    return sorted(visible, key=lambda entry: entry.name)


def is_image(path: str) -> bool:
    """Return True if Pillow opens files of this suffix, or this file if it has none."""
    if _suffix(path):
        return _suffix(path) in _suffixes()
    if os.path.isfile(path):  # reading a pipe would block forever
        with contextlib.suppress(Exception), Image.open(path, formats=formats(path)):
            return True
    return False


def has_image_suffix(name: str) -> bool:
    """Return True if Pillow opens files of this suffix; no file of this name is looked at."""
    return _suffix(name) in _suffixes()


def formats(path: str) -> list[str]:
    """Return the formats that a file may have: those recognised by content, and its suffix's."""
    by_suffix = _suffixes().get(_suffix(path), "JPEG")
    return [name for name in dict.fromkeys((*_BY_CONTENT, by_suffix)) if name in Image.OPEN]


@functools.cache
def _suffixes() -> dict[str, str]:
    """Suffixes, in lower case, of the formats that this installation of Pillow opens."""
    for module in _PLUGINS:
        with contextlib.suppress(ImportError):
            plugin = importlib.import_module(module)
            if register := getattr(plugin, "register_heif_opener", None):
                register()
    # JPEG opens the first picture of a stereo pair.
    known = Image.registered_extensions() | {".mpo": "JPEG"}
    opened = Image.OPEN.keys() - _NEVER
    return {suffix: name for suffix, name in known.items() if name in opened}


def _suffix(path: str) -> str:
    """The suffix in lower case; a number, as in names that scanners give, is none."""
    suffix = os.path.splitext(path)[1].lower()
    return "" if suffix[1:].isdigit() else suffix


def _kind(suffix: str) -> str:
    needed = _PLUGIN_OF.get(suffix)
    return f"{suffix} (pip install {needed} to read them)" if needed else suffix or "without suffix"
