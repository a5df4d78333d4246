"""The trainer: it learns, can be interrupted anywhere, loses no files, and fails in one line."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from rich.console import Console

from vi_simsiam.config import AugmentConfig, DecodeConfig, LossConfig, ModelConfig, TrainConfig
from vi_simsiam.data.cache import pack
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.engine.checkpoint import Checkpoint, checkpoint_path, checkpoints, load_last
from vi_simsiam.engine.log import read_log
from vi_simsiam.engine.run import load_run, new_folder
from vi_simsiam.engine.step import TrainStep
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import ImageWarning, InputError, TrainingError
from vi_simsiam.models import Output

pytestmark = pytest.mark.usefixtures("small_network")

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


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
    return read_log(folder)[0]


def checkpoint(folder: Path) -> Checkpoint:
    return load_last(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint(folder).model


def learned(lines: list[dict[str, float]]) -> bool:
    """Loss and cosine of the last quarter are better than the first's: single steps are noise."""
    quarter = len(lines) // 4
    first, last = (
        {name: sum(line[name] for line in part) / quarter for name in ("loss", "cosine")}
        for part in (lines[:quarter], lines[-quarter:])
    )
    return last["loss"] < first["loss"] - 0.05 and last["cosine"] > first["cosine"] + 0.03


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    equal = (torch.equal(first[name], second[name]) for name in first)
    return first.keys() == second.keys() and all(equal)


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
    assert trainer.config.loss_scale == (1 / 31 if method == "vi-simsiam" else 1.0)
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    run = load_run(tmp_path / "run", device="cpu")
    assert run.config == settings.located()
    assert not run.model.training
    assert same(run.model.state_dict(), trainer.model.state_dict())


def test_the_same_configuration_gives_the_same_run(image_folder: Path, tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"workers": 1}), ("c", {"seed": 1})):
        train(config(image_folder, epochs=1, **changes), tmp_path / name)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_workers_that_end_with_the_job_do_not_break_the_checkpoint(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch system ends the loader's workers, too."""

    def end_the_job() -> None:
        for worker in multiprocessing.active_children():
            worker.terminate()
            worker.join()
        os.kill(os.getpid(), signal.SIGTERM)

    trainer = Trainer(config(image_folder, workers=2), tmp_path / "run", console=QUIET)
    monkeypatch.setattr(trainer, "train_step", Watched(trainer.train_step, end_the_job))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.loader.workers == 2
    assert checkpoint(tmp_path / "run").step == 1


def test_an_epoch_is_done_before_its_checkpoint(image_folder: Path, tmp_path: Path) -> None:
    """A run can be resumed from its start on; the time of an epoch does not contain the disk's."""
    run = tmp_path / "run"
    trainer = Trainer(config(image_folder, save_every=3600.0), run, console=QUIET)
    seen: list[tuple[int, int]] = []
    trainer.fit(epoch_done=lambda: seen.append((trainer.step, checkpoint(run).step)))
    assert seen == [(5, 0), (10, 0)]
    assert checkpoint(run).step == trainer.saver.step == 10


def test_resume_drops_metrics_written_after_the_checkpoint(
    image_folder: Path, tmp_path: Path
) -> None:
    """A killed run has later lines, and a crash can cut the last one off."""
    run = tmp_path / "run"
    train(config(image_folder), run)
    for path in checkpoints(run)[1:]:
        path.unlink()
    dataclasses.replace(checkpoint(run), step=5).save(checkpoint_path(run, 5))
    checkpoint_path(run, 10).unlink()
    before = metrics(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    train(config(image_folder), run, resume=True)
    after = metrics(run)
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
    message = r"not finite at step 7 \(epoch 2\); .*checkpoint-00000006.safetensors \(step 6\)"
    with pytest.raises(TrainingError, match=message):
        trainer.fit()
    trainer.train_step.losses.zero_()
    next(trainer.model.parameters()).data[0] = float("inf")
    with pytest.raises(TrainingError, match=r"weights are not finite at step \d+"):
        trainer._save()
    assert checkpoint(tmp_path / "run").step == 6
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_folders_are_never_written_to_by_mistake(image_folder: Path, tmp_path: Path) -> None:
    settings = config(image_folder, epochs=1, cache_dir=tmp_path / "cache")
    train(settings, tmp_path / "run")
    kept = weights(tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / ".thesis").write_text("mine")
    changed = {"lr": 0.5, "augment": AugmentConfig(size=24, blur_prob=0.0)}
    resume, overwrite = {"resume": True}, {"overwrite": True}
    for folder, options, changes, message in (
        ("run", {}, {}, "already holds a run; say --resume .* or --overwrite"),
        ("run", resume, changed, "lr: 0.02 -> 0.5; augment.size: 16 -> 24"),
        ("run", resume | overwrite, {}, "only one of them"),
        ("run", overwrite, {"batch_size": 999}, "batch_size: 999"),
        ("notes", overwrite, {}, "holds other files"),
        ("notes/.thesis", {}, {}, "is a file, not a folder"),
        ("nothing", resume, {}, "holds no checkpoint"),
    ):
        with pytest.raises(InputError, match=message):
            Trainer(dataclasses.replace(settings, **changes), tmp_path / folder, **options)
    with pytest.raises(InputError, match="resume: no folder given"):
        Trainer(settings, resume=True)
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
    packed = config(image_folder, data="pack:mine.pack")
    assert new_folder(tmp_path / "runs", config(image_folder)).name.endswith("-003")
    assert new_folder(tmp_path, packed).name == "mine-vi-simsiam-001"


def test_a_run_on_a_pack_keeps_the_packs_decoding(image_folder: Path, tmp_path: Path) -> None:
    packs = {}
    for colour in ("white", "black"):
        decode = DecodeConfig(background=colour)
        file = tmp_path / f"{colour}.pack"
        pack(open_dataset(str(image_folder), decode=decode).train, file, workers=0)
        packs[colour] = config(image_folder, data=f"pack:{file}", epochs=1)
    run = tmp_path / "run"
    train(packs["white"], run)
    assert Trainer(packs["white"], run, resume=True).config.decode.background == "white"
    for settings, message in (
        (config(image_folder, epochs=1), "decode.background: white -> gray; leave these options"),
        (packs["black"], "background: white -> black; .*black.pack was decoded so"),
    ):
        with pytest.raises(InputError, match=message):
            Trainer(settings, run, resume=True)


def test_unreadable_images_are_named_as_they_are(image_folder: Path, tmp_path: Path) -> None:
    """One in 100 is tolerated; its name may look like rich markup."""
    data = tmp_path / "data"
    for i in range(6):
        shutil.copytree(image_folder / "train" / "dark", data / str(i))
    (data / "0" / "[bold]00[nonsense].png").write_bytes(b"no image")
    message = r"1 unreadable image left out: .*\[bold\]00\[nonsense\]\.png"
    with pytest.warns(ImageWarning, match=message):
        trainer = Trainer(config(data), tmp_path / "run", console=QUIET)
    assert len(trainer.loader.source) == 120


def test_damaged_runs_are_named(image_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match="holds no run"):
        load_run(tmp_path)
    train(config(image_folder, epochs=1), run)
    (run / "checkpoint-00000004.safetensors").unlink()
    path = run / "checkpoint-00000005.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:1000], b"", b"no checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"checkpoint-00000005.safetensors cannot be read"):
            load_run(run, device="cpu")
    path.write_bytes(whole)
    other = config(image_folder, model=ModelConfig(dim=16)).to_dict()
    for content, message in (
        (json.dumps(other), r"config.json is damaged or was changed: .* model.dim: 32 -> 16"),
        ('{"method": "vi-simsiam", "colour": 3}', "colour"),
        ('{"method": ', "config.json is damaged"),
    ):
        (run / "config.json").write_text(content)
        with pytest.raises(InputError, match=message):
            load_run(str(run), device="cpu")


def test_the_loss_is_logged_without_its_scale(image_folder: Path, tmp_path: Path) -> None:
    """In nats; the first step's loss does not depend on the factor on the gradient."""
    first = []
    for scale in (1.0, 0.125):
        loss = LossConfig(loss_scale=scale, cosine_weight=0.0)
        train(config(image_folder, loss=loss, log_every=1, epochs=1), tmp_path / str(scale))
        first.append(metrics(tmp_path / str(scale))[0])
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-6)
    assert first[1]["grad_norm"] == pytest.approx(first[0]["grad_norm"] / 8, rel=1e-4)


def test_a_dead_worker_costs_no_step(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is saved at its last step; resumed it equals a run without a dead worker."""
    settings = config(image_folder, workers=1, save_every=3600.0, epochs=4)
    train(settings, tmp_path / "whole")
    before = {process.pid for process in multiprocessing.active_children()}
    trainer = Trainer(settings, tmp_path / "run", console=QUIET)

    def kill_the_worker() -> None:
        if trainer.step == 6:
            for process in multiprocessing.active_children():
                if process.pid not in before and process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(trainer, "train_step", Watched(trainer.train_step, kill_the_worker))
    message = r"^workers: a process that prepares images has ended .*; saved at step \d+[^\n]*$"
    with pytest.raises(TrainingError, match=message):
        trainer.fit()
    assert checkpoint(tmp_path / "run").step >= 7
    train(settings, tmp_path / "run", resume=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_gpu_that_is_too_small_is_one_readable_error(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config(image_folder), tmp_path / "run", console=QUIET)

    def exhausted() -> None:
        text = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of 8 GiB."
        raise torch.OutOfMemoryError(text)

    monkeypatch.setattr(trainer, "train_step", Watched(trainer.train_step, exhausted))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 8 * 10**9))
    message = r"Tried to allocate 20.00 GiB \(1.0 of 8.0 GB are free\); a larger --accumulate"
    with pytest.raises(TrainingError, match=message):
        trainer.fit()


def test_a_run_killed_while_its_configuration_was_written_is_started_again(
    image_folder: Path, tmp_path: Path
) -> None:
    """The unfinished file does not count as another file, and is removed."""
    folder = tmp_path / "run"
    folder.mkdir()
    remains = folder / ".config.json.0123456789abcdef"
    remains.write_text("{")
    train(config(image_folder, epochs=1), folder, overwrite=True)
    assert not remains.exists()
    assert checkpoint(folder).step == 5


def test_a_batch_that_is_too_large_is_refused_before_anything_is_decoded(
    image_folder: Path, tmp_path: Path
) -> None:
    settings = config(image_folder, batch_size=41, cache_dir=tmp_path / "cache")
    message = r"batch_size: 41 must be at most 40, the images in .*train"
    with pytest.raises(InputError, match=message):
        Trainer(settings, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "cache").exists()


def test_missing_weights_are_one_line(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_route(*arguments: object, **named: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_route)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints"
    message = rf"pretrained: https://.*/(\S+) could not be downloaded \(no route\); .* {place}/\1$"
    with pytest.raises(InputError, match=message):
        Trainer(config(image_folder, model=ModelConfig(pretrained=True)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
