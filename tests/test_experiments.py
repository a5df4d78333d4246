"""The runner of experiments: every run is made once, also after failures and interruptions."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment_cases import calls, run, small_plan, stand_in
from filelock import FileLock
from PIL import Image
from rich.console import Console

from vi_simsiam.cli.experiment import experiment
from vi_simsiam.config import TrainConfig
from vi_simsiam.errors import InputError
from vi_simsiam.experiments import runner
from vi_simsiam.experiments.catalogue import plan
from vi_simsiam.experiments.plan import Place, PlanOptions
from vi_simsiam.experiments.runner import Run, _slots, _table

ONE = small_plan({"a": 0.1})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stand-in's command; processes are looked at often."""
    monkeypatch.setattr("vi_simsiam.engine.processes._POLL_SECONDS", 0.02)
    return stand_in(tmp_path)


def test_every_run_gets_its_arm_its_seed_and_its_place(
    out: Path, command: list[str], tmp_path: Path
) -> None:
    planned = small_plan({"a": 0.1, "b": 0.2}, seeds=2)
    place = Place(devices=("cpu",), parallel=2, cache_dir=tmp_path, threads=3)
    code, lines = run(planned, out, command, place)
    assert code == 0
    assert any(re.fullmatch(r"a-seed-1: done in \d s  logistic 70.0 %", line) for line in lines)
    assert lines[-1] == "4 of 4 runs done"
    for arm, seed, lr in (("a", 0, 0.1), ("a", 1, 0.1), ("b", 0, 0.2), ("b", 1, 0.2)):
        (call,) = calls(out, f"{arm}-seed-{seed}")
        config = TrainConfig.from_dict(call["config"])
        assert (call["arm"], call["seed"], call["threads"]) == (arm, seed, "3")
        assert (config.seed, config.lr, config.device) == (seed, lr, "cpu")
        assert (config.workers, config.cache_dir) == (0, tmp_path)
    assert json.loads((out / "plan.json").read_text())["created"]

    (out / "results" / "b-seed-1.json").unlink()
    assert run(planned, out, command)[1][0] == "3 of 4 runs finished and kept"
    assert [len(calls(out, name)) for name in ("a-seed-0", "b-seed-0", "b-seed-1")] == [1, 1, 2]


def test_foreign_images_are_opened_before_the_first_run(
    out: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    planned = small_plan({"a": 0.1}, ood=("near=cats", "far=folder:dogs"))
    for name in ("cats", "dogs"):
        with pytest.raises(InputError, match=name):
            run(planned, out, command)
        assert not out.exists()
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "image.png")
    assert run(planned, out, command)[0] == 0
    (call,) = calls(out, "a-seed-0")
    assert call["ood"] == [f"near=folder:{tmp_path}/cats", f"far=folder:{tmp_path}/dogs"]
    assert str(tmp_path) not in (out / "plan.json").read_text()


def test_runs_go_round_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _slots(Place(parallel=2)) == ["cuda:0", "cuda:1"] * 2
    monkeypatch.setattr("vi_simsiam.experiments.runner.cores", lambda: 3)
    assert _slots(Place(devices=("cpu",))) == ["cpu"] * 3
    for name, value in (("parallel", 0), ("threads", 0), ("workers", -1)):
        with pytest.raises(InputError, match=f"{name}: {value} is not accepted"):
            _slots(Place(**{name: value}))


def test_a_failed_run_does_not_affect_others_and_is_tried_again(
    out: Path, command: list[str]
) -> None:
    planned = small_plan({"a": 0.5, "b": 0.2, "c": 0.1}, after={"b": "a"})
    code, lines = run(planned, out, command)
    assert code == 1
    log = out / "runs" / "a-seed-0.log"
    assert f"a-seed-0: failed with exit code 1: no memory left (see {log})" in lines
    assert "b-seed-0: not started: a-seed-0, which it starts from, is not trained" in lines
    assert lines[-2:] == ["1 of 3 runs done", "go on with: again"]
    assert run(planned, out, command)[0] == 0
    (call,) = calls(out, "b-seed-0")
    assert (call["fitted"], call["after"]) == (True, str(out / "runs" / "a-seed-0"))
    assert log.read_text().count("epoch 1") == 2, "the log is appended to"


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGINT,), (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)],
    ids=["terminal", "batch system"],
)
def test_an_interruption_ends_all_runs_and_starts_no_more(
    numbers: tuple[signal.Signals, ...], out: Path, command: list[str]
) -> None:
    """A batch system repeats its signal; the runs save all the same."""
    planned = small_plan({"quick": 0.1, "slow": 0.25, "late": 0.25, "never": 0.2})

    def interrupt() -> None:
        while not (out / "runs" / "late-seed-0" / "checkpoint").exists():
            time.sleep(0.02)
        time.sleep(0.1)
        for number in numbers:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    code, lines = run(planned, out, command)
    assert code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert "slow-seed-0: interrupted  interrupted: saved at step 3" in lines
    assert lines[-2:] == ["1 of 4 runs done", "go on with: again"]
    assert not (out / "runs" / "never-seed-0").exists()
    assert run(planned, out, command)[0] == 0
    assert [len(calls(out, f"{name}-seed-0")) for name in ("quick", "slow")] == [1, 2]


def test_a_folder_that_cannot_be_used_is_named(out: Path, command: list[str]) -> None:
    def refused(message: str, folder: Path = out, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            run(dataclasses.replace(ONE, **changes), folder, command)

    out.mkdir()
    for name in (".lock", ".plan.json.0123456789abcdef"):  # left by a killed command
        (out / name).write_text("")
    assert run(ONE, out, command)[0] == 0
    more = dataclasses.replace(ONE.options, trials=8)
    assert run(dataclasses.replace(ONE, options=more), out, command)[0] == 0, "there are no trials"
    saved = json.loads((out / "plan.json").read_text())
    del saved["options"]["ood"]  # as an older version wrote it
    (out / "plan.json").write_text(json.dumps(saved))
    assert run(ONE, out, command)[0] == 0
    longer = dataclasses.replace(ONE.options, epochs=3)
    refused("^epochs: 3 is not what .* with, None; use that, or another --out", options=longer)
    elsewhere = dataclasses.replace(ONE.options, data=("cifar10", "x"))
    refused("^data: cifar10 x is not what .* with, fashion-mini;", options=elsewhere)
    refused("^experiment: tuned is not what .* controls;", experiment="tuned")
    refused("planned by another version of vi-simsiam, with other primary", primary=None)
    with FileLock(out / ".lock"):
        refused("another command is running the experiment")
    (out / "plan.json").write_text("{")
    refused(r"plan\.json is damaged")
    (out / "plan.json").unlink()
    refused("holds other files")
    refused("is a file, not a folder", out / "results" / "a-seed-0.json")


def test_a_plan_that_came_first_while_images_were_decoded_is_kept(
    out: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def another_command(*_: object) -> None:
        monkeypatch.setattr(runner, "_decode", lambda *_: None)
        assert run(ONE, out, command)[0] == 0

    monkeypatch.setattr(runner, "_decode", another_command)
    with pytest.raises(InputError, match="was started with"):
        run(small_plan({"b": 0.2}, seeds=2), out, command)
    assert [path.name for path in (out / "results").iterdir()] == ["a-seed-0.json"]


def test_trials_choose_the_settings_once(out: Path, command: list[str]) -> None:
    """The stand-in's accuracy is 1 - lr: every method's lowest rate must win, and stay chosen."""
    planned = plan("tuned", PlanOptions(trials=2, seeds=1, data=("fashion-mini",), images=100))
    code, lines = run(planned, out, command)
    assert code == 0
    assert {"4 of 4 runs done", "2 of 2 runs done"} <= set(lines)
    chosen = json.loads((out / "chosen.json").read_text())
    for method in ("simsiam", "vi-simsiam"):
        trials = [arm for arm in planned.trials if arm.config.method == method]
        best = min(trials, key=lambda arm: arm.config.lr)
        assert chosen["chosen"][method]["trial"] == best.name
        (call,) = calls(out, f"{method}-seed-0")
        config = TrainConfig.from_dict(call["config"])
        for name in ("lr", "weight_decay", "loss"):
            assert getattr(config, name) == getattr(best.config, name)
        assert (config.held_out, config.images) == (0.0, 100)
        (call,) = calls(out / "trials", f"{best.name}-seed-1000")
        assert (call["measures"], call["uncertainty"]) == (["logistic"], False)
        assert call["config"]["held_out"] == 0.2

    for result in (out / "trials" / "results").glob("*.json"):
        result.write_text(json.dumps({**json.loads(result.read_text()), "accuracy": {}}))
    assert run(planned, out, command)[0] == 0
    assert json.loads((out / "chosen.json").read_text()) == chosen


def test_a_log_is_shown_as_it_is(tmp_path: Path) -> None:
    run = Run(ONE, ONE.arms[0], 0, tmp_path)
    run.log.parent.mkdir()
    run.log.write_text("reading [/x] [red]\n")
    run.start(["sleep", "60"], threads=1, append=True)
    console = Console(file=io.StringIO(), width=80)
    try:
        console.print(_table([run], 80))
    finally:
        run.kill()
    assert "reading [/x] [red]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_command_prints_what_it_wrote(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vi_simsiam.experiments.runner._WORKER", command)
    words = "controls --arms simsiam vi-simsiam --data fashion-mini --devices cpu --seeds 1"
    assert experiment(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    written = lines[lines.index("2 of 2 runs done") + 1 :]
    assert written[0] == "runs/experiments/controls/summary.md"
    assert all((tmp_path / path).is_file() for path in written)
