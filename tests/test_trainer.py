"""The trainer: that it learns, that a run can be interrupted anywhere, and that nothing on disk is lost."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from vi_simsiam.config import AugmentConfig, DecodeConfig, LossConfig, ModelConfig, TrainConfig
from vi_simsiam.data.cache import pack
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.engine.checkpoint import Checkpoint, write_atomically
from vi_simsiam.engine.monitor import effective_rank, representation_statistics
from vi_simsiam.engine.run import load_run, new_folder, resolve_device
from vi_simsiam.engine.step import TrainStep, learning_rates
from vi_simsiam.engine.trainer import Trainer
from vi_simsiam.errors import ImageWarning, InputError, TrainingError
from vi_simsiam.models import Output, SimSiam, VISimSiam

QUIET = Console(quiet=True)


def config(image_folder: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(
        data=f"folder:{image_folder}",
        epochs=2,
        batch_size=8,
        lr=0.02,
        workers=0,
        device="cpu",
        log_every=2,
        save_every=0.0,
        augment=AugmentConfig(size=16, blur_prob=0.0),
        model=ModelConfig(dim=32, projector_hidden=32, predictor_hidden=16),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def train(config: TrainConfig, folder: Path, **options: bool) -> Trainer:
    trainer = Trainer(config, folder, console=QUIET, **options)
    trainer.fit()
    return trainer


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Checkpoint.load(folder / "checkpoint.pt", torch.device("cpu")).model


def learned(lines: list[dict[str, float]]) -> bool:
    """Whether the last quarter's loss and cosine are better than the first's: single steps of batch 8 are noise."""
    quarter = len(lines) // 4
    first, last = (
        {name: sum(line[name] for line in part) / quarter for name in ("loss", "cosine")}
        for part in (lines[:quarter], lines[-quarter:])
    )
    return last["loss"] < first["loss"] - 0.05 and last["cosine"] > first["cosine"] + 0.03


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


class Watched:
    """A training step that first calls a function."""

    def __init__(self, step: TrainStep, before: Callable[[], object]) -> None:
        self.step, self.before = step, before

    def __call__(self, views: list[torch.Tensor]) -> Output:
        self.before()
        return self.step(views)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)


@pytest.mark.parametrize("method", ["vi-simsiam", "simsiam"])
def test_training_lowers_the_loss_and_writes_the_run(
    image_folder: Path, tmp_path: Path, method: str
) -> None:
    settings = config(image_folder, method=method, epochs=12, lr=0.05)
    trainer = train(settings, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == sorted({*range(2, 61, 2), *range(5, 61, 5)})
    assert learned(lines)
    assert ("kappa" in lines[-1]) == (method == "vi-simsiam")
    assert lines[-1]["lr"] == pytest.approx(float(trainer.train_step.rates[59]))
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    run = load_run(tmp_path / "run", device="cpu")
    assert run.config == settings.located()
    assert not run.model.training
    assert same(run.model.state_dict(), trainer.model.state_dict())


def test_the_same_configuration_gives_the_same_run(image_folder: Path, tmp_path: Path) -> None:
    train(config(image_folder), tmp_path / "a")
    train(config(image_folder, workers=1), tmp_path / "b")
    train(config(image_folder, seed=1), tmp_path / "c")
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_interrupted_anywhere_and_resumed_is_the_same_run(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 lies inside the first epoch: the views, the order, momentum and the learning rate must all go on."""
    settings = config(image_folder)
    train(settings, tmp_path / "whole")

    trainer = Trainer(settings, tmp_path / "parts", console=QUIET)

    def interrupt_at_3() -> None:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer, "train_step", Watched(trainer.train_step, interrupt_at_3))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Checkpoint.load(tmp_path / "parts" / "checkpoint.pt", torch.device("cpu")).step == 3

    train(settings, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [line["step"] for line in parts] == [line["step"] for line in whole]
    assert parts[-1]["loss"] == whole[-1]["loss"]


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="signals of POSIX")
def test_workers_that_end_with_the_job_break_into_nothing(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch system ends the loader's workers, too; torch's handler of their end raises wherever the program is."""

    def worker_died(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    before = signal.signal(signal.SIGCHLD, worker_died)
    try:
        trainer = Trainer(config(image_folder), tmp_path / "run", console=QUIET)
        save = trainer._save

        def save_while_a_worker_ends() -> None:
            if trainer.step:
                os.kill(os.getpid(), signal.SIGCHLD)
            save()

        end_the_job = Watched(trainer.train_step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        monkeypatch.setattr(trainer, "train_step", end_the_job)
        monkeypatch.setattr(trainer, "_save", save_while_a_worker_ends)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        assert signal.getsignal(signal.SIGCHLD) is worker_died
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert Checkpoint.load(tmp_path / "run" / "checkpoint.pt", torch.device("cpu")).step == 1


def test_an_epoch_is_done_before_its_checkpoint(image_folder: Path, tmp_path: Path) -> None:
    """Whoever takes an epoch's time does not take that of the disk."""
    trainer = Trainer(config(image_folder, save_every=0.0), tmp_path / "run", console=QUIET)
    seen: list[tuple[int, int]] = []
    trainer.fit(epoch_done=lambda: seen.append((trainer.step, trainer.saved_step)))
    assert seen == [(5, 0), (10, 5)]
    assert trainer.saved_step == 10


def test_resume_drops_metrics_written_after_the_checkpoint(
    image_folder: Path, tmp_path: Path
) -> None:
    """A run that was killed has lines that its checkpoint knows nothing of."""
    train(config(image_folder), tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    first = Checkpoint.load(path, torch.device("cpu"))
    dataclasses.replace(first, step=5).save(path)
    before = metrics(tmp_path / "run")
    Trainer(config(image_folder), tmp_path / "run", resume=True, console=QUIET).fit()
    after = metrics(tmp_path / "run")
    assert [line["step"] for line in after] == [line["step"] for line in before]
    assert after[:3] == before[:3]
    assert after[3:] != before[3:]


def test_not_a_number_stops_and_keeps_the_last_good_checkpoint(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config(image_folder), tmp_path / "run", console=QUIET)
    loss = trainer.model.loss

    def broken(output: Output, backend: str, loss_scale: float) -> torch.Tensor:
        return loss(output, backend, loss_scale) * (float("nan") if trainer.step == 6 else 1.0)

    monkeypatch.setattr(trainer.model, "loss", broken)
    with pytest.raises(
        TrainingError,
        match=r"not finite at step 7 \(epoch 2\); the last good checkpoint is .*checkpoint.pt",
    ):
        trainer.fit()
    kept = Checkpoint.load(tmp_path / "run" / "checkpoint.pt", torch.device("cpu"))
    assert kept.step == 5
    assert all(torch.isfinite(value).all() for value in kept.model.values())


def test_weights_that_are_not_finite_are_not_saved(image_folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(image_folder), tmp_path / "run", console=QUIET)
    trainer.fit()
    next(trainer.model.parameters()).data[0] = float("inf")
    with pytest.raises(TrainingError, match="weights are not finite at step 10"):
        trainer._save()
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_clipping_bounds_the_update(image_folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        config(image_folder, clip_norm=1e-3, weight_decay=0.0), tmp_path / "run", console=QUIET
    )
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.model.train()
    batch = next(iter(trainer.loader.epoch(0)))
    trainer.train_step(batch.views)
    norm = trainer.train_step.gradient_norm()
    moved = torch.stack(
        [
            (new - old).square().sum()
            for new, old in zip(trainer.model.parameters(), before, strict=True)
        ]
    )
    assert norm > 1e-3
    assert moved.sum().sqrt().item() == pytest.approx(1e-3 * 0.02, rel=1e-3)


def test_multicrop_trains(image_folder: Path, tmp_path: Path) -> None:
    augment = AugmentConfig(size=16, local_views=2, local_size=8, blur_prob=0.0)
    trainer = Trainer(config(image_folder, augment=augment), tmp_path / "run", console=QUIET)
    batch = next(iter(trainer.loader.epoch(0)))
    assert [tuple(view.shape) for view in batch.views] == [(8, 3, 16, 16)] * 2 + [(8, 3, 8, 8)] * 2
    output = trainer.train_step(batch.views)
    assert len(output.predictions) == 4
    assert len(output.targets) == 2
    assert torch.isfinite(trainer.train_step.losses[0])


def test_learning_rate_warms_up_and_decays(image_folder: Path) -> None:
    rates = learning_rates(config(image_folder, epochs=10, warmup_epochs=2.0, lr=0.5), 5).tolist()
    assert len(rates) == 50
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.5)
    assert rates[30] == pytest.approx(0.25)
    assert 0 < rates[-1] < 0.002


def test_folders_are_never_written_to_by_mistake(image_folder: Path, tmp_path: Path) -> None:
    settings = config(image_folder, epochs=1)
    train(settings, tmp_path / "run")
    kept = weights(tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run; say --resume .* or --overwrite"):
        Trainer(settings, tmp_path / "run")
    changed = dataclasses.replace(settings, lr=0.5, augment=AugmentConfig(size=24, blur_prob=0.0))
    with pytest.raises(InputError, match="lr: 0.02 -> 0.5; augment.size: 16 -> 24"):
        Trainer(changed, tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="only one of them"):
        Trainer(settings, tmp_path / "run", resume=True, overwrite=True)
    with pytest.raises(InputError, match="batch_size: 999"):
        Trainer(dataclasses.replace(settings, batch_size=999), tmp_path / "run", overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        Trainer(settings, tmp_path / "notes", overwrite=True)
    with pytest.raises(InputError, match="holds no checkpoint.pt"):
        Trainer(settings, tmp_path / "nothing", resume=True)
    assert same(weights(tmp_path / "run"), kept)
    assert not (tmp_path / "nothing").exists()

    (tmp_path / "run" / "mine.json").write_text("mine")
    train(dataclasses.replace(settings, seed=5), tmp_path / "run", overwrite=True)
    assert not same(weights(tmp_path / "run"), kept)
    assert (tmp_path / "run" / "mine.json").read_text() == "mine"


def test_every_run_without_a_name_gets_a_folder_of_its_own(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [Trainer(config(image_folder), console=QUIET).folder.name for _ in range(2)]
    assert names == [f"{image_folder.name}-vi-simsiam-001", f"{image_folder.name}-vi-simsiam-002"]
    assert new_folder(tmp_path / "runs", config(image_folder)).name.endswith("-003")
    assert (
        new_folder(tmp_path, config(image_folder, data="pack:mine.pack")).name
        == "mine-vi-simsiam-001"
    )


def test_a_run_can_be_resumed_before_its_first_epoch_ends(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However hard it was stopped: there is a checkpoint from the very start."""
    settings = config(image_folder, epochs=1)
    train(settings, tmp_path / "whole")
    trainer = Trainer(settings, tmp_path / "parts", console=QUIET)
    monkeypatch.setattr(trainer, "_train_epoch", _crash)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit()
    train(settings, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def _crash(*arguments: object) -> None:
    raise RuntimeError("power cut")


def test_resume_after_a_crash_in_the_middle_of_a_line(image_folder: Path, tmp_path: Path) -> None:
    train(config(image_folder), tmp_path / "run")
    before = metrics(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    train(config(image_folder), tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == before


def test_resume_notices_that_the_data_changed(image_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    settings = config(data, epochs=1)
    train(settings, tmp_path / "run")
    (data / "train" / "dark" / "00.png").unlink()
    with pytest.raises(
        InputError,
        match="has changed since the run was trained on it: 39 readable training images, not 40",
    ):
        Trainer(settings, tmp_path / "run", resume=True)


def test_how_a_pack_was_decoded_is_how_its_run_goes_on(image_folder: Path, tmp_path: Path) -> None:
    white = open_dataset(str(image_folder), decode=DecodeConfig(background="white"))
    pack(white.train, tmp_path / "x.pack", workers=0)
    settings = config(image_folder, data=f"pack:{tmp_path / 'x.pack'}", epochs=1)
    train(settings, tmp_path / "run")
    assert (
        Trainer(settings, tmp_path / "run", resume=True, console=QUIET).config.decode
        == white.train.decode
    )
    with pytest.raises(
        InputError, match=r"decode.background: white -> gray; leave these options out"
    ):
        Trainer(config(image_folder, epochs=1), tmp_path / "run", resume=True)
    black = tmp_path / "black.pack"
    pack(
        open_dataset(str(image_folder), decode=DecodeConfig(background="black")).train,
        black,
        workers=0,
    )
    moved = dataclasses.replace(settings, data=f"pack:{black}")
    with pytest.raises(
        InputError,
        match=r"background: white -> black; .*black.pack was decoded so; decode it as the run's",
    ):
        Trainer(moved, tmp_path / "run", resume=True)


def test_unreadable_images_are_named_as_they_are(image_folder: Path, tmp_path: Path) -> None:
    """One in 100 is tolerated; its name may look like rich markup."""
    data = tmp_path / "data"
    for i in range(120):
        shutil.copytree(image_folder / "train" / "dark", data / str(i), dirs_exist_ok=True)
    (data / "0" / "[bold]00[nonsense].png").write_bytes(b"no image")
    with pytest.warns(
        ImageWarning, match=r"1 unreadable image left out: .*\[bold\]00\[nonsense\]\.png"
    ):
        trainer = Trainer(config(data), tmp_path / "run", console=QUIET)
    assert len(trainer.loader.source) == 2400


def test_damaged_runs_are_named(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        load_run(tmp_path)
    train(config(image_folder, epochs=1), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    for damaged in (whole[:1000], b"", b"no checkpoint"):
        checkpoint.write_bytes(damaged)
        with pytest.raises(
            InputError, match=r"checkpoint.pt cannot be read: it is damaged or no checkpoint"
        ):
            load_run(tmp_path / "run", device="cpu")
    checkpoint.write_bytes(whole)
    other = config(image_folder, model=ModelConfig(dim=16)).to_dict()
    (tmp_path / "run" / "config.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="does not fit the model"):
        load_run(str(tmp_path / "run"), device="cpu")
    (tmp_path / "run" / "config.json").write_text('{"method": "vi-simsiam", "colour": 3}')
    with pytest.raises(InputError, match="colour"):
        load_run(tmp_path / "run", device="cpu")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_statistics_of_spread_and_collapsed_representations() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(256, 64, generator=generator)
    model = SimSiam(torch.nn.Flatten(), features=64, dim=64)
    found = representation_statistics(model, Output((spread, spread), (spread, spread)))
    assert found["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert found["z_std"] == pytest.approx(1.0, abs=0.05)
    assert 50 < found["effective_rank"] <= 64
    point = spread[:1].expand(256, 64)
    found = representation_statistics(model, Output((point, point), (point, point)))
    assert found["z_std"] < 1e-5
    assert found["effective_rank"] == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(torch.eye(5)) == pytest.approx(5.0)

    probabilistic = VISimSiam(
        torch.nn.Flatten(),
        features=64,
        dim=64,
        concentration_scale=2.0,
        concentration_link="softplus",
    )
    raw = torch.cat([spread, torch.zeros(256, 1)], 1)
    found = representation_statistics(probabilistic, Output((raw, raw), (spread, spread)))
    assert found["kappa"] == pytest.approx(2 * 0.693147 / 63, rel=1e-5)
    assert 1e4 < found["kappa_best"] < 1e7, "cosines of 1: large, and finite"
    away = torch.cat([-spread, torch.zeros(256, 1)], 1)
    assert (
        representation_statistics(probabilistic, Output((away, away), (spread, spread)))[
            "kappa_best"
        ]
        == 0
    )


def test_the_best_kappa_and_the_spread_of_the_projections() -> None:
    """Cosines 0.8 and 0.28, whose geometric mean of 1 + c is 1.5179: kappa*/(D - 1) = 0.5179/0.4821."""
    model = VISimSiam(torch.nn.Flatten(), features=4, dim=3)
    target = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    predicted = torch.tensor([[0.8, 0.6, 0, 0], [0, 0.28, 0.96, 0]])
    norm = model.projector[-1]
    norm.running_mean.copy_(torch.tensor([1.0, 2, 0]))
    norm.running_var.copy_(torch.tensor([0.5, 0.25, 0.5]))
    found = representation_statistics(model, Output((predicted, predicted), (target, target)))
    best = math.sqrt(1.8 * 1.28) - 1
    assert found["kappa_best"] == pytest.approx(best / (1 - best), rel=1e-5)
    assert found["projection_spread"] == pytest.approx(1.25 / 6.25, rel=1e-6)
    model.projector[-1] = torch.nn.Identity()
    found = representation_statistics(model, Output((predicted, predicted), (target, target)))
    assert "projection_spread" not in found


def test_collapse_is_announced_once(image_folder: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200, quiet=False, file=(tmp_path / "out").open("w"))
    trainer = Trainer(config(image_folder), tmp_path / "run", console=console)
    trainer.model.projector.register_forward_hook(lambda module, inputs, z: z[:1] + 1e-3 * z)
    trainer.fit()
    assert (
        console.export_text().count("collapsed since step 2: z-std 0.00") == 2
    )  # as a warning, and at the end


def test_unknown_devices_are_named() -> None:
    for name in ("tpu", "meta", "cuda:99"):
        with pytest.raises(InputError, match=f"device: '{name}'"):
            resolve_device(name)


def test_the_loss_is_logged_without_its_scale(image_folder: Path, tmp_path: Path) -> None:
    """In nats, whatever factor the gradient has: the first step's loss does not depend on it."""
    first = []
    for scale in (1.0, 0.125):
        loss = LossConfig(loss_scale=scale, cosine_weight=0.0)
        settings = config(image_folder, loss=loss, log_every=1, epochs=1)
        train(settings, tmp_path / str(scale))
        first.append(metrics(tmp_path / str(scale))[0])
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-6)
    assert first[1]["grad_norm"] == pytest.approx(first[0]["grad_norm"] / 8, rel=1e-4)


def test_loss_scale_divides_by_the_dimension(image_folder: Path, tmp_path: Path) -> None:
    assert Trainer(config(image_folder), tmp_path / "a", console=QUIET).loss_scale == 1 / 31
    assert (
        Trainer(config(image_folder, method="simsiam"), tmp_path / "b", console=QUIET).loss_scale
        == 1.0
    )
    literal = config(image_folder, loss=LossConfig(concentration_scale=1.0, loss_scale=1.0))
    assert Trainer(literal, tmp_path / "c", console=QUIET).loss_scale == 1.0
