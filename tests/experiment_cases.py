"""Small plans, a stand-in for the process that trains a run, and a watch on real ones."""

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

# Does what it is told by the learning rate: 0.5 fails, 0.25 stays until it is asked to end, all others are done at once.
STAND_IN = """
    import json, os, pathlib, signal, sys, time
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    assert sys.argv[2] == "--parent" and int(sys.argv[3]) == os.getppid()
    spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
    folder, config = pathlib.Path(spec["folder"]), spec["config"]
    name = folder.name
    folder.mkdir(exist_ok=True)
    with (folder / "calls").open("a") as file:
        call = {**spec, "threads": os.environ["OMP_NUM_THREADS"], "start": time.monotonic()}
        file.write(json.dumps(call) + "\\n")
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
    result |= {"data": config["data"], "device": "none", "method": config["method"], "accuracy": {"logistic": round(1 - config["lr"], 6)}}
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
    base = tiny_config("fashion-mini")
    arms = [
        Arm(name, dataclasses.replace(base, lr=lr), f"arm {name}", after=(after or {}).get(name))
        for name, lr in rates.items()
    ]
    names = list(rates)
    options = PlanOptions(seeds=seeds, data=("fashion-mini",))
    return make_plan("controls", options, arms, (names[-1], names[0], "logistic"), data=())


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
    plan: Plan, out: Path, command: list[str], place: Place | None = None, again: str = "again"
) -> tuple[int, str]:
    """Run a plan with stand-ins; the exit code and what was printed."""
    said = io.StringIO()
    code = run_experiment(
        plan,
        out,
        place or Place(devices=("cpu",), parallel=2),
        again=again,
        command=command,
        console=Console(file=said, width=200),
    )
    return code, said.getvalue()


def calls(out: Path, name: str) -> list[dict[str, Any]]:
    """What the processes of a run were told, one after the other."""
    return [json.loads(line) for line in (out / "runs" / name / "calls").read_text().splitlines()]


def spec(config: TrainConfig, out: Path, name: str = "arm", **changes: Any) -> dict[str, Any]:
    """What a real process is told."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    (out / "results").mkdir(exist_ok=True)
    run_name = f"{name}-seed-{config.seed}"
    return {
        "experiment": "controls",
        "measures": ["knn20", "knn200", "logistic", "linear"],
        "uncertainty": True,
        "val_images": None,
        "progress_every": None,
        "arm": name,
        "seed": config.seed,
        "config": config.to_dict(),
        "folder": str(out / "runs" / run_name),
        "result": str(out / "results" / f"{run_name}.json"),
        **changes,
    }
