"""Plans, processes and results of experiments as the tests need them, without any training."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vi_simsiam.config import AugmentConfig, ModelConfig, TrainConfig
from vi_simsiam.evaluation.results import pack_bits
from vi_simsiam.experiments.catalogue import plan
from vi_simsiam.experiments.plan import (
    TRIAL_SEED,
    Arm,
    Place,
    Plan,
    PlanOptions,
    make_plan,
    settings,
)
from vi_simsiam.experiments.runner import run_experiment
from vi_simsiam.experiments.worker import without_places

COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu" / "experiments"
IMAGES = 400
# The learning rate selects the behaviour: 0.5 fails, 0.25 waits for SIGTERM, others finish at once.
STAND_IN = """
    import json, os, pathlib, signal, sys, time
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
    folder, config = pathlib.Path(spec["folder"]), spec["config"]
    folder.mkdir(exist_ok=True)
    with (folder / "calls").open("a") as file:
        file.write(json.dumps({**spec, "threads": os.environ["OMP_NUM_THREADS"]}) + "\\n")
    again = (folder / "checkpoint").exists()
    (folder / "checkpoint").write_text("1")
    print("epoch 1", flush=True)
    time.sleep(0.05)
    if config["lr"] == 0.5 and not again:
        sys.exit("no memory left")
    while config["lr"] == 0.25 and not again and not stop:
        time.sleep(0.02)
    if stop:
        print("interrupted: saved at step 3")
        sys.exit(130)
    if spec["after"]:
        assert (pathlib.Path(spec["after"]) / "trained.json").is_file()
    (folder / "trained.json").write_text("{}")
    result = {key: spec[key] for key in ("experiment", "arm", "seed", "config")}
    result |= {"data": config["data"], "device": "none", "method": config["method"]}
    result |= {name: {} for name in ("curve", "correct", "uncertainty", "versions")}
    result |= dict.fromkeys(("images", "val_images", "seconds", "commit")) | {"date": "today"}
    result["accuracy"] = {"logistic": round(1 - config["lr"], 6)}
    pathlib.Path(spec["result"]).write_text(json.dumps(result))
    print("logistic 70.0 %")
"""


def stand_in(folder: Path) -> list[str]:
    """The command that starts the stand-in, without the packages that a real run imports."""
    script = folder / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN))
    return [sys.executable, "-S", str(script)]


def small_plan(
    rates: dict[str, float], *, after: dict[str, str] | None = None, seeds: int = 1, **options: Any
) -> Plan:
    """A plan of arms by their learning rates."""
    names, waits = list(rates), after or {}
    arms = [
        Arm(
            name,
            tiny_config("fashion-mini", lr=lr),
            f"arm {name}",
            fitted=name in waits,
            after=waits.get(name),
        )
        for name, lr in rates.items()
    ]
    primary = (names[-1], names[0], "logistic")
    given = PlanOptions(seeds=seeds, **options)
    return make_plan("controls", given, arms, primary, data=("fashion-mini",))


def tiny_config(data: str, **changes: Any) -> TrainConfig:
    """A training of a few steps on the CPU."""
    base = TrainConfig(
        data=data,
        epochs=2,
        batch_size=8,
        lr=0.02,
        workers=0,
        device="cpu",
        log_every=2,
        save_every=0.0,
        augment=AugmentConfig(size=16, blur_prob=0.0),
        model=ModelConfig(dim=16, projector_hidden=16, predictor_hidden=16),
    )
    return dataclasses.replace(base, **changes)


def run(
    plan: Plan, out: Path, command: list[str], place: Place | None = None
) -> tuple[int, list[str]]:
    """Run a plan with stand-ins; the exit code and the lines printed."""
    place, printed = place or Place(devices=("cpu",), parallel=2), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("vi_simsiam.experiments.runner._WORKER", command)
        code = run_experiment(plan, out, place, "again")
    return code, printed.getvalue().splitlines()


def calls(out: Path, name: str) -> list[dict[str, Any]]:
    """The specifications of a run's processes, in order, with their threads."""
    return [json.loads(line) for line in (out / "runs" / name / "calls").read_text().splitlines()]


def spec(config: TrainConfig, out: Path, **changes: Any) -> dict[str, Any]:
    """The specification of a real run."""
    for name in ("runs", "results"):
        (out / name).mkdir(parents=True, exist_ok=True)
    return {
        "experiment": "controls",
        "measures": ["knn20", "knn200", "logistic", "linear"],
        "uncertainty": True,
        "ood": [],
        "val_images": None,
        "progress_every": None,
        "arm": "arm",
        "seed": config.seed,
        "config": config.to_dict(),
        "fitted": False,
        "after": None,
        "folder": str(out / "runs" / "arm-seed-0"),
        "result": str(out / "results" / "arm-seed-0.json"),
        **changes,
    }


def first_right(count: int) -> NDArray[np.bool_]:
    """Bits of a run that got the first `count` images right."""
    return np.arange(IMAGES) < count


def right(count: int) -> dict[str, Any]:
    """Changes to a result after which the linear probe got the first `count` images right."""
    bits = pack_bits(torch.from_numpy(first_right(count)))
    return {"accuracy": {"linear": count / IMAGES}, "correct": {"linear": bits}}


def result(arm: Arm, experiment: str, seed: int, **changes: Any) -> dict[str, Any]:
    """The result of a run that got the first 200 + 8 seed images right."""
    curve = {
        "epoch": np.linspace(0.1, arm.config.epochs, 20).tolist(),
        "cosine": [0.8] * 20,
        "z_std": [0.9] * 20,
        "grad_norm": np.linspace(1, 3, 20).tolist(),
    }
    if arm.config.method == "vi-simsiam":
        curve["kappa"] = [2.0] * 20
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
        "curve": curve,
        **right(min(200 + 8 * seed, IMAGES)),
        "val_images": IMAGES,
        "uncertainty": {},
        "device": "cpu (1 thread)",
        "versions": {"torch": "2.14.1"},
        "commit": "abc1234",
        "date": "2026-01-02T03:04:05+00:00",
    } | changes


def diverged(arm: Arm, experiment: str, seed: int) -> dict[str, Any]:
    """The result of a run whose loss stopped being finite."""
    nothing = dict.fromkeys(("steps", "images", "seconds", "val_images"))
    empty: dict[str, Any] = {"accuracy": {}, "correct": {}}
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
    """A finished experiment: a result of every arm and seed; the first trials are chosen."""
    made = write_plan(out, name, **options)
    for arm in made.arms:
        for seed in range(made.options.seeds):
            write_result(out, result(arm, name, seed))
    for trial in made.trials:
        write_result(out / "trials", result(trial, name, TRIAL_SEED))
    if made.trials:
        accuracy = {trial.name: 0.25 for trial in made.trials}
        arms = made.tuned(accuracy)
        chosen = {arm.name: {"trial": trial, **settings(arm.config)} for trial, arm in arms.items()}
        (out / "chosen.json").write_text(json.dumps({"accuracy": accuracy, "chosen": chosen}))
    return made
