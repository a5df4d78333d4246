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


def first_right(count: int, images: int = IMAGES) -> NDArray[np.bool_]:
    """Bits of a run that got the first `count` images right."""
    return np.arange(images) < count


def right(count: int, images: int = IMAGES, measure: str = "linear") -> dict[str, Any]:
    """Changes to a result after which one measure got the first `count` images right."""
    bits = pack_bits(torch.from_numpy(first_right(count, images)))
    return {"accuracy": {measure: count / images}, "correct": {measure: bits}, "val_images": images}


def result(arm: Arm, experiment: str, seed: int, **changes: Any) -> dict[str, Any]:
    """The result of a run that got the first 200 + 8 seed images right by every measure."""
    points = np.linspace(0.1, arm.config.epochs, 20).tolist()
    curve = {
        "epoch": points,
        "loss": [-point for point in points],
        "cosine": [0.8] * 20,
        "z_std": [0.9] * 20,
        "effective_rank": [40.0] * 20,
        "grad_norm": np.linspace(1, 3, 20).tolist(),
    }
    uncertainty = {}
    if arm.config.method == "vi-simsiam":
        curve["kappa"] = [2.0] * 20
        uncertainty = {"calibration_error": 0.02 + 0.01 * seed, "aurc": 0.4, "aurc_baseline": 0.3}
    config = without_places(arm.config) | {"seed": seed}
    knn, linear = (right(200 + 8 * seed, measure=measure) for measure in ("knn20", "linear"))
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
        "curve": curve,
        "accuracy": {**knn["accuracy"], **linear["accuracy"], "linear_top5": 0.9},
        "correct": {**knn["correct"], **linear["correct"]},
        "val_images": IMAGES,
        "uncertainty": uncertainty,
        "device": "cpu (1 thread)",
        "versions": {"torch": "2.14.1"},
        "commit": "abc1234",
        "date": "2026-01-02T03:04:05+00:00",
    } | changes


def diverged(arm: Arm, experiment: str, seed: int) -> dict[str, Any]:
    """The result of a run whose loss stopped being finite."""
    nothing = dict.fromkeys(("steps", "images", "seconds", "val_images"))
    empty: dict[str, Any] = {"accuracy": {}, "correct": {}, "uncertainty": {}}
    reason = "step 3: the loss is not finite"
    return result(arm, experiment, seed, **nothing, **empty, diverged=reason)


def write_plan(out: Path, name: str, **options: Any) -> Plan:
    """Write OUT/plan.json of the named experiment."""
    made = plan(name, PlanOptions(**options))
    out.mkdir(parents=True, exist_ok=True)
    content = {**made.described(), "created": "2026-01-01T00:00:00+00:00"}
    (out / "plan.json").write_text(json.dumps(content))
    return made


def write_result(out: Path, content: dict[str, Any]) -> None:
    """Write a result to OUT/results/."""
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{content['arm']}-seed-{content['seed']}.json").write_text(json.dumps(content))


def write_all(out: Path, name: str, **options: Any) -> Plan:
    """A finished experiment: a result of every arm and seed, and of every trial.

    The first trial of every arm is chosen.
    """
    made = write_plan(out, name, **options)
    for arm in made.arms:
        for seed in made.seeds:
            write_result(out, result(arm, name, seed))
    if (trials := made.trials) is not None:
        for trial in trials.arms:
            write_result(out / "trials", result(trial, name, trials.seed, **right(100)))
        best, arms = trials.choose({trial.name: 0.25 for trial in trials.arms})
        chosen = {arm.name: {"trial": best[arm.name], **settings(arm.config)} for arm in arms}
        (out / "chosen.json").write_text(json.dumps({"chosen": chosen}))
    return made
