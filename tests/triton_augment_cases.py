"""Cases of the kernels that make views, in Triton's interpreter or on a GPU (see
`triton_cases.py`).

The reference is the eager one, and for a few views torchvision itself. In the interpreter the views
are tiny, and bfloat16 is truncated where a GPU rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from test_augment import FULL, drawn, oracle, row
from torch import Tensor
from triton_tools import DEVICE, INTERPRETED, captured

from vi_simsiam.kernels import augment as kernel
from vi_simsiam.kernels.augment import crop_start
from vi_simsiam.ops.augment import eager_augment

GUARD = 64
IMAGE = (13, 19) if INTERPRETED else (375, 500)
"""Height and width."""

# The interpreter evaluates weights of 0/0 in rows and columns that the kernel discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _row(
    start: int,
    image_width: int,
    crop: tuple[int, int],
    order: Sequence[int] = (),
    strengths: Sequence[float] = (1, 1, 1, 0),
    **columns: float,
) -> NDArray[np.int32]:
    columns |= dict(zip(("brightness", "contrast", "saturation", "hue"), strengths, strict=True))
    columns |= {"stride": 3 * image_width, "order": sum(x << 4 * i for i, x in enumerate(order))}
    values = row(*crop, **columns).numpy()[0, 0]
    values[:2] = np.array([start], "<i8").view(np.int32)
    return values


def _images(count: int, height: int, width: int) -> Tensor:
    """Noise on slopes, one image after another."""
    generator = torch.Generator().manual_seed(0)
    slope = torch.linspace(0, 155, width)[:, None] * torch.tensor([1.0, 0.5, 0.2])
    images = slope + 100 * torch.rand(count, height, width, 3, generator=generator)
    return images.to(torch.uint8).flatten()


def _random_rows(count: int) -> tuple[Tensor, NDArray[np.int32]]:
    """Images and rows of them with every operation switched on and off at random."""
    policy = replace(FULL, crop_scale=(1e-3, 1.0), jitter_prob=0.7)
    pixels, table = drawn([IMAGE] * (count // 2), policy, seed=count)
    return pixels, table.numpy().reshape(count, -1)


def _augment(
    pixels: Tensor, rows: NDArray[np.int32], size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(N, size, size, 3) on the CPU; what surrounds the output and the workspace is checked."""
    count = len(rows) * size * size * 3
    memory = torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype, device=DEVICE)
    out = memory[GUARD : GUARD + count].view(len(rows), size, size, 3)
    needed = kernel.workspace_bytes(len(rows), size)
    workspace = torch.full((needed + 2 * GUARD,), 0xA5, dtype=torch.uint8, device=DEVICE)
    kernel.augment(pixels.to(DEVICE), torch.from_numpy(rows).to(DEVICE), out, workspace[GUARD:])
    assert memory[:GUARD].isnan().all()
    assert memory[GUARD + count :].isnan().all()
    assert (workspace[:GUARD] == 0xA5).all()
    assert (workspace[GUARD + needed :] == 0xA5).all()
    return out.cpu()


def _check(got: Tensor, rows: NDArray[np.int32], pixels: Tensor, size: int) -> None:
    want = eager_augment(pixels, torch.from_numpy(rows)[None], size)[0].permute(0, 2, 3, 1)
    if got.dtype == torch.bfloat16:
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=1e-4)
        return
    for view, reference, values in zip(got, want, rows, strict=True):
        tolerance = 1e-4 if any(values[6] >> i & 15 == 4 for i in (0, 4, 8, 12)) else 1e-5  # hue
        torch.testing.assert_close(view, reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("size", "count", "dtype"),
    [(8, 6, torch.float32), (9, 4, torch.float32), (34, 2, torch.float32), (9, 2, torch.bfloat16)]
    if INTERPRETED
    else [
        (s, 128, d) for s in (8, 33, 64, 96, 97, 128, 224) for d in (torch.float32, torch.bfloat16)
    ],
    ids=str,
)
def test_random_rows(size: int, count: int, dtype: torch.dtype) -> None:
    pixels, rows = _random_rows(count)
    _check(_augment(pixels, rows, size, dtype), rows, pixels, size)


def test_against_torchvision() -> None:
    """One operation to a view, then all of them; the last crop ends with the last byte."""
    size, (height, width) = 8 if INTERPRETED else 11, (13, 19)
    pixels = _images(2, height, width)
    every = {"strengths": [1.4, 0.6, 1.3, 0.1]}
    last = len(pixels) - 3 * (3 * width + 3)
    rows = [
        _row(0, width, (13, 19)),
        _row(3, width, (2, 18), flip=1),
        _row(3 * (2 * width + 5), width, (1, 1)),
        *(_row(6, width, (8, 9), order=[code], **every) for code in (1, 2, 3, 4)),
        _row(6, width, (8, 9), order=[0, 4], strengths=[1, 1, 1, -0.5]),
        _row(6, width, (8, 9), gray=1),
        _row(6, width, (8, 9), order=[1], gray=1, sigma=1.0, **every),
        _row(6, width, (8, 9), sigma=0.3),
        _row(3 * height * width, width, (13, 19), [3, 1, 4, 2], flip=1, sigma=2.0, **every),
        _row(last, width, (4, 3), order=[2, 1], gray=1, sigma=1.0),
    ]
    rows = np.stack(rows)
    got = _augment(pixels, rows, size)
    for view, values in zip(got, rows, strict=True):
        torch.testing.assert_close(
            view, oracle(pixels, values, size).permute(1, 2, 0), rtol=0, atol=1e-5
        )


def test_the_last_byte() -> None:
    """Crops that end with it, their last pixel at each place of a group of four."""
    width = 31
    pixels = _images(1, 3, width)
    rows = np.stack(
        [_row(len(pixels) - 3 * (width + w), width, (2, w)) for w in (9, *range(20, 26))]
    )
    _check(_augment(pixels, rows, 8), rows, pixels, 8)


def test_strong_reduction() -> None:
    """17 taps, in each direction, of crops that no multiple of four divides."""
    size = 8 if INTERPRETED else 64
    height, width = 8 * size + 1, 8 * size + 3
    pixels = _images(1, height, width)
    rows = np.stack([_row(0, width, (2 * size + 1, width)), _row(3, width, (height - 2, 2))])
    _check(_augment(pixels, rows, size), rows, pixels, size)


def test_equal_tables_give_equal_bits() -> None:
    pixels, rows = _random_rows(2 if INTERPRETED else 128)
    size = 8 if INTERPRETED else 96
    turned = _augment(pixels, rows[::-1].copy(), size).flip(0)
    assert torch.equal(_augment(pixels, rows, size), turned)


def test_pixels_at_any_address() -> None:
    pixels = _images(1, 6, 7)
    rows = np.stack([_row(3, 7, (5, 4))])
    want = _augment(pixels, rows, 8)
    for shift in (1, 2, 3):
        memory = torch.cat([torch.full((shift,), 255, dtype=torch.uint8), pixels])
        assert torch.equal(_augment(memory.to(DEVICE)[shift:], rows, 8), want)


@triton.jit
def _start_kernel(row_ptr: tl.tensor, out_ptr: tl.tensor) -> None:
    tl.store(out_ptr, crop_start(row_ptr))


@pytest.mark.parametrize("start", [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 0x5_89AB_CDEF, 2**62 + 1])
def test_start_has_64_bits(start: int) -> None:
    """At an address that 8 does not divide."""
    memory = torch.zeros(17, dtype=torch.int32)
    memory[1:] = torch.from_numpy(_row(start, 4, (1, 1)))
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _start_kernel[(1,)](memory.to(DEVICE)[1:], out)
    assert out.item() == start


@pytest.mark.skipif(
    INTERPRETED, reason="needs a GPU: would have captured the launches in a CUDA graph"
)
def test_in_a_graph() -> None:
    """A replay reads the table anew."""
    (pixels, rows), size = _random_rows(32), 96
    pixels = pixels.to(DEVICE)
    table = torch.from_numpy(rows).to(DEVICE)
    out = torch.empty((32, size, size, 3), device=DEVICE)
    workspace = torch.empty(kernel.workspace_bytes(32, size), dtype=torch.uint8, device=DEVICE)
    graph, _ = captured(lambda: kernel.augment(pixels, table, out, workspace))
    table.copy_(torch.from_numpy(rows[::-1].copy()))
    out.fill_(torch.nan)
    graph.replay()
    _check(out.cpu().flip(0), rows, pixels.cpu(), size)
