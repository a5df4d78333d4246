"""Random views of an image (the augmentation policy), and the fixed view that evaluation uses."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from vi_simsiam.config import AugmentConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_BLUR_TAPS = 13
"""Covers three standard deviations of the strongest blur of SimSiam's policy, sigma = 2."""


def view_seed(seed: int, epoch: int, sample: int, view: int) -> int:
    """The key of a view's random numbers: 64 well mixed bits, different for any two views of a run."""
    return int(np.random.SeedSequence((seed, epoch, sample, view)).generate_state(1, np.uint64)[0])


class RandomView:
    """SimSiam's augmentation (Chen and He, arXiv 2011.10566, section 3) for views of one size.

    The random numbers come from torch's CPU generator, seeded by a key and restored afterwards: a view depends on its
    image and key alone, not on the process, on other views or on where a run was resumed.

    Args:
        augment: the policy.
        size: side of the view in pixels.
        scale: share of the image's area that the crop covers.
    """

    def __init__(self, augment: AugmentConfig, size: int, scale: tuple[float, float]) -> None:
        # Reflection padding reaches at most size - 1 pixels beyond the border.
        taps = min(_BLUR_TAPS, 2 * size - 1)
        # The image stays a PIL image as long as its 8-bit arithmetic is the faster one.
        steps: list[tuple[float, v2.Transform]] = [
            (1.0, v2.RandomResizedCrop(size, scale)),
            (augment.flip_prob, v2.RandomHorizontalFlip(augment.flip_prob)),
            (augment.jitter_prob, v2.RandomApply([v2.ColorJitter(*augment.jitter)], augment.jitter_prob)),
            (augment.grayscale_prob, v2.RandomGrayscale(augment.grayscale_prob)),
            (1.0, _to_float()),
            (augment.blur_prob, v2.RandomApply([v2.GaussianBlur(taps, list(augment.blur_sigma))], augment.blur_prob)),
            (1.0, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)),
        ]
        self.transform = v2.Compose([step for probability, step in steps if probability > 0])

    def __call__(self, image: Image.Image, key: int) -> Tensor:
        """A random view of `image`: (3, size, size) float32, normalised."""
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(key)
        try:
            view: Tensor = self.transform(image)
        finally:
            generator.set_state(state)
        return view


def eval_view(size: int) -> v2.Compose:
    """The view for evaluation: the shorter side resized to `size` (bicubic), the centre cropped, normalised."""
    resize = v2.Resize(size, InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(size), _to_float(), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def _to_float() -> v2.Compose:
    return v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
