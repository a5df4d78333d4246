"""Random views: keyed, reproducible, and torchvision's; and the fixed view for evaluation."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.views import IMAGENET_MEAN, IMAGENET_STD, RandomView, eval_view, view_seed

PLAIN = AugmentConfig(jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0, flip_prob=0.0)


def picture(height: int = 40, width: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(view: Tensor) -> Tensor:
    """The view before normalisation, in [0, 1]."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return view * std + mean


def test_seeds_are_distinct_and_fixed() -> None:
    """A change of the key function would change every run that is resumed: its values are pinned."""
    seeds = {view_seed(s, e, i, v) for s in range(3) for e in range(4) for i in range(50) for v in range(3)}
    assert len(seeds) == 3 * 4 * 50 * 3
    assert view_seed(0, 0, 0, 0) == int(np.random.SeedSequence((0, 0, 0, 0)).generate_state(1, np.uint64)[0])
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert max(seeds) > 2**63


def test_a_view_is_a_function_of_image_and_key() -> None:
    random_view = RandomView(AugmentConfig(), 16, (0.2, 1.0))
    first, again = random_view(picture(), 5), random_view(picture(), 5)
    assert first.shape == (3, 16, 16)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, random_view(picture(), 6))
    assert not torch.equal(first, random_view(picture(seed=1), 5))
    copy = pickle.loads(pickle.dumps(random_view))
    assert torch.equal(first, copy(picture(), 5))


def test_the_callers_random_numbers_are_left_alone() -> None:
    random_view = RandomView(AugmentConfig(), 16, (0.2, 1.0))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    random_view(picture(), 5)
    assert torch.equal(torch.rand(4), expected)


def test_a_view_is_what_torchvision_makes_of_the_seed() -> None:
    """The policy, spelled out once more with torchvision's own transforms under the same seed."""
    policy = v2.Compose(
        [
            v2.RandomResizedCrop(16, (0.2, 1.0)),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], 0.5),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    random_view = RandomView(AugmentConfig(), 16, (0.2, 1.0))
    for key in range(20):
        torch.manual_seed(key)
        assert torch.equal(random_view(picture(), key), policy(picture()))


def test_probabilities_of_the_policy() -> None:
    """400 draws stay within five standard errors of their rate."""
    image = picture(24, 24)
    original = pixels(RandomView(PLAIN, 24, (1.0, 1.0))(image, 0))
    flip = RandomView(AugmentConfig(jitter_prob=0, grayscale_prob=0, blur_prob=0), 24, (1.0, 1.0))
    gray = RandomView(AugmentConfig(jitter_prob=0, flip_prob=0, blur_prob=0), 24, (0.2, 1.0))
    flipped = sum(not torch.allclose(pixels(flip(image, key)), original, atol=0.3) for key in range(400))
    grayed = sum(bool((pixels(gray(image, key)).std(0) < 1e-4).all()) for key in range(400))
    assert abs(flipped - 200) <= 50
    assert abs(grayed - 80) <= 40


def test_impossible_and_certain_steps() -> None:
    """A crop of all the area is the whole image, whatever aspect ratio was drawn; then only flip and gray are left."""
    always = RandomView(AugmentConfig(jitter_prob=0, grayscale_prob=1, blur_prob=0, flip_prob=1), 24, (1.0, 1.0))
    image = picture(24, 24)
    expected = np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).convert("L"), dtype=np.float32) / 255
    for key in range(10):
        np.testing.assert_allclose(pixels(always(image, key)).numpy(), np.stack([expected] * 3), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 90), (300, 7)])
@pytest.mark.parametrize("size", [8, 13, 64])
def test_any_image_gives_finite_views(height: int, width: int, size: int) -> None:
    certain = AugmentConfig(jitter_prob=1, grayscale_prob=0, blur_prob=1)
    view = RandomView(certain, size, (0.05, 0.14))(picture(height, width), 1)
    assert view.shape == (3, size, size)
    assert torch.isfinite(view).all()


def test_eval_view_is_the_centre_of_the_resized_image() -> None:
    image = picture(40, 30)
    view = pixels(eval_view(15)(image))
    resized = np.asarray(image.resize((15, 20), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    np.testing.assert_allclose(view.permute(1, 2, 0).numpy(), resized[2:17], atol=1e-6)
