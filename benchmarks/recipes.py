"""Recipes of `vi-simsiam bench record`: what is trained, until which accuracy, and every change.

A row of a record is its base with all changes up to that one, so each row differs from the row
above by one change, which its title names with the settings that go with it. No change may touch
the task or what is given before it begins.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from vi_simsiam.config import PRESETS, TrainConfig, flat
from vi_simsiam.errors import InputError, none_of
from vi_simsiam.experiments.catalogue import plan
from vi_simsiam.experiments.plan import PlanOptions

_PLACES = {"seed", "device", "data", "data_root", "offline", "cache_dir"}
"""Settings of a run that are no part of its recipe."""
_FIXED = {
    *_PLACES, "images", "held_out", "split_seed", "distinct", "init", "model.pretrained",
}  # fmt: skip
"""Settings that no change may touch."""


@dataclass(frozen=True)
class Change:
    """A change of a recipe: the title of its row, and new values by field, with dots in parts."""

    title: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A task, and recipes for it.

    Raises:
        InputError: two rows with one title, or a change of a field that does not exist, that may
            not change or that does not accept the value.
    """

    name: str
    base: TrainConfig
    """The first recipe, with the data set and the number of training images."""
    threshold: float
    """The kNN accuracy to be reached, as a share (k = 200, T = 0.1, all images of the record)."""
    every: int
    """Epochs between two measurements; the last epoch always has one."""
    changes: tuple[Change, ...]
    val_images: int | None = None
    """Number of validation images, drawn class by class; None for all."""
    published: str | None = None
    """A figure of others, with its hardware."""

    def __post_init__(self) -> None:
        for row, change in enumerate(self.rows):
            if any(change.title == other.title for other in self.rows[:row]):
                raise InputError(f"changes: two rows of {self.name} are called {change.title!r}")
            self.config(row)

    @property
    def rows(self) -> tuple[Change, ...]:
        """The base, which changes nothing, and the changes."""
        return Change("base"), *self.changes

    def settings(self, row: int) -> dict[str, Any]:
        """All changed settings of a row, by field."""
        return {name: x for change in self.rows[: row + 1] for name, x in change.settings.items()}

    def config(self, row: int) -> TrainConfig:
        """The configuration of a row."""
        plain = self.base.to_dict()
        fields = flat(plain)
        for name, value in self.settings(row).items():
            if name not in fields:
                raise none_of("changes", name, fields)
            if name in _FIXED:
                raise InputError(f"changes: {name!r} is fixed for all rows of {self.name}")
            part, dot, inner = name.partition(".")
            if dot:
                plain[part][inner] = value
            else:
                plain[name] = value
        return TrainConfig.from_dict(plain)

    def recipe(self, row: int) -> dict[str, Any]:
        """All that decides the runs of a row except seed, device and data, as from JSON."""
        settings = flat(self.config(row).to_dict()).items()
        kept = {name: value for name, value in settings if name not in _PLACES}
        measured = {"measure_every": self.every, "val_images": self.val_images}
        found: dict[str, Any] = json.loads(json.dumps(kept | measured))
        return found


_VI = Change("VI-SimSiam", {"method": "vi-simsiam"})
_400 = Change("400 epochs at twice the rate", {"epochs": 400, "lr": 0.06, "warmup_epochs": 10.0})
_LOCAL = Change("2 local views", {"augment.local_views": 2, "augment.local_size": 64})
(_SIMSIAM,) = plan("lightly-imagenette", PlanOptions(arms=("simsiam",))).arms
_LIGHTLY = _SIMSIAM.config
_DEMO = PRESETS["demo"]
_CROPS = Change("crops of half or more", {"augment.crop_scale": (0.5, 1.0)})
_SMALL = replace(
    _DEMO,
    epochs=4,
    warmup_epochs=0.5,
    augment=replace(_DEMO.augment, crop_scale=(0.3, 1.0)),
    model=replace(_DEMO.model, stem="imagenet"),
)

RECORDS = {
    record.name: record
    for record in (
        Record(
            "imagenette-75",
            base=_LIGHTLY,
            threshold=0.752,
            every=5,
            changes=(
                _VI,
                Change(
                    "100 epochs at twice the rate",
                    {"epochs": 100, "lr": 0.06, "warmup_epochs": 5.0},
                ),
                _LOCAL,
            ),
            published="lightly's ImageNette benchmark, SimSiam, 200 epochs: 75.2 % in 58 minutes "
            "on an NVIDIA RTX A6000",
        ),
        Record(
            "imagenette-87",
            base=replace(_LIGHTLY, epochs=800),
            threshold=0.872,
            every=20,
            changes=(_VI, _400, _LOCAL),
            published="lightly's ImageNette benchmark, SimSiam, 800 epochs: 87.2 % in 206 minutes "
            "on an NVIDIA RTX A6000",
        ),
        Record(
            # lightly's CIFAR-10 benchmark has a projector of two layers, here it has three.
            "cifar10-90",
            base=replace(
                _LIGHTLY,
                data="cifar10",
                epochs=800,
                batch_size=512,
                augment=replace(_LIGHTLY.augment, size=32, blur_prob=0.0),
                model=replace(_LIGHTLY.model, stem="small"),
            ),
            threshold=0.904,
            every=20,
            changes=(_VI, _400),
            published="lightly's CIFAR-10 benchmark, SimSiam, 800 epochs: 90.4 % in 334 minutes "
            "on an NVIDIA RTX A6000",
        ),
        Record(
            "fashion-mini",
            base=_SMALL,
            threshold=0.65,
            every=1,
            changes=(
                _CROPS,
                Change("half the learning rate", {"lr": 0.03}),
                Change(
                    "preset demo: medium stem at the first rate for 3 epochs",
                    {"model.stem": "medium", "lr": 0.06, "epochs": 3, "warmup_epochs": 0.375},
                ),
            ),
        ),
        Record(
            "cifar10-small",
            base=replace(
                _SMALL,
                data="cifar10",
                images=10_000,
                augment=replace(_SMALL.augment, size=32, crop_scale=(0.2, 1.0)),
            ),
            threshold=0.29,
            every=1,
            changes=(_CROPS,),
            val_images=2_000,
        ),
    )
}
"""The records by name."""
