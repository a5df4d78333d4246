"""Experiments: every run is made once, however often the command is interrupted, and measured as it should be."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment_cases import calls, run, small_plan, spec, stand_in, tiny_config

from vi_simsiam.cli.experiment import experiment
from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.run import load_run
from vi_simsiam.errors import InputError, TrainingError
from vi_simsiam.evaluation.results import unpack_bits
from vi_simsiam.experiments import measure, worker
from vi_simsiam.experiments.catalogue import plan
from vi_simsiam.experiments.plan import Place, Plan, PlanOptions


def test_every_run_is_told_its_arm_its_seed_and_its_place(tmp_path: Path) -> None:
    out, command = tmp_path / "out", stand_in(tmp_path)
    planned = small_plan({"a": 0.1, "b": 0.2}, seeds=2)
    code, said = run(
        planned, out, command, Place(devices=("cpu",), parallel=2, cache_dir=tmp_path, threads=3)
    )
    assert code == 0
    assert "a-seed-1: done in 0 s  logistic 70.0 %" in said
    assert "4 of 4 runs done" in said
    assert "go on" not in said
    for arm, lr in (("a", 0.1), ("b", 0.2)):
        for seed in (0, 1):
            (call,) = calls(out, f"{arm}-seed-{seed}")
            config = TrainConfig.from_dict(call["config"])
            assert (call["arm"], call["seed"], config.seed, config.lr) == (arm, seed, seed, lr)
            assert (config.device, config.workers, config.cache_dir, call["threads"]) == (
                "cpu",
                0,
                tmp_path,
                "3",
            )
    saved = json.loads((out / "plan.json").read_text())
    assert saved["primary"] == {
        "arm": "b",
        "against": "a",
        "measure": "logistic",
        "data": "fashion-mini",
    }
    assert saved["created"]

    code, said = run(planned, out, command)
    assert code == 0
    assert said.splitlines() == ["4 of 4 runs finished and kept", "4 of 4 runs done"]
    assert len(calls(out, "a-seed-0")) == 1
    (out / "results" / "b-seed-1.json").unlink()
    assert run(planned, out, command)[0] == 0
    assert [len(calls(out, f"b-seed-{seed}")) for seed in (0, 1)] == [1, 2]


def test_runs_go_round_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Place().slots() == ["cuda:0", "cuda:1"]
    assert Place(parallel=2).slots() == ["cuda:0", "cuda:1"] * 2
    monkeypatch.setattr("vi_simsiam.data.decoding.cores", lambda: 3)
    assert Place(devices=("cpu",)).slots() == ["cpu"] * 3
    with pytest.raises(InputError, match="device: 'cuda:2' is not here"):
        Place(devices=("cuda:2",)).slots()
    for name, value in (("parallel", 0), ("threads", 0), ("workers", -1)):
        with pytest.raises(InputError, match=f"{name}: {value} is not accepted"):
            Place(**{name: value}).slots()


def test_a_run_that_fails_leaves_the_others_alone_and_is_tried_again(tmp_path: Path) -> None:
    out, command = tmp_path / "out", stand_in(tmp_path)
    planned = small_plan({"a": 0.5, "b": 0.2, "c": 0.1}, after={"b": "a"})
    code, said = run(planned, out, command)
    assert code == 2
    assert "a-seed-0: failed with exit code 1: no memory left (see" in said
    assert "b-seed-0: not started: a-seed-0, which it starts from, is not trained" in said
    assert "c-seed-0: done" in said
    assert said.splitlines()[-2:] == ["1 of 3 runs done", "go on with: again"]
    code, said = run(planned, out, command)
    assert code == 0
    assert calls(out, "b-seed-0")[0]["config"]["frozen_run"] == str(out / "runs" / "a-seed-0")
    assert (out / "runs" / "a-seed-0.log").read_text().count("epoch 1") == 2, "the log goes on, too"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_runs_and_starts_no_more(
    tmp_path: Path, number: signal.Signals
) -> None:
    out, command = tmp_path / "out", stand_in(tmp_path)
    planned = small_plan({"quick": 0.1, "slow": 0.25, "late": 0.25, "never": 0.2})

    def interrupt() -> None:
        while not (out / "runs" / "late-seed-0" / "checkpoint").exists():
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    threading.Thread(target=interrupt, daemon=True).start()
    code, said = run(planned, out, command)
    assert code == 130
    assert signal.getsignal(number) is handler
    assert "slow-seed-0: interrupted  interrupted: saved at step 3" in said
    assert said.splitlines()[-2:] == ["1 of 4 runs done", "go on with: again"]
    assert not (out / "runs" / "never-seed-0").exists()
    code, said = run(planned, out, command)
    assert code == 0
    assert len(calls(out, "quick-seed-0")) == 1
    assert len(calls(out, "slow-seed-0")) == 2


def test_another_plan_is_refused_by_the_option_that_differs(tmp_path: Path) -> None:
    out, command = tmp_path / "out", stand_in(tmp_path)
    planned = small_plan({"a": 0.1})
    assert run(planned, out, command)[0] == 0

    def changed(**options: Any) -> Plan:
        return dataclasses.replace(planned, options=dataclasses.replace(planned.options, **options))

    with pytest.raises(
        InputError,
        match=r"^epochs: 3 is not what .*out was started with, None; use that, or another",
    ):
        run(changed(epochs=3), out, command)
    with pytest.raises(
        InputError, match=r"^data: cifar10 imagewoof is not what .* started with, fashion-mini;"
    ):
        run(changed(data=("cifar10", "imagewoof")), out, command)
    with pytest.raises(InputError, match=r"^experiment: tuned is not what .* controls;"):
        run(dataclasses.replace(planned, experiment="tuned"), out, command)
    with pytest.raises(
        InputError, match="planned by another version of vi-simsiam, with other primary"
    ):
        run(dataclasses.replace(planned, primary=None), out, command)
    (out / "plan.json").write_text("{")
    with pytest.raises(InputError, match=r"plan\.json is damaged"):
        run(planned, out, command)
    (out / "plan.json").unlink()
    with pytest.raises(InputError, match="holds other files"):
        run(planned, out, command)


@pytest.mark.skipif(sys.platform == "win32", reason="files are locked by fcntl")
def test_two_commands_do_not_run_one_experiment(tmp_path: Path) -> None:
    import fcntl

    out, command = tmp_path / "out", stand_in(tmp_path)
    planned = small_plan({"a": 0.1})
    out.mkdir()
    (out / "plan.json").write_text(json.dumps(planned.described()))
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another command is running the experiment"):
            run(planned, out, command)


def test_a_command_killed_before_its_plan_was_written_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, command = tmp_path / "out", stand_in(tmp_path)
    out.mkdir()
    for name in (".lock", ".plan.json.0123456789abcdef"):
        (out / name).write_text("")

    def begun_by_another(*given: object) -> None:
        (out / "plan.json").write_text(json.dumps(small_plan({"a": 0.1}, seeds=2).described()))

    with monkeypatch.context() as patch:
        patch.setattr("vi_simsiam.experiments.runner._decode", begun_by_another)
        with pytest.raises(InputError, match=r"^seeds: 1 is not what .* was started with, 2;"):
            run(small_plan({"a": 0.1}), out, command)
    assert not (out / "runs").exists()
    (out / "plan.json").unlink()
    assert run(small_plan({"a": 0.1}), out, command)[0] == 0


def test_trials_choose_the_settings_once(tmp_path: Path) -> None:
    """The stand-in's accuracy is 1 - lr: the lowest learning rate of every method must win, and stay chosen."""
    out, command = tmp_path / "out", stand_in(tmp_path)
    planned = plan("tuned", PlanOptions(trials=3, seeds=2, data=("fashion-mini",), images=100))
    assert planned.trials is not None
    code, said = run(planned, out, command)
    assert code == 0
    assert "6 of 6 runs done" in said
    assert "4 of 4 runs done" in said
    chosen = json.loads((out / "chosen.json").read_text())
    for method in ("simsiam", "vi-simsiam"):
        trials = [arm for arm in planned.trials.arms if arm.config.method == method]
        best = min(trials, key=lambda arm: arm.config.lr)
        assert chosen["chosen"][method]["trial"] == best.name
        for seed in (0, 1):
            (call,) = calls(out, f"{method}-seed-{seed}")
            config = TrainConfig.from_dict(call["config"])
            assert (config.lr, config.weight_decay, config.loss) == (
                best.config.lr,
                best.config.weight_decay,
                best.config.loss,
            )
            assert (config.held_out, config.images) == (0.0, 100)
        trial = json.loads((out / "trials" / "runs" / f"{best.name}-seed-1000.json").read_text())
        assert (trial["measures"], trial["uncertainty"], trial["config"]["held_out"]) == (
            ["logistic"],
            False,
            0.2,
        )

    for result in (out / "trials" / "results").glob("*.json"):
        result.write_text(json.dumps({**json.loads(result.read_text()), "accuracy": {}}))
    assert run(planned, out, command)[0] == 0
    assert json.loads((out / "chosen.json").read_text()) == chosen, (
        "what is chosen is not chosen again"
    )


KILLED = """
    import os, signal, sys
    from vi_simsiam.engine import trainer
    from vi_simsiam.experiments import worker
    advance = trainer.Monitor.advance
    def killed(self, step):
        advance(self, step)
        if step == 7:  # two steps after the checkpoint of the first epoch
            os.kill(os.getpid(), signal.SIGKILL)
    trainer.Monitor.advance = killed
    worker.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_to_the_result_of_an_uninterrupted_one(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(f"folder:{image_folder}", method="simsiam")
    results = {}
    for name in ("whole", "killed"):
        told = spec(config, tmp_path / name, progress_every=1, measures=["knn200", "linear"])
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(told))
        if name == "killed":
            command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path)]
            assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
            folder = Path(told["folder"])
            assert (folder / "checkpoint.pt").is_file()
            assert not (folder / "trained.json").exists()
        assert worker.main([str(path)]) == 0
        said = capsys.readouterr().out
        assert ("epoch 1/2" in said, "epoch 2/2" in said) == (name == "whole", True)
        results[name] = json.loads(Path(told["result"]).read_text())
        text = Path(told["result"]).read_text()
        assert str(tmp_path) not in text
        assert str(image_folder.parent) not in text
    for result in results.values():
        assert result["curve"].pop("knn200_seconds")[0] < result.pop("seconds")
        result.pop("date")
    assert results["whole"] == results["killed"]

    found = results["whole"]
    assert (found["steps"], found["images"], found["val_images"]) == (10, 40, 16)
    assert found["data"] == f"folder:{image_folder.name}"
    assert list(found["accuracy"]) == ["knn200", "linear", "linear_top5"]
    assert list(found["correct"]) == ["knn200", "linear"]
    for name, bits in found["correct"].items():
        assert unpack_bits(bits, 16).double().mean() == found["accuracy"][name]
    assert found["curve"]["epoch"][-1] == 2
    assert found["curve"]["knn200_epoch"] == [1, 2]
    assert found["curve"]["knn200"][-1] == found["accuracy"]["knn200"], (
        "all images are few enough for both"
    )

    # Killed once more, between the last checkpoint and the accuracy after it.
    lines = (folder / "progress.jsonl").read_text().splitlines(keepends=True)
    (folder / "progress.jsonl").write_text(lines[0])
    (folder / "trained.json").unlink()
    assert worker.train(config, folder, progress_every=1)["steps"] == 10
    assert measure.progress_curve(folder / "progress.jsonl")["knn200"] == found["curve"]["knn200"]


def test_a_run_that_was_trained_is_only_measured(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(f"folder:{image_folder}", epochs=1)
    told = spec(config, tmp_path, measures=["knn20", "logistic"])
    monkeypatch.setattr(measure, "evaluate_uncertainty", lambda run, report: UNCERTAINTY)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "measure_run", _fail)
        with pytest.raises(RuntimeError, match="no such measure"):
            worker.work(told)
    assert not Path(told["result"]).exists()
    checkpoint = Path(told["folder"]) / "checkpoint.pt"
    written = checkpoint.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(worker, "Trainer", _fail)
        moved = {
            **told,
            "config": dataclasses.replace(config, cache_dir=tmp_path / "elsewhere").to_dict(),
        }
        line = worker.work(moved)
        assert worker.work(told) == "measured before"
    assert len(list((tmp_path / "elsewhere").glob("*.pack"))) == 2, (
        "images are read from where they are now"
    )
    assert checkpoint.stat().st_mtime_ns == written
    result = json.loads(Path(told["result"]).read_text())
    assert line == "  ".join(
        f"{name} {100 * result['accuracy'][name]:.1f} %" for name in ("knn20", "logistic")
    )
    assert result["uncertainty"]["calibration_error"] == 0.25
    Path(told["result"]).unlink()
    other = {**told, "config": dataclasses.replace(config, lr=0.3).to_dict()}
    with pytest.raises(InputError, match="was trained with another configuration: lr: 0.02 -> 0.3"):
        worker.work(other)

    run = load_run(told["folder"], device="cpu", workers=0)
    fewer = measure.limited(run, 6)
    assert fewer.splits.val is not None
    assert np.bincount(fewer.splits.val.labels).tolist() == [3, 3], "of every class as many"
    assert measure.limited(run, 16) is run


def _fail(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("no such measure")


def test_a_loss_that_is_not_finite_is_a_result(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = spec(tiny_config(f"folder:{image_folder}"), tmp_path)

    hopeless = {**told, "config": tiny_config(f"folder:{image_folder}", lr=1e30).to_dict()}
    assert re.fullmatch(
        r"diverged: (the loss is not finite at step \d+ \(epoch 1\))", line := worker.work(hopeless)
    )
    text = Path(told["result"]).read_text()
    assert str(tmp_path) not in text
    result = json.loads(text)
    assert (result["diverged"], result["accuracy"]) == (line.removeprefix("diverged: "), {})
    Path(told["result"]).unlink()
    monkeypatch.setattr(
        worker, "train", lambda *_, **__: (_ for _ in ()).throw(TrainingError("a worker died"))
    )
    with pytest.raises(TrainingError, match="a worker died"):
        worker.work(told)
    assert not Path(told["result"]).exists()


def test_a_run_ends_with_the_command_that_started_it(image_folder: Path, tmp_path: Path) -> None:
    told = spec(tiny_config(f"folder:{image_folder}", epochs=1000), tmp_path)
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(told))
    command = [sys.executable, "-m", "vi_simsiam.experiments.worker", str(path), "--parent"]
    gone = 2**22 + 1  # above the largest number of a process
    ended = subprocess.run([*command, str(gone)], capture_output=True, timeout=120)
    assert ended.returncode in (-signal.SIGTERM, 130)


UNCERTAINTY: dict[str, Any] = {
    "calibration": {"error": 0.25},
    "misclassification": {
        "scores": {
            "kappa": {"auroc": 0.7, "aurc": 0.2, "augrc": 0.1},
            "contrast": {"auroc": 0.6, "aurc": 0.3, "augrc": 0.05},
            "jpeg_size": {"auroc": 0.5, "aurc": 0.4, "augrc": 0.2},
            "softmax": {"auroc": 0.99, "aurc": 0.01, "augrc": 0.01},
        }
    },
    "retrieval": {
        "validation": {"seen_classes": True, "scores": {"kappa": 0.6, "contrast": None}},
        "digits": {
            "seen_classes": False,
            "scores": {"kappa": 0.4, "contrast": 0.3, "jpeg_size": 0.2},
        },
    },
    "ood": {
        "cats": {
            "scores": {
                "kappa": {"auroc": 0.9},
                "contrast": {"auroc": 0.5},
                "jpeg_size": {"auroc": 0.8},
            }
        },
        "dogs": {
            "scores": {
                "kappa": {"auroc": 0.5},
                "contrast": {"auroc": 1.0},
                "jpeg_size": {"auroc": 0.5},
            }
        },
    },
    "corruptions": {
        "blur": {"scores": {"kappa": {"spearman": 0.5}, "contrast": {"spearman": -0.5}}},
        "noise": {"scores": {"kappa": {"spearman": 1.0}, "contrast": {"spearman": 0.0}}},
    },
}


def test_uncertainty_is_flattened_beside_the_best_trivial_score() -> None:
    found = measure.flat_uncertainty(UNCERTAINTY)
    names = {
        name.removesuffix("_baseline_name"): found.pop(name)
        for name in list(found)
        if name.endswith("_name")
    }
    assert names == {
        "auroc_misclassification": "contrast",
        "aurc": "contrast",
        "augrc": "contrast",
        "auroc_retrieval_unseen": "contrast",
        "ood_auroc": "contrast",
        "ood_auroc_cats": "jpeg_size",
        "ood_auroc_dogs": "contrast",
        "spearman_corruption": "contrast",
    }
    assert found == pytest.approx(
        {
            "calibration_error": 0.25,
            "auroc_misclassification": 0.7,
            "auroc_misclassification_baseline": 0.6,
            "aurc": 0.2,
            "aurc_baseline": 0.3,
            "augrc": 0.1,
            "augrc_baseline": 0.05,
            "auroc_retrieval": 0.6,
            "auroc_retrieval_unseen": 0.4,
            "auroc_retrieval_unseen_baseline": 0.3,
            "ood_auroc": 0.7,
            "ood_auroc_baseline": 0.75,
            "ood_auroc_cats": 0.9,
            "ood_auroc_cats_baseline": 0.8,
            "ood_auroc_dogs": 0.5,
            "ood_auroc_dogs_baseline": 1.0,
            "spearman_corruption": 0.75,
            "spearman_corruption_baseline": -0.25,
        }
    )


def test_a_curve_keeps_its_ends_and_five_digits(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "epoch": i / 10, "loss": 1 / 3 + i, "lr": 0.1} for i in range(1001)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = measure.curve(path)
    assert list(found) == ["epoch", "loss"]
    assert len(found["epoch"]) == measure.CURVE_POINTS
    assert (found["epoch"][0], found["epoch"][-1]) == (0.0, 100.0)
    assert np.diff(found["epoch"]).max() - np.diff(found["epoch"]).min() < 0.11, (
        "evenly apart, but for a line"
    )
    assert (found["loss"][0], found["loss"][-1]) == (0.33333, 1000.3)
    assert measure.curve(tmp_path / "none.jsonl") == {}


def test_the_command_answers_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, text in (
        (["table2"], "experiment: 'table2' is none of"),
        (["controls", "--arms", "resnet"], "arms: 'resnet' is none of"),
        (
            ["deaths", "--arms", "vi-simsim"],
            r"simsiam-d128-lr0.0125, .*, \.\.\. \(48 in all\); did you mean 'vi-simsiam-",
        ),
        (["controls", "--seeds", "0"], "seeds: 0 is not accepted"),
        (["controls", "--devices", "tpu"], "device: 'tpu' is none of"),
        (["controls", "--data", "cifar10", "--offline"], "cifar10: no complete copy"),
    ):
        with pytest.raises(InputError, match=text) as refused:
            experiment(arguments)
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir()), "a command that cannot begin plans nothing"

    monkeypatch.setattr("vi_simsiam.experiments.runner._WORKER", stand_in(tmp_path))
    arguments = [
        "controls",
        "--arms",
        "simsiam",
        "vi-simsiam",
        "--data",
        "fashion-mini",
        "--devices",
        "cpu",
    ]
    assert experiment([*arguments, "--seeds", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    written = said[said.index("4 of 4 runs done") + 1 :]
    assert written[0] == "runs/experiments/controls/summary.md"
    assert all((tmp_path / path).is_file() for path in written)
    (tmp_path / "runs/experiments/controls/results/simsiam-seed-0.json").unlink()
    with pytest.raises(InputError, match=r"^seeds: 3 is not what .* was started with, 2;"):
        experiment(arguments)
