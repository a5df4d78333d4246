"""Cropped copies are found by their thumbnails, at any place and in either order."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_clean import scene

from vi_simsiam.cleaning.alignment import aligned_correlation
from vi_simsiam.cleaning.duplicates import THRESHOLD, find_copies
from vi_simsiam.cleaning.facts import FACTS, facts_of

CPU = torch.device("cpu")
SCENES = 24


def cropped(seed: int, *, quality: int = 80) -> Image.Image:
    """A scene cropped to 80 to 100 % of each side, as it comes out or enlarged, as JPEG."""
    generator = np.random.default_rng(seed)
    image = scene(seed, 128)
    width, height = generator.integers(103, 129, 2).tolist()
    left, top = generator.integers(0, (129 - width, 129 - height)).tolist()
    part = image.crop((left, top, left + width, top + height))
    if seed % 2:
        part = part.resize((128, 128))
    file = io.BytesIO()
    part.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


@pytest.fixture(scope="module")
def facts() -> np.ndarray:
    """Facts of the scenes, and after them of their crops."""
    images = [scene(seed, 128) for seed in range(SCENES)] + [*map(cropped, range(SCENES))]
    return np.concatenate([facts_of(image).view(FACTS) for image in images])


def test_crops_are_told_from_other_images(facts: np.ndarray) -> None:
    thumbnails = torch.from_numpy(facts["thumbnail"]).float()
    whole, crops = thumbnails.split(SCENES)
    assert (aligned_correlation(whole, crops) >= THRESHOLD).sum() >= SCENES - 1
    assert (aligned_correlation(crops, whole) >= THRESHOLD).sum() >= SCENES - 1
    assert aligned_correlation(whole, crops.roll(1, 0)).max() < 0.8
    assert aligned_correlation(whole, whole).min() > 0.999


def test_a_correlation_does_not_depend_on_the_other_pairs(facts: np.ndarray) -> None:
    thumbnails = torch.from_numpy(facts["thumbnail"]).float()
    whole, crops = thumbnails.split(SCENES)
    mixed = torch.cat([crops[:4], crops[:4].roll(1, 0)])
    both = aligned_correlation(torch.cat([whole[:4]] * 2), mixed)
    torch.testing.assert_close(both[:4], aligned_correlation(whole[:4], crops[:4]))
    assert aligned_correlation(whole[:0], crops[:0]).shape == (0,)


def test_images_without_details_have_no_correlation(facts: np.ndarray) -> None:
    flat = torch.full((2, 48, 48), 90.0)
    ramp = torch.arange(48.0).expand(2, 48, 48)
    for one, other in ((flat, flat + 3), (flat, ramp), (ramp, flat)):
        assert aligned_correlation(one, other).abs().max() < 0.1
    stripes = ramp.square() / 48  # no detail from row to row
    assert aligned_correlation(stripes, stripes).min() > 0.999


def test_a_copy_is_one_of_an_earlier_image() -> None:
    """The second and fourth image are crops of the third, and hardly alike themselves."""
    whole = scene(0, 128)
    parts = [whole.crop(box).resize((128, 128)) for box in ((0, 0, 103, 103), (25, 25, 128, 128))]
    images = [scene(1, 128), parts[0], whole, parts[1], parts[1]]
    each = np.concatenate([facts_of(image).view(FACTS) for image in images])
    copies = find_copies(np.ones((5, 4), np.float32), each, device=CPU)
    assert copies.other.tolist()[:3] == [-1, -1, 1]
    assert copies.other[3] in (1, 2)
    assert copies.other[4] == 3


def test_an_encoder_that_has_learned_nothing_is_no_hindrance(facts: np.ndarray) -> None:
    generator = np.random.default_rng(0)
    embedding = generator.normal(size=(len(facts), 64)).astype(np.float32)
    copies = find_copies(embedding, facts, device=CPU)
    assert (copies.other[:SCENES] == -1).all()
    assert (copies.other[SCENES:] == np.arange(SCENES)).mean() >= 0.8
    assert ((copies.other[SCENES:] == -1) | (copies.other[SCENES:] == np.arange(SCENES))).all()
