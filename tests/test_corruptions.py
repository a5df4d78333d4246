"""Damage by level: what each kind does, that it grows, that it is the same every time and at every size."""

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
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.corruptions import LEVELS, MAGNITUDES, corrupt


def pictures(count: int = 6, side: int = 28) -> NDArray[np.uint8]:
    """Fashion-MNIST, coloured and enlarged smoothly, so that an image shows the same at every size."""
    source = open_dataset("fashion-mini").train
    images = [source.image(i).resize((side, side), Image.Resampling.BICUBIC) for i in range(count)]
    tints = np.random.default_rng(0).uniform(0.5, 1, (count, 1, 1, 3))
    return (np.stack([np.asarray(image) for image in images]) * tints).astype(np.uint8)


def damage(images: NDArray[np.uint8], kind: str, level: int) -> float:
    return float(np.abs(corrupt(images, kind, level).astype(float) - images).mean())


@pytest.mark.parametrize("kind", MAGNITUDES)
@pytest.mark.parametrize("side", [16, 28])
def test_damage_grows_with_the_level(kind: str, side: int) -> None:
    images = pictures(side=side)
    damages = [damage(images, kind, level) for level in LEVELS]
    assert damages[0] == 0
    assert all(after > before for before, after in itertools.pairwise(damages))
    for level in LEVELS:
        damaged = corrupt(images, kind, level)
        assert damaged.shape == images.shape
        assert damaged.dtype == np.uint8


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_an_image_is_damaged_alike_in_any_company(kind: str) -> None:
    images, numbers = pictures(), np.array([3, 14, 15, 92, 65, 35])
    together = corrupt(images, kind, 3, seed=5, numbers=numbers)
    alone = np.concatenate(
        [corrupt(images[i : i + 1], kind, 3, seed=5, numbers=numbers[i : i + 1]) for i in range(6)]
    )
    np.testing.assert_array_equal(together, alone)
    other = corrupt(images, kind, 3, seed=6, numbers=numbers)
    assert np.array_equal(together, other) == (kind not in ("noise", "occlusion"))


@pytest.mark.parametrize("kind", [kind for kind in MAGNITUDES if kind != "jpeg"])
@pytest.mark.parametrize("level", LEVELS[1:])
def test_small_and_large_images_lose_as_much(kind: str, level: int) -> None:
    small = damage(pictures(12, 28), kind, level)
    large = damage(pictures(12, 224), kind, level)
    # Lengths are whole pixels, and a blur narrower than a pixel finds little to blur in 28 of them.
    assert large == pytest.approx(small, rel=0.35)


def test_blur_is_gaussian() -> None:
    images = pictures(2, 64)
    for level, share in enumerate(MAGNITUDES["blur"], 1):
        sigma = share * 64
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
    assert (
        np.abs(np.corrcoef(cells[:, :, 0, :-1, 0].ravel(), cells[:, :, 0, 1:, 0].ravel())[0, 1])
        < 0.05
    )


def test_squares_cover_the_stated_area_and_contain_the_smaller_ones() -> None:
    white = np.full((20, 40, 40, 3), 255, np.uint8)
    before = np.zeros((20, 40, 40), dtype=bool)
    places = set()
    for level, share in enumerate(MAGNITUDES["occlusion"], 1):
        damaged = corrupt(white, "occlusion", level)
        covered = (damaged == 128).all(-1)
        assert ((damaged == 255).all(-1) | covered).all()
        assert (covered | ~before).all()
        assert covered.mean((1, 2)) == pytest.approx(share, abs=0.03)
        before = covered
        if level == 1:
            places = {tuple(np.argwhere(square)[0]) for square in covered}
    assert len(places) > 10


def test_squares_reach_every_edge() -> None:
    covered = (corrupt(np.full((60, 40, 40, 3), 255, np.uint8), "occlusion", 5) == 128).all(-1)
    for side in (covered.any(2).argmax(1), covered.any(1).argmax(1)):
        assert set(side) == {0, 1, 2, 3, 4, 5}, "35 of 40 pixels leave six places"


def test_contrast_keeps_the_mean_brightness_and_blank_ends_in_gray() -> None:
    images = np.random.default_rng(0).integers(60, 200, (3, 16, 16, 3), dtype=np.uint8)
    luma = np.array([0.299, 0.587, 0.114])
    for level, factor in enumerate(MAGNITUDES["contrast"], 1):
        faded = corrupt(images, "contrast", level)
        assert (faded @ luma).mean((1, 2)) == pytest.approx((images @ luma).mean((1, 2)), abs=0.3)
        assert (faded @ luma).std((1, 2)) == pytest.approx(
            factor * (images @ luma).std((1, 2)), rel=0.05
        )
    assert (corrupt(images, "blank", 5) == 128).all()
    assert np.abs(corrupt(images, "blank", 2) - (0.6 * images + 0.4 * 128)).max() <= 0.5 + 1e-9


def test_jpeg_is_pillows() -> None:
    images = pictures(2, 40)
    buffer = io.BytesIO()
    Image.fromarray(images[1]).save(buffer, "JPEG", quality=10)
    np.testing.assert_array_equal(corrupt(images, "jpeg", 3)[1], np.asarray(Image.open(buffer)))


def test_what_cannot_be_damaged_is_refused() -> None:
    images = pictures(2)
    for arguments, message in [
        ((images, "rain", 1), "kind: 'rain' is none of blur"),
        ((images, "blur", 6), "level: 6"),
        ((images.astype(float), "blur", 1), "float64"),
        ((images[:, :20], "blur", 1), r"\(2, 20, 28, 3\)"),
    ]:
        with pytest.raises(InputError, match=message):
            corrupt(*arguments)
    with pytest.raises(InputError, match="seed: -1"):
        corrupt(images, "blur", 1, seed=-1)
    with pytest.raises(InputError, match="numbers"):
        corrupt(images, "blur", 1, numbers=np.arange(3))
    assert corrupt(images[:0], "noise", 2).shape == (0, 28, 28, 3)
