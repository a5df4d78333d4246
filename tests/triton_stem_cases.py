"""Cases of the first convolution over blocks of pixels, in Triton's interpreter or on a GPU (see
`triton_cases.py`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from triton_tools import DEVICE

from vi_simsiam.kernels.stem_convolution import blocks_of_pixels
from vi_simsiam.ops.stem_convolution import stem_convolution, takes


def _draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 12), (1, 1)], ids=str)
def test_convolution_and_its_weights_gradient(
    size: tuple[int, int], layout: torch.memory_format
) -> None:
    """Against torch's convolution over pixels, for odd and even sizes."""
    images = _draw(2, 3, *size).contiguous(memory_format=layout)
    weight = _draw(5, 3, 7, 7, seed=1).contiguous(memory_format=layout).requires_grad_()
    found, expected = (
        stem_convolution(images, weight),
        F.conv2d(images, weight, stride=2, padding=3),
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=torch.channels_last)
    gradient = _draw(*expected.shape, seed=2)
    (ours,), (theirs,) = (torch.autograd.grad(y, weight, gradient) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_images_in_bfloat16_and_a_weight_in_float32() -> None:
    images, weight = _draw(2, 3, 6, 6, dtype=torch.bfloat16), _draw(4, 3, 7, 7, dtype=torch.float32)
    found = stem_convolution(images, weight)
    assert found.dtype == torch.bfloat16
    expected = F.conv2d(images.double(), weight.bfloat16().double(), stride=2, padding=3)
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-5)


def test_every_element_of_the_blocks_is_written() -> None:
    """A crop of a larger image, over what memory held before."""
    images = _draw(2, 4, 9, 11)[:, 1:, 1:6, 2:8]
    blocks = images.new_full((2, 3 + 3, 3 + 3, 16), torch.nan)
    blocks_of_pixels(images, blocks)
    pixels = F.pad(images, (4, 2, 4, 3))
    expected = torch.zeros_like(blocks)
    for row in range(2):
        for column in range(2):
            channels = slice(3 * (2 * row + column), 3 * (2 * row + column) + 3)
            expected[..., channels] = pixels[:, :, row::2, column::2].permute(0, 2, 3, 1)
    assert torch.equal(blocks, expected)


def test_no_images() -> None:
    weight = _draw(4, 3, 7, 7).requires_grad_()
    found = stem_convolution(_draw(0, 3, 8, 8), weight)
    assert found.shape == (0, 4, 4, 4)
    assert not torch.autograd.grad(found.sum(), weight)[0].any()


def test_other_convolutions_are_left_to_torch() -> None:
    images = _draw(2, 3, 8, 8)
    usual = {"kernel_size": 7, "stride": 2, "padding": 3, "bias": False}
    assert takes(images, nn.Conv2d(3, 4, **usual))
    for changed in (
        {"kernel_size": 3},
        {"stride": 1},
        {"padding": 2},
        {"bias": True},
        {"dilation": 2},
    ):
        assert not takes(images, nn.Conv2d(3, 4, **{**usual, **changed})), changed
    assert not takes(images, nn.Conv2d(4, 4, **usual))
    assert not takes(images.requires_grad_(), nn.Conv2d(3, 4, **usual))
