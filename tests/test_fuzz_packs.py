"""Whatever the bytes of a pack file are, it is read or refused in one line, in little memory."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import noise, parts, sealed, with_body
from PIL import Image

from vi_simsiam.data.cache import pack
from vi_simsiam.data.packed import open_pack
from vi_simsiam.data.sources import FileSource
from vi_simsiam.errors import InputError

EVERY_DAY, SOAK = 300, 50_000
_MOST_BYTES = 8 << 20
EDGES = [0, 1, 2, 3, 4, 8, 12, 24, 63, 64, 65, 2**26, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]
NUMBERS = st.sampled_from([*EDGES, *(-x for x in EDGES), 2**63, 10**30]) | st.integers(-9, 999)
TEXTS = st.sampled_from(["", "set", "labels", "\udcff", "\0", "x" * 500])
ODD = (
    NUMBERS
    | TEXTS
    | st.floats()
    | st.sampled_from([None, True])
    | st.lists(NUMBERS | TEXTS, max_size=4)
    | st.dictionaries(TEXTS, NUMBERS | st.lists(TEXTS, max_size=2), max_size=2)
)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A pack with labels, places and an unreadable image, and one with none of these."""
    folder = tmp_path_factory.mktemp("stored")
    for i in range(3):
        Image.fromarray(noise(4 + i, 5 - i, i)).save(folder / f"{i}.png")
    paths = [*sorted(folder.iterdir()), *[folder / "0.png"] * 98, folder / "none.png"]
    labels = np.arange(len(paths)) % 2
    sources = (FileSource(paths, labels, ("even", "odd")), FileSource(paths[:2]))
    found = []
    for source in sources:
        pack(source, folder / "a.pack", workers=0)
        found.append((folder / "a.pack").read_bytes())
    return found


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], bool]:
    """Opens a pack with some bytes and uses everything in it."""
    path = tmp_path / "a.pack"

    def use(content: bytes) -> bool:
        path.write_bytes(content)
        tracemalloc.start()
        try:
            images = open_pack(path)
            for index in range(len(images)):
                images.image(index)
                images.describe(index)
            images.pixel_checksums()
            assert isinstance(repr(images), str)
            assert isinstance(images.warnings, list)
            accepted = True
        except InputError as error:
            message = str(error)
            assert message.startswith(f"pack: {path} ")
            assert "\n" not in message
            accepted = False
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < _MOST_BYTES
        return accepted

    return use


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values in a header."""
    keys = value if isinstance(value, dict) else range(len(value)) if type(value) is list else ()
    for key in keys:
        yield (*path, key)
        yield from _places(value[key], (*path, key))


def change_header(data: st.DataObject, header: dict[str, Any]) -> dict[str, Any]:
    """Replace, delete or add some values."""
    header = copy.deepcopy(header)
    for _ in range(data.draw(st.integers(1, 3))):
        places = list(_places(header))
        *outer, key = data.draw(st.sampled_from(places)) if places else ("count",)
        holder: Any = header
        for each in outer:
            holder = holder[each]
        what = data.draw(st.sampled_from(["replace", "replace", "near", "delete", "add"]))
        old = holder[key]
        if what == "near" and type(old) is int:
            holder[key] = old + data.draw(st.sampled_from([-64, -1, 1, 4, 8, 64]))
        elif what == "delete":
            del holder[key]
        elif what == "add" and isinstance(holder, dict):
            holder[data.draw(TEXTS)] = data.draw(ODD)
        else:
            holder[key] = data.draw(ODD)
    return header


def change_bytes(data: st.DataObject, content: bytes) -> bytes:
    """Overwrite, insert or cut out some bytes."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed)))
        new = data.draw(
            st.binary(max_size=9) | NUMBERS.map(lambda x: (x % 2**64).to_bytes(8, "little"))
        )
        length = data.draw(st.sampled_from([0, len(new), len(new), 1, 64, 1000]))
        changed[place : place + length] = new
    return bytes(changed)


def fuzz(
    examples: int, packs: list[bytes], read: Callable[[bytes], bool], *, derandomize: bool
) -> None:
    """Read so many changed packs, half of them with checksums that are right."""

    @settings(max_examples=examples, deadline=None, database=None, derandomize=derandomize)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        whole, kind = data.draw(st.sampled_from(packs)), data.draw(st.integers(0, 3))
        body, header = parts(whole)
        if kind == 0:
            read(change_bytes(data, whole))
        elif kind == 1:
            body = change_bytes(data, body)
            read(sealed(body, with_body(header, body)))
        else:
            read(sealed(body, change_header(data, header)))

    check()


def test_unchanged_packs_are_read(packs: list[bytes], read: Callable[[bytes], bool]) -> None:
    for whole in packs:
        assert read(whole)
        assert read(sealed(*parts(whole)))


def test_packs_of_any_content(packs: list[bytes], read: Callable[[bytes], bool]) -> None:
    fuzz(EVERY_DAY, packs, read, derandomize=True)


@pytest.mark.soak
def test_packs_of_any_content_for_minutes(
    packs: list[bytes], read: Callable[[bytes], bool]
) -> None:
    fuzz(SOAK, packs, read, derandomize=False)
