"""A run that is stopped, killed or damaged goes on to the bits of one that never stopped."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import small_backbone
from test_distributed import real_run, run_ranks, values
from test_trainer import QUIET, Watched, checkpoint, config, metrics, same, train

from vi_simsiam.cli.train import _with_resume_value
from vi_simsiam.config import TrainConfig
from vi_simsiam.engine import train as train_module
from vi_simsiam.engine.checkpoint import (
    Checkpoint,
    checkpoint_path,
    checkpoints,
    load_last,
)
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.processes import STOP_SIGNALS, locked
from vi_simsiam.engine.run import load_run
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError, RunWarning

pytestmark = pytest.mark.usefixtures("small_network")

_TIMINGS = {"seconds", "views_per_s", "data_wait"}


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without those that are timings."""
    return [
        {name: value for name, value in line.items() if name not in _TIMINGS}
        for line in metrics(folder)
    ]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, momentum and metrics are equal bit for bit."""
    one, two = load_last(first), load_last(second)
    assert one.step == two.step
    assert same(one.model, two.model)
    assert same(one.momentum, two.momentum)
    assert lines(first) == lines(second)


def stop_at(trainer: Trainer, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the trainer receive Ctrl-C in the step `step`, and save after it."""

    def interrupt() -> None:
        if trainer.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer, "train_step", Watched(trainer.train_step, interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


@pytest.fixture(name="settings")
def ten_steps(image_folder: Path) -> TrainConfig:
    """Ten steps with a line of metrics for every three, saved at the end only."""
    return config(image_folder, log_every=3, save_every=3600.0)


@pytest.fixture(name="run")
def finished_run(settings: TrainConfig, tmp_path: Path) -> Path:
    """A finished run with the checkpoints of its last two steps."""
    train(dataclasses.replace(settings, save_every=0.0), tmp_path / "run")
    return tmp_path / "run"


def test_a_run_that_stops_at_every_step_is_the_one_that_never_stopped(
    settings: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with another number of workers each time, and another interval between checkpoints."""
    train(settings, tmp_path / "whole")
    for step in range(1, 11):
        changed = dataclasses.replace(settings, workers=step % 3, save_every=step % 2 * 3600.0)
        trainer = Trainer(changed, tmp_path / "parts", resume="auto", console=QUIET)
        assert trainer.step == step - 1
        if step < 10:
            stop_at(trainer, step, monkeypatch)
        else:
            trainer.fit()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    before = lines(tmp_path / "parts")
    train(settings, tmp_path / "parts", resume=True)
    assert lines(tmp_path / "parts") == before, "nothing was left to train"


def test_another_number_of_ranks_goes_on_with_the_same_views(
    settings: TrainConfig, tmp_path: Path
) -> None:
    """Five steps on two ranks and five on one, or the other way round, are ten on one."""
    settings = dataclasses.replace(settings, log_every=1, lr=0.1)
    _, expected = real_run(World(), settings, tmp_path / "whole")
    for name, ranks in (("first", (2, 1)), ("second", (1, 2))):
        for steps, size in zip((5, 10), ranks, strict=True):
            given = (settings, tmp_path / name, steps)
            found = values(run_ranks(part, 2, *given))[0] if size == 2 else part(World(), *given)
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
        losses = [[line["loss"] for line in metrics(tmp_path / each)] for each in (name, "whole")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def part(world: World, settings: TrainConfig, folder: Path, steps: int) -> dict[str, Any]:
    """Go on to this step; returns the weights."""

    def trainer(*given: Any, **named: Any) -> Trainer:
        made = Trainer(*given, resume="auto", **named)
        made.total_steps = steps
        return made

    with mock.patch.object(train_module, "Trainer", trainer):
        return real_run(world, settings, folder)[1]


def test_checkpoints_are_written_within_epochs_and_the_last_are_kept(
    settings: TrainConfig, tmp_path: Path
) -> None:
    for keep in (1, 3):
        folder = tmp_path / str(keep)
        train(dataclasses.replace(settings, save_every=0.0, keep=keep), folder)
        assert checkpoints(folder) == [checkpoint_path(folder, 10 - i) for i in range(keep)]
        shutil.copy(checkpoints(folder)[0], checkpoint_path(folder, 2))  # a kill left it
        train(dataclasses.replace(settings, save_every=0.0, keep=keep), folder, resume=True)
        assert checkpoints(folder) == [checkpoint_path(folder, 10 - i) for i in range(keep)]
    train(settings, tmp_path / "rarely")
    names = [path.name for path in checkpoints(tmp_path / "rarely")]
    assert names == ["checkpoint-00000010.safetensors", "checkpoint-00000000.safetensors"]
    assert_same_run(tmp_path / "1", tmp_path / "rarely")


def test_the_metrics_are_on_the_disk_before_a_checkpoint(
    settings: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure a run goes on from the checkpoint, and its earlier lines are there."""
    folder, flush, written = tmp_path / "run", os.fsync, [0]

    def fsync(descriptor: int) -> None:
        flush(descriptor)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder / "metrics.jsonl")):
            written[0] = os.fstat(descriptor).st_size
        elif checkpoints(folder) and len(lines(folder)) > 1:
            assert written[0] == (folder / "metrics.jsonl").stat().st_size

    trainer = Trainer(settings, folder, console=QUIET)
    trainer.fit(epoch_done=lambda: monkeypatch.setattr(os, "fsync", fsync))
    assert written[0] > 0


def damaged(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def test_the_checkpoint_before_a_damaged_one_is_used(
    settings: TrainConfig, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "damaged")
    newest, before = checkpoints(tmp_path / "damaged")
    newest.write_bytes(damaged(newest.read_bytes(), 4000, 3))
    message = rf"{newest} cannot be read: .*; the one before it is used, {before.name} \(step 9\)$"
    with pytest.warns(RunWarning, match=message):
        opened = load_run(tmp_path / "damaged", device="cpu")
    assert same(opened.model.state_dict(), Checkpoint.load(before).model)
    with pytest.warns(RunWarning, match=message):
        train(settings, tmp_path / "damaged", resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RunWarning)
        assert_same_run(run, tmp_path / "damaged")
    for path in checkpoints(run):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="checkpoint-00000010.safetensors cannot be read"):
        train(settings, run, resume=True)


def test_a_damaged_checkpoint_of_a_later_step_does_not_stay(
    settings: TrainConfig, run: Path
) -> None:
    """The run goes on from step 4; a kill at step 5 must not lead back there once more."""
    kept = checkpoint(run)
    for path in checkpoints(run):
        path.write_bytes(b"")
    dataclasses.replace(kept, step=4, losses=torch.zeros(1)).save(checkpoint_path(run, 4))
    with pytest.warns(RunWarning):
        trainer = Trainer(settings, run, resume=True, console=QUIET)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(epoch_done=lambda: trainer._save() or 1 // 0)  # type: ignore[func-returns-value]
    assert checkpoints(run) == [checkpoint_path(run, 5), checkpoint_path(run, 4)]


def test_one_training_at_a_time_uses_a_folder(
    settings: TrainConfig, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New runs, resumed ones, and a mix; the other training goes on undisturbed."""
    seen: list[str] = []

    def second(*, resume: bool) -> None:
        for options in ({"resume": resume}, {"overwrite": True}):
            other = Trainer(settings, first.folder, console=QUIET, **options)
            with pytest.raises(InputError, match=f"another training writes to {first.folder}"):
                other.fit()
            seen.append("refused")

    first = Trainer(settings, tmp_path / "new", console=QUIET)
    late = Trainer(settings, tmp_path / "new", console=QUIET)
    first.fit(epoch_done=lambda: second(resume=True))
    assert seen == ["refused"] * 4
    with pytest.raises(InputError, match="already holds a run"):
        late.fit()
    stale = Trainer(settings, run, resume=True, console=QUIET)
    train(dataclasses.replace(settings, seed=3, save_every=0.0), run, overwrite=True)
    checkpoints(run)[1].unlink()
    with pytest.raises(InputError, match=f"another training has used {run} meanwhile"):
        stale.fit()
    assert_same_run(tmp_path / "new", train(settings, tmp_path / "alone").folder)


def test_another_training_that_goes_on_while_this_one_prepares(
    settings: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps would be done again, and its checkpoints be removed."""
    folder, choose = tmp_path / "run", train_module.choose_kernels
    stop_at(Trainer(settings, folder, console=QUIET), 4, monkeypatch)

    def prepare(*given: Any, **named: Any) -> Any:
        monkeypatch.setattr(train_module, "choose_kernels", choose)
        train(settings, folder, resume=True)
        return choose(*given, **named)

    monkeypatch.setattr(train_module, "choose_kernels", prepare)
    late = Trainer(settings, folder, resume=True, console=QUIET)
    assert late.step == 4
    with pytest.raises(InputError, match=f"another training has used {folder} meanwhile"):
        late.fit()


@pytest.mark.skipif(sys.platform == "win32", reason="other locks")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remains of a process that was killed on another computer keep nobody out."""
    import fcntl

    def refused(*given: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    (tmp_path / ".lock").write_text("4711\nanother computer\n")
    with (
        pytest.warns(RunWarning, match="on a file system without locks"),
        locked(tmp_path / ".lock", "busy"),
    ):
        pass


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_save_and_end(
    number: int, settings: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch system may repeat its signal before the step ends."""
    trainer = Trainer(settings, tmp_path / "run", console=QUIET)
    before = [signal.getsignal(each) for each in STOP_SIGNALS]

    def send() -> None:
        if trainer.step == 6:
            for _ in range(1 if number == signal.SIGINT else 3):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(trainer, "train_step", Watched(trainer.train_step, send))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert checkpoint(tmp_path / "run").step == trainer.saver.step == 7
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_a_signal_while_the_last_checkpoint_is_written_ends_the_command(
    settings: TrainConfig, tmp_path: Path
) -> None:
    """An evaluation would follow."""
    trainer = Trainer(settings, tmp_path / "run", console=QUIET)

    def send() -> None:
        if trainer.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(epoch_done=send)
    assert load_last(tmp_path / "run").step == 10


def interrupted_twice(world: World, settings: TrainConfig, folder: Path) -> int:
    """Train up to two Ctrl-C in the third step; returns the step that is saved."""
    with mock.patch("vi_simsiam.models.build_backbone", small_backbone):
        trainer = Trainer(settings, folder, console=QUIET, world=world)

    def interrupt() -> None:
        for _ in range(2 if trainer.step == 2 else 0):
            os.kill(os.getpid(), signal.SIGINT)

    with (
        mock.patch.object(trainer, "train_step", Watched(trainer.train_step, interrupt)),
        pytest.raises(KeyboardInterrupt),
    ):
        trainer.fit()
    return load_last(folder).step


def test_torchrun_repeats_the_signal_of_the_terminal_to_a_single_rank(
    settings: TrainConfig, tmp_path: Path
) -> None:
    assert values(run_ranks(interrupted_twice, 1, settings, tmp_path / "run")) == [3]


def test_a_hang_up_that_is_ignored_stays_ignored(
    settings: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after nohup."""
    trainer = Trainer(settings, tmp_path / "run", console=QUIET)
    hang_up = Watched(trainer.train_step, lambda: os.kill(os.getpid(), signal.SIGHUP))
    monkeypatch.setattr(trainer, "train_step", hang_up)
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer.fit()
    finally:
        signal.signal(signal.SIGHUP, former)
    assert trainer.step == 10


@pytest.mark.parametrize("resume", [False, True, "auto"])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts(
    resume: Any, settings: TrainConfig, run: Path, tmp_path: Path
) -> None:
    """It holds a configuration, an empty log and the remains of a write, and nothing to lose."""
    folder = tmp_path / "killed"
    folder.mkdir()
    shutil.copy(run / "config.json", folder)
    (folder / "metrics.jsonl").touch()
    names = ("config.json", ".origin", "report.html", checkpoints(run)[0].name)
    remains = [f".{name}.0123456789abcdef" for name in names]
    for name in remains:
        (folder / name).write_text("{")
    train(settings, folder, resume=resume)
    assert_same_run(run, folder)
    assert not any((folder / name).exists() for name in remains)


def test_results_without_a_checkpoint_are_not_replaced(settings: TrainConfig, run: Path) -> None:
    """Somebody may remove checkpoints to save space."""
    for path in checkpoints(run):
        path.unlink()
    for resume, message in ((False, "already holds a run"), ("auto", "overwrite replaces")):
        with pytest.raises(InputError, match=message):
            Trainer(settings, run, resume=resume, console=QUIET)  # type: ignore[arg-type]


def test_resume_takes_a_value_or_none() -> None:
    for given, meant in (
        ("--resume", "--resume always"),
        ("--resume --out x", "--resume always --out x"),
        ("--out x --resume auto", "--out x --resume auto"),
        ("--resume never --resume", "--resume never --resume always"),
        ("--resume=auto", "--resume=auto"),
        ("--resume auot", "--resume auot"),  # refused with the accepted values
    ):
        assert _with_resume_value(given.split()) == meant.split()
