"""Checkpoints: every byte is checked, and nothing of another training is used."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_same_run, damaged, finished_run, ten_steps  # noqa: F401
from test_trainer import QUIET, checkpoint, same, train

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.checkpoint import (
    BEST,
    FORMER,
    Checkpoint,
    add_checkpoint,
    checkpoints,
    load_best,
    load_last,
)
from vi_simsiam.engine.run import load_run
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError, TrainingError
from vi_simsiam.files import write_atomically
from vi_simsiam.inference.encoder import load

pytestmark = pytest.mark.usefixtures("small_network")


def test_the_best_checkpoint_is_kept(settings: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = Trainer(dataclasses.replace(settings, keep=1, save_every=0.0), folder, console=QUIET)

    def measure() -> None:
        trainer.knn = {5: 0.75, 10: 0.5}[trainer.step]

    trainer.fit(epoch_done=measure)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "checkpoint-00000010.safetensors",
        BEST,
    ]
    best, last = load_best(folder), load_last(folder)
    assert (best.step, best.knn, best.best_knn) == (5, 0.75, 0.75)
    assert (last.step, last.knn, last.best_knn) == (10, 0.5, 0.75)
    assert same(load(folder, "cpu", checkpoint="best").model.state_dict(), best.model)
    assert same(load_run(folder, device="cpu").model.state_dict(), last.model)
    (folder / BEST).unlink()
    with pytest.raises(InputError, match=r"run has no checkpoint-best.safetensors; runs with"):
        load(folder, "cpu", checkpoint="best")


def test_the_best_checkpoint_outlives_a_kill_while_it_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on with its accuracy would not measure these weights again."""
    best = dataclasses.replace(load_last(run), knn=0.75, best_knn=0.75)
    for kills, folder in enumerate((tmp_path / "at once", tmp_path / "between")):
        folder.mkdir()
        first = dataclasses.replace(best, step=5, knn=None, best_knn=None, losses=torch.zeros(0))
        add_checkpoint(folder, first, keep=2, best=False)
        left = [write_atomically] * kills
        with monkeypatch.context() as patch:
            patch.setattr(
                "vi_simsiam.engine.checkpoint.write_atomically",
                lambda *given, left=left: left.pop()(*given),  # IndexError where none is left
            )
            with pytest.raises(IndexError):
                add_checkpoint(folder, best, keep=2, best=True)
        assert load_last(folder).best_knn is None or (folder / BEST).is_file()


def test_a_file_has_its_name_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power failure could leave the name with nothing behind it."""
    calls: list[str] = []
    flush, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("folder" if folder else f"file of {os.fstat(descriptor).st_size} bytes")
        flush(descriptor)

    def replace(*names: Any) -> None:
        calls.append("name")
        rename(*names)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(tmp_path / "file", lambda file: file.write(bytes(10_000)))
    assert calls == ["file of 10000 bytes", "name", "folder"]


def test_no_damaged_bit_passes(run: Path) -> None:
    """In any part of the file: its length, the JSON, the checksum, padding and tensors."""
    path = checkpoints(run)[0]
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    generator = random.Random(0)
    places = [*range(8), header - 1, header, len(content) - 1]
    places += [generator.randrange(header) for _ in range(200)]
    places += [generator.randrange(len(content)) for _ in range(200)]
    for place in places:
        path.write_bytes(damaged(content, place, generator.randrange(8)))
        with pytest.raises(InputError, match=f"{path.name} cannot be read"):
            Checkpoint.load(path)
    for size in (0, 7, 100, header, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=f"{path.name} cannot be read"):
            Checkpoint.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(InputError, match=f"{path.name} cannot be read"):
        Checkpoint.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": torch.zeros(3)},
        {"momentum": None},
        {"model": torch.zeros(3)},
        {"model": torch.zeros(32, 32, dtype=torch.float64)},
        {"step": 11},
        {"step": 10**6},
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    change: dict[str, Any], settings: TrainConfig, run: Path
) -> None:
    """By name, shape, dtype and number of steps, before anything is copied."""
    kept, name = checkpoint(run), "projector.0.weight"
    for part, value in change.items():
        if part == "step":
            kept = dataclasses.replace(kept, step=value)
        else:
            tensors = {**getattr(kept, part), name: value}
            left = {key: tensor for key, tensor in tensors.items() if tensor is not None}
            kept = dataclasses.replace(kept, **{part: left})
    assert name in kept.model
    kept.save(checkpoints(run)[0])
    message = r"does not fit the model|the checkpoint is of step \d+ of 10"
    with pytest.raises(InputError, match=message):
        Trainer(settings, run, resume=True, console=QUIET)


def test_numbers_that_cannot_be(run: Path) -> None:
    kept = checkpoint(run)
    path = checkpoints(run)[0]
    changes: list[dict[str, Any]] = [
        {"step": -1, "losses": torch.zeros(0)}, {"images": 0}, {"seconds": -1.0},
        {"losses": torch.zeros(11)}, {"losses": torch.zeros(2, dtype=torch.int32)},
        {"content": {"images": "x"}}, {"content": {"classes": 7}}, {"content": {"validation": {}}},
    ]  # fmt: skip
    for change in changes:
        dataclasses.replace(kept, **change).save(path)
        with pytest.raises(InputError, match=f"{path.name} cannot be read"):
            Checkpoint.load(path)


def test_a_description_of_images_without_its_parts(settings: TrainConfig, run: Path) -> None:
    """The others are compared, as with files of older versions."""
    path, kept = checkpoints(run)[0], checkpoint(run)
    dataclasses.replace(kept, content={"invention": 1}).save(path)
    assert Trainer(settings, run, resume=True, console=QUIET).step == kept.step
    dataclasses.replace(kept, config={**kept.config, "invention": 1}).save(path)
    with pytest.raises(InputError, match=rf"a checkpoint in {run} is damaged .*invention"):
        Trainer(settings, run, resume=True, console=QUIET)


def test_statistics_that_are_not_finite_are_not_saved(settings: TrainConfig, run: Path) -> None:
    """Training never reads those of BatchNorm, and evaluation does."""
    before = load_last(run).step
    trainer = Trainer(settings, run, resume=True, console=QUIET)
    trainer.model.get_buffer("projector.1.running_var").fill_(math.inf)
    with pytest.raises(TrainingError, match="the weights are not finite at step"):
        trainer._save()
    assert load_last(run).step == before


def test_a_later_format_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = checkpoint(run)
    with monkeypatch.context() as patch:
        patch.setattr("vi_simsiam.engine.checkpoint._FORMAT", 3)
        kept.save(checkpoints(run)[0])
    with pytest.raises(InputError, match="was written by a later version of vi-simsiam"):
        Checkpoint.load(checkpoints(run)[0])
    assert len(checkpoints(run)) == 2
    with pytest.raises(InputError, match="was written by a later version of vi-simsiam"):
        load_last(run)  # rather than the one before
    assert len(checkpoints(run)) == 2
    (run / "checkpoint-000000010.safetensors").touch()
    assert len(checkpoints(run)) == 2, "not a name of ours"


def test_a_run_of_format_1_goes_on(settings: TrainConfig, run: Path, tmp_path: Path) -> None:
    """With torch's archive and optimiser state, and then with files of today."""
    shutil.copytree(run, tmp_path / "former")
    kept = Checkpoint.load(checkpoints(run)[1])
    order = Trainer(settings, run, resume=True, console=QUIET).train_step.momentum
    states = {i: {"momentum_buffer": kept.momentum[name]} for i, name in enumerate(order)}
    content = {"format": 1, "step": 9, "seconds": 1.0, "images": kept.images}
    content |= {"model": kept.model, "optimizer": {"state": states, "param_groups": []}}
    content |= {"content": kept.content}
    for path in checkpoints(tmp_path / "former"):
        path.unlink()
    torch.save(content, tmp_path / "former" / FORMER)
    train(settings, tmp_path / "former", resume=True)
    assert_same_run(run, tmp_path / "former")
    archive = tmp_path / "former" / FORMER
    whole = archive.read_bytes()
    weight = whole.index(kept.model["projector.0.weight"].numpy().tobytes())
    for place in (weight, weight + 5):  # the archive's checksums leave gaps between its members
        archive.write_bytes(damaged(whole, place, 5))
        with pytest.raises(InputError, match="cannot be read"):
            Checkpoint.load(archive)
