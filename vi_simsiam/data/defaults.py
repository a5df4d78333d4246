"""Settings that suit a data set, for those that a user leaves open."""

from __future__ import annotations

import dataclasses

from vi_simsiam.backbones import own_size
from vi_simsiam.config import LEAST_SIZE, PRESETS, AugmentConfig, Stem, TrainConfig
from vi_simsiam.data.decoding import median_side
from vi_simsiam.data.sources import ImageSource

FITTED = (
    "size", "local_size", "crop_scale", "blur_prob", "stem", "dim", "epochs", "batch_size", "lr",
    "warmup_epochs",
)  # fmt: skip
"""The settings that `suited` chooses."""

_LARGEST = 224
_TINY = 28
"""Sizes up to this take the demo's settings, which train on a CPU in minutes."""
_ONE_PIXEL = 32
"""Sizes up to this leave one pixel to the last layers of a network with the ImageNet stem."""
_SMALL = 64
"""In images up to this size a blur of 2 pixels removes the details to learn from."""
_IMAGES_SEEN = 200 * 9_469
"""200 epochs of ImageNette's images, the length of the published trainings."""
_MOST_EPOCHS = 400
_FEWEST_EPOCHS = 20


def suited_size(source: ImageSource) -> int:
    """Return the side of the global views in pixels: the median shorter side, from 8 to 224."""
    return min(max(median_side(source) or _LARGEST, LEAST_SIZE), _LARGEST)


def sized(views: AugmentConfig, size: int) -> AugmentConfig:
    """Return `views` with global views of `size` pixels, and local ones of SwAV's 96 / 224."""
    local_size = max(LEAST_SIZE, round(size * AugmentConfig.local_size / AugmentConfig.size))
    return dataclasses.replace(views, size=size, local_size=local_size)


def suited(
    config: TrainConfig,
    source: ImageSource,
    *,
    views: AugmentConfig | None = None,
    size: int | None = None,
    epochs: int | None = None,
    ranks: int = 1,
) -> TrainConfig:
    """Return `config` with the settings of `FITTED` chosen for the training images.

    - Views have the images' size, or that of a timm model whose size is fixed or whose weights are
      given; local ones have SwAV's share of it. Up to 28 pixels the rest is
      the demo's.
    - Up to 28 pixels the stem is the medium one and up to 32 the small one, unless weights are
      pretrained; up to 64 there is no blur, and D is 512.
    - The run sees about as many images as 200 epochs of ImageNette have (the demo's number up to 28
      pixels), in 20 to 400 epochs, of which a twentieth (an eighth) warms up the learning rate.

    Args:
        config: all other settings.
        source: the training images, at least 2; a batch holds no more than all of them.
        views: a given augmentation, of which only the sizes are fitted; None to fit all of it.
        size: a given side of the global views.
        epochs: a given length of the run.
        ranks: processes that share every batch evenly.
    """
    size = size or own_size(config) or suited_size(source)
    tiny = size <= _TINY
    start = PRESETS["demo" if tiny else "default"]
    augment = views or dataclasses.replace(
        start.augment,
        blur_prob=0.0 if size <= _SMALL else start.augment.blur_prob,
        local_views=config.augment.local_views,
    )
    epochs = epochs or _epochs(len(source), tiny)
    shares = ranks * config.accumulate
    given = config.model.pretrained or ":" in config.model.backbone
    stem: Stem = "imagenet"
    if size <= _ONE_PIXEL and not given:
        stem = "medium" if tiny else "small"
    return dataclasses.replace(
        config,
        epochs=epochs,
        batch_size=max(2, min(start.batch_size, len(source)) // shares * shares),
        lr=start.lr,
        warmup_epochs=epochs / (8 if tiny else 20),
        augment=sized(augment, size),
        model=dataclasses.replace(
            config.model,
            stem=stem,
            dim=512 if size <= _SMALL else config.model.dim,
        ),
    )


def _epochs(images: int, tiny: bool) -> int:
    demo = PRESETS["demo"].epochs
    seen, fewest = (demo * 8_000, demo) if tiny else (_IMAGES_SEEN, _FEWEST_EPOCHS)
    epochs = seen / max(1, images)
    rounded = round(epochs, -1) if epochs > _FEWEST_EPOCHS else round(epochs)
    return int(min(max(rounded, fewest), _MOST_EPOCHS))
