"""Every way of storing pixels becomes the right 8-bit RGB, and losses are reported."""

from __future__ import annotations

import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from vi_simsiam.config import DecodeConfig
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.pixels import loss_lines, losses, to_rgb
from vi_simsiam.data.sources import FileSource, ImageSource

GRAY = np.array([[0, 50], [128, 255]], dtype=np.uint8)
COLOUR = np.stack([GRAY, GRAY[::-1], GRAY.T], axis=2)
WEBP = pytest.param(
    "WEBP", marks=pytest.mark.skipif(not features.check("webp"), reason="Pillow without WebP")
)
TALL = np.arange(6, dtype=np.uint8).reshape(3, 2) * 40


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> Image.Image:
    """The image as it is opened again from a file of that kind."""
    file = BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def red(image: Image.Image, decode: DecodeConfig | None = None) -> list[list[int]]:
    converted = to_rgb(image, decode)
    assert converted.mode == "RGB"
    return np.asarray(converted)[..., 0].tolist()


def lines(images: list[Image.Image], decode: DecodeConfig | None = None) -> list[str]:
    lost = [loss for image in images for loss in losses(to_rgb(image, decode))]
    return loss_lines("set", lost)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_eight_bit_mode_keeps_its_colours(mode: str) -> None:
    flat = Image.new("RGB", (4, 4), (250, 250, 250))
    image = flat.convert("L").convert(mode) if mode in ("1", "LA", "PA") else flat.convert(mode)
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - 250).max() <= 6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "kind", ["RGBA", "LA", "PA", "palette", "colour key", "gray key", WEBP, "deep key"]
)
def test_equal_looking_files_give_equal_pixels(kind: str) -> None:
    """A transparent pixel is invisible, a half-transparent one half visible."""

    def picture(hidden: int) -> Image.Image:
        gray = np.array([[hidden, 200], [200, 0]], np.uint8)
        alpha = np.array([[0, 128], [255, 255]], np.uint8)
        if kind == "deep key":
            return stored(Image.fromarray(gray.astype(np.uint16) * 257), transparency=hidden * 257)
        if kind == "gray key":
            return stored(Image.fromarray(gray), transparency=hidden)
        if kind == "colour key":
            return stored(Image.fromarray(np.dstack([gray] * 3)), transparency=(hidden,) * 3)
        if kind in ("palette", "PA"):
            image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8))
            image.putpalette([value for value in (hidden, 200, 200, 0) for _ in range(3)])
            image.info["transparency"] = bytes(alpha.reshape(-1).tolist())
            return stored(image) if kind == "palette" else image.convert("PA")
        rgba = Image.fromarray(np.dstack([gray, gray, gray, alpha]))
        if kind == "WEBP":
            return stored(rgba, kind, lossless=True, exact=True)
        return stored(rgba.convert(kind))

    seen = red(picture(77))
    assert seen == red(picture(7))
    half = 200 if kind.endswith("key") else 200 * 128 / 255 + 128 * 127 / 255
    np.testing.assert_allclose(seen, [[128, half], [200, 0]], atol=1)
    red_behind = to_rgb(picture(77), DecodeConfig(background="#ff0000"))
    assert red_behind.getpixel((0, 0)) == (255, 0, 0)


def png(bits: int, rows: list[list[int]], key: tuple[int, ...]) -> bytes:
    """A PNG of a depth that Pillow does not write: a row of gray, in RGB if `key` is, per frame.

    Frames are laid over those before them.
    """
    frames, width = len(rows), len(rows[0])
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, 1, bits, len(key) - 1, 0, 0, 0)]
    chunks += [b"tRNS" + struct.pack(f">{len(key)}H", *key)]
    if frames > 1:
        chunks += [b"acTL" + struct.pack(">II", frames, 0)]
    for number, row in enumerate(rows):
        digits = "".join(f"{value:0{bits}b}" for value in np.repeat(row, len(key)))
        size = -(-len(digits) // 8)
        data = zlib.compress(b"\0" + int(digits.ljust(8 * size, "0"), 2).to_bytes(size, "big"))
        if frames > 1:
            area = (width, 1, 0, 0, 1, 1, 0, 1)
            chunks += [b"fcTL" + struct.pack(">IIIIIHHBB", max(0, 2 * number - 1), *area)]
        chunks += [b"fdAT" + struct.pack(">I", 2 * number) + data if number else b"IDAT" + data]
    file = b"\x89PNG\r\n\x1a\n"
    for chunk in (*chunks, b"IEND"):
        file += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return file


@pytest.mark.parametrize(("bits", "level"), [(1, 1), (2, 2), (4, 9), (8, 77), (16, 0x4D21)])
def test_the_transparent_colour_of_a_png_is_as_deep_as_its_pixels(bits: int, level: int) -> None:
    for key, expected in ((level, [0, 128]), (0, [128, round(level * 255 / (2**bits - 1))])):
        for channels in (1, 3) if bits >= 8 else (1,):
            image = Image.open(BytesIO(png(bits, [[0, level]], (key,) * channels)))
            assert [red(image), red(image)] == [[expected], [expected]]  # again once it is loaded


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1)])
def test_frames_of_a_deep_png_are_the_same_in_any_order(
    order: tuple[int, ...], tmp_path: Path
) -> None:
    """Decoding scales the colour, by which Pillow goes on composing if the file is kept open."""
    decode, path = DecodeConfig(frames="all"), tmp_path / "a.png"
    equal = [[0, 0x4D21]] * 3
    for rows in (equal, [[0xC8C8] * 3, [0x4D21, 0x2121, 0], [0x4D21, 0, 0x2121]]):
        path.write_bytes(png(16, rows, (0x4D21,) * 3))
        source = FileSource([path], decode=decode)
        alone = [red(FileSource(source.paths, decode=decode).image(index)) for index in order]
        assert [red(source.image(index)) for index in order] == alone
        assert rows is not equal or alone == [[[0, 128]]] * 3


def test_gray_with_premultiplied_alpha() -> None:
    image = Image.fromarray(np.array([[[200, 255], [100, 128]]], np.uint8)).convert("La")
    np.testing.assert_allclose(red(image), [[200, 100 * 128 / 255 + 128 * 127 / 255]], atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", WEBP, "deep PNG"])
def test_images_are_turned_upright(tmp_path: Path, orientation: int, kind: str) -> None:
    """Each file is written as by a camera held that way, hence all look alike."""
    turned = (TALL, TALL[:, ::-1], TALL[::-1, ::-1], TALL[::-1])
    turned += (TALL.T, np.rot90(TALL, 1), TALL[::-1, ::-1].T, np.rot90(TALL, -1))
    pixels = np.kron(turned[orientation - 1], np.ones((16, 16), np.uint8))
    image = Image.fromarray(pixels.astype(np.uint16) * 257 if kind.startswith("deep") else pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image"
    image.save(path, kind.split()[-1], exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    source = FileSource([path])
    upright = source.image(0)
    np.testing.assert_allclose(np.asarray(upright)[8::16, 8::16, 0], TALL, atol=3)
    assert source.dimensions(0) == (48, 32) or kind.endswith("PNG")
    np.testing.assert_array_equal(to_rgb(upright), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_do_not_cost_the_image() -> None:
    for data in (b"II*\0\x08\0\0\0\x05\0\x12\x01\x03", b"nonsense", b"II*\0\xff\xff\xff\xff"):
        image = stored(Image.fromarray(GRAY), "PNG", exif=b"Exif\0\0" + data)
        assert red(image) == GRAY.tolist()


@pytest.mark.parametrize(
    ("suffix", "byte_order"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("pgm", "<u2")]
)
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str, byte_order: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray((GRAY.astype(np.uint16) * 257).astype(byte_order)).save(path)
    assert red(FileSource([path]).image(0)) == GRAY.tolist()


def tiff(values: np.ndarray, photometric: int = 1) -> Image.Image:
    """A TIFF of a type that Pillow does not write: one strip, little-endian."""
    bits, kind = values.dtype.itemsize * 8, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8}
    tags |= {277: 1, 278: height, 279: values.nbytes, 339: kind}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = struct.pack("<2sHI", b"II", 42, 8 + values.nbytes)
    content = values.tobytes() + struct.pack("<H", len(tags)) + directory + bytes(4)
    return Image.open(BytesIO(header + content))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 65535]], np.uint16), [0, 1, 255]),
        (np.array([[-32768, 0, 32767]], np.int16), [0, 128, 255]),
        (np.array([[0, 2**31, 2**32 - 1]], np.uint32), [0, 128, 255]),
        (np.array([[-(2**31), 0, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[-1, 2, np.nan]], np.float32), [0, 255, 0]),
        (np.array([[-np.inf, np.inf, 0.25]], np.float32), [0, 255, 64]),
    ],
)
def test_the_stored_type_gives_the_range(values: np.ndarray, expected: list[int]) -> None:
    assert red(tiff(values)) == [expected]
    if values.dtype == np.uint16:
        assert red(tiff(values, photometric=0)) == [[255 - level for level in expected]]


def test_a_value_range_of_ones_own() -> None:
    body = np.array([[-2000, -1000, 1000, 3000, 5000]], np.int32)
    assert red(tiff(body), DecodeConfig(value_range=(-1000.0, 3000.0))) == [[0, 0, 128, 255, 255]]
    assert red(tiff(body), DecodeConfig(value_range="file")) == [[0, 36, 109, 182, 255]]
    assert red(tiff(body * 0 + 7), DecodeConfig(value_range="file")) == [[0] * 5]
    twelve = Image.fromarray(np.array([[0, 1000, 4095]], np.uint16))
    assert red(stored(twelve), DecodeConfig(value_range=(0.0, 4095.0))) == [[0, 62, 255]]
    eight = DecodeConfig(value_range=(0.0, 10.0))
    assert red(Image.fromarray(GRAY), eight) == GRAY.tolist(), "8 bits stay as they are"


def test_lost_range_is_reported_once_with_the_option_that_keeps_it() -> None:
    def deep(low: int, high: int) -> Image.Image:
        return stored(Image.fromarray(np.array([[low, high]], np.uint16)))

    twelve = [deep(low, 4095 - low) for low in (0, 1, 2)]
    dark, bright = deep(0, 900), deep(0, 65000)
    clipped = tiff(np.array([[-1024.5, 3071]], np.float32))
    for images, facts in (
        (twelve, "3 images .* 0 to 4095 only, and 0 to 65535 .* --value-range 0 4095 "),
        ([clipped], "1 image .* -1024.5 to 3071 and .* to 0 to 1; .* --value-range -1024.5 3071 "),
        ([dark, bright], "1 image .* less than an eighth of 0 to 65535, .* --value-range file "),
    ):
        (line,) = lines(images)
        assert re.match(f"set: values of {facts}", line)
    assert lines([bright, bright]) == []
    for value_range in ((0.0, 4095.0), "file"):
        assert lines(twelve, DecodeConfig(value_range=value_range)) == []


@pytest.fixture
def animation(tmp_path: Path) -> list[Path]:
    """Files of three frames each, with the levels 0, 100 and 200."""
    frames = [Image.new("L", (4, 4), level) for level in (0, 100, 200)]
    for kind in ("gif", "tif", "png", "webp"):
        if kind != "webp" or features.check("webp"):
            options = {"lossless": True} if kind == "webp" else {}
            path = tmp_path / f"moving.{kind}"
            frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    pages = [BytesIO() for _ in frames]
    for frame, page in zip(frames, pages, strict=True):
        frame.save(page, "PCX")
    content = b"".join(page.getvalue() for page in pages)
    starts = [20, 20 + len(pages[0].getvalue()), 20 + len(content) - len(pages[2].getvalue())]
    (tmp_path / "moving.dcx").write_bytes(struct.pack("<5I", 0x3ADE68B1, *starts, 0) + content)
    prefix = struct.pack("<IHH8xIH", 38, 0xF1FA, 1, 22, 16)
    content = b"".join(prefix + frame.tobytes() for frame in frames)
    header = struct.pack("<I6HI108x", 128 + len(content), 0xAF11, len(frames), 4, 4, 8, 3, 0)
    (tmp_path / "moving.fli").write_bytes(header + content)
    return sorted(tmp_path.iterdir())


def test_of_animations_the_first_frame_or_all(animation: list[Path]) -> None:
    def levels(source: ImageSource) -> list[int]:
        return [source.image(index).getpixel((0, 0))[0] for index in range(len(source))]

    count = len(animation)
    labels, names = np.arange(count, dtype=np.int64), "abcdef"[:count]
    images = in_memory(FileSource(animation, labels, names, "set"), workers=0)
    assert levels(images) == [0] * count
    (note,) = images.notes
    found = f"set: {count} images with several frames, of which the first is used; .* --frames all "
    assert re.match(found, note)
    source = FileSource(animation, labels, names, "set", decode=DecodeConfig(frames="all"))
    np.testing.assert_array_equal(source.labels, np.repeat(labels, 3))
    images = in_memory(source, workers=0)
    assert (levels(images), images.notes) == ([0, 100, 200] * count, ())
    part = source.take(np.array([2, 6, 7]), "part")
    places = [f"{animation[0]}#2", f"{animation[2]}", f"{animation[2]}#1"]
    assert [part.describe(index) for index in range(3)] == places
    assert levels(part) == [200, 0, 100]
    assert part.fingerprint() != source.take(np.array([1, 6, 7]), "part").fingerprint()
