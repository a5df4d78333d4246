"""The parts of an experiment: its arms, their number of runs, and its primary comparison.

A plan is a pure function of the experiment's name and options, so the same command finds the same
runs again. The primary comparison is part of the plan and is written down before any run starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vi_simsiam.checks import choice, require
from vi_simsiam.config import TrainConfig
from vi_simsiam.data_names import FOREIGN_KINDS, data_label, data_spec, foreign_spec
from vi_simsiam.errors import InputError
from vi_simsiam.paths import user_path

MEASURES = ("knn20", "knn200", "logistic", "linear", "linear_top5")
"""Accuracies measured for every run, in the order of every table."""
PRIMARY_MEASURE = "logistic"
"""Measure of experiments that reproduce no published figure: this classifier is a function of the
features alone, with no learning rate or number of steps that could favour one arm."""
TRIAL_SEED = 1000
"""Seed of every trial; none of the arms' seeds."""
HELD_OUT = 0.2
"""Share of the training images used to measure the trials, not to train them."""

TUNED = ("lr", "weight_decay")
"""Settings that the trials vary."""


@dataclass(frozen=True)
class PlanOptions:
    """Options of an experiment; None for the experiment's own setting."""

    seeds: int = 3
    """Runs of every arm, with the seeds 0, 1, ..."""
    data: tuple[str, ...] | None = None
    """Data sets: imagenette, imagewoof, cifar10, fashion-mini, folder:PATH or pack:FILE."""
    preset: str = "default"
    """Settings to start from: default or demo (28 pixels); not for table1, lightly-imagenette."""
    epochs: int | None = None
    """Length of a training."""
    size: int | None = None
    """Side of the global views, in pixels; local views keep their share of it."""
    images: int | None = None
    """Number of training images, drawn class by class; None for all."""
    val_images: int | None = None
    """Number of validation images, drawn class by class; None for all."""
    batch_size: int | None = None
    """Images in a batch; the learning rate is left as it is."""
    dim: int | None = None
    """D: dimension of the representation space."""
    arms: tuple[str, ...] | None = None
    """Only these arms; None for all that are not optional."""
    trials: int = 20
    """Points of the grid of settings that every method tries (experiment tuned); 20 for all."""
    ema: float | None = None
    """Momentum of the target network (byol, vi-byol); None for 0.996, or 0.99 below 100 epochs."""
    backbone: str | None = None
    """Backbone, as for `train`."""
    init: Path | None = None
    """Weights that the backbone begins with, as for `train`."""
    pretrained: bool = False
    """Begin with the ImageNet weights of torchvision or timm."""
    ood: tuple[str, ...] = ()
    """Images to measure uncertainty on: near=DATA or far=DATA, by their distance from the own."""

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "images", "val_images", "trials"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 1, "at least 1")
        for name in ("data", "arms"):
            require(name, "nothing", getattr(self, name) != (), "at least one")
        for spec in self.ood:
            require("ood", spec, foreign_spec(spec)[0] in FOREIGN_KINDS, "near=DATA or far=DATA")


@dataclass(frozen=True)
class Place:
    """The place where runs happen; it may change when an experiment is continued."""

    data_root: Path = Path("data")
    """Where downloaded data sets are kept or looked for."""
    offline: bool = False
    """Never download."""
    cache_dir: Path | None = None
    """Where decoded images are kept; None for the user's cache folder."""
    devices: tuple[str, ...] = ()
    """cuda:0, cuda:1, ... or cpu; none for every GPU, or the CPU without any."""
    parallel: int | None = None
    """Runs at once on each device; None for one on a GPU, and one for every core on a CPU."""
    threads: int | None = None
    """Threads of a run's operations; None for the cores shared among the runs, and one on a CPU."""
    workers: int | None = None
    """Processes that prepare views on a CPU and read images to measure; None to suit the device."""


@dataclass(frozen=True)
class Arm:
    """A configuration to compare, run once for every seed."""

    name: str
    config: TrainConfig
    """Configuration of the first seed; other runs differ in the seed only."""
    note: str
    """Description in one phrase."""
    inferred: tuple[str, ...] = ()
    """Settings that the source does not state."""
    fitted: bool = False
    """Nothing is trained: a distribution is fitted to a finished encoder (`fit_concentration`), the
    run of `after` or the backbone with the weights that its configuration names."""
    after: str | None = None
    """Name of the arm to whose run of the same seed a distribution is fitted."""
    optional: bool = False
    """Left out unless requested by name."""
    seeds: int | None = None
    """Number of runs; None for `PlanOptions.seeds`."""
    trial_of: str | None = None
    """Name of the arm whose settings this trial may become."""

    def described(self) -> dict[str, Any]:
        """The arm's entry in plan.json."""
        return {
            "name": self.name,
            "method": self.config.method,
            "note": self.note,
            "inferred": list(self.inferred),
            "data": data_label(self.config.data),
            "seeds": self.seeds,
            "settings": settings(self.config),
        }


@dataclass(frozen=True)
class Plan:
    """All runs of an experiment."""

    experiment: str
    options: PlanOptions
    """Options that the plan follows from."""
    arms: tuple[Arm, ...]
    """All arms; with `trials`, their settings are those that the trials choose."""
    primary: dict[str, str] | None
    """The comparison that the experiment is made for: "arm", "against", "measure" and "data".

    All others are exploratory. None if one of its arms was not requested.
    """
    published: dict[str, Any] = field(default_factory=dict)
    """Published accuracies by arm and measure, as shares."""
    progress_every: int | None = None
    """Epochs between two kNN accuracies during training; None for none."""
    trials: tuple[Arm, ...] = ()
    """Settings tried on held-out images before the arms' settings are known."""
    measures: tuple[str, ...] = MEASURES
    """Accuracies of every run; if empty, only the training counts and no weights are kept."""
    scores: tuple[tuple[str, str], ...] = ()
    """Scores of uncertainty to compare by purpose, each with the arm that has it."""

    def tuned(self, accuracy: dict[str, float]) -> dict[str, Arm]:
        """The arms with the settings of their best trial, by its name; `accuracy` is by trial."""
        found = {}
        for arm in self.arms:
            own = [trial for trial in self.trials if trial.trial_of == arm.name]
            best = max(own, key=lambda trial: accuracy[trial.name])
            found[best.name] = replace(arm, config=replace(best.config, held_out=0.0, split_seed=0))
        return found

    def described(self) -> dict[str, Any]:
        """The content of plan.json, without its date."""
        options = {item.name: getattr(self.options, item.name) for item in fields(PlanOptions)}
        options["data"] = [data_label(spec) for spec in self.options.data or ()]
        options["init"] = self.options.init and _weights(self.options.init)
        foreign = map(foreign_spec, self.options.ood)
        options["ood"] = [f"{kind}={data_label(data_spec(data))}" for kind, data in foreign]
        trials = {
            "seed": TRIAL_SEED,
            "held_out": HELD_OUT,
            "measure": PRIMARY_MEASURE,
            "arms": [trial.described() for trial in self.trials],
        }
        return {
            "experiment": self.experiment,
            "primary": self.primary,
            "arms": [arm.described() for arm in self.arms],
            "published": self.published,
            "options": options,
            "trials": trials if self.trials else None,
            "scores": [list(score) for score in self.scores] or None,
        }


def _weights(init: Path) -> str:
    """The name of a run or a file of weights, and a digest of what it holds."""
    from vi_simsiam.engine.checkpoint import checkpoints

    place = user_path("init", init)
    files = [path for path in (place, *checkpoints(place)) if path.is_file()]
    if not files:
        return init.name
    with files[0].open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))
    return f"{init.name} ({found.hexdigest()})"


def settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of a trial: those that trials vary, and the loss."""
    shape = ("concentration_link", "concentration_gain", "concentration_scale")
    loss = {name: getattr(config.loss, name) for name in (*shape, "cosine_weight", "loss_scale")}
    return {**{name: getattr(config, name) for name in TUNED}, **loss}


def make_plan(
    experiment: str,
    options: PlanOptions,
    arms: Sequence[Arm],
    primary: tuple[str, str, str] | None,
    *,
    data: tuple[str, ...] = ("imagenette",),
    published: dict[str, Any] | None = None,
    **more: Any,
) -> Plan:
    """Make a plan of the requested arms on every data set of `options`, else of `data`.

    Args:
        experiment: name.
        options: options of the command.
        arms: all arms, on any data set.
        primary: arm, arm it is compared with, and measure; on the first data set.
        data: data sets where `options` names none.
        published: accuracies by data set, arm and measure.
        more: other fields of the plan.

    Raises:
        InputError: an unknown arm, an arm without the one that it starts from, or two data sets
            with the same name.
    """
    data = tuple(map(data_spec, options.data or data))
    options = replace(options, data=data)
    names = tuple(arm.name for arm in arms)
    for wanted in options.arms or ():
        choice("arms", wanted, names)
    requested = options.arms or [arm.name for arm in arms if not arm.optional]
    chosen = [arm for arm in arms if arm.name in requested]
    for arm in chosen:
        if arm.after is not None and arm.after not in requested:
            raise InputError(
                f"arms: {arm.name!r} starts from the runs of {arm.after!r}; name that, too"
            )

    def on(spec: str, name: str) -> str:
        return name if len(data) == 1 else f"{name}-{data_label(spec).replace(':', '-')}"

    every = {
        on(spec, arm.name): replace(
            arm,
            name=on(spec, arm.name),
            config=replace(arm.config, data=spec),
            after=arm.after and on(spec, arm.after),
        )
        for spec in data
        for arm in chosen
    }
    if len(every) < len(data) * len(chosen):
        raise InputError(f"data: {' '.join(data)} is not accepted; two of them have the same name")
    compared = None
    if primary is not None:
        first, second, measure = primary
        pair = {"arm": on(data[0], first), "against": on(data[0], second)}
        if every.keys() >= set(pair.values()):
            compared = {**pair, "measure": measure, "data": data_label(data[0])}
    figures = {
        on(spec, arm): measures
        for spec in data
        for arm, measures in (published or {}).get(spec, {}).items()
        if arm in requested
    }
    return Plan(experiment, options, tuple(every.values()), compared, figures, **more)


def scaled(config: TrainConfig, options: PlanOptions) -> TrainConfig:
    """Apply the epochs, sizes and numbers of `options`, and drop images that occur twice.

    A warm-up shrinks with the epochs.
    """
    augment, model = config.augment, config.model
    if options.size is not None:
        # Multiples of 8, as all of SwAV's sizes are.
        local = max(8, round(augment.local_size * options.size / augment.size / 8) * 8)
        augment = replace(augment, size=options.size, local_size=local)
    if options.dim is not None:
        model = replace(model, dim=options.dim)
    backbone = options.backbone or model.backbone
    own_stem = options.pretrained or ":" in backbone
    stem = "imagenet" if own_stem else model.stem
    model = replace(model, backbone=backbone, stem=stem, pretrained=options.pretrained)
    epochs = options.epochs or config.epochs
    return replace(
        config,
        epochs=epochs,
        warmup_epochs=config.warmup_epochs * epochs / config.epochs,
        batch_size=config.batch_size if options.batch_size is None else options.batch_size,
        images=options.images,
        distinct=True,
        init=options.init,
        augment=augment,
        model=model,
    )
