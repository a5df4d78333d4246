"""The benchmark of whole trainings: its clock, the trainings, and their comparison."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from benchmark_cases import CPU, needs_gpu
from rich.console import Console
from test_trainer import config
from torch import Tensor, nn

from vi_simsiam.benchmarks import plots, train, train_peers
from vi_simsiam.benchmarks.results import LIGHTLY, OURS, OURS_SIMSIAM, read_result
from vi_simsiam.benchmarks.train_peers import Recorder
from vi_simsiam.config import ModelConfig
from vi_simsiam.engine.monitor import Monitor
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError
from vi_simsiam.functional import cosine_loss


def options(**changed: Any) -> train.Options:
    small = {"images": 8, "size": 8, "batch_size": 4, "epochs": 2, "workers": 0}
    return train.Options(device="cpu", **{**small, **changed})


@pytest.fixture
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither warm up nor collect garbage, which takes longer than a training here."""
    monkeypatch.setattr(train, "_warm_up", lambda *_: None)
    monkeypatch.setattr(train_peers, "gc", mock.Mock())


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> dict[str, train.Trains]:
    """The trainings of `train.run`, to be filled by the test."""
    given: dict[str, train.Trains] = {}
    monkeypatch.setattr(train, "PROVIDERS", given)
    return given


class Constant(nn.Flatten):
    """Features without training."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))


def trains(*, epochs: int | None = None, loss: float = 1.0, weight: float = 1.0) -> train.Trains:
    def call(training: train_peers.Training, recorder: Recorder) -> None:
        for _ in range(training.config.epochs if epochs is None else epochs):
            recorder.epoch_done(Constant(weight), torch.tensor(loss))

    return call


def raises(error: BaseException) -> train.Trains:
    return mock.Mock(side_effect=error)


@pytest.mark.usefixtures("no_warm_up")
def test_recorder_stands_still_while_features_are_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0, 110.0, 114.0, 124.0, 128.0, 129.0]
    monkeypatch.setattr(train_peers, "time", mock.Mock(perf_counter=mock.Mock(side_effect=now)))
    recorder = Recorder(CPU, 2, mock.Mock(side_effect=[0.5, 0.7]), 1)
    trains(epochs=2)(mock.Mock(), recorder)
    recorder.finish()
    assert recorder.epoch_ends == [10.0, 20.0]
    assert recorder.accuracies == [(1, 10.0, 0.5), (2, 20.0, 0.7)]
    assert recorder.evaluation_seconds == 4.0
    assert recorder.total_seconds == 21.0
    given = train.Options(epochs=2, images=64, target_accuracy=0.6)
    found = train.summary([recorder], given, steps_per_epoch=5)
    assert found["time"]["median_us"] == 2e6
    assert (found["cold_start_seconds"], found["training_seconds"]) == (0.0, 21.0)
    assert found["views_per_second"] == 64.0
    assert (found["knn_top1"], found["seconds_to_target"]) == (0.7, 20.0)
    other = dataclasses.replace(given, target_accuracy=0.9)
    assert train.summary([recorder], other, steps_per_epoch=5)["seconds_to_target"] is None


@pytest.mark.usefixtures("no_warm_up")
def test_trainings_are_compared_in_turn_and_failures_recorded(
    image_folder: Path, tmp_path: Path, providers: dict[str, train.Trains]
) -> None:
    order: list[str] = []
    given = {
        "vi-simsiam": trains(),
        "lightly": raises(ImportError("lightly is not installed")),
        "plain PyTorch": trains(),
        "short": trains(epochs=1),
        "empty": trains(epochs=0),
        "nan": trains(loss=math.nan),
        "inf": trains(weight=math.inf),
    }

    def noted(name: str) -> train.Trains:
        return lambda *arguments: order.append(name) or given[name](*arguments)

    providers |= {name: noted(name) for name in given}
    chosen = options(rounds=2, epochs=3, out=tmp_path)
    result = train.run(chosen)
    assert order[:7] == ["lightly", *(name for name in given if name != "lightly")]
    assert order[7:] == ["vi-simsiam", "plain PyTorch"], "what failed is not trained again"
    (case,) = result["cases"]
    assert case["name"] == "generated 2x8 batch 4, 3 epochs of 8 images"
    mine, other = case["providers"]["vi-simsiam"], case["providers"]["plain PyTorch"]
    assert mine["correct"]
    assert mine["time"]["rounds"] == 4, "two later epochs of two trainings"
    assert mine["caching_seconds"] > 0
    assert other["caching_seconds"] is None
    assert 0 <= mine["knn_top1"] <= 1
    failures = {n: each["failure"] for n, each in case["providers"].items() if not each["correct"]}
    assert failures == {
        "lightly": "ImportError: lightly is not installed",
        "short": "TrainingError: wrong: 1 of 3 epochs were trained",
        "empty": "TrainingError: wrong: 0 of 3 epochs were trained",
        "nan": "TrainingError: diverged: losses or weights are not finite",
        "inf": "TrainingError: diverged: losses or weights are not finite",
    }
    assert all(case["providers"][name]["time"] is None for name in failures)
    written = json.loads((tmp_path / "cpu" / "train.json").read_text())
    assert written["cases"] == json.loads(json.dumps(result["cases"]))
    assert (tmp_path / "cpu" / "train.png").read_bytes().startswith(b"\x89PNG")
    for changed, message in (
        ({"only": "x"}, "no provider's name contains 'x'; there are 'vi-simsiam', 'lightly'"),
        (
            {"data": f"folder:{image_folder}", "images": None, "batch_size": 300},
            "batch_size: 300 must be at most 40",
        ),
    ):
        with pytest.raises(InputError, match=message):
            train.run(dataclasses.replace(chosen, **changed))


@pytest.mark.usefixtures("no_warm_up")
def test_a_benchmark_that_is_stopped_leaves_the_trainings_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, providers: dict[str, train.Trains]
) -> None:
    monkeypatch.setattr(plots, "draw", lambda *_: [])
    providers |= {
        "vi-simsiam": trains(),
        "plain PyTorch": raises(KeyboardInterrupt()),
        "lightly": trains(),
    }
    with pytest.raises(KeyboardInterrupt):
        train.run(options(out=tmp_path))
    path = tmp_path / "cpu" / "train.json"
    (case,) = json.loads(path.read_text())["cases"]
    assert [each["time"] is not None for each in case["providers"].values()] == [True, False, True]
    assert case["providers"]["plain PyTorch"]["failure"] == "stopped before its last training"
    providers["plain PyTorch"] = trains()
    content = json.loads(path.read_text())
    lightly = content["cases"][0]["providers"]["lightly"]
    for seconds in (math.nan, -math.inf):
        lightly["cold_start_seconds"] = seconds
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match="cold_start_seconds"):
            read_result(path, "train")
    lightly["cold_start_seconds"] = -0.1  # a first epoch can be faster than the later ones
    path.write_text(json.dumps(content))
    train.run(options(out=tmp_path, resume=True))
    (case,) = json.loads(path.read_text())["cases"]
    assert case["providers"]["plain PyTorch"]["correct"], "a case is measured anew as a whole"


@pytest.mark.usefixtures("no_warm_up")
def test_a_training_that_learnt_much_less_than_lightlys_has_no_speed(
    monkeypatch: pytest.MonkeyPatch, providers: dict[str, train.Trains]
) -> None:
    shares = {LIGHTLY: 0.9, OURS_SIMSIAM: 0.1, train_peers.PLAIN: 0.6, OURS: 0.1}
    providers |= dict.fromkeys(shares, trains())
    monkeypatch.setattr(train, "knn_top1", mock.Mock(side_effect=shares.values()))
    (case,) = train.run(options())["cases"]
    found = case["providers"]
    assert [name for name, values in found.items() if not values["correct"]] == [OURS_SIMSIAM]
    assert found[OURS_SIMSIAM]["failure"] == "wrong: kNN top-1 10.0%, lightly's 90.0%"
    assert found[OURS_SIMSIAM]["time"] is None
    again = {name: {"knn_top1": share, "correct": True} for name, share in shares.items()}
    train.refuse_worse(again, images=10_000)
    wrong = [name for name, values in again.items() if not values["correct"]]
    assert wrong == [OURS_SIMSIAM, train_peers.PLAIN], "four standard errors of so many are small"


def test_train_options_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="images: 3 must be at least 64"):
        train.Options(images=3)
    with pytest.raises(InputError, match="epochs: 1 must be at least 2"):
        train.Options(epochs=1)
    with pytest.raises(InputError, match="target_accuracy: 60.0 must lie between 0 and 1"):
        train.Options(target_accuracy=60.0)


@pytest.mark.usefixtures("small_network", "no_warm_up")
@pytest.mark.parametrize("name", [train_peers.PLAIN, train_peers.TUNED, LIGHTLY, OURS_SIMSIAM])
def test_each_training_trains(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    providers: dict[str, train.Trains],
) -> None:
    """With a tiny network: it has a speed and an accuracy, and the weights moved."""
    if name == LIGHTLY:
        pytest.importorskip("lightly")
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(plots, "draw", lambda *_: [])
    log = Monitor.log
    captured = {"captured": True}  # as on a GPU
    monkeypatch.setattr(Monitor, "log", lambda self, metrics, _: log(self, metrics, captured))
    small = ModelConfig(dim=16, projector_hidden=8, predictor_hidden=8)
    sums: list[float] = []

    class Watched(Recorder):
        def epoch_done(self, backbone: nn.Module, loss: Tensor) -> None:
            sums.append(sum(parameter.abs().sum().item() for parameter in backbone.parameters()))
            super().epoch_done(backbone, loss)

    def watched(training: train_peers.Training, recorder: Recorder) -> None:
        config = dataclasses.replace(training.config, model=small, workers=0)
        train_peers.PROVIDERS[name](dataclasses.replace(training, config=config), recorder)

    monkeypatch.setattr(train, "Recorder", Watched)
    providers[name] = watched
    result = train.run(options(size=16, out=tmp_path))
    found = result["cases"][0]["providers"][name]
    assert found["correct"], found["failure"]
    assert found["views_per_second"] > 0
    assert 0 <= found["knn_top1"] <= 1
    assert len(set(sums)) == 2, "each epoch changed the weights"
    assert found["captured"] == (True if name == OURS_SIMSIAM else None)


@pytest.mark.usefixtures("small_network")
def test_an_epoch_is_over_before_its_checkpoint(image_folder: Path, tmp_path: Path) -> None:
    """The time of an epoch does not include the writing of hundreds of megabytes."""
    settings = config(image_folder, save_every=3600.0)
    trainer = Trainer(settings, tmp_path / "run", console=Console(quiet=True))
    unsaved: list[int] = []
    trainer.fit(epoch_done=lambda: unsaved.append(trainer.step - trainer.saver.step))
    assert unsaved == [5, 10]


def test_every_training_has_the_same_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = [torch.randn(4, 8, generator=generator) for _ in range(3)]
    targets = [torch.randn(4, 8, generator=generator) for _ in range(2)]
    found = train_peers._over_pairs(train_peers._half_loss, predictions, targets)
    expected = cosine_loss(tuple(predictions), tuple(targets))
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", [train_peers.PLAIN, LIGHTLY, OURS])
def test_gpu_training_of_each_provider(name: str, providers: dict[str, train.Trains]) -> None:
    given = train.Options(device="cuda", images=64, batch_size=32, epochs=2, workers=1)
    providers[name] = train_peers.PROVIDERS[name]
    result = train.run(given)
    found = result["cases"][0]["providers"][name]
    assert found["correct"] or "not installed" in found["failure"], found["failure"]
    assert not found["correct"] or found["peak_bytes"] > 10**8
