"""Files that declare far more than they hold are named as unreadable, and cost little."""

from __future__ import annotations

import io
import runpy
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from packing_cases import noise
from PIL import Image

from vi_simsiam.config import DecodeConfig
from vi_simsiam.data import pixels
from vi_simsiam.data.cache import cached
from vi_simsiam.data.sources import FileSource, UnreadableError

resource = pytest.importorskip("resource")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Tag data larger than file"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]
ALL = DecodeConfig(frames="all")


def stored(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(*chunks: bytes, size: int | None = None) -> bytes:
    """A PNG with further chunks behind its header, and perhaps another size in it."""
    whole = stored("PNG")
    header, rest = whole[:33], whole[33:]
    if size is not None:
        header = header[:8] + chunk(b"IHDR", struct.pack(">II", size, size) + header[24:29])
    return header + b"".join(chunks) + rest


def jpeg(size: int) -> bytes:
    whole = bytearray(stored("JPEG"))
    start = whole.index(b"\xff\xc0")
    whole[start + 5 : start + 9] = struct.pack(">HH", size, size)
    return bytes(whole)


def bmp(size: int) -> bytes:
    whole = bytearray(stored("BMP"))
    whole[18:26] = struct.pack("<ii", size, size)
    return bytes(whole)


def scans(count: int) -> bytes:
    whole = stored("JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * count + b"\xff\xd9"


def tags(count: int, size: int, *, start: int = 8) -> bytes:
    """A TIFF's first tags, each of which has the same `size` bytes as its value."""
    place = start + 2 + 12 * count + 4
    entries = (struct.pack("<HHII", 0x8000 + tag, 7, size, place) for tag in range(count))
    head = b"II*\0" + struct.pack("<IH", start, count)
    return head + b"".join(entries) + bytes(4) + bytes(size)


def pages(count: int, last: int = 0) -> bytes:
    """A TIFF of pages of one pixel; the last one names `last` as the place of the next."""
    numbers = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 0, 278: 1, 279: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in numbers.items())
    size = 2 + len(entries) + 4
    nexts = [*(8 + size * page for page in range(1, count)), last]
    ifds = (struct.pack("<H", 8) + entries + struct.pack("<I", place) for place in nexts)
    return b"II*\0" + struct.pack("<I", 8) + b"".join(ifds)


def gif(count: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (1, 1), 1).save(buffer, "GIF")
    whole = buffer.getvalue()
    return whole[:-1] + whole[whole.index(b",", 13) : -1] * (count - 1) + b";"


BOMB = b"a\0\0" + zlib.compress(bytes(80 << 20))
MANY = [chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(1 << 20))) for i in range(70)]
UNREADABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "huge.png": (lambda: png(size=50_000), "exceeds limit of"),
    "short.png": (lambda: png(size=13_000), "truncated"),
    "text.png": (lambda: png(chunk(b"zTXt", BOMB)), "too large"),
    "texts.png": (lambda: png(*MANY), "Too much memory used in text"),
    "profile.png": (lambda: png(chunk(b"iCCP", BOMB)), "too large"),
    "short.jpg": (lambda: jpeg(13_000), "13000 x 13000 pixels in [0-9,]+ bytes"),
    "scans.jpg": (lambda: scans(200), "2[0-9]+ scans, more than 100"),
    "short.bmp": (lambda: bmp(13_000), "truncated"),
    "short.ppm": (lambda: b"P6 13000 13000 255\n" + bytes(100), "truncated"),
    "short.tif": (lambda: stored("TIFF")[:200], "."),
    "tags.tif": (lambda: tags(2000, 1 << 20), "."),
}


def test_they_are_left_out_in_little_memory(tmp_path: Path) -> None:
    for name, (content, _) in UNREADABLE.items():
        (tmp_path / name).write_bytes(content())
    good = tmp_path / "good.png"
    good.write_bytes(png())
    paths = sorted(tmp_path.iterdir())
    # At most 1 % of a source may be unreadable.
    source = FileSource([*paths, *[good] * 1200], name="set")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images, unreadable = cached(source, cache_dir=tmp_path / "cache", workers=0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
    assert len(images) == 1201
    assert [Path(entry.path).name for entry in unreadable] == sorted(UNREADABLE)
    for entry, name in zip(unreadable, sorted(UNREADABLE), strict=True):
        assert "\n" not in str(entry)
        with pytest.raises(UnreadableError, match=UNREADABLE[name][1]):
            FileSource([entry.path]).image(0)


def test_large_tags_are_passed_over(tmp_path: Path) -> None:
    """Without a warning for each of them; pytest sets the module's filters aside."""
    path = tmp_path / "a.png"
    path.write_bytes(png(chunk(b"eXIf", tags(2000, 1 << 20))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runpy.run_path(pixels.__file__)
        assert FileSource([path]).image(0).size == (16, 16)
    assert caught == []


@pytest.mark.parametrize(("last", "count"), [(0, 3), (8, 3), (8, 1)])
def test_pages_that_name_earlier_ones_end(tmp_path: Path, last: int, count: int) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(pages(count, last))
    assert len(FileSource([path], decode=ALL)) == count
    assert FileSource([path]).image(0).size == (1, 1)


@pytest.mark.parametrize("make", [gif, pages])
def test_frames_are_limited(
    tmp_path: Path, make: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "_MOST_FRAMES", 20)
    for count in (20, 21):
        path = tmp_path / f"{count}{make.__name__}"
        path = path.with_suffix(".gif" if make is gif else ".tif")
        path.write_bytes(make(count))
        source = FileSource([path], decode=ALL)
        if count == 20:
            assert len(source) == 20
            assert np.asarray(source.image(19)).shape == (1, 1, 3)
            continue
        assert len(source) == 1
        with pytest.raises(UnreadableError, match="more than 20 frames"):
            source.image(0)
    assert FileSource([path]).image(0).size == (1, 1)
