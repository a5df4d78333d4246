"""The experiments by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from vi_simsiam.checks import choice, require
from vi_simsiam.config import (
    LITERAL,
    SOFTPLUS,
    LossConfig,
    ModelConfig,
    TrainConfig,
    policy,
    preset,
)
from vi_simsiam.experiments.plan import (
    HELD_OUT,
    PRIMARY_MEASURE,
    TRIAL_SEED,
    Arm,
    Plan,
    PlanOptions,
    make_plan,
    scaled,
)
from vi_simsiam.experiments.purposes import SCORES
from vi_simsiam.text import METHODS

_METHODS_PRIMARY = ("vi-simsiam", "simsiam", PRIMARY_MEASURE)
_SHORT_EPOCHS = 100
"""In fewer epochs, a target network with momentum 0.996 stays close to the untrained network."""
_RATES, _GRID_BATCH = (0.025, 0.0625, 0.15625, 0.390625, 0.9765625), 64
"""Learning rates of the grid, for a batch of that size."""
_WEIGHT_DECAYS = (1e-4, 5e-4, 2.5e-3, 1.25e-2)
_FITTED = "a distribution fitted to the finished SimSiam run of its seed"
_DEATH_DIMS, _DEATH_RATES = (128, 256, 512, 2048), (0.0125, 0.03, 0.06, 0.1)
_REFERENCE_SEEDS = 4
"""Runs of SimSiam in the experiment "deaths", the reference for the others."""


def plan(name: str, options: PlanOptions) -> Plan:
    """The plan of the named experiment.

    Raises:
        InputError: an unknown experiment or arm, or a setting that is not accepted.
    """
    makers = {
        "table1": _table1,
        "tuned": _tuned,
        "controls": _controls,
        "kappa": _kappa,
        "further": _further,
        "stability": _stability,
        "lightly-imagenette": _lightly_imagenette,
        "deaths": _deaths,
    }
    choice("experiment", name, tuple(makers))
    return makers[name](options)


def _table1(options: PlanOptions) -> Plan:
    """Nakamura et al., arXiv 2203.11437, Table 1: linear evaluation on ImageNette and ImageWoof."""
    inferred = (
        "augment.size", "augment.local_size", "augment.crop_scale", "augment.local_scale",
        "augment.local_views", "model.dim",
    )  # fmt: skip
    simsiam, ours = _both(scaled(preset("paper"), options), "the paper's settings")
    arms = (
        replace(simsiam, inferred=inferred),
        replace(ours, inferred=(*inferred, "initial concentration")),
    )
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
    primary = ("vi-simsiam", "simsiam", "linear")
    data = ("imagenette", "imagewoof")
    return make_plan("table1", options, arms, primary, data=data, published=published)


def _both(base: TrainConfig, described: str) -> list[Arm]:
    """An arm of each method with the settings of `base`."""
    return [
        Arm(method, replace(base, method=method), f"{title} with {described}")
        for method, title in METHODS.items()
    ]


def _tuned(options: PlanOptions) -> Plan:
    """Every method with the best settings that trials at the same points found.

    Trials have a seed of their own and are measured on a held-out part of the training images. The
    best settings are then run with new seeds on the whole training set.
    """
    base = replace(scaled(preset(options.preset), options), loss=LossConfig())
    arms = _both(base, "the settings that its trials chose")
    made = make_plan("tuned", options, arms, _METHODS_PRIMARY)
    points = _drawn(base.batch_size, options.trials)
    trials = tuple(
        Arm(
            f"trial-{arm.name}-{number:02d}",
            replace(
                arm.config, held_out=HELD_OUT, split_seed=TRIAL_SEED, lr=lr, weight_decay=decay
            ),
            f"trial of {arm.name}",
            trial_of=arm.name,
        )
        for arm in made.arms
        for number, (lr, decay) in enumerate(points, start=1)
    )
    return replace(made, trials=trials)


def _drawn(batch_size: int, trials: int) -> list[tuple[float, float]]:
    """Learning rates and weight decays for "tuned": a grid, in its order; fewer than all are drawn.

    Learning rates are in proportion to the batch.
    """
    grid = [
        (float(f"{rate * batch_size / _GRID_BATCH:.7g}"), decay)
        for rate in _RATES
        for decay in _WEIGHT_DECAYS
    ]
    require("trials", trials, trials <= len(grid), f"at most {len(grid)}, the points of the grid")
    chosen = np.random.default_rng(TRIAL_SEED).permutation(len(grid))[:trials]
    return [grid[number] for number in sorted(chosen)]


def _controls(options: PlanOptions) -> Plan:
    """Parts of VI-SimSiam one by one: its loss, a concentration at all, one for each image."""
    ours = scaled(preset(options.preset), options)
    simsiam = replace(ours, method="simsiam")
    usual = 0.99 if simsiam.epochs < _SHORT_EPOCHS else 0.996
    ema = usual if options.ema is None else options.ema

    def changed(**fields: Any) -> TrainConfig:
        return replace(ours, loss=LossConfig(**fields))

    twice = replace(simsiam, loss=LossConfig(loss_scale=2.0))
    softplus = replace(ours, loss=SOFTPLUS)
    configs = {
        "simsiam": (simsiam, "von Mises-Fisher with a constant concentration, which is SimSiam"),
        "vmf-constant": (
            twice,
            "the same with twice the concentration: twice SimSiam's gradient",
        ),
        "ps-constant": (
            changed(concentration="constant", concentration_value=5.0),
            "Power Spherical with kappa/(D-1) = 5 for every image, the best one at a cosine of 5/6",
        ),
        "ps-global": (
            changed(concentration="global"),
            "Power Spherical with one learned concentration",
        ),
        "vi-simsiam": (ours, "Power Spherical with a concentration for each image"),
        "vi-softplus": (softplus, "the likelihood alone, with kappa = (D-1) softplus(raw)"),
        "ps-shuffled": (
            changed(concentration="shuffled"),
            "every image with the concentration of another in the batch",
        ),
        "ps-detached": (
            changed(concentration="detached"),
            "a concentration for each image from which the network learns nothing",
        ),
        "fitted": (ours, _FITTED),
        "byol": (replace(simsiam, ema=ema), f"SimSiam with a target network of momentum {ema}"),
        "vi-byol": (replace(ours, ema=ema), f"VI-SimSiam with a target network of momentum {ema}"),
    }
    arms = {name: Arm(name, *content) for name, content in configs.items()}
    arms["fitted"] = replace(arms["fitted"], fitted=True, after="simsiam")
    for name in ("vi-softplus", "vi-byol"):
        arms[name] = replace(arms[name], optional=True)
    return make_plan("controls", options, list(arms.values()), _METHODS_PRIMARY)


def _kappa(options: PlanOptions) -> Plan:
    """Scores of uncertainty by purpose: kappa trained along, kappa fitted, and simpler ones."""
    simsiam, ours = _both(scaled(preset(options.preset), options), "the same settings")
    fitted = Arm("fitted", ours.config, _FITTED, fitted=True, after="simsiam")
    return make_plan("kappa", options, [simsiam, ours, fitted], _METHODS_PRIMARY, scores=SCORES)


def _further(options: PlanOptions) -> Plan:
    """Given weights, and further training from them with two learning rates."""
    given = options.init is not None or options.pretrained
    require("init", options.init, given, "a run or file of weights, or give --pretrained")
    base = scaled(preset(options.preset), options)
    simsiam, ours = _both(base, "the preset's learning rate")
    begun = "the given weights, with a distribution fitted to them"
    later = "a distribution fitted to the run of simsiam of its seed"
    arms = [
        Arm("starting", ours.config, begun, fitted=True),
        simsiam,
        *(_gentle(arm) for arm in (simsiam, ours)),
        ours,
        Arm("fitted", ours.config, later, fitted=True, after="simsiam"),
    ]
    return make_plan("further", options, arms, ("simsiam", "starting", PRIMARY_MEASURE))


def _gentle(arm: Arm) -> Arm:
    """The arm with a tenth of its learning rate."""
    config = replace(arm.config, lr=arm.config.lr / 10)
    return replace(arm, name=f"{arm.name}-gentle", config=config, note=f"{arm.name}, a tenth of it")


def _stability(options: PlanOptions) -> Plan:
    """Parametrisations of the concentration over dimensions, and remedies for the literal one."""
    dims = (128, 512, 2048) if options.dim is None else (options.dim,)
    one = options.dim or 512
    base = replace(scaled(preset(options.preset), options), loss=SOFTPLUS)
    # As the paper gives it; the gradient is D - 1 times that of the scaled loss.
    literal = replace(base, lr=1e-3, loss=LITERAL)

    def at(config: TrainConfig, dim: int, **fields: Any) -> TrainConfig:
        return replace(config, model=replace(config.model, dim=dim), **fields)

    arms = []
    for dim in dims:
        note = f"kappa = (D-1) softplus(raw), loss/(D-1), D = {dim}"
        arms += [
            Arm(f"literal-d{dim}", at(literal, dim), f"kappa = softplus(raw), D = {dim}"),
            Arm(f"scaled-d{dim}", at(base, dim), note),
        ]
    bounds: dict[str, Any] = {
        "concentration_min": 0.05 * (one - 1),
        "concentration_max": 20.0 * (one - 1),
    }
    bounded = at(literal, one, loss=replace(literal.loss, **bounds))
    clipped = at(literal, one, clip_norm=1.0)
    local_size = max(8, round(base.augment.size * 3 / 7 / 8) * 8)
    crops = replace(base.augment, crop_scale=(0.14, 1.0), local_views=6, local_size=local_size)
    shared = at(base, one, augment=crops)
    separate = replace(shared, model=replace(shared.model, local_predictor=True))
    arms += [
        Arm(f"literal-bounded-d{one}", bounded, "literal, kappa/(D-1) between 0.05 and 20"),
        Arm(f"literal-clipped-d{one}", clipped, "literal, gradients of norm 1 at most"),
        Arm(f"multicrop-shared-d{one}", shared, "scaled, multi-crop, one predictor"),
        Arm(
            f"multicrop-separate-d{one}",
            separate,
            "scaled, multi-crop, a second predictor for the local views",
        ),
    ]
    primary = (f"scaled-d{dims[-1]}", f"literal-d{dims[-1]}", PRIMARY_MEASURE)
    return make_plan("stability", options, arms, primary)


def _lightly_imagenette(options: PlanOptions) -> Plan:
    """SimSiam as in lightly's ImageNette benchmark.

    Source: docs/source/getting_started/benchmarks/imagenette_benchmark.py. Its loss is half of
    ours, so its learning rate L and weight decay w are L/2 and 2w here. docs/experiments.md has the
    differences that remain.
    """
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
    base = scaled(base, options)
    arms = [
        Arm("simsiam", base, "SimSiam with the settings of lightly's ImageNette benchmark"),
        Arm("vi-simsiam", replace(base, method="vi-simsiam"), "VI-SimSiam with the same settings"),
    ]
    accuracy = {200: 0.752, 800: 0.872}.get(base.epochs)
    return make_plan(
        "lightly-imagenette",
        options,
        arms,
        ("vi-simsiam", "simsiam", "knn200"),
        published=None if accuracy is None else {"imagenette": {"simsiam": {"knn200": accuracy}}},
        progress_every=max(1, base.epochs // 20),
    )


def _deaths(options: PlanOptions) -> Plan:
    """Many short trainings, to count those that stop learning.

    At every D and learning rate: `seeds` runs of the default loss, a quarter as many of softplus,
    and at most four of SimSiam. Nothing is measured but the training itself.
    """
    base = replace(scaled(preset(options.preset), options), log_every=5, loss=LossConfig())
    accepted = "at least 2: kappa is followed after the first"
    require("epochs", base.epochs, base.epochs >= 2, accepted)

    def arms(dim: int, lr: float) -> Iterator[Arm]:
        at = f"d{dim}-lr{lr:g}"
        config = replace(base, lr=lr, model=replace(base.model, dim=dim))
        yield Arm(f"vi-simsiam-{at}", config, "the default loss")
        softplus = replace(config, loss=SOFTPLUS)
        note = "the likelihood alone, kappa = (D-1) softplus(raw)"
        yield Arm(f"softplus-{at}", softplus, note, seeds=-(-options.seeds // 4))
        simsiam = replace(config, method="simsiam")
        seeds = min(options.seeds, _REFERENCE_SEEDS)
        yield Arm(f"simsiam-{at}", simsiam, "SimSiam", seeds=seeds)

    dims = _DEATH_DIMS if options.dim is None else (options.dim,)
    every = [arm for dim in dims for lr in _DEATH_RATES for arm in arms(dim, lr)]
    return make_plan("deaths", options, every, None, data=("fashion-mini",), measures=())
