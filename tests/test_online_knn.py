"""The kNN accuracy during a training: measured, logged, shown, and without effect on the run."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_figures import drawn  # noqa: F401  # a fixture
from test_monitor import METRICS, opened, printed, terminal
from test_trainer import QUIET, Watched, config, metrics, same, train, weights

from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.engine import knn
from vi_simsiam.engine.checkpoint import load_best
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.figures import draw_curves

pytestmark = pytest.mark.usefixtures("small_network")


def test_a_run_is_the_same_with_and_without_it(image_folder: Path, tmp_path: Path) -> None:
    """Weights, BatchNorm statistics, generators, and every figure but the accuracy and times."""
    generators = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    for name, every in (("without", None), ("with", 2)):
        train(config(image_folder, epochs=4, knn_every=every), tmp_path / name)
    assert same(weights(tmp_path / "without"), weights(tmp_path / "with"))
    assert torch.equal(torch.random.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])
    plain, measured = metrics(tmp_path / "without"), metrics(tmp_path / "with")
    assert {line["step"] for line in measured if "knn" in line} == {10, 20}
    assert all(0 <= line["knn"] <= 1 for line in measured if "knn" in line)
    times = {"knn", "views_per_s", "data_wait", "seconds"}
    for first, second in zip(plain, measured, strict=True):
        assert first.keys() - times == second.keys() - times
        assert all(first[name] == second[name] for name in first.keys() - times)


def test_a_resumed_run_is_the_same_and_measures_by_its_present_options(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(image_folder, epochs=4)
    train(dataclasses.replace(settings, knn_every=1), tmp_path / "whole")
    trainer = Trainer(settings, tmp_path / "run", console=QUIET)

    def stop() -> None:
        if trainer.step == 6:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(trainer, "train_step", Watched(trainer.train_step, stop))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    resumed = train(dataclasses.replace(settings, knn_every=1), tmp_path / "run", resume=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    found, whole = (
        {line["step"]: line["knn"] for line in metrics(tmp_path / name) if "knn" in line}
        for name in ("run", "whole")
    )
    assert found == {step: whole[step] for step in (10, 15, 20)}
    assert resumed.knn == found[20]


def test_its_time_is_not_counted(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock jumps by a thousand seconds in every measurement."""
    clock, jumps = time.perf_counter, [0.0]

    def measure(self: knn.OnlineKnn, backbone: torch.nn.Module) -> float:
        jumps[0] += 1000.0
        return 0.5

    monkeypatch.setattr(knn.OnlineKnn, "measure", measure)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + jumps[0])
    train(config(image_folder, knn_every=1, log_every=1), tmp_path / "run")
    assert jumps == [2000.0]
    assert all(line["seconds"] < 1000 for line in metrics(tmp_path / "run"))
    assert all(line["views_per_s"] > 16 / 1000 for line in metrics(tmp_path / "run"))


def test_the_best_weights_are_those_that_were_measured(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of an epoch, however seldom checkpoints are written."""
    accuracies = iter([0.5, 0.7, 0.6])
    monkeypatch.setattr(knn.OnlineKnn, "measure", lambda self, backbone: next(accuracies))
    settings = config(image_folder, epochs=3, knn_every=1, save_every=1000.0)
    trainer = train(settings, tmp_path / "run")
    best = load_best(tmp_path / "run")
    assert (best.step, best.knn, trainer.knn) == (10, 0.7, 0.6)


def test_it_takes_labels(image_folder: Path, tmp_path: Path) -> None:
    data = f"folder:{image_folder / 'train' / 'dark'}"
    with pytest.raises(InputError, match=r"^knn_every: .*has no labels"):
        Trainer(config(image_folder, data=data, knn_every=1), tmp_path / "run")
    with pytest.raises(InputError, match=r"^knn_every: 0 is not accepted"):
        config(image_folder, knn_every=0)
    assert not (tmp_path / "run").exists()


def test_dark_and_bright_images_are_classified(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels as features; of each class the same share is drawn, the same every time."""
    monkeypatch.setattr(knn, "_FEWEST", 10)
    monkeypatch.setitem(knn._PIXELS, "cpu", 1)
    splits = open_dataset(str(image_folder))
    packed, _ = knn.cached(splits.train)
    settings, cpu = config(image_folder, knn_every=1), torch.device("cpu")
    online, again, other = (
        knn.OnlineKnn(dataclasses.replace(settings, seed=seed), splits, packed, cpu)
        for seed in (0, 0, 1)
    )
    assert [np.bincount(part.labels).tolist() for part in online._parts] == [[5, 5], [5, 5]]
    assert np.array_equal(online._parts[0].images, again._parts[0].images)
    assert not np.array_equal(online._parts[0].images, other._parts[0].images)

    class Brightness(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            mean = images.mean((1, 2, 3))
            return torch.stack([mean, torch.ones_like(mean)], 1)

    assert online.measure(Brightness()) == 1.0
    assert (
        online.measure(torch.nn.Sequential(Brightness(), torch.nn.Threshold(9, torch.nan))) is None
    )


def test_it_is_shown_on_the_bar_and_in_the_epochs_line(tmp_path: Path) -> None:
    console = terminal(120)
    with opened(tmp_path, console) as monitor:
        monitor.log(METRICS | {"knn": 0.625})
        monitor.log(METRICS | {"step": 30})
        monitor._progress.refresh()
        monitor.epoch_done(147, METRICS | {"knn": 0.625})
    lines = printed(console)
    assert any("kNN 62.5%" in line and "/29400" in line for line in lines)
    (line,) = (line for line in lines if line.startswith("epoch 1/200  loss"))
    assert "kNN 62.5%" in line


def test_the_curves_show_it_where_it_was_measured(
    image_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    saved: list[Figure] = request.getfixturevalue("drawn")
    train(config(image_folder, knn_every=1), tmp_path / "run")
    draw_curves(tmp_path / "run")
    (line,) = (
        line for axes in saved[0].axes for line in axes.lines if line.get_label() == "kNN accuracy"
    )
    expected: list[Any] = [line["knn"] for line in metrics(tmp_path / "run") if "knn" in line]
    assert line.get_xdata().tolist() == [1, 2]
    assert line.get_ydata().tolist() == expected
