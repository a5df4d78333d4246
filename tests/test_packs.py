"""A pack file that a stranger wrote is refused in one line, however right its checksums are.

One that is truncated while it is mapped ends a run in one line, too.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing_cases import noise, parts, pixels, sealed, with_body
from PIL import Image

from vi_simsiam.cli import main
from vi_simsiam.config import policy
from vi_simsiam.data import pack_file
from vi_simsiam.data.cache import pack
from vi_simsiam.data.device import DeviceFeed
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.packed import Contents, PackedImages, open_pack
from vi_simsiam.data.sources import ArraySource, FileSource
from vi_simsiam.data.views import Schedule
from vi_simsiam.data.workers import results
from vi_simsiam.errors import InputError, TrainingError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A pack of three images of 4 x 5, 5 x 4 and 6 x 3 pixels, with labels and places."""
    folder = tmp_path_factory.mktemp("stored")
    for i in range(3):
        Image.fromarray(noise(4 + i, 5 - i, i)).save(folder / f"{i}.png")
    paths = sorted(folder.iterdir())
    pack(FileSource(paths, np.arange(3) % 2, ("even", "odd"), "set"), folder / "a.pack", workers=0)
    return (folder / "a.pack").read_bytes()


def refusal(path: Path, content: bytes) -> str:
    """The message for such a file: one line that begins with its name."""
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        open_pack(path)
    message = str(error.value)
    assert message.startswith(f"pack: {path} ")
    assert "\n" not in message
    return message


def test_a_sealed_copy_is_read(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pack"
    body, header = parts(whole)
    path.write_bytes(sealed(body, with_body(header, body)))
    images = open_pack(path)
    assert [np.shape(image) for image in pixels(images)] == [(4, 5, 3), (5, 4, 3), (6, 3, 3)]
    assert images.describe(2).endswith("2.png")


HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "no count": ({"count": None}, "header cannot be used"),
    "another count": ({"count": 4}, r"section \w+"),
    "a negative count": ({"count": -3}, r"section \w+"),
    "a huge count": ({"count": 2**62 + 3}, r"section \w+"),
    "a fraction": ({"count": 3.0}, "header cannot be used"),
    "infinite": ({"checked_bytes": float("inf")}, "not finite"),
    "no bytes": ({"checked_bytes": 0}, "checksum"),
    "one byte each": ({"checked_bytes": 1}, "checksum"),
    "other bytes": ({"checked_bytes": 1 << 27}, "checksum"),
    "no checksums": ({"checksums": []}, "0 checksums"),
    "many checksums": ({"checksums": [1] * 1000}, "1,000 checksums"),
    "names": ({"classes": [1, 2]}, "header cannot be used"),
    "too few classes": ({"classes": ["one"]}, "labels"),
    "no classes": ({"classes": None}, "labels"),
    "a name": ({"name": ["set"]}, "header cannot be used"),
    "a triple": ({"unreadable": [["a", "b", "c"]]}, "unreadable"),
    "background": ({"decode": {"background": "no colour"}}, "background"),
    "unknown": ({"decode": {"foreground": "red"}}, "foreground"),
    "deep": ({"decode": {"background": [[[]]]}}, "header cannot be used"),
    "notes": ({"notes": "text"}, "header cannot be used"),
}


@pytest.mark.parametrize(("change", "reason"), HEADERS.values(), ids=list(HEADERS))
def test_headers(whole: bytes, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    body, header = parts(whole)
    content = sealed(body, with_body(header, body) | change)
    assert re.search(reason, refusal(tmp_path / "a.pack", content))


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"count": 1' + b"0" * 5000 + b"}", b"null"],
    ids=["empty", "cut", "list", "no text", "deep", "long", "null"],
)
def test_headers_that_are_none(whole: bytes, tmp_path: Path, header: bytes) -> None:
    message = refusal(tmp_path / "a.pack", sealed(parts(whole)[0], header))
    assert "its header cannot be used" in message
    assert len(message) < 600


SECTIONS: dict[str, Callable[[dict[str, list[int]], int], dict[str, Any]]] = {
    "outside": lambda s, stop: {"labels": [stop - stop % 64 + 64, 24]},
    "across the end": lambda s, stop: {"places": [s["places"][0], stop]},
    "negative place": lambda s, stop: {"labels": [-64, 24]},
    "negative length": lambda s, stop: {"places": [s["places"][0], -1]},
    "huge": lambda s, stop: {"places": [2**62, 2**62]},
    "to be wrapped": lambda s, stop: {"places": [2**63 - 64, 128]},
    "in the prologue": lambda s, stop: {"pixels": [0, s["pixels"][1] + 64]},
    "crooked": lambda s, stop: {"heights": [s["heights"][0] + 4, 12]},
    "overlapping": lambda s, stop: {"widths": s["heights"]},
    "pixels not first": lambda s, stop: {"pixels": [s["labels"][0] + 64, 0]},
    "short": lambda s, stop: {"offsets": [s["offsets"][0], 16]},
    "one number": lambda s, stop: {"offsets": [64]},
    "three numbers": lambda s, stop: {"offsets": [64, 24, 1]},
    "text": lambda s, stop: {"offsets": ["64", "24"]},
    "unknown": lambda s, stop: {"masks": [64, 0]},
}


@pytest.mark.parametrize("change", SECTIONS.values(), ids=list(SECTIONS))
def test_sections(
    whole: bytes, tmp_path: Path, change: Callable[[dict[str, list[int]], int], dict[str, Any]]
) -> None:
    body, header = parts(whole)
    header["sections"] |= change(header["sections"], 64 + len(body))
    message = refusal(tmp_path / "a.pack", sealed(body, with_body(header, body)))
    assert re.search(
        r"contradicts itself \(section '?\w+'? (at|is)|its header cannot be used", message
    )


@pytest.mark.parametrize("name", ["pixels", "offsets", "heights", "widths", "places"])
def test_sections_that_are_missing(whole: bytes, tmp_path: Path, name: str) -> None:
    body, header = parts(whole)
    del header["sections"][name]
    message = refusal(tmp_path / "a.pack", sealed(body, with_body(header, body)))
    assert re.search(rf"its header cannot be used .*{name}", message)


SIZES = {
    "zero": ([0, 5, 6], [5, 4, 3]),
    "negative": ([-4, 5, 6], [-5, 4, 3]),
    "larger": ([4, 5, 7], [5, 4, 3]),
    "largest": ([2**31 - 1] * 3, [2**31 - 1] * 3),
    "more than 2 GiB": ([1 << 15, 5, 6], [1 << 15, 4, 3]),
}


def with_sizes(whole: bytes, heights: list[int], widths: list[int]) -> bytes:
    body, header = parts(whole)
    changed = bytearray(body)
    for name, values in (("heights", heights), ("widths", widths)):
        start, length = header["sections"][name]
        changed[start - 64 : start - 64 + length] = np.array(values, "<i4").tobytes()
    return sealed(bytes(changed), with_body(header, changed))


@pytest.mark.parametrize(("heights", "widths"), SIZES.values(), ids=list(SIZES))
def test_sizes(whole: bytes, tmp_path: Path, heights: list[int], widths: list[int]) -> None:
    message = refusal(tmp_path / "a.pack", with_sizes(whole, heights, widths))
    assert re.search(r"contradicts itself \((heights and widths|pixels): ", message)
    contents = Contents("set", np.array(heights, np.int32), np.array(widths, np.int32))
    with pytest.raises(InputError, match="heights and widths|pixels"):
        PackedImages(np.zeros(174, np.uint8), contents)


def test_sizes_that_wrap_to_the_number_of_bytes(tmp_path: Path) -> None:
    """3 (16 * 2^30 * 2^30 + 17) is 51 in 64 bits."""
    pack(ArraySource(np.zeros((17, 1, 1, 3), np.uint8)), tmp_path / "a.pack")
    heights, widths = [*[1 << 30] * 16, 17], [*[1 << 30] * 16, 1]
    sizes = 3 * np.array(heights, np.int64) * np.array(widths)
    assert int(np.cumsum(sizes)[-1]) == 51
    content = with_sizes((tmp_path / "a.pack").read_bytes(), heights, widths)
    assert "images must have at most" in refusal(tmp_path / "a.pack", content)


def test_offsets_labels_and_places(whole: bytes, tmp_path: Path) -> None:
    body, header = parts(whole)
    for name, values, reason in (
        ("offsets", np.array([0, 60, 2**40], "<i8").tobytes(), "offsets: must be"),
        ("labels", np.array([0, 1, 2], "<i8").tobytes(), r"labels: values must lie in \[0, 2\)"),
        ("labels", np.array([0, -1, 0], "<i8").tobytes(), r"labels: values must lie in \[0, 2\)"),
        ("places", b"\0\0\0", "places: must be 3, one for each image"),
    ):
        changed = bytearray(body)
        start = header["sections"][name][0] - 64
        changed[start : start + len(values)] = values
        content = sealed(bytes(changed), with_body(header, changed))
        assert re.search(rf"contradicts itself \({reason}", refusal(tmp_path / "a", content))
    # Paths need not be text.
    changed = bytearray(body)
    changed[header["sections"]["places"][0] - 64] = 0xFF
    (tmp_path / "a").write_bytes(sealed(bytes(changed), with_body(header, changed)))
    assert open_pack(tmp_path / "a").describe(0)[0] == "\udcff"


def test_the_header_is_limited(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_file, "_MOST_HEADER_BYTES", 100)
    assert "is damaged: a header of" in refusal(tmp_path / "a", whole)
    prologue = pack_file.PROLOGUE.pack(pack_file.MAGIC, 2, 0, len(whole), 0, 0)[:-4]
    content = prologue + pack_file.zlib.crc32(prologue).to_bytes(4, "little") + whole[64:]
    assert "is damaged: a header of" in refusal(tmp_path / "a", content)


def test_a_pipe_is_no_pack(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pack")
    with pytest.raises(InputError, match=r"a\.pack is no regular file"):
        open_pack(tmp_path / "a.pack")


@pytest.fixture
def opened(whole: bytes, tmp_path: Path) -> PackedImages:
    path = tmp_path / "a.pack"
    path.write_bytes(whole)
    return open_pack(path)


@pytest.mark.parametrize("size", [0, 100, 10**6])
def test_a_file_that_is_truncated_while_in_use(opened: PackedImages, size: int) -> None:
    """Also where it grows, as by another program that writes in its place."""
    assert opened.path is not None
    part = opened.take(np.array([2, 0]), "part")
    whole = opened.path.stat().st_size
    schedule = Schedule(opened, policy("none"), batch_size=2, seed=0)
    loader = MultiViewLoader(opened, "none", 2, workers=2)
    one = MultiViewLoader(opened, "none", 2, workers=0)
    assert len(list(loader)) == 1
    os.truncate(opened.path, size)
    how = "truncated" if size < whole else "written to"
    message = rf"^pack: {opened.path} was {how} while in use: [\d,]+ bytes, expected {whole:,}$"
    for use in (
        lambda: opened.image(2),
        lambda: opened.describe(0),
        lambda: part.image(0),
        lambda: part.pixel_checksums(),
        lambda: opened.pixel_checksums(),
        lambda: DeviceFeed(schedule, torch.device("cpu"), memory="gpu"),
        lambda: list(loader),
        lambda: list(one),
    ):
        with pytest.raises(InputError, match=message):
            use()
    assert opened.heights.tolist() == [4, 5, 6]
    os.truncate(opened.path, whole)


def read_behind_the_end(_: int) -> None:
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGBUS)


def test_a_process_that_read_behind_the_end() -> None:
    message = (
        r"^set: a process that prepares images has ended \(killed by signal: Bus error\); "
        "a file that it read may have been truncated, or its disk have failed$"
    )
    with pytest.raises(TrainingError, match=message):
        list(results(read_behind_the_end, range(3), 2, "set"))


def test_the_command_ends_in_one_line(
    whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body, header = parts(whole)
    changed = with_body(header, body) | {"checked_bytes": 1}
    (tmp_path / "a.pack").write_bytes(sealed(body, changed))
    command = f"train --data {tmp_path}/a.pack --out {tmp_path}/run --epochs 1 --device cpu"
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"vi-simsiam: pack: .*a\.pack contradicts itself .*\n", error)
    assert not (tmp_path / "run").exists()
