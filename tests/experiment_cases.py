"""Small plans, and a stand-in for the process that trains a run of an experiment."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console

from vi_simsiam.config import AugmentConfig, ModelConfig, TrainConfig
from vi_simsiam.experiments.plan import Arm, Place, Plan, PlanOptions, make_plan
from vi_simsiam.experiments.runner import run_experiment

# The learning rate selects the behaviour: 0.5 fails, 0.25 waits for SIGTERM, others finish at once.
STAND_IN = """
    import json, os, pathlib, signal, sys, time
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    assert sys.argv[2] == "--parent" and int(sys.argv[3]) == os.getppid()
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
    if config["frozen_run"]:
        assert (pathlib.Path(config["frozen_run"]) / "trained.json").is_file()
    (folder / "trained.json").write_text("{}")
    result = {key: spec[key] for key in ("experiment", "arm", "seed", "config")}
    result |= {"data": config["data"], "device": "none", "method": config["method"]}
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
    rates: dict[str, float], *, seeds: int = 1, after: dict[str, str] | None = None
) -> Plan:
    """A plan of arms by their learning rates."""
    base, names = tiny_config("fashion-mini"), list(rates)
    arms = [
        Arm(name, dataclasses.replace(base, lr=lr), f"arm {name}", after=(after or {}).get(name))
        for name, lr in rates.items()
    ]
    primary = (names[-1], names[0], "logistic")
    return make_plan("controls", PlanOptions(seeds=seeds), arms, primary, data=("fashion-mini",))


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
    place = place or Place(devices=("cpu",), parallel=2)
    console = Console(file=io.StringIO(), width=200)
    code = run_experiment(plan, out, place, again="again", command=command, console=console)
    return code, console.file.getvalue().splitlines()  # type: ignore[attr-defined]


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
        "val_images": None,
        "progress_every": None,
        "arm": "arm",
        "seed": config.seed,
        "config": config.to_dict(),
        "folder": str(out / "runs" / "arm-seed-0"),
        "result": str(out / "results" / "arm-seed-0.json"),
        **changes,
    }
