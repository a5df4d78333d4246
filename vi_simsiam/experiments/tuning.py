"""The experiment "tuned": every method with the best settings that the same number of trials finds.

Trials are trained on four fifths of the training images and measured on the last one, with a seed of their own. The best
trial's settings are then frozen, and run with new seeds on the whole training set.

Grids (learning rates at a batch of 64, in proportion to the batch):

    simsiam             12 learning rates of 0.006 to 0.1 x 3 weight decays
    vi-simsiam default   6 learning rates of 0.006 to 0.1 x 3 weight decays
    vi-simsiam literal   6 learning rates of 1e-4 to 3e-3 x 3 weight decays

so that both methods have 36 points, of which each gets the same number of trials, drawn without repetition by a fixed
seed: VI-SimSiam's in turn from two forms of its loss, the default one and the paper's, whose gradients are D - 1 times as
large.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from vi_simsiam.config import LITERAL, LossConfig, Method, preset
from vi_simsiam.errors import InputError
from vi_simsiam.experiments.plan import (
    METHODS,
    PRIMARY_MEASURE,
    Arm,
    Plan,
    PlanOptions,
    Trials,
    finished,
    scaled,
    with_data,
)
from vi_simsiam.text import counted

_SEED = 1000
_HELD_OUT = 0.2
_BATCH = 64
_WEIGHT_DECAYS = (1e-4, 3e-4, 1e-3)


def tuned(options: PlanOptions) -> Plan:
    """The plan: trials of every method on every data set, and an arm for each whose settings they choose.

    Raises:
        InputError: more trials than a method's grid has points, or an option that the plan does not take.
    """
    options = with_data(options, "imagenette")
    base = scaled(preset(options.preset), options)
    arms = [
        Arm(
            method,
            dataclasses.replace(base, method=method),
            f"{title} with the settings that its trials chose",
        )
        for method, title in METHODS
    ]
    unchosen = finished("tuned", options, arms, ("vi-simsiam", "simsiam", PRIMARY_MEASURE))
    found = {method: _drawn(method, base.batch_size, options.trials) for method, _ in METHODS}
    trials: dict[str, list[Arm]] = {
        arm.name: [
            Arm(
                f"trial-{arm.name}-{number:02d}",
                dataclasses.replace(arm.config, held_out=_HELD_OUT, split_seed=_SEED, **settings),
                f"trial of {arm.name}",
            )
            for number, settings in enumerate(found[arm.config.method], start=1)
        ]
        for arm in unchosen.arms
    }

    def choose(accuracies: dict[str, float]) -> tuple[dict[str, str], tuple[Arm, ...]]:
        best = {
            name: max(own, key=lambda trial: accuracies[trial.name]) for name, own in trials.items()
        }
        chosen = tuple(
            dataclasses.replace(
                arm, config=dataclasses.replace(best[arm.name].config, held_out=0.0, split_seed=0)
            )
            for arm in unchosen.arms
        )
        return {name: trial.name for name, trial in best.items()}, chosen

    every = tuple(itertools.chain.from_iterable(trials.values()))
    return dataclasses.replace(
        unchosen, trials=Trials(every, _SEED, _HELD_OUT, PRIMARY_MEASURE, choose)
    )


def grid(method: Method, batch_size: int) -> list[list[dict[str, Any]]]:
    """The settings a method may get, fields of `TrainConfig`: one list for every form of the loss."""

    def points(low: float, high: float, count: int, loss: LossConfig) -> list[dict[str, Any]]:
        rates = np.geomspace(low, high, count) * batch_size / _BATCH
        return [
            {"lr": float(f"{rate:.4g}"), "weight_decay": decay, "loss": loss}
            for rate in rates
            for decay in _WEIGHT_DECAYS
        ]

    if method == "simsiam":
        return [points(6e-3, 0.1, 12, LossConfig())]
    return [points(6e-3, 0.1, 6, LossConfig()), points(1e-4, 3e-3, 6, LITERAL)]


def _drawn(method: Method, batch_size: int, trials: int) -> list[dict[str, Any]]:
    """So many points of a method's grid, in turn from its forms of the loss."""
    parts = grid(method, batch_size)
    if trials > sum(map(len, parts)):
        raise InputError(
            f"trials: {trials} is not accepted; the grid of {method} has {counted(sum(map(len, parts)), 'point')}"
        )
    generator = np.random.default_rng(_SEED)
    orders = [[part[i] for i in generator.permutation(len(part))] for part in parts]
    in_turn = [
        point for each in itertools.zip_longest(*orders) for point in each if point is not None
    ]
    return in_turn[:trials]
