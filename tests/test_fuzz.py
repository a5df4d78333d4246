"""Damaged files of every format end in one line of the package's own errors, or are read.

A valid file is changed in its structure (odd values, keys removed or doubled) or in its bytes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fuzz_cases import Reader, plain, readers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from vi_simsiam.errors import UserError

EVERYDAY, SOAK = 250, 100_000
"""Examples of all formats together; everyday without those whose reader takes a second."""
_FEWEST = 3
_SECONDS, _MEGABYTES, _LONGEST = 60, 600, 2_000
_LONG, _DEEP = json.dumps("x" * 100_000), 5_000
ODD = (
    "null", "true", "false", "0", "-1", "1", "3", "0.5", "-0.0", "1e-320", "1e99", "-1e99", "1e308",
    "1e999", "-1e999", "NaN", "Infinity", "1" + 400 * "0", "4503599627370497",
    "9223372036854775807", "18446744073709551616", '""', '"x"', '"\\u0000"', '"\\ud800"',
    '"\\udcff"', '"3"', '"nan"', '"\\u202e\\n|`<b>$ \\\\{x_1}"', _LONG, "[]", "{}", "[[]]",
    "[1, 2, 3]", '["a"]', "[null]", '{"a": 1}', '{"": {}}', "[" * _DEEP + "]" * _DEEP,
    '{"a":' * 40 + "1" + "}" * 40, "[" + "0," * 5_000 + "0]",
)  # fmt: skip
"""JSON of values that a schema, a range or a table may not expect."""
_EDITS = st.lists(
    st.tuples(
        st.sampled_from(("replace", "replace", "replace", "remove", "double", "copy")),
        st.integers(0, 10**5),
        st.sampled_from(ODD),
    ),
    min_size=1,
    max_size=3,
)
_CUTS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "truncate", "insert", "remove")),
        st.integers(0, 10**5),
        st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=3,
)
CHANGES = st.one_of(st.tuples(st.just("values"), _EDITS), st.tuples(st.just("bytes"), _CUTS))


def edited(valid: bytes, edits: list[tuple[str, int, str]]) -> bytes:
    """The JSON, or lines of JSON, with values replaced, keys removed, and entries doubled."""
    try:
        documents = [json.loads(valid)]
    except ValueError:
        lines = valid.decode().splitlines()
        documents = [json.loads(line) if line[0] == "{" else {line: 0} for line in lines]
    raw: dict[str, str] = {}
    for number, (kind, place, odd) in enumerate(edits):
        nodes = [node for each in documents for node in _nodes(each)]
        if not nodes:
            break
        parent, key = nodes[place % len(nodes)]
        if kind == "remove":
            del parent[key]
        elif kind == "copy":
            other, name = nodes[(7 * place) % len(nodes)]
            parent[key] = json.loads(json.dumps(other[name]))
        else:
            before = json.dumps(parent[key])
            parent[key] = mark = f"@{number}@"
            double = kind == "double"
            again = f"{json.dumps(key)}: {odd}" if isinstance(parent, dict) else odd
            raw[json.dumps(mark)] = f"{before}, {again}" if double else odd
    text = "\n".join(map(json.dumps, documents))
    for mark, content in reversed(raw.items()):
        text = text.replace(mark, content)
    return text.encode()


def _nodes(content: Any) -> Iterator[tuple[Any, Any]]:
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _nodes(content[key])


def spoiled(valid: bytes, cuts: list[tuple[str, int, bytes]]) -> bytes:
    """The bytes with some of them changed."""
    for kind, place, more in cuts:
        at = place % (len(valid) + 1)
        before, after = valid[:at], valid[at:]
        if kind == "flip" and after:
            after = bytes([after[0] ^ (1 << more[0] % 8)]) + after[1:]
        elif kind == "truncate":
            after = b""
        elif kind == "insert":
            after = more + after
        elif kind == "remove":
            after = after[len(more) :]
        valid = before + after
    return valid


def changed(valid: bytes, kind: str, steps: list[Any]) -> bytes:
    """The content after the steps of one kind."""
    return edited(valid, steps) if kind == "values" else spoiled(valid, steps)


def check(reader: Reader, path: Path) -> str:
    """Read a file: it is accepted, or refused in one line of a bounded length; returns the line."""

    def stop(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"{reader.name}: not read in {_SECONDS} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    message = ""
    try:
        reader.read(path)
    except UserError as error:
        message = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    assert "\n" not in message
    assert len(message) < _LONGEST
    return message


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Reader, Path]]]:
    """Every reader, and the path of its file in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        plain(patch)
        folder = tmp_path_factory.mktemp("fuzz")
        found = []
        for number, reader in enumerate(readers(folder / "made")):
            path = folder / str(number) / reader.file
            reader.prepare(folder / str(number))
            found.append((reader, path))
        yield found


def examples(table: list[tuple[Reader, Path]], count: int) -> None:
    """Read `count` damaged files, shared among the readers."""
    shares = sum(reader.share for reader, _ in table)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for reader, path in table:
        path.write_bytes(reader.valid)
        number = round(count * reader.share / shares)
        if number < _FEWEST:
            continue

        @settings(
            max_examples=number,
            derandomize=True,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(CHANGES)
        def holds(change: Any) -> None:
            path.write_bytes(changed(reader.valid, *change))  # noqa: B023, called in this turn
            check(reader, path)  # noqa: B023

        reader.read(path)
        holds()
        path.write_bytes(reader.valid)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < _MEGABYTES * 1024


def _fifo(path: Path, valid: bytes) -> None:
    os.mkfifo(path)


def _whole(path: Path, valid: bytes) -> None:
    """An object that never ends: nested deeper than Python's stack."""
    path.write_bytes(b'{"a": [' * 100_000)


PLACES = {
    "empty": lambda path, valid: path.write_bytes(b""),
    "byte order mark": lambda path, valid: path.write_bytes(b"\xef\xbb\xbf" + valid),
    "UTF-16": lambda path, valid: path.write_bytes(valid.decode().encode("utf-16")),
    "folder": lambda path, valid: path.mkdir(),
    "pipe": _fifo,
    "link to itself": lambda path, valid: path.symlink_to(path),
    "deep": _whole,
    "large number": lambda path, valid: path.write_bytes(b'{"step": 1' + 5_000 * b"0" + b"}"),
    "key twice": lambda path, valid: path.write_bytes(b'{"seed": 1, "seed": 2}'),
    "zeros": lambda path, valid: path.write_bytes(bytes(len(valid))),
}
"""What stands in the place of a file."""
_NO_FILE = ("folder", "pipe", "link to itself")


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_such_file_is_refused_or_left_out(
    table: list[tuple[Reader, Path]], kind: str
) -> None:
    """A log loses its damaged lines, and settings may have the mark; all others are refused."""
    for reader, path in table:
        if reader.share < 1:  # the same files as other readers', used for more
            continue
        path.unlink(missing_ok=True)
        PLACES[kind](path, reader.valid)
        try:
            refused = check(reader, path)
        finally:
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(reader.valid)
        left_out = reader.file.endswith(".jsonl") and kind not in _NO_FILE
        allowed = reader.file.endswith(".yaml") and kind in ("byte order mark", "key twice")
        assert (refused == "") == (left_out or allowed), reader.name


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_damaged_files_are_read_or_refused(table: list[tuple[Reader, Path]]) -> None:
    examples(table, EVERYDAY)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_many_damaged_files_are_read_or_refused(table: list[tuple[Reader, Path]]) -> None:
    examples(table, SOAK)
