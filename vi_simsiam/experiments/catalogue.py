"""The experiments by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from vi_simsiam.config import (
    LITERAL,
    SOFTPLUS,
    LossConfig,
    ModelConfig,
    TrainConfig,
    policy,
    preset,
)
from vi_simsiam.errors import none_of
from vi_simsiam.experiments.deaths import deaths
from vi_simsiam.experiments.plan import (
    METHODS,
    PRIMARY_MEASURE,
    Arm,
    Plan,
    PlanOptions,
    finished,
    scaled,
    with_data,
)
from vi_simsiam.experiments.tuning import tuned

_SHORT_EPOCHS = 100
"""Below this many epochs an average over 1 / (1 - 0.996) steps and more still holds the untrained network for long."""


def plan(name: str, options: PlanOptions) -> Plan:
    """The plan of the named experiment.

    Raises:
        InputError: no such experiment or arm, or a setting that is not accepted.
    """
    makers = {
        "table1": _table1,
        "tuned": tuned,
        "controls": _controls,
        "stability": _stability,
        "lightly-imagenette": _lightly_imagenette,
        "deaths": deaths,
    }
    if name not in makers:
        raise none_of("experiment", name, makers)
    return makers[name](options)


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
        Arm(
            "ps-global",
            changed(concentration="global"),
            "Power Spherical with one learned concentration",
        ),
        Arm("vi-simsiam", ours, "Power Spherical with a concentration for each image"),
        Arm(
            "vi-softplus",
            dataclasses.replace(ours, loss=SOFTPLUS),
            "the likelihood alone, with kappa = (D-1) softplus(raw)",
            optional=True,
        ),
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
        Arm(
            "ps-posthoc",
            ours,
            "the concentration fitted on the finished SimSiam run of its seed",
            after="simsiam",
        ),
        Arm(
            "byol",
            dataclasses.replace(simsiam, ema=ema),
            f"SimSiam with a target network of momentum {ema}",
        ),
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
    base = dataclasses.replace(base, loss=SOFTPLUS)
    # As the paper gives it; the gradient is D - 1 times that of the scaled loss.
    literal = dataclasses.replace(base, lr=1e-3, loss=LITERAL)

    def at(config: TrainConfig, dim: int, **fields: Any) -> TrainConfig:
        return dataclasses.replace(
            config, model=dataclasses.replace(config.model, dim=dim), **fields
        )

    arms = []
    for dim in dims:
        arms += [
            Arm(f"literal-d{dim}", at(literal, dim), f"kappa = softplus(raw), D = {dim}"),
            Arm(
                f"scaled-d{dim}",
                at(base, dim),
                f"kappa = (D-1) softplus(raw), loss/(D-1), D = {dim}",
            ),
        ]
    bounds = dataclasses.replace(
        literal.loss, concentration_min=0.05 * (one - 1), concentration_max=20.0 * (one - 1)
    )
    crops = dataclasses.replace(
        base.augment,
        crop_scale=(0.14, 1.0),
        local_views=6,
        local_size=max(8, round(base.augment.size * 3 / 7 / 8) * 8),
    )
    separate = dataclasses.replace(base.model, dim=one, local_predictor=True)
    arms += [
        Arm(
            f"literal-bounded-d{one}",
            at(literal, one, loss=bounds),
            "literal, kappa/(D-1) between 0.05 and 20",
        ),
        Arm(
            f"literal-clipped-d{one}",
            at(literal, one, clip_norm=1.0),
            "literal, gradients of norm 1 at most",
        ),
        Arm(
            f"multicrop-shared-d{one}",
            at(base, one, augment=crops),
            "scaled, multi-crop, one predictor",
        ),
        Arm(
            f"multicrop-separate-d{one}",
            dataclasses.replace(base, augment=crops, model=separate),
            "scaled, multi-crop, a second predictor for the local views",
        ),
    ]
    largest = dims[-1]
    return finished(
        "stability", options, arms, (f"scaled-d{largest}", f"literal-d{largest}", PRIMARY_MEASURE)
    )


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
        Arm(
            "vi-simsiam",
            dataclasses.replace(simsiam, method="vi-simsiam"),
            "VI-SimSiam with the same settings",
        ),
    ]
    accuracy = {200: 0.752, 800: 0.872}.get(simsiam.epochs)
    published = {"imagenette": {"simsiam": {"knn200": accuracy}}} if accuracy is not None else {}
    every = max(1, simsiam.epochs // 20)
    return finished(
        "lightly-imagenette",
        options,
        arms,
        ("vi-simsiam", "simsiam", "knn200"),
        published,
        progress_every=every,
    )
