"""Colour operations of one view, as device functions: torchvision's, on float32 in [0, 1].

With grey = 0.2989 r + 0.587 g + 0.114 b and the view's factor f, three of the four operations are
one blend

    x <- clamp(f x + (1 - f) o, 0, 1)

with o = 0 (brightness), the mean of grey over the view (contrast) or grey (saturation),

and hue is a rotation h <- (h + f) mod 1 between a conversion to hue, saturation and value and the
one back. With v = max, s = (v - min) / v and h6 = 6 h, the channel with n = 5 (red), 3 (green) or 1
(blue) comes back as

    v - v s clamp(min(k, 4 - k), 0, 1),   k = (n + h6) mod 6,

which is what torchvision selects from its four candidates, without the selection. Where all
channels are equal s is 0 and h has no effect. The branches depend on the view alone, so that a
warp computes only the operations of its view.
"""

from __future__ import annotations

import triton
import triton.language as tl

BRIGHTNESS = tl.constexpr(1)
"""First of the codes in the order of operations; the columns of the factors follow one another in
the same order."""
CONTRAST = tl.constexpr(2)
SATURATION = tl.constexpr(3)
HUE = tl.constexpr(4)


@triton.jit
def grey_of(r: tl.tensor, g: tl.tensor, b: tl.tensor) -> tl.tensor:
    """ITU-R 601 luma with torchvision's coefficients."""
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def before_contrast(order: tl.tensor) -> tl.tensor:
    """The operations in `order` that precede contrast: all of them where there is none."""
    before = order
    for step in tl.static_range(4):
        place = 12 - 4 * step
        before = tl.where((order >> place) & 15 == CONTRAST, order & ((1 << place) - 1), before)
    return before


@triton.jit
def adjust(
    r: tl.tensor,
    g: tl.tensor,
    b: tl.tensor,
    operations: tl.tensor,
    factors_ptr: tl.tensor,
    mean: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Applies `operations`, 4 bits each and the lowest ones first, to tensors of one shape.

    factors_ptr: int32, the bits of the four factors in the order of the codes. mean: of grey where
    contrast is applied.
    """
    while operations != 0:
        operation = operations & 15
        if operation != 0:
            factor = tl.load(factors_ptr + (operation - BRIGHTNESS)).to(tl.float32, bitcast=True)
            if operation == HUE:
                r, g, b = _turn(r, g, b, factor)
            else:
                other = tl.where(operation == CONTRAST, mean, 0.0)
                other = tl.where(operation == SATURATION, grey_of(r, g, b), other) * (1.0 - factor)
                r = unit_clamp(r * factor + other)
                g = unit_clamp(g * factor + other)
                b = unit_clamp(b * factor + other)
        operations = operations >> 4
    return r, g, b


@triton.jit
def unit_clamp(x: tl.tensor) -> tl.tensor:
    """x within [0, 1], which a GPU does with the operation before."""
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _turn(
    r: tl.tensor, g: tl.tensor, b: tl.tensor, shift: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    value = tl.maximum(tl.maximum(r, g), b)
    spread = value - tl.minimum(tl.minimum(r, g), b)
    # Each sextant measures from the largest channel; red wins a tie, then green, as in torchvision.
    step = tl.where(value == r, g - b, tl.where(value == g, b - r, r - g))
    sextant = tl.where(value == r, 0.0, tl.where(value == g, 2.0, 4.0))
    hue = (sextant + step / tl.where(spread == 0.0, 1.0, spread)) * (1.0 / 6.0) + shift
    hue = (hue - tl.floor(hue)) * 6.0
    return (
        _channel(hue + 5.0, value, spread),
        _channel(hue + 3.0, value, spread),
        _channel(hue + 1.0, value, spread),
    )


@triton.jit
def _channel(k: tl.tensor, value: tl.tensor, spread: tl.tensor) -> tl.tensor:
    """v - v s clamp(..), where v s is the spread of the channels."""
    k = tl.where(k >= 6.0, k - 6.0, k)
    return value - spread * unit_clamp(tl.minimum(k, 4.0 - k))
