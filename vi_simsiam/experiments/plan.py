"""What an experiment consists of: its arms, how often each is run, and the comparison that it is made for.

A plan is a pure function of the experiment's name and options, so that the same command finds the same runs again. The
primary comparison is part of it and is written down before any run starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vi_simsiam.config import LossConfig, Method, ModelConfig, TrainConfig, policy, preset
from vi_simsiam.errors import InputError

MEASURES = ("knn20", "knn200", "logistic", "linear", "linear_top5")
"""Accuracies that every run is measured by, in the order of every table."""
PRIMARY_MEASURE = "logistic"
"""Of the experiments that reproduce no published figure: a linear classifier that is a function of the features alone, with
no learning rate or number of steps that could suit one arm, or a large training set, better than another."""
METHODS: tuple[tuple[Method, str], ...] = (("simsiam", "SimSiam"), ("vi-simsiam", "VI-SimSiam"))
_SHORT_EPOCHS = 100
"""Below this many epochs an average over 1 / (1 - 0.996) steps and more still holds the untrained network for long."""


@dataclass(frozen=True)
class PlanOptions:
    """What may be said of an experiment; None for the experiment's own setting."""

    seeds: int = 3
    """Runs of every arm, with the seeds 0, 1, ..."""
    data: tuple[str, ...] | None = None
    """Data sets: imagenette, imagewoof, cifar10, fashion-mini, folder:PATH or pack:FILE; None for the experiment's own."""
    preset: str = "default"
    """Settings of `vi-simsiam train` that tuned, controls and stability start from: default, or demo for images of 28 pixels."""
    epochs: int | None = None
    """Length of a training."""
    size: int | None = None
    """Side of the global views, in pixels; local views keep their share of it."""
    images: int | None = None
    """Train on so many images, drawn class by class; None for all."""
    val_images: int | None = None
    """Measure on so many validation images, drawn class by class; None for all."""
    batch_size: int | None = None
    """Images in a batch; the learning rate is left as it is."""
    dim: int | None = None
    """D: dimension of the representation space."""
    arms: tuple[str, ...] | None = None
    """Only these arms; None for all that are not optional."""
    trials: int = 8
    """Trials of every method on a held-out part of the training set (experiment tuned)."""
    ema: float | None = None
    """Momentum of the target network (arms byol and vi-byol); None for 0.996, or 0.99 below 100 epochs."""

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "images", "val_images", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value} is not accepted; it must be at least 1")
        if self.data is not None and (not self.data or len(set(self.data)) < len(self.data)):
            raise InputError(f"data: {' '.join(self.data) or 'nothing'} is not accepted; each data set is said once")
        if self.arms is not None and not self.arms:
            raise InputError("arms: nothing is not accepted; name at least one")

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON types; data sets by their labels, so that a moved folder is the same data."""
        plain = dataclasses.asdict(self)
        plain["data"] = None if self.data is None else [label(spec) for spec in self.data]
        plain["arms"] = None if self.arms is None else list(self.arms)
        return plain


@dataclass(frozen=True)
class Arm:
    """One thing that is compared: a configuration, run once for every seed."""

    name: str
    config: TrainConfig
    """Of the first seed; another run differs in the seed alone, and in `frozen_run`."""
    note: str
    """What it is, in one phrase."""
    inferred: tuple[str, ...] = ()
    """Settings that its source does not state."""
    after: str | None = None
    """Name of the arm whose run of the same seed this one starts from."""
    optional: bool = False
    """Whether it is left out unless it is asked for by name."""

    def described(self) -> dict[str, Any]:
        """The arm as it stands in plan.json."""
        return {
            "name": self.name,
            "method": self.config.method,
            "note": self.note,
            "inferred": list(self.inferred),
            "data": label(self.config.data),
        }


@dataclass(frozen=True)
class Primary:
    """The comparison that an experiment is made for; all others are exploratory."""

    arm: str
    against: str
    measure: str
    data: str


@dataclass(frozen=True)
class Trials:
    """Settings tried on held-out images before the arms' settings are known."""

    arms: tuple[Arm, ...]
    """Every trial of every method."""
    seed: int
    """Of all of them; none of the arms' seeds."""
    held_out: float
    """Share of the training images that they are measured on, and not trained on."""
    measure: str
    """The accuracy that counts."""
    choose: Callable[[dict[str, float]], tuple[dict[str, str], tuple[Arm, ...]]]
    """From the accuracy of every trial by its name: the best trial of every arm, and the arms with its settings."""


@dataclass(frozen=True)
class Plan:
    """All runs of an experiment.

    Attributes:
        experiment: its name.
        arms: with `trials` these are only named: their settings are those that the trials choose.
        primary: the comparison it is made for; None if one of its arms was not asked for.
        published: by arm, figures to stand beside those measured, shares by measure.
        progress_every: epochs between two kNN accuracies during training, whose time is not counted; None for none.
        trials: what settings are chosen by; None if they are given.
    """

    experiment: str
    options: PlanOptions
    arms: tuple[Arm, ...]
    primary: Primary | None
    published: dict[str, Any] = field(default_factory=dict)
    progress_every: int | None = None
    trials: Trials | None = None

    @property
    def seeds(self) -> range:
        """Seeds of every arm."""
        return range(self.options.seeds)

    def described(self) -> dict[str, Any]:
        """The content of plan.json, without its date."""
        trials = self.trials
        return {
            "experiment": self.experiment,
            "primary": None if self.primary is None else dataclasses.asdict(self.primary),
            "arms": [arm.described() for arm in self.arms],
            "published": self.published,
            "options": self.options.to_dict(),
            "trials": None
            if trials is None
            else {
                "seed": trials.seed,
                "held_out": trials.held_out,
                "measure": trials.measure,
                "arms": [{**arm.described(), "settings": settings(arm.config)} for arm in trials.arms],
            },
        }


def label(spec: str) -> str:
    """A data set without the place where it lies: folder:NAME for folder:/some/where/NAME."""
    kind, colon, path = spec.partition(":")
    return f"{kind}:{Path(path).name}" if colon else spec


def settings(config: TrainConfig) -> dict[str, Any]:
    """What trials vary."""
    return {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "concentration_scale": config.loss.concentration_scale,
        "loss_scale": config.loss.loss_scale,
    }


def plan(name: str, options: PlanOptions) -> Plan:
    """The plan of the named experiment.

    Raises:
        InputError: no such experiment or arm, or a setting that is not accepted.
    """
    from vi_simsiam.experiments import tuning

    makers = {
        "table1": _table1,
        "tuned": tuning.tuned,
        "controls": _controls,
        "stability": _stability,
        "lightly-imagenette": _lightly_imagenette,
    }
    if name not in makers:
        raise InputError(f"experiment: {name!r} is none of {', '.join(makers)}")
    return makers[name](options)


def finished(
    experiment: str,
    options: PlanOptions,
    arms: list[Arm],
    primary: tuple[str, str, str],
    published: dict[str, Any] | None = None,
    **more: Any,
) -> Plan:
    """A plan of those arms that were asked for, with an arm for every data set.

    Args:
        experiment: its name.
        options: what was said of it; `options.data` must be known.
        arms: for the first data set.
        primary: arm, arm it is compared with, and measure; on the first data set.
        published: by data set and arm, accuracies by measure.
        more: other fields of the plan.

    Raises:
        InputError: an arm that there is not.
    """
    data = options.data or ()
    names = [arm.name for arm in arms]
    for wanted in options.arms or ():
        if wanted not in names:
            raise InputError(f"arms: {wanted!r} is none of {', '.join(names)}")
    asked = [arm for arm in arms if (not arm.optional if options.arms is None else arm.name in options.arms)]
    for arm in asked:
        if arm.after is not None and arm.after not in [other.name for other in asked]:
            raise InputError(f"arms: {arm.name!r} starts from the runs of {arm.after!r}; name that, too")

    def named(name: str, spec: str) -> str:
        return name if len(data) == 1 else f"{name}-{label(spec).replace(':', '-')}"

    every = tuple(
        dataclasses.replace(
            arm,
            name=named(arm.name, spec),
            config=dataclasses.replace(arm.config, data=spec),
            after=None if arm.after is None else named(arm.after, spec),
        )
        for spec in data
        for arm in asked
    )
    found = {arm.name for arm in every}
    if len(found) < len(every):
        raise InputError(f"data: {' '.join(data)} is not accepted; two of them have the same name")
    first, second = (named(each, data[0]) for each in primary[:2])
    both = {first, second} <= found
    figures = {
        named(arm, spec): measures
        for spec in data
        for arm, measures in (published or {}).get(spec, {}).items()
        if named(arm, spec) in found
    }
    named_primary = Primary(first, second, primary[2], label(data[0])) if both else None
    return Plan(experiment, options, every, named_primary, figures, **more)


def scaled(config: TrainConfig, options: PlanOptions) -> TrainConfig:
    """`config` with the epochs, sizes and numbers that were said, and without images that training and validation share.

    A warm-up is shortened with the epochs.
    """
    augment, model = config.augment, config.model
    if options.size is not None:
        # Multiples of 8, as all of SwAV's sizes are.
        local = max(8, round(augment.local_size * options.size / augment.size / 8) * 8)
        augment = dataclasses.replace(augment, size=options.size, local_size=local)
    if options.dim is not None:
        model = dataclasses.replace(model, dim=options.dim)
    epochs = options.epochs or config.epochs
    return dataclasses.replace(
        config,
        epochs=epochs,
        warmup_epochs=config.warmup_epochs * epochs / config.epochs,
        batch_size=config.batch_size if options.batch_size is None else options.batch_size,
        images=options.images,
        distinct=True,
        augment=augment,
        model=model,
    )


def with_data(options: PlanOptions, *data: str) -> PlanOptions:
    """The options with the experiment's own data sets, unless others were said."""
    return options if options.data is not None else dataclasses.replace(options, data=data)


def _table1(options: PlanOptions) -> Plan:
    """Nakamura et al., arXiv 2203.11437, Table 1: linear evaluation on ImageNette and ImageWoof."""
    options = with_data(options, "imagenette", "imagewoof")
    inferred = (
        "augment.size", "augment.local_size", "augment.crop_scale", "augment.local_scale", "augment.local_views",
        "model.dim", "initial concentration",
    )  # fmt: skip
    base = scaled(preset("paper"), options)
    arms = [
        Arm(
            method,
            dataclasses.replace(base, method=method),
            f"{title} with the paper's settings",
            inferred if method == "vi-simsiam" else inferred[:-1],
        )
        for method, title in METHODS
    ]
    published = {
        "imagenette": {
            "simsiam": {"linear": 0.88223, "linear_top5": 0.98236},
            "vi-simsiam": {"linear": 0.90650, "linear_top5": 0.99389},
        },
        "imagewoof": {
            "simsiam": {"linear": 0.72410, "linear_top5": 0.97480},
            "vi-simsiam": {"linear": 0.78468, "linear_top5": 0.98066},
        },
    }
    return finished("table1", options, arms, ("vi-simsiam", "simsiam", "linear"), published)


def _controls(options: PlanOptions) -> Plan:
    """What of VI-SimSiam does it: its loss, a concentration at all, or one for each image?"""
    options = with_data(options, "imagenette")
    ours = scaled(preset(options.preset), options)
    simsiam = dataclasses.replace(ours, method="simsiam")
    ema = options.ema
    if ema is None:
        ema = 0.99 if simsiam.epochs < _SHORT_EPOCHS else 0.996

    def changed(**fields: Any) -> TrainConfig:
        return dataclasses.replace(ours, loss=LossConfig(**fields))

    arms = [
        Arm("simsiam", simsiam, "von Mises-Fisher with a constant concentration, which is SimSiam"),
        Arm(
            "vmf-constant",
            dataclasses.replace(simsiam, loss=LossConfig(loss_scale=2.0)),
            "the same with twice the concentration: twice SimSiam's gradient",
        ),
        Arm(
            "ps-constant",
            changed(concentration="constant", concentration_value=5.0),
            "Power Spherical with kappa/(D-1) = 5 for every image, the best one at a cosine of 5/6",
        ),
        Arm("ps-global", changed(concentration="global"), "Power Spherical with one learned concentration"),
        Arm("vi-simsiam", ours, "Power Spherical with a concentration for each image"),
        Arm(
            "ps-shuffled",
            changed(concentration="shuffled"),
            "every image with the concentration of another in the batch",
        ),
        Arm(
            "ps-detached",
            changed(concentration="detached"),
            "a concentration for each image from which the network learns nothing",
        ),
        Arm("ps-posthoc", ours, "the concentration fitted on the finished SimSiam run of its seed", after="simsiam"),
        Arm("byol", dataclasses.replace(simsiam, ema=ema), f"SimSiam with a target network of momentum {ema}"),
        Arm(
            "vi-byol",
            dataclasses.replace(ours, ema=ema),
            f"VI-SimSiam with a target network of momentum {ema}",
            optional=True,
        ),
    ]
    return finished("controls", options, arms, ("vi-simsiam", "simsiam", PRIMARY_MEASURE))


def _stability(options: PlanOptions) -> Plan:
    """Which parametrisation of the concentration trains, at which dimension, and what helps the other one."""
    options = with_data(options, "imagenette")
    dims = (128, 512, 2048) if options.dim is None else (options.dim,)
    one = options.dim or 512
    base = scaled(preset(options.preset), options)
    # As the paper gives it; the gradient is D - 1 times that of the scaled loss.
    literal = dataclasses.replace(base, lr=1e-3, loss=LossConfig(concentration_scale=1.0, loss_scale=1.0))

    def at(config: TrainConfig, dim: int, **fields: Any) -> TrainConfig:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, dim=dim), **fields)

    arms = []
    for dim in dims:
        arms += [
            Arm(f"literal-d{dim}", at(literal, dim), f"kappa = softplus(raw), D = {dim}"),
            Arm(f"scaled-d{dim}", at(base, dim), f"kappa = (D-1) softplus(raw), loss/(D-1), D = {dim}"),
        ]
    bounds = dataclasses.replace(literal.loss, concentration_min=0.05 * (one - 1), concentration_max=20.0 * (one - 1))
    crops = dataclasses.replace(
        base.augment,
        crop_scale=(0.14, 1.0),
        local_views=6,
        local_size=max(8, round(base.augment.size * 3 / 7 / 8) * 8),
    )
    separate = dataclasses.replace(base.model, dim=one, local_predictor=True)
    arms += [
        Arm(f"literal-bounded-d{one}", at(literal, one, loss=bounds), "literal, kappa/(D-1) between 0.05 and 20"),
        Arm(f"literal-clipped-d{one}", at(literal, one, clip_norm=1.0), "literal, gradients of norm 1 at most"),
        Arm(f"multicrop-shared-d{one}", at(base, one, augment=crops), "scaled, multi-crop, one predictor"),
        Arm(
            f"multicrop-separate-d{one}",
            dataclasses.replace(base, augment=crops, model=separate),
            "scaled, multi-crop, a second predictor for the local views",
        ),
    ]
    largest = dims[-1]
    return finished("stability", options, arms, (f"scaled-d{largest}", f"literal-d{largest}", PRIMARY_MEASURE))


def _lightly_imagenette(options: PlanOptions) -> Plan:
    """SimSiam as in lightly's ImageNette benchmark (docs/source/getting_started/benchmarks/imagenette_benchmark.py).

    Batch 256, SGD with learning rate 0.06, momentum 0.9 and weight decay 5e-4, a cosine schedule, ResNet-18, a projector
    512-2048-2048-2048 and a predictor 2048-512-2048, two views of 128 pixels, kNN with k = 200 and T = 0.1. Its loss is
    half of ours, so its learning rate L and weight decay w are L/2 and 2w here. What differs from it: residual branches
    start at zero here, the schedule falls after every step instead of every epoch, its images are the copies of 160
    pixels, and its accuracy is the best of all epochs where ours is the last one's.
    """
    options = with_data(options, "imagenette")
    base = TrainConfig(
        method="simsiam",
        data="imagenette",
        epochs=200,
        batch_size=256,
        lr=0.06 / 2,
        momentum=0.9,
        weight_decay=2 * 5e-4,
        augment=policy("lightly-imagenette"),
        model=ModelConfig(dim=2048, projector_hidden=2048, predictor_hidden=512),
    )
    simsiam = scaled(base, options)
    arms = [
        Arm("simsiam", simsiam, "SimSiam with the settings of lightly's ImageNette benchmark"),
        Arm("vi-simsiam", dataclasses.replace(simsiam, method="vi-simsiam"), "VI-SimSiam with the same settings"),
    ]
    accuracy = {200: 0.752, 800: 0.872}.get(simsiam.epochs)
    published = {"imagenette": {"simsiam": {"knn200": accuracy}}} if accuracy is not None else {}
    every = max(1, simsiam.epochs // 20)
    return finished(
        "lightly-imagenette", options, arms, ("vi-simsiam", "simsiam", "knn200"), published, progress_every=every
    )
