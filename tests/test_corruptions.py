"""Damage by level: the effect of each kind, its growth, and its independence of batch and size."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_blur

from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.evaluation.corruptions import LEVELS, MAGNITUDES, corrupt


def pictures(count: int = 6, side: int = 28) -> NDArray[np.uint8]:
    """Fashion-MNIST, coloured and enlarged smoothly: the same content at every size."""
    source = open_dataset("fashion-mini").train
    images = [source.image(i).resize((side, side), Image.Resampling.BICUBIC) for i in range(count)]
    tints = np.random.default_rng(0).uniform(0.5, 1, (count, 1, 1, 3))
    return (np.stack([np.asarray(image) for image in images]) * tints).astype(np.uint8)


def damage(images: NDArray[np.uint8], kind: str, level: int) -> float:
    return float(np.abs(corrupt(images, kind, level).astype(float) - images).mean())


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_damage_grows_with_the_level(kind: str) -> None:
    images = pictures(side=16)
    damages = [damage(images, kind, level) for level in LEVELS]
    assert damages[0] == 0
    assert all(after > before for before, after in itertools.pairwise(damages))
    damaged = corrupt(images, kind, 5)
    assert (damaged.shape, damaged.dtype) == (images.shape, np.uint8)


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_the_damage_of_an_image_does_not_depend_on_the_batch(kind: str) -> None:
    images, numbers = pictures(), np.array([3, 14, 15, 92, 65, 35])
    together = corrupt(images, kind, 3, seed=5, numbers=numbers)
    for i in range(6):
        alone = corrupt(images[i : i + 1], kind, 3, seed=5, numbers=numbers[i : i + 1])
        np.testing.assert_array_equal(together[i], alone[0])
    other = corrupt(images, kind, 3, seed=6, numbers=numbers)
    assert np.array_equal(together, other) == (kind not in ("noise", "occlusion"))


@pytest.mark.parametrize("kind", [kind for kind in MAGNITUDES if kind != "jpeg"])
def test_small_and_large_images_lose_as_much(kind: str) -> None:
    small, large = pictures(12, 28), pictures(12, 112)
    for level in LEVELS[1:]:
        # Lengths are whole pixels, and a blur narrower than a pixel changes little at 28 pixels.
        assert damage(large, kind, level) == pytest.approx(damage(small, kind, level), rel=0.35)


def test_blur_is_gaussian() -> None:
    images = pictures(2, 40)
    for level, share in enumerate(MAGNITUDES["blur"], 1):
        sigma = share * 40
        taps = 2 * round(4 * sigma) + 1
        floats = torch.from_numpy(images).permute(0, 3, 1, 2).double()
        peer = gaussian_blur(floats, [taps, taps], [sigma, sigma]).permute(0, 2, 3, 1).numpy()
        assert np.abs(corrupt(images, "blur", level) - peer).max() < 0.51


def test_noise_has_the_stated_deviation_and_grain() -> None:
    gray = np.full((4, 96, 96, 3), 128, np.uint8)
    noise = corrupt(gray, "noise", 2).astype(float) - 128
    assert noise.std() == pytest.approx(255 * MAGNITUDES["noise"][1], rel=0.03)
    assert len(np.unique(noise.reshape(4, -1), axis=0)) == 4, "every image has noise of its own"
    cells = noise.reshape(4, 32, 3, 32, 3, 3)
    np.testing.assert_array_equal(cells, np.broadcast_to(cells[:, :, :1, :, :1], cells.shape))
    neighbours = cells[:, :, 0, :-1, 0].ravel(), cells[:, :, 0, 1:, 0].ravel()
    assert np.abs(np.corrcoef(*neighbours)[0, 1]) < 0.05


def test_squares_cover_the_stated_area_and_contain_the_smaller_ones() -> None:
    white = np.full((60, 40, 40, 3), 255, np.uint8)
    before = np.zeros((60, 40, 40), dtype=bool)
    for level, share in enumerate(MAGNITUDES["occlusion"], 1):
        damaged = corrupt(white, "occlusion", level)
        covered = (damaged == 128).all(-1)
        assert ((damaged == 255).all(-1) | covered).all()
        assert (covered | ~before).all()
        assert covered.mean((1, 2)) == pytest.approx(share, abs=0.03)
        before = covered
    for side in (covered.any(2).argmax(1), covered.any(1).argmax(1)):
        assert set(side) == {0, 1, 2, 3, 4, 5}, "35 of 40 pixels leave six positions"


def test_contrast_keeps_the_mean_brightness_and_blank_ends_in_gray() -> None:
    images = np.random.default_rng(0).integers(60, 200, (3, 16, 16, 3), dtype=np.uint8)
    luma = np.array([0.299, 0.587, 0.114])
    bright = images @ luma
    for level, factor in enumerate(MAGNITUDES["contrast"], 1):
        faded = corrupt(images, "contrast", level) @ luma
        assert faded.mean((1, 2)) == pytest.approx(bright.mean((1, 2)), abs=0.3)
        assert faded.std((1, 2)) == pytest.approx(factor * bright.std((1, 2)), rel=0.05)
    assert (corrupt(images, "blank", 5) == 128).all()
    assert np.abs(corrupt(images, "blank", 2) - (0.6 * images + 0.4 * 128)).max() <= 0.5 + 1e-9


def test_jpeg_is_pillows() -> None:
    images, buffer = pictures(2, 40), io.BytesIO()
    Image.fromarray(images[1]).save(buffer, "JPEG", quality=10)
    np.testing.assert_array_equal(corrupt(images, "jpeg", 3)[1], np.asarray(Image.open(buffer)))
