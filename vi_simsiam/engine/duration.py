"""How long a training on a CPU takes, and what makes it shorter."""

from __future__ import annotations

from vi_simsiam.config import Stem, TrainConfig

_LONG = 20 * 60
_SHORT = 15 * 60
_FEWEST_EPOCHS = 4
_SMALLER = 64
# Relative cost of a view of s x s pixels: s^2, thirteen times that behind the small stem, and what depends on no size.
# Fitted to ResNet-18's steps on two CPU cores: 0.22 s (28 pixels), 0.65 (64), 2.7 (128), 2.1 (32, small stem).
_FIXED = 625
_STEM: dict[Stem, int] = {"imagenet": 1, "small": 13}


def duration_line(
    config: TrainConfig, images: int, seconds: float, *, resumed: bool = False
) -> str:
    """How long the rest of a run will take, and for a long one the options of about a quarter of an hour.

    Args:
        config: of the run.
        images: number of training images.
        seconds: that the rest will take at the speed of the first steps.
        resumed: whether the run goes on with settings that cannot be changed any more.
    """
    text = f"{duration(seconds)} to go on this CPU"
    if seconds <= _LONG or resumed:
        return text
    augment, model = config.augment, config.model
    size, stem, options = augment.size, model.stem, []
    if augment.local_views:
        options.append(
            "--local-views 0" + (" --no-local-predictor" if model.local_predictor else "")
        )
    if size > _SMALLER:
        size = _SMALLER
        options.append(f"--size {size}")
    if stem == "small":
        stem = "imagenet"
        options.append(f"--stem {stem}")
    sizes = [augment.size] * 2 + [augment.local_size] * augment.local_views
    shorter = seconds * 2 * _cost(size, stem) / sum(_cost(side, model.stem) for side in sizes)
    if shorter > _SHORT:
        fewest = min(_FEWEST_EPOCHS, config.epochs)
        epochs = max(fewest, int(config.epochs * _SHORT / shorter))
        options.append(f"--epochs {epochs}")
        fitted = config.warmup_epochs in (
            config.epochs / 20,
            config.epochs / 8,
        )  # follows --epochs by itself
        if config.warmup_epochs >= epochs and not fitted:
            options.append(f"--warmup-epochs {epochs / 10:g}")
        shorter *= epochs / config.epochs
    fewer = max(2 * config.batch_size, int(images * _SHORT / shorter))
    if shorter > _SHORT and fewer < images:
        options.append(f"--images {fewer}")
        shorter *= fewer / images
    return f"{text}; {' '.join(options)}: {duration(shorter)}"


def duration(seconds: float) -> str:
    """A time in the words of an estimate: "about 40 s", "about 12 min", "about 4 h", "about 3 days"."""
    for unit, name, most in ((1, "s", 90), (60, "min", 90), (3600, "h", 48)):
        if seconds < most * unit:
            return f"about {max(1, round(seconds / unit))} {name}"
    return f"about {round(seconds / 86400)} days"


def _cost(size: int, stem: Stem) -> int:
    return _FIXED + size * size * _STEM[stem]
