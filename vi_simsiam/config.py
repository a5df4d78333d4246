"""Typed configuration of a training run, and the presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vi_simsiam.checks import (
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    Rule,
    at_least,
    check_fields,
    choice,
    is_name,
    limited,
    require,
)
from vi_simsiam.config_parts import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LEAST_SIZE,
    MOST_CHANNELS,
    POLICIES,
    AugmentConfig,
    Concentration,
    Constants,
    DecodeConfig,
    Link,
    LossConfig,
    ModelConfig,
    Projector,
    Stem,
    policy,
    tuples,
)
from vi_simsiam.data_names import NAMED_DATA, data_spec, joined_spec, located_spec
from vi_simsiam.errors import InputError, cut
from vi_simsiam.paths import user_path
from vi_simsiam.text import one_line

__all__ = [
    "IMAGENET_MEAN", "IMAGENET_STD", "LEAST_SIZE", "LITERAL", "MOST_CHANNELS", "NAMED_DATA",
    "PARTS", "PLACE_FIELDS", "POLICIES", "PRESETS", "SOFTPLUS", "AugmentConfig",
    "Concentration", "Constants", "DataMemory", "DecodeConfig", "Link", "LossConfig", "Method",
    "ModelConfig", "Projector", "Stem", "TrainConfig", "data_spec", "differing_fields", "flat",
    "policy", "preset", "with_former_loss",
]  # fmt: skip

Method = Literal["vi-simsiam", "simsiam"]
Precision = Literal["auto", "bf16", "fp32"]
DataMemory = Literal["auto", "gpu", "host"]
Capture = Literal["auto", "on", "off"]
Kernels = Literal["auto", "on", "off"]
BatchNormStatistics = Literal["per-view", "joint"]
StopOn = Literal["collapse"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run. Saved as config.json in its folder."""

    method: Method = "vi-simsiam"
    data: str = "fashion-mini"
    """A folder of images or several, a list (.txt, .csv), Parquet or tar files, a pack file, or
    fashion-mini (embedded), cifar10, imagenette, imagewoof."""
    data_root: Path = Path("data")
    """Folder of downloaded data sets."""
    offline: bool = False
    """Never download: use the data sets in --data-root, or stop."""
    cache_dir: Path | None = None
    """Folder of decoded images; None for vi-simsiam/ in the user's cache folder (XDG_CACHE_HOME or
    ~/.cache), or in the folder of temporary files where there is no home folder."""
    data_memory: DataMemory = "auto"
    """Memory that holds the decoded images while a GPU trains: gpu, host (streamed to the GPU), or
    auto (gpu if they fit)."""
    images: int | None = limited(None, at_least(2))
    """Train on this many images, drawn in proportion to the classes; None for all of them."""
    held_out: float = limited(0.0, Rule(lambda x: 0 <= x < 1, "a share of at least 0 and below 1"))
    """Share of the training images that is kept from training and replaces the validation
    images."""
    split_seed: int = limited(0, SEED)
    """Seed of the images that --images and --held-out draw."""
    distinct: bool = False
    """Leave out files that training and validation part both hold, byte for byte; --images and
    --held-out always do."""
    epochs: int = limited(100, at_least(1))
    batch_size: int = limited(64, at_least(2, "at least 2 (BatchNorm needs two samples)"))
    accumulate: int = limited(1, at_least(1))
    """Compute a batch in this many parts, one after the other, for less memory. The step is that
    of the whole batch, except that BatchNorm normalises each part by its own statistics."""
    lr: float = limited(0.0125, POSITIVE)
    """Peak learning rate, reached after the warm-up and followed by a cosine decay to 0; not scaled
    by the batch size."""
    momentum: float = limited(0.9, Rule(lambda x: 0 <= x < 1, "at least 0 and below 1"))
    weight_decay: float = limited(1e-4, NOT_NEGATIVE)
    warmup_epochs: float = 0.0
    """Length of the linear warm-up, in epochs."""
    clip_norm: float | None = limited(None, POSITIVE)
    """Largest norm of the gradient; None for no clipping."""
    ema: float | None = limited(None, Rule(lambda x: 0 < x < 1, "above 0 and below 1"))
    """Momentum of an exponential moving average of the weights that makes the targets (BYOL, Grill
    et al., arXiv 2006.07733), constant over the run; None for targets from the network itself."""
    init: Path | None = None
    """Weights that the backbone begins with: a run, or a state dict as .safetensors, .pth, .pt or
    .tar; with or without a prefix of its names."""
    seed: int = limited(0, SEED)
    workers: int | None = limited(None, at_least(0))
    """Processes that prepare views on a CPU, and that read images for evaluation; None for a number
    that suits the device."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto is bf16 on a GPU and fp32 on a CPU."""
    backend: str = "auto"
    """Implementation of the loss: auto, eager, triton, cuda or cpu."""
    capture: Capture = "auto"
    """Replay a GPU's training step as one CUDA graph; auto falls back to single launches."""
    kernels: Kernels = "auto"
    """Use the project's kernels around the network's convolutions; auto: where they can be used,
    unless a long run measures at its start that torch's layers are faster."""
    deterministic: bool = False
    """On a GPU: use torch's deterministic algorithms, so that a resumed run gives the same bits; a
    CPU always does."""
    compile: bool = False
    """Pass the network through torch.compile, instead of the kernels."""
    batch_norm: BatchNormStatistics = "per-view"
    """BatchNorm normalises each view by its own statistics, or all views of one size jointly."""
    sync_batch_norm: bool = False
    """With several GPUs: BatchNorm statistics over the batch of all of them."""
    log_every: int | None = limited(None, at_least(1))
    """Steps between two lines in metrics.jsonl; None for 10 on a CPU and 100 on a GPU, which waits
    for each line."""
    log: str = "tensorboard"
    """Loggers besides metrics.jsonl, joined by commas: tensorboard, wandb, mlflow, trackio."""
    save_every: float = limited(60.0, NOT_NEGATIVE)
    """Least seconds between two checkpoints; one is written at the end and on a signal, too."""
    keep: int = limited(2, at_least(1))
    """Number of checkpoints that are kept, besides the one with the best kNN accuracy."""
    knn_every: int | None = limited(None, at_least(1))
    """Measure the kNN accuracy on some labelled images after every so many epochs; None for
    never."""
    stop_on: StopOn | None = None
    """End a training early that has collapsed, with the exit code 3; None for never."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        if isinstance(self.data, list | tuple):
            object.__setattr__(self, "data", joined_spec(self.data))
        check_fields(self)
        within = 0 <= self.warmup_epochs < self.epochs
        require("warmup_epochs", self.warmup_epochs, within, "at least 0, below epochs")
        kind, maximum = self.loss.concentration, self.loss.concentration_max
        if self.method == "simsiam":
            accepted = "method vi-simsiam; simsiam predicts no concentration"
            require("concentration", kind, kind == "sample", accepted)
            require("concentration_max", maximum, maximum is None, accepted)
        if self.init is not None:
            require("init", self.init, not self.model.pretrained, "None with pretrained")
        has_local = self.augment.local_views > 0 and self.augment.local_size < self.augment.size
        local = self.model.local_predictor
        accepted = "False without local views smaller than the others"
        require("local_predictor", local, has_local or not local, accepted)

    @property
    def fitted(self) -> bool:
        """True for a run of `fit_concentration`, whose encoder stays as it is."""
        return self.model.projector == "standardised"

    @property
    def loss_scale(self) -> float:
        """Factor on the loss: `loss.loss_scale`, or the method's default."""
        default = 1 / (self.model.dim - 1) if self.method == "vi-simsiam" else 1.0
        return self.loss.loss_scale or default

    def uses_bf16(self, device: str) -> bool:
        """True if the network computes in bfloat16 on a device of this type."""
        return self.precision == "bf16" or (self.precision == "auto" and device == "cuda")

    def located(self) -> TrainConfig:
        """The same with absolute paths, so that a run can be opened from anywhere."""
        paths: dict[str, Any] = {
            name: user_path(name, getattr(self, name)).absolute()
            for name in _PATHS
            if getattr(self, name) is not None
        }
        return dataclasses.replace(self, data=located_spec(self.data), **paths)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        plain = dataclasses.asdict(self)
        return plain | {name: str(plain[name]) for name in _PATHS if plain[name] is not None}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`, also after conversion to JSON and back, and for older versions.

        Raises:
            InputError: a field is unknown or has a value that is not accepted.
        """
        try:
            values = dict(with_former_loss(plain))
            values.pop("frozen_run", None)
            for name, kind in PARTS.items():
                if name in values:
                    values[name] = kind(**tuples(values[name]))
            for name, default in _PATHS.items():
                path = values.setdefault(name, default)
                fits = path is default or (isinstance(path, str | Path) and is_name(str(path)))
                require(name, repr(path), fits, "a path")
                values[name] = None if path is None else Path(path)
            return cls(**values)
        except InputError:
            raise
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"configuration: {cut(one_line(str(error)))}") from error


PARTS: dict[str, type[Any]] = {
    "decode": DecodeConfig, "augment": AugmentConfig, "model": ModelConfig, "loss": LossConfig,
}  # fmt: skip
"""The parts of a configuration."""
_PATHS = {"data_root": Path("data"), "cache_dir": None, "init": None}

PLACE_FIELDS = {
    "workers", "device", "data_root", "offline", "cache_dir", "data_memory", "capture", "kernels",
    "compile", "log_every", "log", "save_every", "keep", "deterministic", "knn_every", "stop_on",
}  # fmt: skip
"""Fields that may change when a run is resumed: they do not change the result."""

SOFTPLUS = LossConfig(concentration_link="softplus", cosine_weight=0.0)
"""The likelihood alone, with kappa = (D-1) softplus(raw) and the loss divided by D-1: in some runs
kappa falls to 0 and nothing is learned."""
LITERAL = dataclasses.replace(SOFTPLUS, concentration_scale=1.0, loss_scale=1.0)
"""The likelihood alone, with kappa = softplus(raw), as in the paper."""

PRESETS: dict[str, TrainConfig] = {
    "default": TrainConfig(),
    # For a few minutes on two CPU cores; how it was chosen: docs/record.md.
    "demo": TrainConfig(
        data="fashion-mini", epochs=3, batch_size=64, lr=0.06, warmup_epochs=0.375,
        augment=AugmentConfig(size=28, local_size=12, crop_scale=(0.5, 1.0), blur_prob=0.0),
        model=ModelConfig(stem="medium", dim=512),
    ),
    # Nakamura et al., arXiv 2203.11437, section 4.1. Crop sizes and D are not given in the paper;
    # these are SwAV's and SimSiam's.
    "paper": TrainConfig(
        data="imagenette", epochs=200, batch_size=64, lr=1e-3, weight_decay=1e-4,
        augment=AugmentConfig(size=224, crop_scale=(0.14, 1.0), local_views=6),
        loss=LITERAL,
    ),
}  # fmt: skip


def preset(name: str) -> TrainConfig:
    """The named preset. Raises InputError for an unknown name."""
    choice("preset", name, tuple(PRESETS))
    return PRESETS[name]


def with_former_loss(plain: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run of an earlier version, with the loss by the present options.

    Link and cosine weight were no options then. With "frozen_run" the likelihood trained the
    concentration alone, on top of that run's network: the model is that of "detached". The name of
    the run stays, so that these settings are refused for a new training.

    Anything else is returned unchanged.
    """
    loss = plain.get("loss")
    if "model" not in plain or not isinstance(loss, dict):
        return plain
    if not {"concentration_scale", "concentration_min", "loss_scale"} <= loss.keys():
        return plain  # a part of a configuration, not one that a run saved
    plain = {name: value for name, value in plain.items() if (name, value) != ("frozen_run", None)}
    if plain.get("method") != "vi-simsiam":
        return plain
    former = {"concentration_link": SOFTPLUS.concentration_link, "cosine_weight": 0.0}
    if "frozen_run" in plain and loss.get("concentration") == "sample":
        loss = loss | {"concentration": "detached"}
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
        name = f"{prefix}{name}"
        fields |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return fields
