"""The process of a run: it trains and measures, and continues where an earlier one ended."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiment_cases import spec, tiny_config
from processes import start

from vi_simsiam.engine.checkpoint import checkpoints
from vi_simsiam.engine.monitor import Monitor
from vi_simsiam.engine.run import load_run
from vi_simsiam.errors import InputError, TrainingError
from vi_simsiam.evaluation.results import unpack_bits
from vi_simsiam.experiments import runner, worker

pytestmark = pytest.mark.usefixtures("small_network")


def _killed(path: Path) -> int:
    """Do a run up to two steps after the checkpoint of its first epoch."""
    advance = Monitor.advance

    def killed(self: Monitor, step: int) -> None:
        advance(self, step)
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    Monitor.advance = killed  # type: ignore[method-assign]
    return worker.main(path)


def test_a_killed_run_continues_to_the_result_of_an_uninterrupted_one(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(f"folder:{image_folder}", method="simsiam")
    results = {}
    for name in ("killed", "whole"):
        given = spec(config, tmp_path / name, progress_every=1, measures=["knn200", "linear"])
        folder, path = Path(given["folder"]), tmp_path / f"{name}.json"
        path.write_text(json.dumps(given))
        if name == "killed":
            process = start(_killed, path)
            process.join(60)
            if process.exitcode is None:
                process.kill()
            assert process.exitcode == -signal.SIGKILL
            assert checkpoints(folder)
            assert not (folder / "trained.json").exists()
        assert worker.main(path) == 0
        printed = capsys.readouterr().out
        assert ("epoch 1/2" in printed, "epoch 2/2" in printed) == (name == "whole", True)
        text = Path(given["result"]).read_text()
        assert str(tmp_path) not in text
        assert str(image_folder.parent) not in text
        results[name] = json.loads(text)
        assert results[name]["curve"].pop("knn200_seconds")[0] < results[name].pop("seconds")
        results[name].pop("date")
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
    assert found["curve"]["knn200"][-1] == found["accuracy"]["knn200"], "both use all images"

    # As if killed once more, between the last checkpoint and the accuracy after it.
    lines = (folder / "progress.jsonl").read_text().splitlines(keepends=True)
    (folder / "progress.jsonl").write_text(lines[0])
    (folder / "trained.json").unlink()
    assert worker.train(config, folder, progress_every=1)["steps"] == 10
    assert worker.curve(folder)["knn200"] == found["curve"]["knn200"]


def _fail(*arguments: Any, **options: Any) -> Any:
    raise TrainingError("a worker died")


def test_a_trained_run_is_only_measured(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(f"folder:{image_folder}", epochs=1)
    given = spec(config, tmp_path, measures=["knn20", "logistic"])
    folder, path = Path(given["folder"]), Path(given["result"])
    worker.train(config, folder)
    written = checkpoints(folder)[0].stat().st_mtime_ns
    monkeypatch.setattr(worker, "Trainer", _fail)
    asked: list[Any] = []

    def evaluate(run: Any, *, ood: list[str], report: Any) -> dict[str, Any]:
        asked.append(ood)
        return UNCERTAINTY

    monkeypatch.setattr(worker, "evaluate_uncertainty", evaluate)
    given["ood"] = ["near=folder:/cats"]
    moved = dataclasses.replace(config, cache_dir=tmp_path / "elsewhere").to_dict()
    line = worker.work({**given, "config": moved})
    assert worker.work(given) == "measured before"
    packs = list((tmp_path / "elsewhere").glob("*.pack"))
    assert len(packs) == 2, "images are found where they are"
    assert checkpoints(folder)[0].stat().st_mtime_ns == written
    result = json.loads(path.read_text())
    shares = {name: f"{100 * share:.1f} %" for name, share in result["accuracy"].items()}
    assert line == f"knn20 {shares['knn20']}  logistic {shares['logistic']}"
    assert result["uncertainty"]["calibration_error"] == 0.25
    assert result["purposes"]["refusing"] == {"kappa": 0.7, "contrast": 0.6, "softmax": 0.99}
    assert asked == [["near=folder:/cats"]]
    path.unlink()
    other = {**given, "config": dataclasses.replace(config, lr=0.3).to_dict()}
    with pytest.raises(InputError, match="the configuration differs from .*: lr: 0.02 -> 0.3"):
        worker.work(other)

    worker.work({**given, "val_images": 6, "measures": ["knn20"]})
    assert json.loads(path.read_text())["val_images"] == 6
    val = load_run(folder, device="cpu", workers=0).splits.val
    assert val is not None
    assert np.bincount(worker.at_most(val, 6).labels).tolist() == [3, 3], "drawn class by class"
    assert worker.at_most(val, 16) is val


def test_a_distribution_is_fitted_to_the_run_of_another_arm(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "evaluate_uncertainty", lambda run, **_: UNCERTAINTY)
    simsiam = tiny_config(f"folder:{image_folder}", method="simsiam", epochs=1)
    found = {}
    for after in (None, str(tmp_path / "simsiam" / "runs" / "arm-seed-0")):
        method, name = ("simsiam", "simsiam") if after is None else ("vi-simsiam", "fitted")
        config = dataclasses.replace(simsiam, method=method)
        given = spec(
            config, tmp_path / name, measures=["logistic"], fitted=bool(after), after=after
        )
        worker.work(given)
        found[name] = json.loads(Path(given["result"]).read_text())
    assert found["fitted"]["correct"] == found["simsiam"]["correct"], "the encoder is the same"
    assert found["fitted"]["uncertainty"]["calibration_error"] == 0.25
    assert found["simsiam"]["uncertainty"] == {}
    assert found["fitted"]["config"]["model"]["projector"] == "standardised"
    assert str(tmp_path) not in json.dumps(found)

    folder = Path(given["folder"])
    (folder / "trained.json").unlink()  # as if it was killed before it was finished
    written = checkpoints(folder)[0].stat().st_mtime_ns
    worker.fit(config, folder, Path(after or ""))
    assert checkpoints(folder)[0].stat().st_mtime_ns > written
    worker.fit(config, folder, tmp_path / "nowhere")  # is not looked for: the run is finished


def test_a_loss_that_is_not_finite_is_a_result(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = spec(tiny_config(f"folder:{image_folder}", lr=1e30), tmp_path)
    path = Path(given["result"])
    line = worker.work(given)
    assert re.fullmatch(r"diverged: the loss is not finite at step \d+ \(epoch 1\)", line)
    assert str(tmp_path) not in path.read_text()
    result = json.loads(path.read_text())
    assert (f"diverged: {result['diverged']}", result["accuracy"]) == (line, {})
    path.unlink()

    monkeypatch.setattr(worker, "train", _fail)
    with pytest.raises(TrainingError, match="a worker died"):
        worker.work(given)
    assert not path.exists()


def test_the_command_of_a_run_is_a_program(tmp_path: Path) -> None:
    given = spec(tiny_config("fashion-mini"), tmp_path)
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(given))
    Path(given["result"]).write_text("{}")
    command = [*runner._WORKER, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "measured before\n")


def scores(key: str, **values: float) -> dict[str, Any]:
    """A part of an uncertainty.json with one figure of every score."""
    return {"scores": {score: {key: value} for score, value in values.items()}}


UNCERTAINTY: dict[str, Any] = {
    "calibration": {"error": 0.25},
    "misclassification": {
        "scores": {
            "kappa": {"auroc": 0.7, "aurc": 0.2, "augrc": 0.1},
            "contrast": {"auroc": 0.6, "aurc": 0.3, "augrc": 0.05},
            "softmax": {"auroc": 0.99, "aurc": 0.01, "augrc": 0.01},
        }
    },
    "retrieval": {
        "validation": {"seen_classes": True, "scores": {"kappa": 0.6, "contrast": None}},
        "digits": {"seen_classes": False, "scores": {"kappa": 0.4, "contrast": 0.3}},
    },
    "ood": {
        "cats": {"kind": "far", **scores("auroc", kappa=0.9, contrast=0.5, jpeg_size=0.8)},
        "dogs": {"kind": "far", **scores("auroc", kappa=0.5, contrast=1.0, jpeg_size=0.5)},
    },
    "corruptions": {"blur": scores("spearman", kappa=0.5, contrast=-0.5)},
}
for trend in UNCERTAINTY["corruptions"]["blur"]["scores"].values():
    trend["aurocs"] = [0.5, 0.5, 0.5, 0.5, 1.0]


def test_uncertainty_is_flattened_beside_the_best_trivial_score() -> None:
    """The softmax is no trivial score; a score that is missing somewhere does not count."""
    wanted: dict[str, tuple[float, float, str]] = {
        "auroc_misclassification": (0.7, 0.6, "contrast"),
        "aurc": (0.2, 0.3, "contrast"),
        "augrc": (0.1, 0.05, "contrast"),
        "auroc_retrieval_unseen": (0.4, 0.3, "contrast"),
        "ood_auroc": (0.7, 0.75, "contrast"),
        "ood_auroc_cats": (0.9, 0.8, "jpeg_size"),
        "ood_auroc_dogs": (0.5, 1.0, "contrast"),
        "spearman_corruption": (0.5, -0.5, "contrast"),
    }
    found = worker.flat_uncertainty(UNCERTAINTY)
    assert (found.pop("calibration_error"), found.pop("auroc_retrieval")) == (0.25, 0.6)
    for name, (own, baseline, score) in wanted.items():
        values = [found.pop(name), found.pop(f"{name}_baseline")]
        assert values == pytest.approx([own, baseline])
        assert found.pop(f"{name}_baseline_name") == score
    assert not found


def test_a_curve_keeps_its_ends_and_five_digits(tmp_path: Path) -> None:
    assert worker.curve(tmp_path) == {}
    lines = [{"step": i, "epoch": i / 10, "loss": 1 / 3 + i, "lr": 0.1} for i in range(1001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = worker.curve(tmp_path)
    assert list(found) == ["epoch", "loss"]
    assert len(found["epoch"]) == worker.CURVE_POINTS
    assert (found["epoch"][0], found["epoch"][-1]) == (0.0, 100.0)
    gaps = np.diff(found["epoch"])
    assert gaps.max() - gaps.min() < 0.11, "evenly apart, up to a line"
    assert (found["loss"][0], found["loss"][-1]) == (0.33333, 1000.3)
