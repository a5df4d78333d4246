"""Folders of experiments as runs leave them, with scripted results: nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vi_simsiam.evaluation.results import pack_bits
from vi_simsiam.experiments.catalogue import plan
from vi_simsiam.experiments.measure import without_places
from vi_simsiam.experiments.plan import Arm, Plan, PlanOptions, settings

IMAGES = 400


def packed(bits: NDArray[np.bool_]) -> str:
    """Correctness as result files hold it."""
    return pack_bits(torch.from_numpy(bits))


def first_right(count: int, images: int = IMAGES) -> NDArray[np.bool_]:
    """Bits of a run that got the first `count` images right."""
    return np.arange(images) < count


def result(arm: Arm, experiment: str, seed: int, **changes: Any) -> dict[str, Any]:
    """The result of a run that got the first 200 + 8 seed images right by every measure."""
    right = first_right(200 + 8 * seed)
    points = np.linspace(0.1, arm.config.epochs, 20)
    curve = {
        "epoch": points,
        "loss": -points,
        "cosine": np.full(20, 0.8),
        "z_std": np.full(20, 0.9),
        "effective_rank": np.full(20, 40.0),
        "grad_norm": np.linspace(1, 3, 20),
    }
    uncertainty = {}
    if arm.config.method == "vi-simsiam":
        curve["kappa"] = np.full(20, 2.0)
        uncertainty = {"calibration_error": 0.02 + 0.01 * seed, "aurc": 0.4, "aurc_baseline": 0.3}
    config = without_places(arm.config) | {"seed": seed}
    return {
        "experiment": experiment,
        "arm": arm.name,
        "seed": seed,
        "data": config["data"],
        "method": arm.config.method,
        "config": config,
        "steps": 100,
        "images": 1_000,
        "seconds": 60.0 + seed,
        "curve": {name: values.tolist() for name, values in curve.items()},
        "accuracy": {"knn20": right.mean(), "linear": right.mean(), "linear_top5": 0.9},
        "correct": {"knn20": packed(right), "linear": packed(right)},
        "val_images": IMAGES,
        "uncertainty": uncertainty,
        "device": "cpu (1 thread)",
        "versions": {"torch": "2.14.1"},
        "commit": "abc1234",
        "date": "2026-01-02T03:04:05+00:00",
    } | changes


def diverged(arm: Arm, experiment: str, seed: int) -> dict[str, Any]:
    """The result of a run whose loss stopped being finite."""
    nothing = {"steps": None, "images": None, "seconds": None, "val_images": None}
    empty: dict[str, Any] = {"accuracy": {}, "correct": {}, "uncertainty": {}}
    return result(
        arm, experiment, seed, **nothing, **empty, diverged="step 3: the loss is not finite"
    )


def right(count: int) -> dict[str, Any]:
    """Changes to a result after which the linear probe got the first `count` images right."""
    bits = first_right(count)
    return {"accuracy": {"linear": float(bits.mean())}, "correct": {"linear": packed(bits)}}


def write_plan(out: Path, name: str, **options: Any) -> Plan:
    """Write OUT/plan.json of the named experiment."""
    made = plan(name, PlanOptions(**options))
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(
        json.dumps({**made.described(), "created": "2026-01-01T00:00:00+00:00"})
    )
    return made


def write_result(out: Path, content: dict[str, Any]) -> None:
    """Write a result to OUT/results/."""
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{content['arm']}-seed-{content['seed']}.json").write_text(json.dumps(content))


def write_all(out: Path, name: str, **options: Any) -> Plan:
    """A finished experiment: a result of every arm and seed, and of every trial, the first of which is chosen."""
    made = write_plan(out, name, **options)
    for arm in made.arms:
        for seed in made.seeds:
            write_result(out, result(arm, name, seed))
    if made.trials is not None:
        for trial in made.trials.arms:
            write_result(out / "trials", result(trial, name, made.trials.seed, **right(100)))
        accuracy = {trial.name: 0.25 for trial in made.trials.arms}
        best, arms = made.trials.choose(accuracy)
        chosen = {arm.name: {"trial": best[arm.name], **settings(arm.config)} for arm in arms}
        text = json.dumps({"measure": made.trials.measure, "accuracy": accuracy, "chosen": chosen})
        (out / "chosen.json").write_text(text)
    return made
