"""The doctor: verdicts on synthetic logs, a real loss that is not finite, and an early end."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_trainer import QUIET, Watched, config, metrics, train

from vi_simsiam.cli import main
from vi_simsiam.config import LossConfig, ModelConfig, TrainConfig
from vi_simsiam.engine.checkpoint import Checkpoint, load_last
from vi_simsiam.engine.doctor import diagnose
from vi_simsiam.engine.processes import locked
from vi_simsiam.engine.replay import replay
from vi_simsiam.engine.run import LOCK, load_run, read_config
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import CollapsedError, InputError, TrainingError
from vi_simsiam.files import write_json
from vi_simsiam.models import Output

pytestmark = pytest.mark.usefixtures("small_network")

GOOD: dict[str, Any] = {
    "loss": -40.0, "cosine": 0.7, "z_std": 0.95, "projection_spread": 0.8, "kappa": 2.3,
    "kappa_best": 2.33, "effective_rank": 20.0, "grad_norm": 1.0, "lr": 0.001, "data_wait": 0.02,
}  # fmt: skip
STEPS = 20
"""Lines of a log, one for every epoch of ten steps."""


def log(
    folder: Path, *changes: dict[str, Any], settings: TrainConfig | None = None, epochs: int = STEPS
) -> Path:
    """A run whose log has `STEPS` good lines, the last of them changed; nobody trains it."""
    folder.mkdir()
    settings = settings or TrainConfig()
    write_json(folder / "config.json", dataclasses.replace(settings, epochs=epochs).to_dict())
    lines = [
        {"step": 10 * number, "epoch": float(number), "seconds": float(number)} | GOOD
        for number in range(1, STEPS + 1)
    ]
    for line, change in zip(lines[len(lines) - len(changes) :], changes, strict=True):
        line |= change
    path = folder / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    os.utime(path, (0, 0))
    return folder


def saved(folder: Path, step: int) -> None:
    """A checkpoint of that step."""
    Checkpoint(step, 0.0, 8, {}).save(folder / f"checkpoint-{step:08d}.safetensors")


def curve(name: str, *values: float) -> list[dict[str, Any]]:
    """Changes that give the last lines these values."""
    return [{name: value} for value in values]


FALLING = [{"loss": -10.0 - number, "knn": 0.4} for number in range(STEPS)]


@pytest.mark.parametrize(
    ("changes", "name", "figure", "remedy"),
    [
        (curve("z_std", *[0.1] * 5), "collapsed since step 160", "z-std 0.10", "a smaller --lr"),
        (curve("projection_spread", *[0.001] * 3), "collapsed since", "0.1% of the", "--warmup"),
        (curve("effective_rank", *[1.2] * 3), "few directions", "effective rank 1.20", "--lr"),
        (curve("kappa", *[0.01] * 5), "dead since step 160", "2.3 would fit", "--clip-norm 1"),
        (curve("kappa", *[60.0] * 3), "kappa runs away", "60, where 2.3", "--concentration-max"),
        (curve("cosine", *[0.01] * 5), "not learning since", "cosine 0.01", "more --epochs"),
        (curve("grad_norm", *[300.0] * 3), "exploding gradients", "300 at least", "--clip-norm 1"),
        (curve("data_wait", *[0.8] * 10), "training waits for data", "80%", "--workers"),
        (FALLING, "features do not improve", "40.0% in the first", "--crop-scale"),
    ],
)
def test_a_problem_has_its_figure_and_remedy(
    tmp_path: Path, changes: list[dict[str, Any]], name: str, figure: str, remedy: str
) -> None:
    (found,) = diagnose(log(tmp_path / "run", *changes)).findings
    assert found.name.startswith(name)
    assert figure in found.figure
    assert remedy in found.remedy
    assert found.limit


@pytest.mark.parametrize(
    "changes",
    [
        [],
        curve("grad_norm", 300.0),  # one batch is no explosion
        curve("kappa", 60.0),
        [{"loss": -10.0 - number, "knn": 0.4 + 0.01 * number} for number in range(STEPS)],
        [{"loss": -10.0, "knn": 0.4}] * STEPS,
        [{"loss": -10.0 - number, "knn": 0.95} for number in range(STEPS)],
        [{"grad_norm": float("nan"), "kappa_best": None}],
    ],
)
def test_a_healthy_run_has_a_short_line(
    tmp_path: Path, changes: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = log(tmp_path / "run", *changes)
    assert diagnose(folder).findings == ()
    assert main(["doctor", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "step 200 of 200, finished" in shown
    assert "healthy: loss " in shown


def test_a_constant_kappa_does_not_run_away(tmp_path: Path) -> None:
    constant = LossConfig(concentration="constant", concentration_value=60.0)
    settings = TrainConfig(loss=constant)
    assert not diagnose(log(tmp_path / "run", *[{"kappa": 60.0}] * 3, settings=settings)).findings


def test_a_fitted_run_has_remedies_of_its_command(tmp_path: Path) -> None:
    """The encoder is given, and with it the rank of the targets."""
    settings = TrainConfig(model=ModelConfig(projector="standardised"))
    lines = [{"kappa": 60.0, "effective_rank": 1.2}] * 3
    (found,) = diagnose(log(tmp_path / "run", *lines, settings=settings)).findings
    assert (found.name, found.remedy) == ("kappa runs away", "more --epochs than 20")


def test_a_run_that_stopped_has_the_way_in_which_it_did(tmp_path: Path) -> None:
    """A signal lets the training save where it stops; nothing lets it after SIGKILL."""
    rates = curve("lr", *[0.012] * STEPS)
    for name, step, ending in (("a", 200, "interrupted"), ("b", 150, "killed")):
        folder = log(tmp_path / name, *rates, epochs=100)
        saved(folder, step)
        found = diagnose(folder)
        assert found.title == f"vi-simsiam, step 200 of 1000, {ending}"
        stopped, rate = found.findings
        assert (stopped.name, rate.name) == (ending, "the learning rate never fell")
        assert stopped.remedy == f"vi-simsiam train --out {folder} --resume"
    os.utime(folder / "metrics.jsonl")
    found = diagnose(folder)
    assert found.title.endswith("still going on")
    assert found.findings == ()


def test_only_the_checkpoint_shows_that_a_run_is_finished(tmp_path: Path) -> None:
    """The last line of the log is written before the last checkpoint."""
    folder = log(tmp_path / "run")
    assert diagnose(folder).title.endswith("finished"), "without weights, as in a copy"
    for step, ending in ((150, "killed"), (200, "finished")):
        saved(folder, step)
        assert diagnose(folder).title == f"vi-simsiam, step 200 of 200, {ending}"
    os.utime(folder / "metrics.jsonl")
    (folder / "checkpoint-00000200.safetensors").write_text("damaged")
    assert diagnose(folder).title.endswith("finished"), "at once, and whatever became of the file"


def test_a_damaged_checkpoint_of_version_0_1_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds its step itself; the rest of the diagnosis is made without it."""
    folder = log(tmp_path / "run", *curve("z_std", *[0.1] * 5))
    (folder / "checkpoint.pt").write_bytes(b"PK, and then nothing")
    damage, collapse = diagnose(folder).findings
    assert damage.name == "the weights are damaged"
    assert f"{folder / 'checkpoint.pt'} cannot be read" in damage.figure
    assert damage.remedy.endswith(f"vi-simsiam train --out {folder} --overwrite")
    assert collapse.name.startswith("collapsed")
    assert main(["doctor", str(folder)]) == 1
    assert "the weights are damaged" in capsys.readouterr().out


def test_a_lock_separates_a_run_in_progress_from_a_killed_one(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its lock, whatever the age of its log."""
    trainer = Trainer(config(image_folder, log_every=1), tmp_path / "run", console=QUIET)
    titles = []

    def look() -> None:
        if trainer.step == 6:
            titles.append(diagnose(trainer.folder).title)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(trainer, "train_step", Watched(trainer.train_step, look))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    titles.append(diagnose(trainer.folder).title)
    assert titles == [
        "vi-simsiam, step 6 of 10, still going on",
        "vi-simsiam, step 7 of 10, interrupted",
    ]


def test_a_training_starts_while_the_doctor_looks(image_folder: Path, tmp_path: Path) -> None:
    """Its look at the lock takes a moment; a training holds it for longer."""
    trainer = Trainer(config(image_folder, epochs=1), tmp_path / "run", console=QUIET)
    trainer.folder.mkdir()
    taken = threading.Event()

    def look() -> None:
        with locked(trainer.folder / LOCK, busy=""):
            taken.set()
            time.sleep(0.3)

    with ThreadPoolExecutor() as pool:
        looking = pool.submit(look)
        assert taken.wait(10)
        trainer.fit()
        looking.result()
    assert load_last(trainer.folder).step == 5


def test_commands_in_messages_are_quoted(tmp_path: Path) -> None:
    folder = log(tmp_path / "my run", epochs=100)
    saved(folder, 150)
    (stopped, *_) = diagnose(folder).findings
    assert stopped.remedy == f"vi-simsiam train --out '{folder}' --resume"


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = log(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "empty")], "holds no run"),
        ([str(run), "--replay"], "has no failure.json"),
    ):
        assert main(["doctor", *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    odd = ['{"step": NaN}', "[]", '{"step": "7"}', '{"st', '{"epoch": 1}', "\xff"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join([*odd, '{"step": 210, "epoch": 1e-320, "loss": null, "lr": null}']))
    saved(run, 300)
    assert diagnose(run).title == "vi-simsiam, step 210, still going on"
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="nothing in its metrics"):
        diagnose(run)
    for content in ("{", '{"step": 1}', '{"step": "7"}'):
        (run / "failure.json").write_text(content)
        with pytest.raises(InputError, match=r"failure\.json is damaged"):
            diagnose(run)


def failed(settings: TrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A run whose loss is not finite at step 7, as a real one that has failed."""
    trainer = Trainer(settings, folder, console=QUIET)
    loss = trainer.model.loss

    def broken(output: Output, backend: str, loss_scale: float) -> torch.Tensor:
        return loss(output, backend, loss_scale) * (float("nan") if trainer.step == 6 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "loss", broken)
        with pytest.raises(TrainingError, match=r"step 7 \(epoch 2\).*doctor .* --replay shows"):
            trainer.fit()
    return trainer


def test_a_failure_counts_until_the_run_has_gone_on(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    failed(config(image_folder), run, monkeypatch)
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint*", ".*"))
    os.utime(copy / "metrics.jsonl", (0, 0))
    for folder in (run, copy):
        assert diagnose(folder).title.endswith("stopped at a loss that is not finite")
    saved(run, load_last(run).step + 1)
    assert diagnose(run).title.endswith("interrupted")


def test_the_batch_of_a_loss_that_is_not_finite_is_made_again(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    opened = partial(load_run, run, device="cpu", workers=0)
    settings = config(image_folder, save_every=1000.0, log_every=4)
    trainer = failed(settings, run, monkeypatch)
    found = json.loads((run / "failure.json").read_text())
    assert (found["step"], found["epoch"], found["loss"]) == (7, 2, "nan")
    assert len(found["losses"]) == 1  # of step 6: the line before is that of step 5
    batches = list(trainer.loader.epoch(1))
    assert found["images"] == batches[1].index.tolist()
    source = trainer.loader.source
    assert found["names"] == [source.describe(index) for index in found["images"]]

    assert main(["doctor", str(run), "--replay", "--device", "cpu", "--workers", "0"]) == 1
    shown = capsys.readouterr().out
    assert "nan at step 7 (epoch 2)" in shown
    assert "no image is extreme by itself, and all are finite" in shown
    assert max(map(len, shown.splitlines())) <= 80 + len(str(run))
    assert Image.open(run / "failure.png").size == (3 * 16 + 8, 8 * 20 - 4)
    again = replay(run, opened)
    model = trainer.model  # with the checkpoint's weights and the batch: the same step
    load_last(run).restore(model)
    output = model.train()(batches[1].views)
    assert again.loss == pytest.approx(model.loss(output, loss_scale=1 / 31).item() * 31, rel=1e-4)

    (run / "failure.json").write_text(json.dumps({**found, "rows": found["rows"][::-1]}))
    with pytest.raises(InputError, match="does not give the batch"):
        replay(run, opened)
    (run / "failure.json").write_text(json.dumps(found))
    train(settings, run, resume=True)
    assert not (run / "failure.json").exists()
    assert diagnose(run).title.endswith("finished")


def test_images_that_are_not_finite_or_extreme_are_named(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed(config(image_folder), tmp_path / "run", monkeypatch)
    run = load_run(tmp_path / "run", device="cpu", workers=0)

    class Odd(torch.nn.Module):
        """Features of ones; those of the brightest and darkest image are longer, or no numbers."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            brightness = images.mean((1, 2, 3))
            features = torch.ones(len(images), 32)
            features[brightness.argmax()] = 1e3
            features[brightness.argmin()] = torch.nan
            return features

    monkeypatch.setattr(run.model, "backbone", Odd())
    found = replay(run.path, lambda: run)
    assert found.statistics == {}
    assert np.isnan(found.loss)
    reasons = sorted(line.rpartition(": ")[2] for line in found.suspects)
    assert set(reasons) == {
        "its features are 1000 times as long as usual",
        "its features are not finite",
    }
    assert all(str(image_folder) in line for line in found.suspects)


def collapsing(settings: TrainConfig, folder: Path) -> Trainer:
    """A trainer whose targets have collapsed from the start on."""
    trainer = Trainer(settings, folder, console=QUIET)
    with torch.no_grad():
        for parameter in trainer.model.projector.parameters():
            parameter.zero_()
    return trainer


def test_a_collapse_ends_a_run_that_can_go_on(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(image_folder, stop_on="collapse")
    run = tmp_path / "run"
    trainer = collapsing(settings, run)
    with pytest.raises(CollapsedError, match=r"saved at step 2; .*--resume --stop-on None"):
        trainer.fit()
    assert load_last(run).step == 2
    found = diagnose(run)
    assert found.title == "vi-simsiam, step 2 of 10, stopped since it has collapsed"
    names = {finding.name for finding in found.findings}
    assert {"ended early by --stop-on", "collapsed since step 2"} <= names
    assert main(["train", "--out", str(run), "--resume", "--quiet"]) == 3
    assert capsys.readouterr().err.startswith("vi-simsiam: the training has collapsed")
    assert main(["train", "--out", str(run), "--resume", "--quiet", "--stop-on", "None"]) == 0
    assert metrics(run)[-1]["step"] == 10
    assert read_config(run).stop_on is None, "so that --resume alone goes on as well"
