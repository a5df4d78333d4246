"""Columns of a table row, described in `vi_simsiam.ops.augment`."""

from __future__ import annotations

import triton.language as tl

COLUMNS = tl.constexpr(16)
START = tl.constexpr(0)
STRIDE = tl.constexpr(2)
HEIGHT = tl.constexpr(3)
WIDTH = tl.constexpr(4)
FLIP = tl.constexpr(5)
ORDER = tl.constexpr(6)
GRAY = tl.constexpr(7)
BRIGHTNESS = tl.constexpr(8)
SIGMA = tl.constexpr(12)
