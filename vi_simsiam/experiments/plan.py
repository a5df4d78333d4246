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

from vi_simsiam.config import Method, TrainConfig
from vi_simsiam.errors import InputError, none_of
from vi_simsiam.text import counted

MEASURES = ("knn20", "knn200", "logistic", "linear", "linear_top5")
"""Accuracies that every run is measured by, in the order of every table."""
PRIMARY_MEASURE = "logistic"
"""Of the experiments that reproduce no published figure: a linear classifier that is a function of the features alone, with
no learning rate or number of steps that could suit one arm, or a large training set, better than another."""
METHODS: tuple[tuple[Method, str], ...] = (("simsiam", "SimSiam"), ("vi-simsiam", "VI-SimSiam"))


@dataclass(frozen=True)
class PlanOptions:
    """What may be said of an experiment; None for the experiment's own setting."""

    seeds: int = 3
    """Runs of every arm, with the seeds 0, 1, ..."""
    data: tuple[str, ...] | None = None
    """Data sets: imagenette, imagewoof, cifar10, fashion-mini, folder:PATH or pack:FILE; None for the experiment's own."""
    preset: str = "default"
    """Settings of `vi-simsiam train` that an experiment other than table1 and lightly-imagenette starts from: default, or demo (28 pixels)."""
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
            raise InputError(
                f"data: {' '.join(self.data) or 'nothing'} is not accepted; each data set is said once"
            )
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
    seeds: int | None = None
    """Number of its runs; None for `PlanOptions.seeds`."""

    def described(self) -> dict[str, Any]:
        """The arm as it stands in plan.json."""
        return {
            "name": self.name,
            "method": self.config.method,
            "note": self.note,
            "inferred": list(self.inferred),
            "data": label(self.config.data),
            "seeds": self.seeds,
            "settings": settings(self.config),
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
        measures: accuracies of every run; none if only the training is looked at, whose weights are then not kept.
    """

    experiment: str
    options: PlanOptions
    arms: tuple[Arm, ...]
    primary: Primary | None
    published: dict[str, Any] = field(default_factory=dict)
    progress_every: int | None = None
    trials: Trials | None = None
    measures: tuple[str, ...] = MEASURES

    def __repr__(self) -> str:
        trials = "" if self.trials is None else f", {counted(len(self.trials.arms), 'trial')}"
        names = ", ".join(arm.name for arm in self.arms)
        return (
            f"Plan({self.experiment}: {names}; {counted(self.options.seeds, 'seed')} each{trials})"
        )

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
                "arms": [
                    {**arm.described(), "settings": settings(arm.config)} for arm in trials.arms
                ],
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
        "concentration_link": config.loss.concentration_link,
        "concentration_gain": config.loss.concentration_gain,
        "concentration_scale": config.loss.concentration_scale,
        "cosine_weight": config.loss.cosine_weight,
        "loss_scale": config.loss.loss_scale,
    }


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
            raise none_of("arms", wanted, names)
    asked = [
        arm
        for arm in arms
        if (not arm.optional if options.arms is None else arm.name in options.arms)
    ]
    for arm in asked:
        if arm.after is not None and arm.after not in [other.name for other in asked]:
            raise InputError(
                f"arms: {arm.name!r} starts from the runs of {arm.after!r}; name that, too"
            )

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
