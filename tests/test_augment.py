"""Augmentation from a table: the plain PyTorch reference against torchvision, its layout, and the
checks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vi_simsiam.config import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from vi_simsiam.data.views import add_offsets, draw_table
from vi_simsiam.errors import BackendUnavailableError, InputError
from vi_simsiam.ops.augment import (
    _CHUNK_FLOATS,
    BLUR_TAPS,
    TABLE_COLUMNS,
    ColourOperation,
    Column,
    augment,
    eager_augment,
)
from vi_simsiam.ops.backends import interpreting

FULL = AugmentConfig(jitter_prob=0.9, grayscale_prob=0.3, blur_prob=0.6)
BATCH_ROUNDING = 10 * 4 * torch.finfo(torch.float32).eps / min(IMAGENET_STD)
"""Between a view made alone and in a batch: each of ten steps (resizing and blur, down and across;
four colour operations; grey; normalisation) may round values up to 1 by a few eps otherwise, which
the normalisation divides."""
ADJUST = {1: tv.adjust_brightness, 2: tv.adjust_contrast, 3: tv.adjust_saturation, 4: tv.adjust_hue}


def pack(shapes: list[tuple[int, int]], seed: int = 0) -> tuple[Tensor, NDArray[np.int64]]:
    """Images of random pixels as bytes with some in front, and the first byte of each."""
    rng = np.random.default_rng(seed)
    counts = [3 * height * width for height, width in shapes]
    offsets = np.concatenate([[7], 7 + np.cumsum(counts)]).astype(np.int64)
    return torch.from_numpy(rng.integers(0, 256, offsets[-1], dtype=np.uint8)), offsets[:-1]


def drawn(
    shapes: list[tuple[int, int]], policy: AugmentConfig = FULL, seed: int = 0
) -> tuple[Tensor, Tensor]:
    pixels, offsets = pack(shapes, seed)
    heights, widths = np.array(shapes).T
    table = draw_table(
        policy, seed=seed, epoch=0, samples=np.arange(len(shapes)), heights=heights, widths=widths
    )
    add_offsets(table, offsets)
    return pixels, torch.from_numpy(table)


def row(tall: int, wide: int, /, **columns: float) -> Tensor:
    """A table of one view: the whole of the only image, and whatever else is given by name."""
    values = np.zeros((1, 1, TABLE_COLUMNS), dtype=np.int32)
    floats = values.view(np.float32)
    values[..., Column.STRIDE : Column.WIDTH + 1] = (3 * wide, tall, wide)
    floats[..., Column.BRIGHTNESS : Column.HUE] = 1
    for name, value in columns.items():
        column = Column[name.upper()]
        target = floats if Column.BRIGHTNESS <= column <= Column.SIGMA else values
        target[..., column] = value
    return torch.from_numpy(values)


def crop_of(pixels: Tensor, values: NDArray[np.int32]) -> Tensor:
    """The crop of a row as (3, h, w) uint8, byte by byte from START and STRIDE."""
    start = int(values[:2].copy().view(np.int64)[0])
    stride, height, width = values[Column.STRIDE : Column.WIDTH + 1].tolist()
    lines = [pixels[start + y * stride : start + y * stride + 3 * width] for y in range(height)]
    return torch.stack(lines).view(height, width, 3).permute(2, 0, 1)


def oracle(pixels: Tensor, values: NDArray[np.int32], size: int) -> Tensor:
    """A view by torchvision's functions on float32."""
    floats = values.view(np.float32).astype(float)
    x = crop_of(pixels, values).contiguous().float() / 255
    x = tv.resize(x, [size, size], antialias=True)
    if values[Column.FLIP]:
        x = tv.horizontal_flip(x)
    for shift in (0, 4, 8, 12):
        operation = int(values[Column.ORDER]) >> shift & 15
        if operation:
            x = ADJUST[operation](x, floats[Column.BRIGHTNESS + operation - 1])
    if values[Column.GRAY]:
        x = tv.rgb_to_grayscale(x, 3)
    if floats[Column.SIGMA] > 0:
        x = tv.gaussian_blur(x, [BLUR_TAPS, BLUR_TAPS], [floats[Column.SIGMA]] * 2)
    return tv.normalize(x, list(IMAGENET_MEAN), list(IMAGENET_STD))


def expected(pixels: Tensor, table: Tensor, size: int) -> Tensor:
    views = [
        torch.stack([oracle(pixels, values, size) for values in rows]) for rows in table.numpy()
    ]
    return torch.stack(views)


def assert_same(actual: Tensor, wanted: Tensor, table: Tensor) -> None:
    """Within 1e-5, and 1e-4 where the hue was shifted (it divides by small differences), in units
    of [0, 1]."""
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    error = ((actual - wanted) * std).abs().amax((2, 3, 4))
    order = table[..., Column.ORDER]
    hue = (
        torch.stack([order >> shift & 15 for shift in (0, 4, 8, 12)]).eq(ColourOperation.HUE).any(0)
    )
    assert torch.isfinite(actual).all()
    assert (error <= torch.where(hue, 1e-4, 1e-5)).all(), error.max()


@pytest.mark.parametrize("size", [8, 13])
def test_views_are_torchvisions(size: int) -> None:
    shapes = [(1, 1), (300, 7), (7, 300), (32, 32), (13, 17), (90, 71), (2, 3), (8, 8)] * 4
    pixels, table = drawn(shapes, seed=size)
    assert_same(eager_augment(pixels, table, size), expected(pixels, table, size), table)


def test_small_crops_of_a_larger_policy_are_torchvisions() -> None:
    policy = AugmentConfig(
        crop_scale=(1e-6, 0.01), local_views=2, jitter=(0.9, 1.5, 2.0, 0.5), jitter_prob=1.0
    )
    pixels, table = drawn([(20, 30), (100, 90), (5, 5)] * 6, policy)
    assert (table[..., Column.HEIGHT : Column.WIDTH + 1].prod(-1) == 1).any()
    assert_same(eager_augment(pixels, table, 24), expected(pixels, table, 24), table)


@pytest.mark.parametrize("size", [64, 65])
def test_a_view_does_not_depend_on_the_batch(size: int) -> None:
    """But for the rounding of batched products: ranks that share a batch see its views, whichever
    way each is resized."""
    pixels, table = drawn([(64, 64), (150, 130), (20, 300), (3, 5)] * 4)
    views = eager_augment(pixels, table, size)
    assert_same(views, expected(pixels, table, size), table)
    for v, b in itertools.product(range(2), range(16)):
        alone = eager_augment(pixels, table[v : v + 1, b : b + 1].contiguous(), size)[0, 0]
        torch.testing.assert_close(alone, views[v, b], rtol=0, atol=BATCH_ROUNDING)


def test_more_rows_than_are_worked_on_at_once() -> None:
    pixels, table = drawn([(40, 50)] * 12)
    assert _CHUNK_FLOATS < 24 * 3 * 150**2
    assert_same(eager_augment(pixels, table, 150), expected(pixels, table, 150), table)


def test_every_colour_order() -> None:
    """Strong factors, so that clamping makes the order matter."""
    pixels, _ = pack([(20, 20)])
    strengths = {"brightness": 1.7, "contrast": 1.6, "saturation": 0.3, "hue": -0.2}
    orders = [
        sum(code << 4 * place for place, code in enumerate(operations))
        for count in (1, 2, 3, 4)
        for operations in itertools.permutations(range(1, 5), count)
    ]
    table = torch.cat([row(20, 20, start=7, order=order, **strengths) for order in orders])
    actual = eager_augment(pixels, table, 16)
    assert_same(actual, expected(pixels, table, 16), table)
    assert len({view.numpy().tobytes() for view in actual}) == len(orders)


@pytest.mark.parametrize("size", [8, 21])
def test_single_steps(size: int) -> None:
    steps: list[dict[str, float]] = [
        {"sigma": 0.1},  # exp(-1 / 0.02) is no blur
        {"sigma": 2.0},
        {"sigma": 50.0},
        {"flip": 1},
        {"gray": 1},
        {"gray": 1, "sigma": 1.0, "flip": 1},
        {"order": 1, "brightness": 0.0},
        {"order": 2, "contrast": 0.0},
        {"order": 3, "saturation": 0.0},
        {"order": 4, "hue": 0.5},
        {"order": 4, "hue": -0.5},
    ]
    pixels, _ = pack([(21, 21)])
    table = torch.cat([row(21, 21, start=7, **columns) for columns in steps])
    actual = eager_augment(pixels, table, size)
    assert_same(actual, expected(pixels, table, size), table)
    plain = eager_augment(pixels, row(21, 21, start=7), size)[0]
    assert not any(torch.equal(each, plain) for each in actual[1:])


def test_gray_and_saturated_pixels_shift_their_hue() -> None:
    """Pixels with two or three equal channels, black and white, are where a hue is easily got
    wrong."""
    corners = list(itertools.product((0, 128, 255), repeat=3))
    pixels = torch.tensor(corners[:-2] * 64, dtype=torch.uint8).view(-1)[: 3 * 40 * 40]
    table = torch.cat(
        [row(40, 40, order=4, hue=hue) for hue in (-0.5, -0.3, -1 / 6, 0.0, 1e-3, 1 / 3, 0.5)]
    )
    assert_same(eager_augment(pixels, table, 40), expected(pixels, table, 40), table)


def test_bfloat16_is_float32_rounded_once_and_autocast_changes_nothing() -> None:
    pixels, table = drawn([(9, 12)] * 16, replace(FULL, local_views=1))
    single, half = (augment(pixels, table, 10, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, single.bfloat16())
    for views in (single, half):
        assert views.shape == (3, 16, 3, 10, 10)
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(pixels, table, 10), single)


@pytest.mark.parametrize("shape", [(2, 0), (0, 4)])
def test_empty_batches(shape: tuple[int, int]) -> None:
    table = torch.zeros((*shape, TABLE_COLUMNS), dtype=torch.int32)
    for backend in ("auto", "eager"):
        views = augment(torch.zeros(0, dtype=torch.uint8), table, 16, backend=backend)
        assert views.shape == (*shape, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": torch.zeros(9)}, "pixels: torch.float32 on cpu .* contiguous torch.uint8"),
        ({"pixels": torch.zeros(1, 9)}, r"pixels: shape \(1, 9\) must be \(bytes,\)"),
        (
            {"pixels": torch.zeros(9, dtype=torch.uint8)[::2]},
            r"pixels: .* strides \(2,\) must be contiguous",
        ),
        ({"table": row(4, 5).long()}, "table: torch.int64 on cpu .* contiguous torch.int32"),
        ({"table": row(4, 5).to("meta")}, "table: torch.int32 on meta .* torch.int32 on cpu"),
        (
            {"table": row(4, 5)[..., :15]},
            r"table: shape \(1, 1, 15\) must be \(views, batch, 16\)",
        ),
        ({"dtype": torch.float16}, "dtype: torch.float16 is neither"),
        ({"size": 7}, "size: 7 must be at least 8"),
        ({"backend": "cuda"}, "backend: 'cuda' is none of auto, eager, triton"),
    ],
)
def test_what_is_not_accepted(change: dict[str, Any], message: str) -> None:
    given = {"pixels": torch.zeros(60, dtype=torch.uint8), "table": row(4, 5), "size": 16}
    with pytest.raises(InputError, match=message):
        augment(**(given | change))


@pytest.mark.skipif(torch.cuda.is_available() or interpreting(), reason="Triton can run here")
def test_a_backend_that_cannot_run_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="'triton' cannot run on cpu tensors"):
        augment(torch.zeros(60, dtype=torch.uint8), row(4, 5), 16, backend="triton")
