"""The parts of a training run's configuration: decoding, augmentation, model and loss."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from vi_simsiam.checks import (
    INTERVAL,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SHARES,
    Rule,
    at_least,
    check_fields,
    choice,
    limited,
    require,
)
from vi_simsiam.errors import InputError, none_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_CHANNELS = 16
LEAST_SIZE = 8
"""Smallest side of a view, in pixels."""

Stem = Literal["imagenet", "medium", "small"]
Projector = Literal["mlp", "standardised"]
Link = Literal["softplus", "quadratic"]
Concentration = Literal["sample", "constant", "global", "shuffled", "detached"]
Frames = Literal["first", "all"]
Constants = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of every channel, for values in [0, 1]."""
ValueRange = Literal["dtype", "file"] | tuple[float, float]

_PIXELS = at_least(LEAST_SIZE, f"a number of pixels of at least {LEAST_SIZE}")
_WIDTH = Rule(lambda n: 1 <= n <= 2**16, "between 1 and 65536")


@dataclass(frozen=True)
class DecodeConfig:
    """Conversion of image files to pixels: 8-bit RGB by default, see `data.pixels`; other channels
    and 16 bits as they are stored, see `data.channels`."""

    background: str = "gray"
    """Colour behind transparent pixels: a name (gray, white, black), #rrggbb or
    rgb(128, 128, 128)."""
    value_range: ValueRange = "dtype"
    """Values of images deeper than 8 bits that become black and white: two numbers, dtype (the
    whole range of the stored type; 0 and 1 for floats) or file (the smallest and largest value of
    each image)."""
    frames: Frames = "first"
    """Frames of animations and multi-page TIFFs: the first one, or all, each as an image."""
    channels: int = limited(
        3, Rule(lambda n: 1 <= n <= MOST_CHANNELS, f"between 1 and {MOST_CHANNELS}")
    )
    """Channels of every image, from 1 to 16. Beside RGB with 8 bits, images are read as they are
    stored, and mean and deviation are measured on the training images."""
    bits: int = limited(8, Rule(lambda n: n in (8, 16), "8 or 16"))
    """Bits of a channel: 8 or 16."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.is_rgb:
            default = dataclasses.asdict(DecodeConfig())
            for name in ("background", "value_range", "frames"):
                accepted = f"{default[name]} unless images are read as RGB with 8 bits"
                value = getattr(self, name)
                require(name, repr(value), value == default[name], accepted)
        if self.background != "gray":
            self.colour()
        if isinstance(self.value_range, tuple):
            numbers = [x for x in self.value_range if isinstance(x, int | float)]
            rising = len(self.value_range) == len(numbers) == 2
            rising = rising and -math.inf < numbers[0] < numbers[1] < math.inf
            accepted = "two finite numbers, the smaller one first"
            require("value_range", self.value_range, rising, accepted)
        elif self.value_range not in ("dtype", "file"):
            raise none_of("value_range", self.value_range, ("LOW HIGH", "dtype", "file"))

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> DecodeConfig:
        """The inverse of `dataclasses.asdict`, also after conversion to JSON and back."""
        return cls(**tuples(plain))

    @property
    def is_rgb(self) -> bool:
        """True if images become 8-bit RGB."""
        return (self.channels, self.bits) == (3, 8)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a decoded pixel."""
        return self.channels * self.bits // 8

    def colour(self) -> tuple[int, int, int]:
        """Red, green and blue of the background, from 0 to 255.

        Raises:
            InputError: `background` is not an opaque colour.
        """
        from PIL import ImageColor

        try:
            red, green, blue, *alpha = ImageColor.getrgb(self.background)
        except ValueError:
            alpha = [0]
        accepted = "an opaque colour such as gray, white, #ff8000 or rgb(255, 128, 0)"
        require("background", repr(self.background), alpha in ([], [255]), accepted)
        return red, green, blue


@dataclass(frozen=True)
class AugmentConfig:
    """Random views of an image; the defaults are SimSiam's (arXiv 2011.10566, section 3)."""

    size: int = limited(224, _PIXELS)
    """Side of the two global views, in pixels."""
    crop_scale: tuple[float, float] = limited((0.2, 1.0), SHARES)
    """Share of the image's area that a global view covers."""
    crop_ratio: tuple[float, float] = limited((3 / 4, 4 / 3), INTERVAL)
    """Aspect ratio of a crop, width over height."""
    local_views: int = limited(0, Rule(lambda n: 0 <= n <= 14, "between 0 and 14"))
    """Number of additional small views (multi-crop); they predict the global views, and are not
    predicted themselves."""
    local_size: int = limited(96, _PIXELS)
    """Side of the local views, in pixels."""
    local_scale: tuple[float, float] = limited((0.05, 0.14), SHARES)
    """Share of the image's area that a local view covers."""
    jitter: tuple[float, float, float, float] = limited(
        (0.4, 0.4, 0.4, 0.1),
        Rule(
            lambda x: all(0 <= strength < math.inf for strength in x) and x[3] <= 0.5,
            "four numbers of at least 0, hue at most 0.5",
        ),
    )
    """Strength of brightness, contrast, saturation and hue jitter."""
    jitter_prob: float = limited(0.8, PROBABILITY)
    grayscale_prob: float = limited(0.2, PROBABILITY)
    blur_prob: float = limited(0.5, PROBABILITY)
    blur_sigma: tuple[float, float] = limited((0.1, 2.0), INTERVAL)
    """Range of the Gaussian blur's standard deviation, in pixels."""
    flip_prob: float = limited(0.5, PROBABILITY)
    mean: tuple[float, ...] | None = None
    """Mean of every channel, for values from 0 to 1, by which views are normalised; None for
    ImageNet's, and for the training images' own where these are not RGB with 8 bits."""
    std: tuple[float, ...] | None = None
    """Standard deviation of every channel, as --mean."""

    def __post_init__(self) -> None:
        check_fields(self)
        both = (self.mean is None) == (self.std is None)
        require("mean", repr(self.mean), both, "given together with std")
        if self.mean is not None and self.std is not None:
            fits = 1 <= len(self.mean) <= MOST_CHANNELS and all(map(math.isfinite, self.mean))
            require("mean", self.mean, fits, f"1 to {MOST_CHANNELS} finite numbers")
            fits = len(self.std) == len(self.mean) and all(0 < x < math.inf for x in self.std)
            require("std", self.std, fits, f"{len(self.mean)} finite numbers above 0")

    @property
    def constants(self) -> Constants:
        """Mean and standard deviation of every channel, by which views are normalised."""
        return self.mean or IMAGENET_MEAN, self.std or IMAGENET_STD

    def normalised_by(self, constants: Constants) -> AugmentConfig:
        """The same with other constants, and without colour where channels are not three."""
        mean, std = constants
        changed = dataclasses.replace(self, mean=mean, std=std)
        if len(mean) == 3:
            return changed
        brightness, contrast, *_ = self.jitter
        return dataclasses.replace(
            changed, jitter=(brightness, contrast, 0.0, 0.0), grayscale_prob=0.0
        )


POLICIES: dict[str, AugmentConfig] = {
    "simsiam": AugmentConfig(),
    # Caron et al., arXiv 2006.09882: two global and six local crops.
    "multicrop": AugmentConfig(crop_scale=(0.14, 1.0), local_views=6),
    # SimSiam's views at 128 pixels, as in lightly's ImageNette benchmark.
    "lightly-imagenette": AugmentConfig(size=128),
    # The middle of the image, the same in both views.
    "none": AugmentConfig(
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        jitter_prob=0.0,
        grayscale_prob=0.0,
        blur_prob=0.0,
        flip_prob=0.0,
    ),
}


def policy(name: str) -> AugmentConfig:
    """The named augmentation policy. Raises InputError for an unknown name."""
    choice("policy", name, tuple(POLICIES))
    return POLICIES[name]


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, projector and predictor."""

    backbone: str = "resnet18"
    """A torchvision ResNet by name, timm:NAME, or module:PACKAGE.ATTRIBUTE: a callable that returns
    a module."""
    stem: Stem = "imagenet"
    """First layers: "imagenet" (7x7 stride 2, max-pool), or for images of up to 64 pixels "medium"
    (3x3 stride 2) or "small" (3x3 stride 1); other backbones than torchvision's keep their own."""
    pretrained: bool = False
    """Start from the ImageNet weights of torchvision or timm."""
    dim: int = limited(2048, Rule(lambda n: 2 <= n <= 2**16, "between 2 and 65536"))
    """D: dimension of the space the representations live in."""
    projector: Annotated[Projector, tyro.conf.Suppress] = "mlp"
    """From features to representations: "mlp" (SimSiam's three layers), or "standardised", the
    features themselves, each column with mean 0 and variance 1 (`fit_concentration`)."""
    projector_hidden: int = limited(512, _WIDTH)
    predictor_hidden: int = limited(512, _WIDTH)
    local_predictor: bool = False
    """A second predictor, for views that are smaller than the first one (multi-crop)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pretrained and self.stem != "imagenet":
            raise InputError("pretrained: ImageNet weights need stem 'imagenet'")
        kind, colon, name = self.backbone.partition(":")
        if colon:
            fits = kind in ("timm", "module") and name != ""
            accepted = "a torchvision ResNet, timm:NAME or module:PACKAGE.ATTRIBUTE"
            require("backbone", repr(self.backbone), fits, accepted)
            accepted = f"'imagenet' with {kind}:, whose networks have first layers of their own"
            require("stem", repr(self.stem), self.stem == "imagenet", accepted)
        if kind == "module" and self.pretrained:
            raise InputError("pretrained: module: has no published weights; give --init a file")


@dataclass(frozen=True)
class LossConfig:
    """The concentration kappa and the scale of the loss; SimSiam uses only `loss_scale`."""

    concentration: Concentration = "sample"
    """Source of kappa. "sample": predicted for every sample (VI-SimSiam). Controls: "constant"
    (concentration-value), "global" (one learned number), "shuffled" (in training every sample gets
    the kappa of another one), "detached" (SimSiam's loss with factor 1 trains the network, and the
    likelihood with factor loss-scale trains kappa on top of it; clip-norm counts both
    gradients)."""
    concentration_value: float | None = None
    """kappa/(D - 1) where the concentration is "constant"."""
    concentration_max: float | None = None
    """Upper bound of kappa, approached smoothly; None for none."""
    concentration_scale: float | None = limited(None, POSITIVE)
    """Factor on the link; None for D - 1."""
    concentration_min: float = limited(0.0, NOT_NEGATIVE)
    """Lower bound of the concentration kappa."""
    concentration_link: Link = "quadratic"
    """Function from the last layer's output to kappa: quadratic, with a gradient that does not
    vanish, or softplus."""
    concentration_gain: float = limited(4.0, POSITIVE)
    """Factor on the quadratic link's input, over sqrt(predictor-hidden); with a larger one kappa
    differs between images sooner, and swings more."""
    cosine_weight: float = limited(1.0, NOT_NEGATIVE)
    """Weight of SimSiam's loss beside the likelihood's; 0 for the paper's loss. No effect with
    "detached"."""
    loss_scale: float | None = limited(None, POSITIVE)
    """Factor on the likelihood's loss, or on SimSiam's; None for 1/(D - 1) with vi-simsiam and 1
    with simsiam."""

    def __post_init__(self) -> None:
        check_fields(self)
        value, maximum = self.concentration_value, self.concentration_max
        constant = self.concentration == "constant"
        fits, accepted = value is None, "None unless concentration is 'constant'"
        if constant:
            fits, accepted = value is not None and 0 < value < math.inf, "a positive number"
        require("concentration_value", value, fits, accepted)
        if maximum is not None:
            above = self.concentration_min < maximum < math.inf
            accepted = f"above concentration_min, {self.concentration_min}"
            require("concentration_max", maximum, above, accepted)
            accepted = "None where concentration is 'constant'"
            require("concentration_max", maximum, not constant, accepted)


def tuples(plain: dict[str, Any]) -> dict[str, Any]:
    """`plain` with tuples for the lists that JSON makes of them."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in plain.items()}
