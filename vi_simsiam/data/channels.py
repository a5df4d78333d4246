"""Images of any channels with 8 or 16 bits, as they are stored; `data.pixels` makes RGB instead.

    .npy          (height, width) or (height, width, channels), uint8 or uint16
    TIFF          its first series, read by tifffile: channels interleaved, in planes or on pages
    other files   gray, gray with alpha, RGB, RGBA and CMYK, as Pillow decodes them

Images are turned upright by their orientation in EXIF or TIFF tags. A palette becomes the colours
that it names. Where other bits are asked for, 16 bits become their
upper 8, and 8 bits are multiplied by 257. Pillow has no more than 8 bits of other files' colour, so
that colour of 16 bits is read from TIFF and .npy files only.

Files are checked before memory is allocated for what they declare.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vi_simsiam.config import DecodeConfig
from vi_simsiam.data.files import ARRAY, formats
from vi_simsiam.data.inside import open_image
from vi_simsiam.data.pixels import check_jpeg, upright_size
from vi_simsiam.errors import InputError
from vi_simsiam.text import counted

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
"""(height, width, channels), uint8 or uint16."""

MOST_BYTES = 2**31 - 1
"""Limit of one image, so that positions within it fit in 32 bits."""
_MOST_COMPRESSED = 1 << 11
"""Largest ratio of pixels to file: deflate's is 1,032."""
_MODES = {"1": "L", "P": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB"}
"""Modes of Pillow that are converted, and what they become."""
_KEPT = ("L", "LA", "RGB", "RGBA", "CMYK")
_WHITE_IS_ZERO, _PALETTE = 0, 3
_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 274
# Orientations whose rows are stored as columns, and those that are then still mirrored: top to
# bottom, and left to right.
_TRANSPOSED, _UPSIDE_DOWN, _MIRRORED = (5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)
_OTHER = re.compile(r"(\d+) channels?, not \d+")
_SHOWN = 3


def read_file(path: str, decode: DecodeConfig) -> Pixels:
    """Return the pixels of an image file.

    Args:
        path: of a .npy, TIFF or any file that Pillow opens.
        decode: number and bits of the channels.

    Raises:
        ValueError: the file holds another number of channels, or values of another type.
        Exception: almost any, for a damaged file.
    """
    with open_image(path) as file:
        if _is_npy(path, file):
            return as_stored(_read_npy(file), decode)
        if _begins_with(file, _TIFF):
            with _series(file) as series:
                return as_stored(_channels_last(series.asarray(), series), decode)
        with Image.open(file, formats=formats(path)) as image:
            return of_pillow(image, decode)


def file_size(path: str) -> tuple[int, int]:
    """Return height and width of an image file from its header; raises as `read_file`."""
    with open_image(path) as file:
        if _is_npy(path, file):
            height, width = _npy_header(file)[0][:2]
            return height, width
        if _begins_with(file, _TIFF):
            with _series(file) as series:
                sizes = dict(zip(series.axes, series.shape, strict=True))
                lies = _orientation(series) in _TRANSPOSED
                return (sizes["X"], sizes["Y"]) if lies else (sizes["Y"], sizes["X"])
        with Image.open(file, formats=formats(path)) as image:
            return upright_size(image)


def of_pillow(image: Image.Image, decode: DecodeConfig) -> Pixels:
    """Return the pixels of a PIL image, turned upright; raises as `read_file`."""
    tiles = getattr(image, "tile", None)
    deep = str(tiles[0][3]) if tiles else ""
    if decode.bits == 16 and image.mode in _KEPT and deep.endswith((";16B", ";16L", ";16N")):
        raise ValueError("colour of 16 bits, of which Pillow reads 8; save it as TIFF or .npy")
    if image.format == "JPEG":
        check_jpeg(image)
    graymap = image.mode == "I" and image.format == "PPM"  # which Pillow scales to 16 bits
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data; the pixels are well
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return as_stored(np.asarray(image), decode)
    if graymap:
        return as_stored(np.asarray(image).astype(np.uint16), decode)
    if image.mode == "P" and image.has_transparency_data:
        image = image.convert("RGBA")
    if image.mode in _MODES:
        image = image.convert(_MODES[image.mode])
    if image.mode not in _KEPT:
        raise ValueError(f"values of mode {image.mode}; accepted are 8 and 16 bits")
    return as_stored(np.asarray(image), decode)


def as_stored(values: NDArray[Any], decode: DecodeConfig) -> Pixels:
    """Return (height, width) or (height, width, channels) values as contiguous pixels.

    Raises:
        ValueError: another number of channels, another type than uint8 and uint16, or no pixel.
    """
    if values.dtype.kind != "u" or values.dtype.itemsize > 2:
        raise ValueError(f"values of {values.dtype}; accepted are uint8 and uint16")
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ValueError(f"shape {values.shape}; accepted is (height, width, channels)")
    pixels = values[:, :, None] if values.ndim == 2 else values
    if pixels.shape[2] != decode.channels:
        raise ValueError(f"{counted(pixels.shape[2], 'channel')}, not {decode.channels}")
    if decode.bits == 8:
        pixels = pixels if pixels.dtype.itemsize == 1 else pixels >> 8
        return np.ascontiguousarray(pixels, np.uint8)
    scale = 257 if pixels.dtype.itemsize == 1 else 1
    return np.ascontiguousarray(pixels.astype(np.uint16) * np.uint16(scale))


def resized(pixels: Pixels, height: int, width: int) -> Pixels:
    """Return an image of another size (bicubic, antialiased, rounded)."""
    values = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    found = F.interpolate(values, (height, width), mode="bicubic", antialias=True)[0]
    levels = found.round_().clamp_(0, int(np.iinfo(pixels.dtype).max)).permute(1, 2, 0)
    return np.ascontiguousarray(levels.numpy().astype(pixels.dtype))


def picture(pixels: Pixels) -> Image.Image:
    """Return a view of an image for people, in mode RGB.

    The first three channels are red, green and blue; of fewer the first is gray. 16 bits go from
    the image's smallest value, black, to its largest, white.
    """
    shown = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, :1].repeat(3, axis=2)
    if shown.dtype == np.uint16:
        low, high = int(shown.min()), int(shown.max())
        shown = np.rint((shown - float(low)) * (255 / max(1, high - low)))
    return Image.fromarray(np.ascontiguousarray(shown, np.uint8))


def refuse_mixed(name: str, failures: Sequence[tuple[str, str]], decode: DecodeConfig) -> None:
    """Raise InputError if images were left out because they have another number of channels.

    Args:
        name: of the source.
        failures: path and reason of every image left out.
        decode: of the source.
    """
    groups: dict[int, list[str]] = {}
    for path, reason in failures:
        if found := _OTHER.fullmatch(reason):
            groups.setdefault(int(found[1]), []).append(path)
    if not groups:
        return
    parts = []
    for channels, paths in sorted(groups.items()):
        names = ", ".join(paths[:_SHOWN]) + ", ..." * (len(paths) > _SHOWN)
        parts.append(f"{counted(len(paths), 'image')} of {counted(channels, 'channel')} ({names})")
    raise InputError(
        f"channels: {name} holds {', '.join(parts)}; all images must have {decode.channels}, or "
        "the number that --channels gives"
    )


def _begins_with(file: IO[bytes], starts: tuple[bytes, ...]) -> bool:
    start = file.read(len(_NPY))
    file.seek(0)
    return start.startswith(starts)


def _is_npy(path: str, file: IO[bytes]) -> bool:
    """By its name, or in a row of a Parquet file, which has none, by its first bytes."""
    return path.lower().endswith(ARRAY) or _begins_with(file, (_NPY,))


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of a .npy file that holds an image and all of its bytes."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the format, which holds no plain array")
    if dtype.kind != "u" or dtype.itemsize > 2 or len(shape) not in (2, 3):
        raise ValueError(
            f"{dtype} of shape {shape}; accepted are uint8 and uint16 (height, width, channels)"
        )
    size = math.prod(shape) * dtype.itemsize
    left = _byte_count(file) - file.tell()
    if min(shape) < 1 or size > min(left, MOST_BYTES):
        raise ValueError(f"shape {shape} in {counted(left, 'byte')}")
    return shape, fortran, dtype


def _byte_count(file: IO[bytes]) -> int:
    position = file.tell()
    count = file.seek(0, os.SEEK_END)
    file.seek(position)
    return count


def _read_npy(file: IO[bytes]) -> NDArray[Any]:
    shape, fortran, dtype = _npy_header(file)
    content = file.read(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


@contextlib.contextmanager
def _series(file: IO[bytes]) -> Iterator[Any]:
    """The first series of a TIFF, once its size and axes are known to be those of an image."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("a TIFF, which takes pip install 'vi-simsiam[tiff]'") from error
    # Metadata of microscopes may name other files, whose pixels would be read as this one's.
    with tifffile.TiffFile(file, is_ome=False, is_mmstack=False, is_ndtiff=False) as tiff:
        series = tiff.series[0]
        axes, shape = series.axes, series.shape
        if len(axes) not in (2, 3) or not {"Y", "X"} <= set(axes) or axes.index("Y") > 1:
            raise ValueError(f"axes {axes} of sizes {shape}; accepted is one image in channels")
        size = math.prod(shape) * series.dtype.itemsize
        held = _byte_count(file)
        if not 0 < size <= min(MOST_BYTES, _MOST_COMPRESSED * held):
            raise ValueError(f"sizes {shape} in {counted(held, 'byte')}")
        if series.keyframe.photometric == _PALETTE:
            raise ValueError("a palette; save its colours")
        yield series


def _channels_last(values: NDArray[Any], series: Any) -> NDArray[Any]:
    """The values (height, width, channels), turned upright by the tag Orientation of TIFF 6.0."""
    if series.keyframe.photometric == _WHITE_IS_ZERO and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    if series.axes.endswith("YX") and values.ndim == 3:
        values = np.moveaxis(values, 0, -1)
    orientation = _orientation(series)
    if orientation in _TRANSPOSED:
        values = values.swapaxes(0, 1)
    if orientation in _UPSIDE_DOWN:
        values = values[::-1]
    return values[:, ::-1] if orientation in _MIRRORED else values


def _orientation(series: Any) -> Any:
    return series.keyframe.tags.valueof(_ORIENTATION, 1)
