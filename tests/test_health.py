"""Trainings that go wrong in each way that has a verdict, and every place that shows it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_trainer import config, metrics

from vi_simsiam.config import SOFTPLUS, AugmentConfig, ModelConfig
from vi_simsiam.engine.run import load_run
from vi_simsiam.engine.train import Trainer
from vi_simsiam.engine.verdict import COLLAPSE_THRESHOLD
from vi_simsiam.evaluation.report import write_report
from vi_simsiam.evaluation.summary import evaluate_run


def trained(
    images: Path, folder: Path, *, collapse: bool = False, **changes: Any
) -> tuple[list[str], list[dict[str, Any]]]:
    """Train on 40 images, 5 steps an epoch; returns the printed and the logged lines."""
    settings = config(
        images,
        **{"epochs": 8, "lr": 0.05, "log_every": 1} | changes,
        augment=AugmentConfig(size=8, blur_prob=0.0),
        model=ModelConfig(dim=32, projector_hidden=32, predictor_hidden=64),
    )
    console = Console(file=io.StringIO(), width=400)
    trainer = Trainer(settings, folder, console=console)
    if collapse:
        hidden = trainer.model.projector[-2]
        hidden.register_forward_hook(lambda module, inputs, z: z[:1] + 1e-3 * z)
    trainer.fit()
    return console.file.getvalue().splitlines(), metrics(folder)  # type: ignore[attr-defined]


def test_a_concentration_that_dies_is_named_by_training_evaluation_and_report(
    image_folder: Path, tmp_path: Path
) -> None:
    """The likelihood alone, kappa = (D-1) softplus(raw), ten times the learning rate."""
    lines, logged = trained(image_folder, tmp_path, lr=0.5, epochs=21, loss=SOFTPLUS)
    last = logged[-1]
    assert last["state"] == "dead"
    # The last three lines that live together: above a tenth of the best kappa, and 0.02.
    alive = 0
    for first in range(len(logged) - 2):
        three = logged[first : first + 3]
        kappa, best = (sum(line[name] for line in three) / 3 for name in ("kappa", "kappa_best"))
        alive = first if kappa >= max(0.1 * best, 0.02) else alive
    assert last["since"] == logged[alive + 1]["step"]
    dead = f"dead since step {last['since']}"
    assert lines[-1].startswith(f"{dead}: kappa/(D-1) ")
    assert "try --concentration-link quadratic --cosine-weight 1" in lines[-1]
    assert any(line.startswith("warning: step ") and "dead since step" in line for line in lines)
    run = load_run(tmp_path, device="cpu", workers=0)
    console = Console(file=io.StringIO(), width=400)
    evaluate_run(run, console=console, quiet=True)
    assert f"warning: training {dead}" in console.file.getvalue()  # type: ignore[attr-defined]
    page = write_report(tmp_path, run).read_text()
    assert f"<strong>Training:</strong> {dead}" in page.partition("<main>")[0]


@pytest.mark.usefixtures("small_network")
def test_projections_that_collapse_before_batch_norm_are_named(
    image_folder: Path, tmp_path: Path
) -> None:
    """All images at nearly one point, which the last BatchNorm stretches to an even spread."""
    lines, logged = trained(image_folder, tmp_path, collapse=True)
    last = logged[-1]
    assert last["state"] == "collapsed"
    assert last["z_std"] > 2 * COLLAPSE_THRESHOLD, "after the BatchNorm nothing is to be seen"
    assert lines[-1].startswith(f"collapsed since step {last['since']}: 0.")
    assert "of the projections before the last BatchNorm differs between images" in lines[-1]


@pytest.mark.usefixtures("small_network")
def test_a_training_that_does_not_learn_is_named(image_folder: Path, tmp_path: Path) -> None:
    lines, logged = trained(image_folder, tmp_path, lr=1e-6, epochs=21)
    last = logged[-1]
    assert last["state"] == "not learning"
    assert re.match(rf"not learning since step {last['since']}: cosine -?0\.0", lines[-1])
    assert "try more --epochs than 21" in lines[-1]


@pytest.mark.usefixtures("small_network")
def test_the_default_loss_learns_and_kappa_follows(image_folder: Path, tmp_path: Path) -> None:
    lines, logged = trained(image_folder, tmp_path, lr=0.1)
    assert {line["state"] for line in logged} == {"learning"}
    assert lines[-1].startswith("learned: ")
    late = logged[len(logged) // 2 :]
    ratio = sum(line["kappa"] for line in late) / sum(line["kappa_best"] for line in late)
    assert 0.3 < ratio < 3
