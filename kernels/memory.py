"""Loads and stores of blocks that may be padded."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(elements: tl.tensor, used: tl.tensor, FULL: tl.constexpr) -> tl.tensor:
    """The elements, 0 where they are padding. FULL: there is none, and no mask is needed."""
    if FULL:
        return tl.load(elements)
    else:
        return tl.load(elements, mask=used, other=0.0)


@triton.jit
def store(elements: tl.tensor, x: tl.tensor, used: tl.tensor, FULL: tl.constexpr) -> None:
    """The opposite of `load`, rounded to the elements' type."""
    if FULL:
        tl.store(elements, x.to(elements.dtype.element_ty))
    else:
        tl.store(elements, x.to(elements.dtype.element_ty), mask=used)
