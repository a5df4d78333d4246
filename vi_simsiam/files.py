"""Files read with a schema, and written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from vi_simsiam.errors import InputError, UserError
from vi_simsiam.paths import printable

_Content = TypeVar("_Content")
_MOST_BYTES = 1 << 28
_LARGEST = 2**63
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_ALL = CollectionCheckStrategy.ALL_ITEMS


def read_bytes(path: Path, option: str, most: int = _MOST_BYTES) -> bytes:
    """The content of a regular file.

    Args:
        path: the file; a link is followed.
        option: name of the argument that gives it, for messages.
        most: bytes that it may have.

    Raises:
        InputError: there is none, it is larger, or no regular file: reading a pipe would block.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise InputError(
                    f"has {size:,} bytes, more than the {most:,} that such a file may have"
                )
            return file.read(size)
    except InputError as error:
        raise InputError(f"{option}: {path} {error}") from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{option}: {path} cannot be read ({reason})") from error


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to be read; a link is followed.

    Raises:
        InputError: it is no regular file: reading a pipe would block. The message continues the
            file's name.
        OSError: it cannot be opened.
    """
    # Without O_NONBLOCK opening a pipe waits for its writer.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAIT))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InputError("is no regular file")
    return file


def read_json(path: Path, kind: type[_Content], option: str) -> _Content:
    """The content of a JSON file of a known form; see `parse_json`.

    Raises:
        InputError: there is no such file, or its content is not of this form.
    """
    content = read_bytes(path, option)
    try:
        return parse_json(content, kind)
    except ValueError as error:
        raise InputError(f"{option}: {path} is damaged ({error})") from error


def parse_json(encoded: bytes | str, kind: type[_Content], *, finite: bool = True) -> _Content:
    """Decode JSON, and check it against a type.

    Args:
        encoded: UTF-8.
        kind: the type, such as a TypedDict; an int is accepted for a float.
        finite: refuse NaN and infinities.

    Raises:
        ValueError: not UTF-8, no JSON, nested too deeply, an integer of more than 64 bits, or
            content of another type; the message says what and where.
    """

    def number(text: str) -> float:
        value = float(text)
        if finite and not math.isfinite(value):
            raise ValueError(f"{text[:20]} is not finite")
        return value

    try:
        text = encoded if isinstance(encoded, str) else encoded.decode()
        content = json.loads(text, parse_int=_integer, parse_float=number, parse_constant=number)
        return check_type(content, kind, collection_check_strategy=_ALL)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except TypeCheckError as error:
        raise ValueError(str(error)) from None


def _integer(text: str) -> int:
    # Python converts no longer text than this, and nothing here computes with more than 64 bits.
    value = int(text) if len(text) < 21 else _LARGEST
    if not -_LARGEST <= value < _LARGEST:
        raise ValueError(f"{text[:20]}... has more than 64 bits")
    return value


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call `write` on a temporary file, and move that to `path` once it is on the disk.

    Raises:
        OSError: with `path`; also where `write` raises another error because of it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with naming(path, aside=temporary):
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _flush_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def naming(path: Path, *, aside: Path | None = None) -> Iterator[None]:
    """Give `path` to an OSError without a file (a full disk's, say), or with the file `aside`.

    A RuntimeError of torch.save that hides such an error is replaced, too.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(error, UserError) or not isinstance(cause, OSError) or not cause.strerror:
            raise
        if cause.filename is not None and cause.filename != str(aside):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically, indented."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as `printable` UTF-8."""
    write_atomically(path, lambda file: file.write(printable(text).encode()))


def _flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the file system does that for folders."""
    with contextlib.suppress(OSError):
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
