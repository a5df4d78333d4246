"""Typed configuration of a training run, its checks, and the presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vi_simsiam.checks import check_types, require
from vi_simsiam.errors import InputError, none_of
from vi_simsiam.paths import user_path

NAMED_DATA = ("fashion-mini", "cifar10", "imagenette", "imagewoof")
"""Data sets that are known by name."""

LEAST_SIZE = 8
"""Smallest side of a view, in pixels."""

Method = Literal["vi-simsiam", "simsiam"]
Stem = Literal["imagenet", "small"]
Precision = Literal["auto", "bf16", "fp32"]
DataMemory = Literal["auto", "gpu", "host"]
Capture = Literal["auto", "on", "off"]
Kernels = Literal["auto", "on", "off"]
BatchNormStatistics = Literal["per-view", "joint"]
Link = Literal["softplus", "quadratic"]
Concentration = Literal["sample", "constant", "global", "shuffled", "detached"]
Frames = Literal["first", "all"]
ValueRange = Literal["dtype", "file"] | tuple[float, float]


def _choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise none_of(name, value, accepted)


def data_spec(text: str) -> str:
    """A data set as it is saved: the path of a folder or file that exists as folder:PATH or pack:FILE, ~ expanded, others as they are."""
    if text in NAMED_DATA or not text:
        return text
    kind, colon, place = text.partition(":")
    if colon and kind in ("folder", "pack"):
        return f"{kind}:{user_path('data', place)}" if place else text
    path = user_path("data", text)
    return f"folder:{path}" if path.is_dir() else f"pack:{path}" if path.is_file() else text


@dataclass(frozen=True)
class DecodeConfig:
    """How image files become 8-bit RGB, see `data.pixels`."""

    background: str = "gray"
    """Colour behind transparent pixels: a name (gray, white, black), #rrggbb or rgb(128, 128, 128)."""
    value_range: ValueRange = "dtype"
    """Values of images deeper than 8 bits that become black and white: two numbers, dtype (the stored type's whole
    range; 0 and 1 for floats) or file (the smallest and largest of each image)."""
    frames: Frames = "first"
    """Of animations and multi-page TIFFs: the first frame, or all frames, each as an image."""

    def __post_init__(self) -> None:
        check_types(self)
        _choice("frames", self.frames, get_args(Frames))
        if self.background != DecodeConfig.background:
            self.colour()
        if isinstance(self.value_range, tuple):
            numbers = [float(value) for value in self.value_range if isinstance(value, int | float)]
            rising = (
                len(self.value_range) == len(numbers) == 2
                and -math.inf < numbers[0] < numbers[1] < math.inf
            )
            require(
                "value_range", self.value_range, rising, "two finite numbers, the smaller one first"
            )
        elif self.value_range not in ("dtype", "file"):
            raise none_of("value_range", self.value_range, ("LOW HIGH", "dtype", "file"))

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> DecodeConfig:
        """The inverse of `dataclasses.asdict`, also after a trip through JSON."""
        return cls(**_tuples(plain))

    def colour(self) -> tuple[int, int, int]:
        """The background's red, green and blue, from 0 to 255. Raises InputError where it is no colour."""
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
    """Random views of an image; the defaults are SimSiam's (Chen and He, arXiv 2011.10566, section 3)."""

    size: int = 224
    """Side of the two global views, in pixels."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a global view covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of a crop, width over height."""
    local_views: int = 0
    """Number of additional small views (multi-crop); they are predicted from, never predicted."""
    local_size: int = 96
    """Side of the local views, in pixels."""
    local_scale: tuple[float, float] = (0.05, 0.14)
    """Share of the image's area that a local view covers."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strength of brightness, contrast, saturation and hue jitter."""
    jitter_prob: float = 0.8
    grayscale_prob: float = 0.2
    blur_prob: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian blur's standard deviation, in pixels."""
    flip_prob: float = 0.5

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("size", "local_size"):
            accepted = f"a number of pixels of at least {LEAST_SIZE}"
            require(name, getattr(self, name), getattr(self, name) >= LEAST_SIZE, accepted)
        require("local_views", self.local_views, 0 <= self.local_views <= 14, "between 0 and 14")
        for name in ("crop_scale", "local_scale"):
            low, high = getattr(self, name)
            require(
                name, (low, high), 0 < low <= high <= 1, "two numbers with 0 < low <= high <= 1"
            )
        low, high = self.crop_ratio
        require(
            "crop_ratio",
            (low, high),
            0 < low <= high < math.inf,
            "two numbers with 0 < low <= high",
        )
        for name in ("jitter_prob", "grayscale_prob", "blur_prob", "flip_prob"):
            require(
                name,
                getattr(self, name),
                0 <= getattr(self, name) <= 1,
                "a probability between 0 and 1",
            )
        jitter_fits = (
            all(math.isfinite(j) and j >= 0 for j in self.jitter) and self.jitter[3] <= 0.5
        )
        require("jitter", self.jitter, jitter_fits, "four numbers of at least 0, hue at most 0.5")
        low, high = self.blur_sigma
        require(
            "blur_sigma",
            (low, high),
            0 < low <= high < math.inf,
            "two numbers with 0 < low <= high",
        )


POLICIES: dict[str, AugmentConfig] = {
    "simsiam": AugmentConfig(),
    # Caron et al., arXiv 2006.09882: two global and six local crops.
    "multicrop": AugmentConfig(crop_scale=(0.14, 1.0), local_views=6),
    # What lightly's ImageNette benchmark gives SimSiam: its views at 128 pixels.
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
    """The named augmentation policy.

    Raises:
        InputError: there is no such policy.
    """
    _choice("policy", name, tuple(POLICIES))
    return POLICIES[name]


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, projector and predictor."""

    backbone: str = "resnet18"
    """Any torchvision ResNet by name."""
    stem: Stem = "imagenet"
    """First layers: "imagenet" (7x7 stride 2, max-pool), or "small" (3x3 stride 1) for images of 28 to 64 pixels."""
    pretrained: bool = False
    """Start from torchvision's ImageNet weights."""
    dim: int = 2048
    """D: dimension of the space the representations live in."""
    projector_hidden: int = 512
    predictor_hidden: int = 512
    local_predictor: bool = False
    """A second predictor, for views that are smaller than the first one (multi-crop)."""

    def __post_init__(self) -> None:
        check_types(self)
        require("dim", self.dim, self.dim >= 2, "at least 2")
        for name in ("projector_hidden", "predictor_hidden"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _choice("stem", self.stem, get_args(Stem))
        if self.pretrained and self.stem != "imagenet":
            raise InputError("pretrained: ImageNet weights need stem 'imagenet'")


@dataclass(frozen=True)
class LossConfig:
    """How the concentration is parametrised and the loss is scaled; SimSiam only uses `loss_scale`."""

    concentration: Concentration = "sample"
    """Where kappa comes from. "sample": predicted for every sample (VI-SimSiam). Controls: "constant" (concentration-value),
    "global" (one learned number), "shuffled" (in training every sample gets another one's), "detached" (the network is
    trained by SimSiam's loss with factor 1, and kappa on top of it by the likelihood with factor loss-scale; a clip-norm
    counts both gradients)."""
    concentration_value: float | None = None
    """kappa/(D - 1) where the concentration is "constant"."""
    concentration_max: float | None = None
    """Upper bound of kappa, approached smoothly; None for none."""
    concentration_scale: float | None = None
    """Factor on the link; None for D - 1."""
    concentration_min: float = 0.0
    """Lower bound of the concentration kappa."""
    concentration_link: Link = "quadratic"
    """How kappa follows from its layer's output: quadratic, with a gradient that does not vanish, or softplus."""
    concentration_gain: float = 4.0
    """Factor on the quadratic link's input, over sqrt(predictor-hidden); larger: kappa differs between images sooner, and swings more."""
    cosine_weight: float = 1.0
    """Weight of SimSiam's loss beside the likelihood's; 0 for the paper's loss. Without effect with frozen-run or "detached"."""
    loss_scale: float | None = None
    """Factor on the likelihood's loss, or on SimSiam's; None for 1/(D - 1) with vi-simsiam and 1 with simsiam."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("concentration_scale", "concentration_gain", "loss_scale"):
            value = getattr(self, name)
            require(name, value, value is None or 0 < value < math.inf, "a positive number")
        for name in ("concentration_min", "cosine_weight"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "at least 0")
        _choice("concentration_link", self.concentration_link, get_args(Link))
        _choice("concentration", self.concentration, get_args(Concentration))
        value, maximum, constant = (
            self.concentration_value,
            self.concentration_max,
            self.concentration == "constant",
        )
        if constant:
            require(
                "concentration_value",
                value,
                value is not None and 0 < value < math.inf,
                "a positive number",
            )
        else:
            require(
                "concentration_value",
                value,
                value is None,
                "None unless concentration is 'constant'",
            )
        if maximum is not None:
            above = self.concentration_min < maximum < math.inf
            require(
                "concentration_max",
                maximum,
                above,
                f"above concentration_min, {self.concentration_min}",
            )
            require(
                "concentration_max", maximum, not constant, "None where concentration is 'constant'"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run. Saved as config.json in its folder."""

    method: Method = "vi-simsiam"
    data: str = "fashion-mini"
    """A folder of images, a pack file, or fashion-mini (embedded), cifar10, imagenette, imagewoof."""
    data_root: Path = Path("data")
    """Where downloaded data sets are kept or looked for."""
    offline: bool = False
    """Never download: use what --data-root holds, or stop."""
    cache_dir: Path | None = None
    """Where decoded images are kept; None for vi-simsiam/ in the user's cache folder (XDG_CACHE_HOME or ~/.cache), or
    in that of temporary files where there is no home folder."""
    data_memory: DataMemory = "auto"
    """Where the decoded images are while a GPU trains: gpu, host (streamed to it), or auto (gpu if they fit)."""
    images: int | None = None
    """Train on so many images, drawn in proportion to the classes; None for all of them."""
    held_out: float = 0.0
    """Share of the training images that is kept from training and takes the place of the validation images."""
    split_seed: int = 0
    """Which images --images and --held-out draw."""
    distinct: bool = False
    """Leave out files that training and validation part both hold, byte for byte; --images and --held-out always do."""
    epochs: int = 100
    batch_size: int = 64
    lr: float = 0.0125
    """Peak learning rate, reached after the warm-up and followed by a cosine decay to 0; not scaled by the batch size."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: float = 0.0
    """Length of the linear warm-up, in epochs."""
    clip_norm: float | None = None
    """Largest norm of the gradient; None for no clipping."""
    ema: float | None = None
    """Momentum of an exponential moving average of the weights that makes the targets (BYOL, Grill et al., arXiv
    2006.07733), constant over the run; None for targets from the network itself."""
    frozen_run: Path | None = None
    """A finished SimSiam run: its network is kept as it is, and only the concentration is fitted to it."""
    seed: int = 0
    workers: int | None = None
    """Processes that prepare views on a CPU, and that read images for evaluation; None for a number that suits the device."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto is bf16 on a GPU and fp32 on a CPU."""
    backend: str = "auto"
    """Implementation of the loss: auto, eager, triton, cuda or cpu."""
    capture: Capture = "auto"
    """Whether a GPU's training step is replayed as one CUDA graph; auto falls back to single launches."""
    kernels: Kernels = "auto"
    """The project's kernels for what surrounds the network's convolutions; auto: on a GPU, without compile, torchrun and sync_batch_norm."""
    compile: bool = False
    """Pass the network through torch.compile, in the place of the kernels."""
    batch_norm: BatchNormStatistics = "per-view"
    """Whether BatchNorm normalises each view by its own statistics or all views of one size jointly."""
    sync_batch_norm: bool = False
    """With several GPUs: BatchNorm statistics over the batch of all of them."""
    log_every: int | None = None
    """Steps between two lines in metrics.jsonl; None for 10 on a CPU and 100 on a GPU, which waits for each of them."""
    save_every: float = 60.0
    """Least seconds between two checkpoints, which are written after an epoch, at the end and on Ctrl-C."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        check_types(self)
        _choice("method", self.method, get_args(Method))
        _choice("precision", self.precision, get_args(Precision))
        _choice("data_memory", self.data_memory, get_args(DataMemory))
        _choice("capture", self.capture, get_args(Capture))
        _choice("kernels", self.kernels, get_args(Kernels))
        _choice("batch_norm", self.batch_norm, get_args(BatchNormStatistics))
        require("epochs", self.epochs, self.epochs >= 1, "at least 1")
        require(
            "batch_size",
            self.batch_size,
            self.batch_size >= 2,
            "at least 2 (BatchNorm needs two samples)",
        )
        require("lr", self.lr, 0 < self.lr < math.inf, "a positive number")
        require("momentum", self.momentum, 0 <= self.momentum < 1, "at least 0 and below 1")
        require("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0")
        require(
            "warmup_epochs",
            self.warmup_epochs,
            0 <= self.warmup_epochs < self.epochs,
            "at least 0, below epochs",
        )
        require(
            "clip_norm",
            self.clip_norm,
            self.clip_norm is None or 0 < self.clip_norm < math.inf,
            "positive",
        )
        require("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2**63")
        require("workers", self.workers, self.workers is None or self.workers >= 0, "at least 0")
        require(
            "log_every", self.log_every, self.log_every is None or self.log_every >= 1, "at least 1"
        )
        require("save_every", self.save_every, 0 <= self.save_every < math.inf, "at least 0")
        require("images", self.images, self.images is None or self.images >= 2, "at least 2")
        require(
            "held_out", self.held_out, 0 <= self.held_out < 1, "a share of at least 0 and below 1"
        )
        require(
            "split_seed",
            self.split_seed,
            0 <= self.split_seed < 2**63,
            "at least 0 and below 2**63",
        )
        require("ema", self.ema, self.ema is None or 0 < self.ema < 1, "above 0 and below 1")
        self._check_variant()

    def _check_variant(self) -> None:
        """Refuse parts that do not go together."""
        kind, frozen = self.loss.concentration, self.frozen_run is not None
        if self.method == "simsiam":
            accepted = "method vi-simsiam; simsiam predicts no concentration"
            require("concentration", kind, kind == "sample", accepted)
            maximum = self.loss.concentration_max
            require("concentration_max", maximum, maximum is None, accepted)
            require("frozen_run", self.frozen_run, not frozen, accepted)
        if frozen:
            require(
                "concentration",
                kind,
                kind in ("sample", "global"),
                "sample or global with frozen_run",
            )
            require(
                "ema",
                self.ema,
                self.ema is None,
                "None with frozen_run, whose network does not move",
            )
        augment, local = self.augment, self.model.local_predictor
        has_local = augment.local_views > 0 and augment.local_size < augment.size
        require(
            "local_predictor",
            local,
            has_local or not local,
            "False without local views smaller than the others",
        )

    def located(self) -> TrainConfig:
        """The same with absolute paths, so that a run can be opened from anywhere."""
        data = data_spec(self.data)
        kind, colon, path = data.partition(":")
        if colon and path and kind in ("folder", "pack"):
            data = f"{kind}:{Path(path).absolute()}"
        places: dict[str, Any] = {}
        for name in ("data_root", "cache_dir", "frozen_run"):
            given = getattr(self, name)
            places[name] = None if given is None else user_path(name, given).absolute()
        return dataclasses.replace(self, data=data, **places)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        plain = dataclasses.asdict(self)
        plain["data_root"] = str(self.data_root)
        for name in ("cache_dir", "frozen_run"):
            plain[name] = None if plain[name] is None else str(plain[name])
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`, also after a trip through JSON; of an older version's, too.

        Raises:
            InputError: a field is unknown or has a value that is not accepted.
        """
        nested = {
            "decode": DecodeConfig,
            "augment": AugmentConfig,
            "model": ModelConfig,
            "loss": LossConfig,
        }
        try:
            plain = with_former_loss(plain)
            values = {
                name: nested[name](**_tuples(value)) if name in nested else value
                for name, value in plain.items()
            }
            paths: dict[str, Any] = {}
            for name, default in (("data_root", "data"), ("cache_dir", None), ("frozen_run", None)):
                given = plain.get(name, default)
                require(
                    name, repr(given), isinstance(given, (str, Path)) or given is default, "a path"
                )
                paths[name] = None if given is None else Path(given)
            return cls(**{**values, **paths})
        except InputError:
            raise
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"configuration: {error}") from error


PLACE_FIELDS = {
    "workers", "device", "data_root", "offline", "cache_dir", "data_memory", "capture", "kernels", "compile",
    "log_every", "save_every",
}  # fmt: skip
"""Where and how a run happens may change when it is resumed; what it computes may not."""

SOFTPLUS = LossConfig(concentration_link="softplus", cosine_weight=0.0)
"""The likelihood alone, with kappa = (D-1) softplus(raw) and the loss over D-1: in some runs kappa falls to 0 and nothing learns."""
LITERAL = dataclasses.replace(SOFTPLUS, concentration_scale=1.0, loss_scale=1.0)
"""The likelihood alone, with kappa = softplus(raw), as the paper has it."""

PRESETS: dict[str, TrainConfig] = {
    "default": TrainConfig(),
    # Sized for two CPU cores and a few minutes: small images, little to blur in them, a small representation space.
    "demo": TrainConfig(
        data="fashion-mini",
        epochs=4,
        batch_size=64,
        lr=0.06,
        warmup_epochs=0.5,
        augment=AugmentConfig(size=28, local_size=12, crop_scale=(0.3, 1.0), blur_prob=0.0),
        model=ModelConfig(dim=512),
    ),
    # Nakamura et al., arXiv 2203.11437, section 4.1; crop sizes and D are not given there and are SwAV's and SimSiam's.
    "paper": TrainConfig(
        data="imagenette",
        epochs=200,
        batch_size=64,
        lr=1e-3,
        weight_decay=1e-4,
        augment=AugmentConfig(
            size=224, crop_scale=(0.14, 1.0), local_views=6, local_size=96, local_scale=(0.05, 0.14)
        ),
        loss=LITERAL,
    ),
}


def preset(name: str) -> TrainConfig:
    """The named preset.

    Raises:
        InputError: there is no such preset.
    """
    _choice("preset", name, tuple(PRESETS))
    return PRESETS[name]


def with_former_loss(plain: dict[str, Any]) -> dict[str, Any]:
    """VI-SimSiam as a run saved it before link and cosine weight could be chosen, with those it had; all else as it is."""
    loss = plain.get("loss")
    if plain.get("method") != "vi-simsiam" or "model" not in plain or not isinstance(loss, dict):
        return plain
    if (
        not {"concentration_scale", "concentration_min", "loss_scale"} <= loss.keys()
    ):  # a part, not what a run saves
        return plain
    former = {
        "concentration_link": SOFTPLUS.concentration_link,
        "cosine_weight": SOFTPLUS.cosine_weight,
    }
    return plain | {"loss": former | loss}


def differing_fields(saved: TrainConfig, given: TrainConfig) -> list[str]:
    """Fields in which two configurations would train differently, as "name: saved -> given"."""
    old, new = flat(saved.to_dict()), flat(given.to_dict())
    return [
        f"{name}: {value} -> {new[name]}"
        for name, value in old.items()
        if value != new[name] and name not in PLACE_FIELDS
    ]


def flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with the names of the inner ones joined by dots."""
    fields: dict[str, Any] = {}
    for name, value in plain.items():
        inner = isinstance(value, dict)
        fields |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return fields


def _tuples(plain: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()
    }
