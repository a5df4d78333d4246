"""Random views from a table: what a row of the table means, the reference in plain PyTorch, and the
fused backend.

A table has one row of 64 bytes for each view of each sample. It holds where the crop lies in the
bytes of the images and what is done with it: crop, resize (bilinear, antialiased), mirror, colour
operations, grayscale, blur, normalise. Each step is the one of torchvision.transforms.v2.functional
on float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vi_simsiam.config import IMAGENET_MEAN, IMAGENET_STD
from vi_simsiam.errors import InputError
from vi_simsiam.ops.backends import check_storage, choose_backend

TABLE_COLUMNS = 16
BLUR_TAPS = 13
"""Covers three standard deviations of the strongest blur of SimSiam's policy, sigma = 2."""
MIN_SIZE = 8
"""Reflection pads a view by six pixels for the blur, and needs more pixels than that to reflect."""
AUGMENT_BACKENDS = ("eager", "triton")

_LUMA = (0.2989, 0.587, 0.114)
# Rows worked on at a time: few enough for a processor's cache, many enough that calls of torch cost
# little.
_CHUNK_FLOATS = 1 << 19
_SMALL_SIZE = 64
"""Views up to this size are resized with matrices, which is faster for crops no larger than them.
"""
_MOST_REDUCED = 64
"""Largest ratio of a crop to its view that is resized on a GPU: torch's kernel holds the weights of
one output pixel in 48 KB, which is too little from about 90 on."""
_LEAST_TAP = 1e-12
"""Smallest tap of a blur: subnormal numbers make a processor ten times slower."""


class Column(IntEnum):
    """Columns of a table row, int32; columns 0 and 1 together are an int64, little-endian."""

    START = 0
    """First byte of the crop in `pixels`, int64."""
    STRIDE = 2
    """Bytes from one row of the image to the next."""
    HEIGHT = 3
    """Height of the crop in pixels."""
    WIDTH = 4
    """Width of the crop in pixels."""
    FLIP = 5
    """1: mirrored left-right after resizing."""
    ORDER = 6
    """`ColourOperation`s in the order they are applied, 4 bits each, lowest bits first; 0 is none.
    """
    GRAY = 7
    """1: grayscale after the colour operations."""
    BRIGHTNESS = 8
    """Factor, the bits of a float32."""
    CONTRAST = 9
    """Factor, the bits of a float32."""
    SATURATION = 10
    """Factor, the bits of a float32."""
    HUE = 11
    """Shift in turns, from -0.5 to 0.5, the bits of a float32."""
    SIGMA = 12
    """Standard deviation of the blur in pixels, the bits of a float32; 0 for no blur."""
    SAMPLE = 13
    """Index of the image in its source."""
    TOP = 14
    """First row of the crop in the image."""
    LEFT = 15
    """First column of the crop in the image."""


class ColourOperation(IntEnum):
    """Codes in `Column.ORDER`. The strength of operation k is in column 7 + k."""

    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    HUE = 4


class Layout(NamedTuple):
    """Storage of the images' pixels, and the numbers by which views are normalised."""

    bits: int = 8
    """Bits of a channel: 8 or 16, little-endian."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Of each of the C interleaved channels, for values in [0, 1]."""
    std: tuple[float, ...] = IMAGENET_STD


RGB = Layout()
"""8-bit RGB with ImageNet's mean and standard deviation, which the fused kernel makes."""


def augment(
    pixels: Tensor,
    table: Tensor,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    layout: Layout = RGB,
) -> Tensor:
    """Make the views that a table describes.

    Args:
        pixels: (bytes,) uint8, the pixels of the images.
        table: (V, B, 16) int32 on the same device, see `Column`. Its values are trusted.
        size: side of the views in pixels, at least 8.
        dtype: of the views, float32 or bfloat16; everything is computed in float32 and rounded
            once.
        backend: "eager", "triton" (one fused kernel), or "auto": triton for CUDA tensors where it
            runs and the layout is `RGB`.
        layout: of the pixels. Saturation, hue and grayscale need three channels; contrast is
            changed about the image's mean luma, or the mean of all channels if there are not three.

    Returns:
        (V, B, C, size, size), normalised; every view is contiguous in `torch.channels_last`.

    Raises:
        InputError: a shape, layout, dtype, device, size or backend that is not accepted.
        BackendUnavailableError: the backend was named explicitly and cannot run on this device.
    """
    _check(pixels, table, size, dtype)
    if not is_fused(backend, pixels.device.type, layout):
        return eager_augment(pixels, table, size, dtype, layout)
    from vi_simsiam.kernels import augment as kernel

    views, batch = table.shape[:2]
    rows = views * batch
    out = torch.empty((rows, size, size, 3), dtype=dtype, device=pixels.device)
    if rows:
        workspace = torch.empty(
            kernel.workspace_bytes(rows, size), dtype=torch.uint8, device=pixels.device
        )
        kernel.augment(pixels, table.view(rows, TABLE_COLUMNS), out, workspace)
    return out.view(views, batch, size, size, 3).permute(0, 1, 4, 2, 3)


def is_fused(backend: str, device_type: str, layout: Layout) -> bool:
    """True if `augment` runs the fused kernel, False if it runs `eager_augment`.

    Raises:
        InputError: the backend is unknown or does not take this layout.
        BackendUnavailableError: the backend was named explicitly and cannot run on this device.
    """
    fits = device_type == "cuda" and layout == RGB
    preferred = ("triton", "eager") if fits else ("eager",)
    if choose_backend(backend, device_type, AUGMENT_BACKENDS, preferred) == "eager":
        return False
    if layout != RGB:
        raise InputError("backend: triton makes views of 8-bit RGB alone; eager makes these")
    return True


def eager_augment(
    pixels: Tensor,
    table: Tensor,
    size: int,
    dtype: torch.dtype = torch.float32,
    layout: Layout = RGB,
) -> Tensor:
    """The reference in plain PyTorch, on any device; see `augment` for arguments and result.

    The parameters are read on the host: on a GPU this waits for the device.
    """
    views, batch = table.shape[:2]
    rows = table.detach().cpu().numpy().reshape(views * batch, TABLE_COLUMNS)
    channels = len(layout.mean)
    out = torch.empty((len(rows), size, size, channels), dtype=dtype, device=pixels.device)
    chunk = max(1, _CHUNK_FLOATS // (channels * size * size))
    # The caller's network may run under autocast; views are float32 until they are rounded.
    with torch.autocast(pixels.device.type, enabled=False):
        for first in range(0, len(rows), chunk):
            _augment_rows(pixels, rows[first : first + chunk], out[first : first + chunk], layout)
    return out.view(views, batch, size, size, channels).permute(0, 1, 4, 2, 3)


def _check(pixels: Tensor, table: Tensor, size: int, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"dtype: {dtype} is neither torch.float32 nor torch.bfloat16")
    if pixels.dim() != 1:
        raise InputError(f"pixels: shape {tuple(pixels.shape)} must be (bytes,)")
    if table.dim() != 3 or table.shape[2] != TABLE_COLUMNS:
        raise InputError(
            f"table: shape {tuple(table.shape)} must be (views, batch, {TABLE_COLUMNS})"
        )
    for name, x, expected in (("pixels", pixels, torch.uint8), ("table", table, torch.int32)):
        if x.dtype != expected or not x.is_contiguous() or x.device != pixels.device:
            raise InputError(
                f"{name}: {x.dtype} on {x.device} with strides {x.stride()} must be contiguous "
                f"{expected} on {pixels.device}"
            )
        check_storage(name, x)
    if size < MIN_SIZE:
        raise InputError(f"size: {size} must be at least {MIN_SIZE}")


def _starts(rows: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.ascontiguousarray(rows[:, : Column.STRIDE]).view("<i8")[:, 0]


def _augment_rows(pixels: Tensor, rows: NDArray[np.int32], out: Tensor, layout: Layout) -> None:
    """Write the views of (n, 16) table rows to `out`, (n, size, size, C)."""
    device = out.device
    x = _resized(pixels, rows, out.shape[1], layout)
    x.mul_(1 / (2**layout.bits - 1))
    strengths = torch.from_numpy(
        rows[:, Column.BRIGHTNESS : Column.SIGMA + 1].view(np.float32).copy()
    ).to(device)
    _apply(x, rows[:, Column.FLIP] != 0, lambda part, _: part.flip(-1), strengths)
    for shift in (0, 4, 8, 12):
        operation = rows[:, Column.ORDER] >> shift & 15
        for code, function in _COLOUR.items():
            _apply(x, operation == code, function, strengths[:, code - 1, None, None, None])
    _apply(x, rows[:, Column.GRAY] != 0, lambda part, _: _gray(part).expand_as(part), strengths)
    _apply(x, rows[:, Column.SIGMA].view(np.float32) > 0, _blur, strengths[:, 4])
    mean, std = (torch.tensor(c, device=device).view(-1, 1, 1) for c in (layout.mean, layout.std))
    out.copy_(x.sub_(mean).div_(std).permute(0, 2, 3, 1))


def _resized(pixels: Tensor, rows: NDArray[np.int32], size: int, layout: Layout) -> Tensor:
    """The crops of (n, 16) table rows as (n, C, size, size) float32, up to 255 or 65535."""
    channels, depth = len(layout.mean), layout.bits // 8
    x = torch.zeros((len(rows), channels, size, size), device=pixels.device)
    pixels = pixels if depth == 1 else pixels.view(torch.uint16)
    sides = rows[:, Column.HEIGHT : Column.WIDTH + 1]
    small = sides.max(axis=1) <= (size if size <= _SMALL_SIZE else 0)
    first = pixels.storage_offset()
    for view, start, stride, (height, width), fits in zip(
        x,
        (_starts(rows) // depth).tolist(),
        (rows[:, Column.STRIDE] // depth).tolist(),
        sides.tolist(),
        small.tolist(),
        strict=True,
    ):
        # Values of an image lie as in channels_last, the layout in which torch resizes fastest.
        shape, strides = (1, channels, height, width), (channels * width, 1, stride, channels)
        crop = pixels.as_strided(shape, strides, first + start)
        if fits:
            view[:, :height, :width] = crop[0]
        elif (height, width) == (size, size):
            view.copy_(crop[0])
        else:
            values = crop.float()
            if max(height, width) > _MOST_REDUCED * size:
                values = values.cpu()
            view.copy_(F.interpolate(values, (size, size), mode="bilinear", antialias=True)[0])

    def enlarge(part: Tensor, sides: Tensor) -> Tensor:
        matrices = _enlarging_matrices(size, x.device)
        return _multiply(matrices[sides[:, 0]], part, matrices[sides[:, 1]])

    _apply(x, small, enlarge, torch.from_numpy(sides.astype(np.int64)).to(x.device))
    return x


@lru_cache(maxsize=8)
def _enlarging_matrices(size: int, device: torch.device) -> Tensor:
    """(size + 1, size, size): matrix n resizes n pixels to `size`; its columns from n on are 0."""
    matrices = torch.zeros((size + 1, size, size), device=device)
    for n in range(1, size + 1):
        identity = torch.eye(n, device=device)[None, None]
        matrices[n, :, :n] = F.interpolate(identity, (size, n), mode="bilinear", antialias=True)[
            0, 0
        ]
    return matrices


def _multiply(down: Tensor, x: Tensor, across: Tensor) -> Tensor:
    """Matrices (n, s, s) times the columns and the rows of (n, C, s, s)."""
    rows = torch.bmm(x.flatten(1, 2), across.mT).view_as(x)
    return down[:, None] @ rows


def _apply(
    x: Tensor,
    chosen: NDArray[np.bool_],
    function: Callable[[Tensor, Tensor], Tensor],
    parameters: Tensor,
) -> None:
    """Replace the chosen rows of `x` by `function` of (these rows, which it may change, and their
    parameters)."""
    if chosen.all():
        x.copy_(function(x, parameters))
    elif chosen.any():
        index = torch.from_numpy(np.flatnonzero(chosen)).to(x.device)
        x.index_copy_(0, index, function(x.index_select(0, index), parameters[index]))


def _gray(x: Tensor) -> Tensor:
    """Luma of (n, 3, h, w), or the mean of other channels, as (n, 1, h, w)."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x.split(1, dim=1)
    luma: Tensor = (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return luma


def _adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 1)


def _adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _gray(x).mean((1, 2, 3), keepdim=True)
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    gray = _gray(x).mul_(1 - factor)
    return x.mul_(factor).add_(gray).clamp_(0, 1)


def _adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue, in turns.

    With hue h in sixths of a turn, from 0 to 6, value v and chroma c = max - min, an HSV colour is
    v - c w with w = 2 - |h - 3| for red, |h - 2| - 1 for green and |h - 4| - 1 for blue, clamped to
    [0, 1].
    """
    red, green, blue = x.unbind(1)
    value = torch.maximum(red, green).maximum(blue)
    chroma = value - torch.minimum(red, green).minimum(blue)
    divisor = chroma.masked_fill(chroma == 0, 1)
    hue = torch.where(
        value == red,
        (green - blue).div_(divisor),
        torch.where(
            value == green, (blue - red).div_(divisor).add_(2), (red - green).div_(divisor).add_(4)
        ),
    )
    hue.add_(shift[:, 0], alpha=6).remainder_(6)
    for channel, distance in (
        (red, 2 - (hue - 3).abs_()),
        (green, (hue - 2).abs_() - 1),
        (blue, (hue - 4).abs_() - 1),
    ):
        torch.addcmul(value, chroma, distance.clamp_(0, 1), value=-1, out=channel)
    return x


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (n, C, s, s) with sigma (n,): multiplied by a matrix from each side, which
    beats a convolution."""
    size, reach = x.shape[-1], BLUR_TAPS // 2
    offsets = torch.arange(-reach, reach + 1, device=x.device)
    taps = torch.softmax(-(offsets / sigma[:, None]).square() / 2, dim=1)
    taps.masked_fill_(taps < _LEAST_TAP, 0)
    # Entry (i, j) is the weight of pixel j in pixel i; pixels beyond the border are reflected at
    # it.
    source = torch.arange(size, device=x.device)[:, None] + offsets
    source = (size - 1 - (size - 1 - source.abs()).abs()).expand(len(x), -1, -1)
    matrix = x.new_zeros((len(x), size, size))
    matrix.scatter_add_(2, source, taps[:, None].expand(-1, size, -1))
    return _multiply(matrix, x, matrix)


_COLOUR: dict[ColourOperation, Callable[[Tensor, Tensor], Tensor]] = {
    ColourOperation.BRIGHTNESS: _adjust_brightness,
    ColourOperation.CONTRAST: _adjust_contrast,
    ColourOperation.SATURATION: _adjust_saturation,
    ColourOperation.HUE: _adjust_hue,
}
