"""Which files of a folder are images: those that Pillow opens, each counted once, and what is passed over."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import stat
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from vi_simsiam.errors import InputError
from vi_simsiam.text import counted

# EPS starts Ghostscript and WMF is drawn by Windows alone; of the others Pillow knows no more than the name.
_NEVER = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_BY_CONTENT = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000", "HEIF")
"""Formats that are recognised by their first bytes, whatever the file is called."""
_PLUGINS = {
    "pillow_heif": "pillow-heif",
    "pillow_avif": "pillow-avif-plugin",
    "pillow_jxl": "pillow-jxl-plugin",
}
"""Modules that make Pillow open further formats, and the packages that they come in."""
_PLUGIN_OF = {
    ".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif", ".avif": "pillow-avif-plugin",
    ".jxl": "pillow-jxl-plugin",
}  # fmt: skip
_SHOWN = 8


class Found(NamedTuple):
    """The images of a folder, and what else is in it."""

    paths: list[str]
    """Sorted by name, level by level."""
    passed_over: Counter[str]
    """Files that are no images, by their suffix in lower case, "" without."""
    repeated: list[tuple[str, str]]
    """Further names (links, symbolic or hard) of images and folders, each with the one that counts."""

    def note(self) -> str:
        """One line that says what is passed over; empty where nothing is."""
        parts = []
        if self.passed_over:
            kinds = [
                f"{count:,} {_kind(suffix)}"
                for suffix, count in self.passed_over.most_common(_SHOWN)
            ]
            if (more := len(self.passed_over) - _SHOWN) > 0:
                kinds.append(f"{counted(more, 'other suffix', 'other suffixes')}")
            parts.append(
                f"{counted(self.passed_over.total(), 'file')} passed over: {', '.join(kinds)}"
            )
        if self.repeated:
            parts.append(
                f"{counted(len(self.repeated), 'further name')} (links) of images and folders left out"
            )
        return "; ".join(parts)


def find_images(folder: str | os.PathLike[str]) -> Found:
    """Find all images in a folder and the folders in it.

    Hidden files and folders are skipped. Links are followed, but every folder is visited and every file counted once:
    where it lies rather than where a link leads to it, of several places the first, level by level and by name. What
    looks like an image and cannot be reached is counted, to be reported when it is read. Raises InputError if a folder
    cannot be listed.
    """
    root = os.fspath(folder)
    paths: list[str] = []
    passed_over: Counter[str] = Counter()
    repeated: list[tuple[str, str]] = []
    # A link to a folder that holds this one would give the images beside it, too.
    above = set(_above(os.path.realpath(root)))
    seen: dict[tuple[int, int], str] = {}
    folders, links = deque([root]), deque[str]()

    def is_new(path: str, status: os.stat_result) -> bool:
        first = seen.setdefault(_identity(status), path)
        if first not in (path, root):
            repeated.append((path, first))
        return first == path

    def take(path: str) -> None:
        try:
            status = os.stat(path)
        except (
            OSError
        ):  # a link that leads nowhere, or to itself; a file in a folder that may not be entered
            if _suffix(path) in _suffixes():
                paths.append(path)
            else:
                passed_over["broken links" if os.path.islink(path) else _suffix(path)] += 1
            return
        if not stat.S_ISREG(status.st_mode):
            return
        if not is_image(path):
            passed_over[_suffix(path)] += 1
        elif is_new(path, status):
            paths.append(path)

    while folders or links:
        if not folders:
            path = links.popleft()
            if os.path.isdir(path):
                folders.append(path)
            else:
                take(path)
            continue
        place = folders.popleft()
        with _listing(place):
            status = os.stat(place)
            if _identity(status) in above or not is_new(place, status):
                continue
            for entry in list_folder(place):
                if entry.is_symlink():
                    links.append(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    take(entry.path)
    paths.sort(key=lambda path: path[len(root) :].split(os.sep))
    return Found(paths, passed_over, repeated)


def list_folder(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return the entries of a folder that are not hidden, sorted by name. Raises InputError if it cannot be listed."""
    with _listing(folder), os.scandir(os.fspath(folder)) as entries:
        return sorted(
            (entry for entry in entries if not entry.name.startswith(".")),
            key=lambda entry: entry.name,
        )


def is_image(path: str) -> bool:
    """Whether Pillow opens a file of this suffix; a file without one is opened to see."""
    if _suffix(path):
        return _suffix(path) in _suffixes()
    if os.path.isfile(path):  # reading a pipe would wait for ever
        with contextlib.suppress(Exception), Image.open(path, formats=formats(path)):
            return True
    return False


def formats(path: str) -> list[str]:
    """Formats that a file may have: those recognised by content, and the one that its suffix stands for."""
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
    known = Image.registered_extensions() | {
        ".mpo": "JPEG"
    }  # which opens a stereo pair's first picture
    return {
        suffix: name for suffix, name in known.items() if name in Image.OPEN and name not in _NEVER
    }


def _suffix(path: str) -> str:
    """The suffix in lower case; numbers, as in the names of scanners, are none."""
    suffix = os.path.splitext(path)[1].lower()
    return "" if suffix[1:].isdigit() else suffix


def _kind(suffix: str) -> str:
    needed = _PLUGIN_OF.get(suffix)
    return f"{suffix} (pip install {needed} to read them)" if needed else suffix or "without suffix"


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _above(folder: str) -> Iterator[tuple[int, int]]:
    """The folders that hold a folder, as far as they can be reached."""
    while (parent := os.path.dirname(folder)) != folder:
        with contextlib.suppress(OSError):
            yield _identity(os.stat(parent))
        folder = parent


@contextlib.contextmanager
def _listing(folder: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror})") from error
