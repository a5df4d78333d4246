"""Faults of a disk, a clock, a batch or a second process: one line, and the run can go on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from processes import start
from test_commands import run
from test_resume import assert_same_run, damaged, lines
from test_trainer import same

from vi_simsiam.cli import main
from vi_simsiam.engine.checkpoint import BEST, checkpoints, load_last
from vi_simsiam.engine.step import TrainStep
from vi_simsiam.models import Output

pytestmark = pytest.mark.usefixtures("small_runs")

TINY = (
    "--batch-size 8 --size 16 --dim 16 --projector-hidden 16 --predictor-hidden 16 --blur-prob 0"
    " --device cpu --workers 0 --log-every 1 --save-every 0 --epochs 3 --quiet"
)
_FEW, _MANY = 3, 200


@pytest.fixture(name="command")
def command_to_train(image_folder: Path) -> Callable[[Path], str]:
    """The command that starts a run in a folder, and that goes on with it."""
    return lambda out: f"train --data {image_folder} --out {out} --resume auto {TINY}"


@pytest.fixture(scope="module", name="whole")
def run_without_faults(
    image_folder: Path, small_runs: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of the same command."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(f"train --data {image_folder} --out {out} {TINY}".split()) == 0
    return out


def mount(*arguments: object) -> None:
    """Call mount; skip the test where that is not allowed."""
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("mounts are made on Linux alone")
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(place: Path, *options: object) -> Iterator[None]:
    mount(*options, place)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", "size=1m", "none"):
        yield place


def fill(disk: Path, *, but: int = 0) -> Path:
    """Fill a file system up to so many bytes; returns the file that does."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        file.truncate(file.tell() - but)
    return filler


@contextlib.contextmanager
def in_step(step: int, fault: Callable[[list[torch.Tensor]], object]) -> Iterator[None]:
    """Within this context `fault` is called in this step of a training, with its views."""
    call = TrainStep.__call__

    def faulty(self: TrainStep, views: list[torch.Tensor]) -> Output:
        if int(self.counter) == step - 1:
            fault(views)
        return call(self, views)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", faulty)
        yield


def stop(views: list[torch.Tensor]) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def failing(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that fails."""
    code, _, err = run(command, capsys)
    assert code == 2, err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("room", "step", "save_every", "line"),
    [
        (0, 0, 0, r"vi-simsiam: \S+/run/config.json: No space left on device"),
        (12_288, 0, 0, r"checkpoint \S+ could not be written \(No space .*\); there is none yet"),
        (8_192, 3, 0, r"checkpoint \S+ could not be written \(No space .*the one before is kept"),
        (0, 3, 1e6, r"the logs in \S+/run could not be written \(No space left on device\)"),
    ],
    ids=["config", "first checkpoint", "checkpoint", "logs"],
)
def test_a_training_on_a_full_disk(
    room: int,
    step: int,
    save_every: float,
    line: str,
    disk: Path,
    command: Callable[[Path], str],
    whole: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once there is room the same command goes on."""
    words = f"{command(disk / 'run')} --save-every {save_every}"
    if step == 0:
        fill(disk, but=room)
    with in_step(step, lambda views: fill(disk, but=room)):
        assert re.search(line, failing(words, capsys))
    (disk / "filler").unlink()
    assert run(words, capsys)[0] == 0
    assert_same_run(whole, disk / "run")


@pytest.mark.parametrize("name", ["knn", "report", "figures", "export", "embed"])
def test_other_output_on_a_full_disk(
    name: str, disk: Path, whole: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder stays as it was, and with room the command does its work."""
    shutil.copytree(whole, disk / "run")
    words = f"{name} {disk / 'run'}" + {
        "export": " --format safetensors",
        "embed": f" {image_folder / 'val'} --out {disk / 'table.parquet'} --device cpu",
        "knn": " --device cpu",
    }.get(name, "")
    fill(disk)
    before = contents(disk)
    line = failing(words, capsys)
    assert re.fullmatch(r"vi-simsiam: \S+: No space left on device\n", line)
    assert contents(disk) == before
    (disk / "filler").unlink()
    assert run(words, capsys)[0] == 0


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_cannot_be_written(
    disk: Path, command: Callable[[Path], str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the start, from a moment on, and when the run is to go on."""
    out, words = disk / "run", command(disk / "run")
    mount("-o", "remount,ro", disk)
    assert "Read-only file system" in failing(words, capsys)
    mount("-o", "remount,rw", disk)
    with contextlib.ExitStack() as stack, in_step(3, lambda _: stack.enter_context(bound(out))):
        assert re.search(r"could not be written \(Read-only file system\)", failing(words, capsys))
        before = contents(out)
        assert "Read-only file system" in failing(words, capsys)
        assert contents(out) == before
    assert load_last(out).step == 2
    assert run(words, capsys)[0] == 0
    assert_same_run(whole, out)


@contextlib.contextmanager
def bound(folder: Path) -> Iterator[None]:
    """Let a folder with open files be read-only."""
    with mounted(folder, "--bind", folder):
        mount("-o", "remount,bind,ro", folder)
        yield


@pytest.mark.parametrize("save_every", [0, 1e6])
@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_folder_that_is_gone(
    replaced: bool,
    save_every: float,
    command: Callable[[Path], str],
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The training ends at its next checkpoint."""
    out = tmp_path / "run"
    words = f"{command(out)} --save-every {save_every}"

    def remove(views: list[torch.Tensor]) -> None:
        shutil.rmtree(out)
        if replaced:
            out.write_text("mine")

    with in_step(3, remove):
        line = failing(words, capsys)
    reason = "Not a directory" if replaced else "No such file or directory"
    assert re.search(rf"{out}\S* could not be written \({reason}\)", line)
    if replaced:
        assert f"out: {out} is a file, not a folder" in failing(words, capsys)
        assert out.read_text() == "mine"
        out.unlink()
    assert run(words, capsys)[0] == 0
    assert_same_run(whole, out)


def test_a_clock_that_is_set_back(
    command: Callable[[Path], str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And files of tomorrow."""
    out, now = tmp_path / "run", time.time
    for step, hours in ((4, 0), (8, -6), (12, -48)):
        monkeypatch.setattr(time, "time", lambda hours=hours: now() + hours * 3600)
        with in_step(step, stop):
            assert run(command(out), capsys)[0] == 130
        for path in out.iterdir():
            os.utime(path, (now() + 86_400,) * 2)
    assert run(command(out), capsys)[0] == 0
    assert_same_run(whole, out)


def test_a_batch_that_is_not_finite(
    command: Callable[[Path], str],
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"

    def spoil(views: list[torch.Tensor]) -> None:
        views[0][0, 0, 0, 0] = torch.nan

    with in_step(7, spoil):
        line = failing(command(out), capsys)
    assert "the loss is not finite at step 7 (epoch 2); the last good checkpoint is" in line
    assert load_last(out).step == 6
    assert run(command(out), capsys)[0] == 0
    assert_same_run(whole, out)


@pytest.fixture(scope="module", name="stopped")
def stopped_run(
    image_folder: Path, small_runs: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that was stopped at step 12."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with in_step(12, stop):
        assert main(f"train --data {image_folder} --out {out} {TINY}".split()) == 130
    assert load_last(out).step == 12
    shutil.copy(checkpoints(out)[0], out / BEST)
    return out


FILES = (
    "checkpoint-00000012.safetensors", "checkpoint-00000011.safetensors",
    "checkpoint-best.safetensors", "config.json", "kernels.json", "metrics.jsonl",
    "events.out.tfevents.*", ".origin",
)  # fmt: skip


@pytest.mark.parametrize(
    "count", [pytest.param(_FEW, id="few"), pytest.param(_MANY, id="many", marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_file_of_a_run(
    pattern: str,
    count: int,
    stopped: Path,
    whole: Path,
    command: Callable[[Path], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One bit is another, or the end is cut off: the same run at the end, or one line."""
    (valid,) = stopped.glob(pattern)
    content, out, refusals = valid.read_bytes(), tmp_path / "run", 0
    for number in range(count):
        choice = random.Random(f"{pattern} {number}")
        place, bit = choice.randrange(len(content)), choice.randrange(8)
        shutil.copytree(stopped, out)
        changed = content[:place] if number % 2 else damaged(content, place, bit)
        (out / valid.name).write_bytes(changed)
        before = contents(out)
        code, _, err = run(command(out), capsys)
        about = f"{number}: {place}, {bit}: {err}"
        if code:
            refusals += 1
            assert (code, err.count("\n")) == (2, 1), about
            assert contents(out) == before, about
        elif pattern == "metrics.jsonl":  # damaged lines are lost
            assert same(load_last(out).model, load_last(whole).model), about
            expected = {line["step"]: line for line in lines(whole)}
            for line in lines(out):
                assert expected.pop(line["step"]).items() <= line.items(), about
            assert len(expected) <= 2 or number % 2, about
        else:
            assert_same_run(whole, out)
        shutil.rmtree(out)
    refusable = pattern in ("config.json", "kernels.json")
    assert refusable or not refusals


def test_a_setting_that_is_another(
    stopped: Path,
    command: Callable[[Path], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The file is valid, and the run would end elsewhere."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    changed = json.loads((out / "config.json").read_text())
    lr = changed["lr"]
    changed["lr"] *= 2
    (out / "config.json").write_text(json.dumps(changed))
    for words in (command(out), f"knn {out} --device cpu"):
        line = failing(words, capsys)
        assert f"{out}/config.json is damaged or was changed: lr: {lr} -> {2 * lr}; " in line


def test_trainings_that_start_in_one_folder_at_once(
    command: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One goes on. The other, and those that come later, end with one line."""
    out, started = tmp_path / "run", {}
    words = f"{command(out)} --epochs 100000 --save-every 0.1"
    for resume in ("never", "auto"):
        given = (f"{words} --resume {resume}".split(), log := tmp_path / resume)
        started[log] = start(logged, *given)
    deadline = time.monotonic() + 60
    try:
        while not (ended := {log: each for log, each in started.items() if not each.is_alive()}):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ((log, refused),) = ended.items()
        assert (refused.exitcode, log.read_text().count("\n")) == (2, 1)
        (last,) = (each for each in started.values() if each is not refused)
        while not checkpoints(out):
            assert last.is_alive()
            time.sleep(0.02)
        for resume in ("never", "never --overwrite", "always", "auto"):
            message = (
                f"out: {out} already holds" if resume == "never" else "another training writes"
            )
            assert message in failing(f"{words} --resume {resume}", capsys)
        last.terminate()
        last.join()
        assert last.exitcode == 130
    finally:
        for each in started.values():
            each.kill()
            each.join()
    assert load_last(out).step > 0


def logged(words: list[str], log: Path) -> int:
    """A command with its output in a file."""
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return main(words)
