"""Images decoded once: into a file that is mapped into memory ever after, or into memory.

    cached(source)        what training and evaluation read; decodes on first use, into the cache
    pack(source, path)    the same into a file of the user's choice
    open_pack(path)       such a file

A cached file is named by the fingerprint of its source, so that changed images are decoded again
and older files are left alone. Files are written aside and moved into place complete: two processes
that fill the same cache at once do the work twice, and both end well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vi_simsiam.data.channels import refuse_mixed
from vi_simsiam.data.decoding import bytes_per_image, decode, few_levels
from vi_simsiam.data.pack_file import FORMAT_VERSION
from vi_simsiam.data.packed import Contents, PackedImages, PackWriter, open_pack
from vi_simsiam.data.pixels import Loss, loss_lines
from vi_simsiam.data.sources import ArraySource, ImageSource, Unreadable
from vi_simsiam.errors import ImageWarning, InputError, is_full
from vi_simsiam.paths import printable, user_path
from vi_simsiam.text import counted, print_line

try:
    import fcntl
except ImportError:  # Windows removes no file that another process has open
    fcntl = None  # type: ignore[assignment]

_TOLERATED_SHARE = 0.01


def cached(
    source: ImageSource,
    *,
    cache_dir: Path | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> tuple[PackedImages, list[Unreadable]]:
    """Return the images of a source decoded, and those left out because they cannot be read.

    Files go through the cache folder and are decoded on first use; images that are in memory or
    have no fingerprint are packed in memory. A damaged cached file is built again.

    Args:
        source: the images.
        cache_dir: the cache folder; None for `cache_folder()`.
        workers: processes that decode; None for one per CPU core.
        console: for progress and the reason for building again; None for no output.

    Raises:
        InputError: more than 1 % of the images cannot be read, or the cache folder cannot be
            written or has no room.
        TrainingError: a process that decodes was killed.
    """
    fingerprint = _fingerprint(source, None)
    if fingerprint is None:
        packed = in_memory(source, workers=workers, console=console)
        return packed, list(packed.unreadable)
    folder = cache_folder() if cache_dir is None else user_path("cache_dir", cache_dir)
    # The last two parts of a name or path, in characters of every file system.
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(Path(source.name).parts[-2:])).strip("-.")
    path = folder / f"{readable[-80:] or 'images'}-{fingerprint[:12]}.pack"
    images: PackedImages | None = None
    try:
        images = open_pack(path, fingerprint=fingerprint)
    except InputError as error:
        if os.path.lexists(path):
            reason = str(error).removeprefix("pack: ")
            _print(console, f"cache: {reason}; decoding the images again")
    if images is None:
        _write(source, path, fingerprint, "cache_dir", None, workers, console)
        images = open_pack(path, fingerprint=fingerprint, verify=False)
    images.notes = (*source.notes, *images.notes)
    return images, list(images.unreadable)


def pack(
    source: ImageSource,
    out: Path,
    *,
    workers: int | None = None,
    shorter_side: int | None = None,
    console: Console | None = None,
) -> list[Unreadable]:
    """Decode the images of a source into a file for `open_pack`; return those that cannot be read.

    ImageWarnings name the losses of the others.

    Args:
        source: the images.
        out: the file; replaced if it exists.
        workers: processes that decode; None for one per CPU core.
        shorter_side: images with a longer shorter side are scaled to it (bicubic, antialiased).
        console: for progress; None for no output.

    Raises:
        InputError: more than 1 % of the images cannot be read, or the file cannot be written.
        TrainingError: a process that decodes was killed.
    """
    if shorter_side is not None and shorter_side < 1:
        raise InputError(f"shorter_side: {shorter_side} must be at least 1")
    out = user_path("out", out)
    if out.is_dir():
        raise InputError(f"out: {out} is a folder; give the name of a file")
    fingerprint = _fingerprint(source, shorter_side) or ""
    contents = _write(source, out, fingerprint, "out", shorter_side, workers, console)
    for note in (*source.notes, *contents.notes):
        warnings.warn(note, ImageWarning, stacklevel=2)
    return list(contents.unreadable)


def in_memory(
    source: ImageSource, *, workers: int | None = None, console: Console | None = None
) -> PackedImages:
    """Return the images of a source decoded in memory, see `cached`; RGB arrays are not copied."""
    if isinstance(source, PackedImages):
        return source
    if isinstance(source, ArraySource):
        values: Any = source.images
        if values.ndim == 3:
            values = np.repeat(values[..., None], 3, axis=3)
        heights, widths = (np.full(len(values), size, np.int32) for size in values.shape[1:3])
        named = Contents(source.name, heights, widths, source.labels, source.classes)
        stored = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        contents = dataclasses.replace(named, decode=source.decode)
        return PackedImages(stored.reshape(-1).view(np.uint8), contents)
    pixels = bytearray()
    mean = bytes_per_image(source)
    contents = _decode(source, pixels.extend, "memory", mean, None, workers, console)
    return PackedImages(np.frombuffer(pixels, np.uint8), contents)


def cache_folder() -> Path:
    """Return $VI_SIMSIAM_CACHE, else $XDG_CACHE_HOME/vi-simsiam, else ~/.cache/vi-simsiam.

    Without a home folder that can be written it is vi-simsiam-UID in the folder of temporary files:
    a container that runs under an arbitrary user needs no settings.
    """
    if own := os.environ.get("VI_SIMSIAM_CACHE"):
        return user_path("VI_SIMSIAM_CACHE", own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return user_path("XDG_CACHE_HOME", shared) / "vi-simsiam"
    with contextlib.suppress(InputError):
        folder = user_path("HOME", "~/.cache") / "vi-simsiam"
        nearest = next(place for place in (folder, *folder.parents) if os.path.exists(place))
        if nearest == folder or os.access(nearest, os.W_OK):
            return folder
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    return Path(tempfile.gettempdir()) / f"vi-simsiam{user}"


def _fingerprint(source: ImageSource, shorter_side: int | None) -> str | None:
    own = source.fingerprint()
    if own is None:
        return None
    key = repr((own, FORMAT_VERSION, shorter_side)).encode()
    return hashlib.blake2b(key, digest_size=20).hexdigest()


def _write(
    source: ImageSource,
    path: Path,
    fingerprint: str,
    option: str,
    shorter_side: int | None,
    workers: int | None,
    console: Console | None,
) -> Contents:
    """Decode into a pack file. `option` is the argument that gives the path, for messages."""
    mean = bytes_per_image(source, shorter_side)
    size = round(mean * len(source))
    needed = f"the decoded images of {source.name} need about {decimal(size)}"
    elsewhere = f"name another place with --{option.replace('_', '-')}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise InputError(
                f"{option}: {needed}, {path.parent} has {decimal(free)} free; {elsewhere}"
            )
        with _replacing(path) as file:
            writer = PackWriter(file)
            contents = _decode(source, writer.append, path, mean, shorter_side, workers, console)
            writer.finish(contents, fingerprint)
    except OSError as error:
        problem = f"{path} cannot be written ({error.strerror or error})"
        if is_full(error):
            problem = f"{path.parent} is full, {needed}"
        raise InputError(f"{option}: {problem}; {elsewhere}") from error
    return contents


def _decode(
    source: ImageSource,
    write: Callable[[bytes], object],
    place: Path | str,
    mean_bytes: float,
    shorter_side: int | None,
    workers: int | None,
    console: Console | None,
) -> Contents:
    """Pass the pixels of all images to `write`; return everything else about them."""
    sizes: list[tuple[int, int]] = []
    kept: list[int] = []
    unreadable: list[Unreadable] = []
    losses: list[Loss] = []
    written = 0
    images, size = counted(len(source), "image"), decimal(round(mean_bytes * len(source)))
    _print(console, f"decoding {source.name}: {images}, about {size}, into {place}")
    chunks = decode(source, workers=workers, shorter_side=shorter_side, mean_bytes=mean_bytes)
    terminal = console if console is not None and console.is_terminal else Console(quiet=True)
    # Drawn by this thread: workers may be forked while another one runs.
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=terminal,
        auto_refresh=False,
        disable=terminal.quiet,
    )
    with contextlib.closing(chunks), bar:
        task = bar.add_task("", total=len(source))
        for chunk in chunks:
            write(chunk.pixels)
            written += len(chunk.pixels)
            sizes += chunk.sizes
            kept += chunk.kept
            unreadable += chunk.unreadable
            losses += chunk.losses
            done = len(kept) + len(unreadable)
            bar.update(task, completed=done, description=decimal(written), refresh=True)
    refuse_mixed(source.name, unreadable, source.decode)
    if len(unreadable) > _TOLERATED_SHARE * len(source):
        first = "; ".join(map(str, unreadable[:3])) + ", ..." * (len(unreadable) > 3)
        raise InputError(
            f"{source.name}: {len(unreadable):,} of {images} cannot be read, at most 1 % may be: "
            f"{first}"
        )
    heights, widths = np.array(sizes, np.int32).reshape(-1, 2).T
    return Contents(
        source.name,
        heights,
        widths,
        labels=None if source.labels is None else source.labels[kept],
        classes=source.classes,
        places=[source.describe(index) for index in kept],
        unreadable=unreadable,
        decode=source.decode,
        notes=[*loss_lines(source.name, losses), *few_levels(source)],
    )


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` once it is complete on the disk, or is removed on an error.

    A lock that ends with this process marks the file as being written. Half-written packs in
    the folder that no process has locked were left by killed ones, and are removed. Where locks are
    refused or not implemented, as in some network file systems, they stay.
    """
    for other in path.parent.glob(f".*.pack.{'[0-9a-f]' * 16}"):
        with contextlib.suppress(OSError), open(other, "rb+") as file:
            _lock(file)
            if other.stat().st_size:  # else it is new, and may have no lock yet
                other.unlink()
    name = f".{path.name.removesuffix('.pack')}.pack.{secrets.token_hex(8)}"
    temporary = path.with_name(name)
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(OSError):
                _lock(file, wait=True)  # another build may just look at it
            file.write(bytes(1))  # what a kill leaves is then no new, empty file
            file.flush()
            file.seek(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # still locked, so that no other build removes it
                os.replace(temporary, path)
        if fcntl is None:
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it would hide another error
            temporary.unlink()


def _lock(file: IO[bytes], *, wait: bool = False) -> None:
    """Lock an open file until it is closed; without `wait` OSError if another process has."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _print(console: Console | None, line: str) -> None:
    if console is not None:
        print_line(console, printable(line))
