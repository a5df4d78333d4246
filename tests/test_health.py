"""Trainings that go wrong in each way that has a verdict, and every place that shows it."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_cases import skip_rendering
from rich.console import Console
from test_trainer import Watched, config, metrics

from vi_simsiam.cli.evaluate import evaluate_run
from vi_simsiam.config import SOFTPLUS, AugmentConfig, ModelConfig
from vi_simsiam.engine import verdict
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.run import load_run
from vi_simsiam.engine.train import Trainer
from vi_simsiam.evaluation import report
from vi_simsiam.evaluation.linear import LinearConfig, evaluate_linear

pytestmark = pytest.mark.usefixtures("small_network")


def trained(
    images: Path,
    folder: Path,
    damage: Callable[[Trainer], object] = lambda trainer: None,
    **changes: Any,
) -> tuple[list[str], list[dict[str, Any]]]:
    """Train on 40 images, 5 steps an epoch, with `damage` to the trainer before every step.

    Returns the printed and the logged lines.
    """
    settings = config(
        images,
        **{"epochs": 4, "lr": 0.05, "log_every": 1} | changes,
        augment=AugmentConfig(size=8, blur_prob=0.0),
        model=ModelConfig(dim=32, projector_hidden=32, predictor_hidden=64),
    )
    console = Console(file=io.StringIO(), width=400)
    trainer = Trainer(settings, folder, console=console)
    trainer.train_step = Watched(trainer.train_step, lambda: damage(trainer))  # type: ignore[assignment]
    trainer.fit()
    return console.file.getvalue().splitlines(), metrics(folder)  # type: ignore[attr-defined]


def test_a_concentration_that_dies_is_named_by_training_evaluation_and_report(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likelihood alone, whose raw concentration falls far down before the eighth step."""

    def lower(trainer: Trainer) -> None:
        if trainer.step == 7:
            torch.nn.init.constant_(trainer.model.predictor[-1].bias[32:33], -20.0)

    lines, logged = trained(image_folder, tmp_path, lower, loss=SOFTPLUS)
    last = logged[-1]
    assert last["state"] == "dead"
    # The first of three lines without a concentration is the first after three that have one.
    assert 6 <= last["since"] <= 8
    dead = f"dead since step {last['since']}"
    assert lines[-1].startswith(f"{dead}: kappa/(D-1) ")
    assert "try --concentration-link quadratic --cosine-weight 1" in lines[-1]
    assert any(line.startswith("warning: step ") and "dead since step" in line for line in lines)
    run = load_run(tmp_path, device="cpu", workers=0)
    console = Console(file=io.StringIO(), width=400)
    brief = functools.partial(evaluate_linear, config=LinearConfig(epochs=1, min_steps=0))
    monkeypatch.setattr("vi_simsiam.evaluation.linear.evaluate_linear", brief)
    skip_rendering(monkeypatch)
    evaluate_run(run, World(run.device), console, quiet=True)
    assert f"warning: training {dead}" in console.file.getvalue()  # type: ignore[attr-defined]
    page = report.write_report(tmp_path).read_text()
    assert f"<strong>Training:</strong> {dead}" in page.partition("<main>")[0]


def test_projections_that_collapse_before_batch_norm_are_named(
    image_folder: Path, tmp_path: Path
) -> None:
    """All images at nearly one point, which the last BatchNorm stretches to an even spread."""

    def collapse(trainer: Trainer) -> None:
        if trainer.step == 0:
            hidden = trainer.model.projector[-2]
            hidden.register_forward_hook(lambda module, inputs, z: z[:1] + 1e-3 * z)

    lines, logged = trained(image_folder, tmp_path, collapse, epochs=8)
    last = logged[-1]
    assert last["state"] == "collapsed"
    assert last["z_std"] > 2 * verdict.COLLAPSE_THRESHOLD, "the BatchNorm hides it"
    assert lines[-1].startswith(f"collapsed since step {last['since']}: 0.")
    assert "of the projections before the last BatchNorm differs between images" in lines[-1]


def test_the_default_loss_learns_and_kappa_follows(image_folder: Path, tmp_path: Path) -> None:
    lines, logged = trained(image_folder, tmp_path, lr=0.1, epochs=8)
    assert {line["state"] for line in logged} == {"learning"}
    assert lines[-1].startswith("learned: ")
    late = logged[len(logged) // 2 :]
    ratio = sum(line["kappa"] for line in late) / sum(line["kappa_best"] for line in late)
    assert 0.3 < ratio < 3
