"""One rule that turns every image into 8-bit RGB, and a record of what that loses.

    stored                           becomes
    up to 8 bits, of any colour      as it is, converted to RGB
    with transparency                composited on the background, medium gray by default
    with an EXIF orientation         turned upright
    gray of 9 to 32 bits             0 and 255 at the two ends of the value range, by default the
                                     stored type's
    floating-point gray              the same, by default 0 and 1; NaN is the lower end
    colour of 16 bits a channel      the upper 8 bits, of a transparent colour, too
    an animation, or several pages   its first frame, or every frame as an image of its own

Values beyond the range are clipped to it.

A file can declare far more than it holds. Pillow refuses images of more than 178,956,970 pixels and
text that expands to more than 64 MiB, before it allocates them; JPEGs are checked here. At that
size, colour takes up to 3 GB while it is decoded, and deep gray up to 6 GB.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from vi_simsiam.config import DecodeConfig
from vi_simsiam.text import counted

_ANIMATED = ("GIF", "WEBP", "TIFF", "PNG", "AVIF", "FLI", "DCX")
"""Formats whose frames are images in their own right; those of MPO files are previews."""
_LOST = "vi_simsiam_lost"
_KEY = "vi_simsiam_key"
_LEAST_USED = 1 / 8
"""Share of the range below which it counts as lost: fewer than 32 of 256 gray values."""
_LARGEST = {"1": 1, "L;2": 3, "L;4": 15}
"""Largest gray value of PNGs of fewer than 8 bits, by Pillow's name of the format."""
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2
_ORIENTATION = 0x0112
_MOST_FRAMES = 1 << 15
_MOST_SCANS = 100
_PIXELS_PER_BYTE = 512
"""Largest number in a JPEG: a block of 8 x 8 pixels takes at least a bit."""

# A panorama of 100 megapixels is decoded like any other photo (twice Pillow's limit is still an
# error), and damaged EXIF data and tags are ignored: one file can cause thousands of warnings.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class Loss(NamedTuple):
    """The loss in decoding one image."""

    framed: bool
    """True if frames were passed over."""
    ends: tuple[float, float] | None = None
    """The range of deep gray that became 0 to 255; None for other images."""
    low: float = 0.0
    """Smallest of the image's deep gray values."""
    high: float = 0.0


def losses(image: Image.Image) -> list[Loss]:
    """Return the loss in an image that `to_rgb` made, if there may be one."""
    found: list[Loss] = image.info.get(_LOST, [])
    return found


def loss_lines(name: str, losses: Sequence[Loss]) -> list[str]:
    """Return a sentence for each kind of loss in a source, with the option that avoids it."""
    lines = []
    if framed := sum(loss.framed for loss in losses):
        lines.append(
            f"{name}: {counted(framed, 'image')} with several frames, of which the first "
            "is used; train or pack with --frames all to take each as an image"
        )
    for ends in dict.fromkeys(loss.ends for loss in losses if loss.ends):
        black, white = ends
        group = [loss for loss in losses if loss.ends == ends]
        low, high = min(loss.low for loss in group), max(loss.high for loss in group)
        least = _LEAST_USED * (white - black)
        narrow = sum(0 < loss.high - loss.low < least for loss in group)
        count, shown = len(group), f"{black:.9g} to {white:.9g}"
        found = f"range from {low:.9g} to {high:.9g}"
        remedy = f"--value-range {low:.9g} {high:.9g} to keep them apart"
        if low < black or high > white:
            found += f" and are clipped to {shown}"
        elif narrow and high - low < least:
            found += f" only, and {shown} become black to white"
        elif narrow:
            found = f"take up less than an eighth of {shown}, which become black to white"
            count = narrow
            remedy = "--value-range file to spread them"
        else:
            continue
        images = counted(count, "image")
        lines.append(f"{name}: values of {images} {found}; train or pack with {remedy}")
    return lines


def to_rgb(image: Image.Image, decode: DecodeConfig | None = None) -> Image.Image:
    """Return an image of any Pillow mode as 8-bit RGB, by the rule at the head of this module.

    Raises ValueError for an image without pixels or a mode that has no RGB equivalent.
    """
    decode = decode or DecodeConfig()
    if 0 in image.size:
        raise ValueError(f"{image.width} x {image.height} pixels")
    framed = decode.frames == "first" and is_animated(image)
    if image.format == "PNG":
        _scale_key(image)
    if image.format == "JPEG":
        check_jpeg(image)
    image.load()
    lost, stored = Loss(framed), _stored(image)
    # Damaged EXIF data raise almost any exception; the pixels are well.
    with contextlib.suppress(Exception):
        if image.getexif().get(_ORIENTATION, 1) != 1:  # else it would be copied
            image = ImageOps.exif_transpose(image)
    if stored is not None:
        image, lost = _eight_bits(image, stored, decode, framed)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, decode.colour())
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    rgb = image.convert("RGB")
    rgb.info = {_LOST: [lost]} if framed or lost.ends else {}
    return rgb


def check_jpeg(image: Image.Image) -> None:
    """Raise ValueError for a JPEG, not loaded yet, that is far smaller or slower than others.

    Pillow fills in what is missing, and decodes all pixels once for each scan.
    """
    file = getattr(image, "fp", None)
    if file is None:
        return
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    scans = file.read().count(b"\xff\xda") if "progressive" in image.info else 1
    file.seek(place)
    if image.width * image.height > _PIXELS_PER_BYTE * size:
        raise ValueError(f"{image.width} x {image.height} pixels in {counted(size, 'byte')}")
    if scans > _MOST_SCANS:
        raise ValueError(f"{scans:,} scans, more than {_MOST_SCANS}")


def count_frames(image: Image.Image) -> int:
    """Return the number of frames of an opened file; raise ValueError for more than 32,768."""
    if not is_animated(image):
        return 1
    if image.format == "TIFF":  # Pillow compares every page with all before it
        for frame in range(1, _MOST_FRAMES + 1):
            try:
                image.seek(frame)
            except EOFError:
                return frame
        raise ValueError(f"more than {_MOST_FRAMES:,} frames")
    count = int(image.n_frames)  # type: ignore[attr-defined]
    if count > _MOST_FRAMES:
        raise ValueError(f"more than {_MOST_FRAMES:,} frames")
    return count


def _scale_key(image: Image.Image) -> None:
    """Scale the transparent colour of a PNG that is not loaded to 8 bits; Pillow does not."""
    # Frames of one file share `info`, and each of them is scaled from the file's value.
    key = image.info.setdefault(_KEY, image.info.get("transparency"))
    tiles = getattr(image, "tile", None)
    kind = tiles[0][3] if tiles else None
    if isinstance(key, tuple) and kind == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif isinstance(key, int) and kind in _LARGEST:
        image.info["transparency"] = (key & _LARGEST[kind]) * (255 // _LARGEST[kind])


def is_animated(image: Image.Image) -> bool:
    """Return True if an opened file has more than one frame."""
    return image.format in _ANIMATED and getattr(image, "is_animated", False)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width of an opened file once turned upright, from its header."""
    turned = 0
    # A PNG may have its EXIF data behind the pixels, and Pillow turns TIFFs itself.
    if image.format not in ("PNG", "TIFF"):
        with contextlib.suppress(Exception):
            turned = image.getexif().get(_ORIENTATION, 0)
    return (image.width, image.height) if turned >= 5 else (image.height, image.width)


class _Stored(NamedTuple):
    """Storage of deep gray: smallest and largest value of its type, 0 and 1 for floats."""

    low: float
    high: float
    inverted: bool = False
    """True if the largest value is black."""


def _stored(image: Image.Image) -> _Stored | None:
    """Storage of gray deeper than 8 bits in an opened file; None for other images."""
    if image.mode == "F":
        return _Stored(0.0, 1.0)
    if not image.mode.startswith("I"):
        return None
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = tags.get(_BITS, (16,))[0]
        half = 2.0 ** (bits - 1)
        low = -half if tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED else 0.0
        return _Stored(low, low + 2 * half - 1, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        return _Stored(0.0, 65535.0)
    return _Stored(-(2.0**31), 2.0**31 - 1)


def _eight_bits(
    image: Image.Image, stored: _Stored, decode: DecodeConfig, framed: bool
) -> tuple[Image.Image, Loss]:
    """Deep gray as 8-bit gray (LA with transparency), and what that loses."""
    pixels = np.asarray(image)
    if stored.high > 2**31:  # Pillow reads unsigned integers as signed ones
        pixels = pixels.view(np.uint32)
    values = pixels.astype(np.float64)
    finite = values if image.mode != "F" else values[np.isfinite(values)]
    black, white = stored.low, stored.high
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (black, black)
    if decode.value_range == "file":
        black, white = low, high if high > low else low + 1
    elif isinstance(decode.value_range, tuple):
        black, white = decode.value_range
    np.nan_to_num(values, copy=False, nan=black)
    np.clip(values, black, white, out=values)
    levels = np.rint((values - black) * (255 / (white - black))).astype(np.uint8)
    gray = Image.fromarray(255 - levels if stored.inverted else levels)
    if isinstance(transparent := image.info.get("transparency"), int):
        gray.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    ends = None if decode.value_range == "file" else (black, white)
    return gray, Loss(framed, ends, low, high)
