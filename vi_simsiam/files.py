"""Files read with a schema, and written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import (
    IO,
    Any,
    BinaryIO,
    NotRequired,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from typeguard import (
    CollectionCheckStrategy,
    TypeCheckError,
    TypeCheckMemo,
    check_type,
    check_type_internal,
    checker_lookup_functions,
)

from vi_simsiam.checks import Rule
from vi_simsiam.errors import InputError, UserError, cut
from vi_simsiam.paths import printable

_Content = TypeVar("_Content")
_MOST_BYTES = 1 << 28
_MOST_BYTES_OF_LINES = 1 << 32  # a log may have a line for each of millions of steps
_LONGEST_LINE = 1 << 20
_LARGEST = 2**63
_LARGEST_FLOAT = 1e100  # sums, squares and scales of a figure stay finite below it
_DEEPEST = 32
_CHECKSUM = b', "crc32": "'
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
    with _opened(path, option, most) as (file, size):
        return file.read(size)


@contextlib.contextmanager
def _opened(path: Path, option: str, most: int) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file of at most so many bytes, with their number; errors name it."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise InputError(
                    f"has {size:,} bytes, more than the {most:,} that such a file may have"
                )
            yield file, size
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


def read_json(path: Path, kind: type[_Content], option: str, *, finite: bool = True) -> _Content:
    """The content of a JSON file of a known form; see `parse_json`.

    Raises:
        InputError: there is no such file, or its content is not of this form.
    """
    content = read_bytes(path, option)
    try:
        return parse_json(content, kind, finite=finite)
    except ValueError as error:
        raise InputError(f"{option}: {path} is damaged ({error})") from error


def read_lines(path: Path, kind: type[_Content], option: str) -> tuple[list[_Content], int]:
    """The lines of a JSON Lines file that are of a known form, and the number of the others.

    A crash cuts the last line off, and a log is still of use without it. Values may be NaN or
    infinite. The checksums of `json_lines` must be right and are left out; older files have none.
    Without a file there is no line.

    Raises:
        InputError: `path` is no regular file, or cannot be read.
    """
    lines: list[tuple[bool, _Content]] = []
    damaged = 0
    if not os.path.lexists(path):
        return [], 0
    with _opened(path, option, _MOST_BYTES_OF_LINES) as (file, _):
        while line := file.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):  # its rest is no line
                while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                damaged += 1
                continue
            content, key, checksum = line.rstrip().partition(_CHECKSUM)
            try:
                if key and checksum != b'%08x"}' % zlib.crc32(content):
                    raise ValueError("checksum")
                encoded = content + b"}" if key else line
                lines.append((bool(key), parse_json(encoded, kind, finite=False)))
            except ValueError:
                damaged += 1
    checked = any(key for key, _ in lines)  # the key of a checksum can be damaged, too
    kept = [content for key, content in lines if key or not checked]
    return kept, damaged + len(lines) - len(kept)


def json_lines(lines: Iterable[dict[str, Any]]) -> str:
    """JSON Lines; the last value of each is the CRC-32 of what is before it.

    Without it a flipped bit could turn one figure into another unnoticed.
    """
    encoded = (json.dumps(line).encode()[:-1] for line in lines)
    parts = (b'%s%s%08x"}\n' % (line, _CHECKSUM, zlib.crc32(line)) for line in encoded)
    return b"".join(parts).decode()


def parse_json(encoded: bytes | str, kind: type[_Content], *, finite: bool = True) -> _Content:
    """Decode JSON, and check it against a type.

    Args:
        encoded: UTF-8.
        kind: the type, such as a TypedDict; an int is accepted for a float, a TypedDict may have
            more keys, and a value of Annotated[..., Rule] must pass the rule.
        finite: refuse NaN and infinities.

    Raises:
        ValueError: not UTF-8, no JSON, nested too deeply, a key that occurs twice, half of a
            surrogate pair, an integer of more than 64 bits or a float beyond 1e100, or content of
            another type; the message says what and where.
    """

    def number(text: str) -> float:
        value = float(text)
        if finite and not math.isfinite(value):
            raise ValueError(f"{text[:20]} is not finite")
        if _LARGEST_FLOAT < abs(value) < math.inf:
            raise ValueError(f"{text[:20]} is too large")
        return value

    try:
        text = encoded if isinstance(encoded, str) else encoded.decode()
        content = json.loads(
            text,
            parse_int=_integer,
            parse_float=number,
            parse_constant=number,
            object_pairs_hook=_object,
        )
        _check_depth(content)
        if "\\u" in text:  # an escape can be half of a pair, which no file name and no output holds
            json.dumps(content, ensure_ascii=False).encode(errors="surrogateescape")
        return check_type(content, kind, collection_check_strategy=_ALL)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (TypeCheckError, ValueError) as error:
        raise ValueError(cut(" ".join(str(error).split()))) from None


def _check_depth(content: Any) -> None:
    """Raise RecursionError for lists and dictionaries deeper than any file of this package."""
    level: list[Any] = [[content]]
    for _ in range(_DEEPEST):
        within = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for part in within for each in part if isinstance(each, dict | list)]
        if not level:
            return
    raise RecursionError


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has the key {twice!r} twice")
    return found


def _integer(text: str) -> int:
    # Python converts no longer text than this, and nothing here computes with more than 64 bits.
    value = int(text) if len(text) < 21 else _LARGEST
    if not -_LARGEST <= value < _LARGEST:
        raise ValueError(f"{text[:20]}... has more than 64 bits")
    return value


def _checker(kind: Any, args: tuple[Any, ...], extras: tuple[Any, ...]) -> Any:
    """Add to typeguard's checks: rules, and TypedDicts of this package that may have more keys."""
    rules = [each for each in extras if isinstance(each, Rule)]
    if rules:
        return partial(_check_rules, rules)
    own = is_typeddict(kind) and kind.__module__.startswith(f"{__package__}.")
    return _check_keys if own else None


def _check_rules(
    rules: list[Rule], value: Any, kind: Any, args: tuple[Any, ...], memo: TypeCheckMemo
) -> None:
    check_type_internal(value, kind[args] if args else kind, memo)
    for rule in rules:
        if not rule.holds(value):
            raise TypeCheckError(f"is {repr(value)[:40]}; it must be {rule.accepted}")


def _check_keys(value: Any, kind: Any, args: tuple[Any, ...], memo: TypeCheckMemo) -> None:
    if not isinstance(value, dict):
        raise TypeCheckError("is not a dict")
    for name, (hint, needed) in _keys(kind).items():
        if name in value:
            try:
                check_type_internal(value[name], hint, memo)
            except TypeCheckError as error:
                error.append_path_element(f"value of key {name!r}")
                raise
        elif needed:
            raise TypeCheckError(f"lacks the key {name!r}")


@cache
def _keys(kind: Any) -> dict[str, tuple[Any, bool]]:
    """By key of a TypedDict: its type, and True if it must be there."""
    hints = get_type_hints(kind, include_extras=True)
    optional = {name for name, hint in hints.items() if get_origin(hint) is NotRequired}
    return {
        name: (get_args(hint)[0], False) if name in optional else (hint, True)
        for name, hint in hints.items()
    }


checker_lookup_functions.insert(0, _checker)


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
            flush(path.parent)
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


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk, where the file system does that."""
    with contextlib.suppress(OSError):
        place = os.open(path, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
