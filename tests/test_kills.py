"""A run that is killed again and again, at any moment, loses nothing but time.

A killed training is started again by the same command, with --resume auto, until it reaches its
end. Its weights, momentum, metrics, configuration and names of files are then those of a run that
was never killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import environment, start
from test_resume import assert_same_run

from vi_simsiam.cli import main
from vi_simsiam.engine.checkpoint import checkpoint_path, checkpoints

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks")
OPTIONS = (
    "--epochs 2 --batch-size 8 --size 16 --dim 32 --projector-hidden 32 --predictor-hidden 16 "
    "--blur-prob 0 --lr 0.02 --device cpu --log-every 2 --save-every 0 --kernels off --quiet"
)
"""Ten steps."""
KILLS = 10
_FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir"}


def command(images: Path, folder: Path, *options: str) -> list[str]:
    """A training into folder/run, with the decoded images in folder/cache."""
    places = ["--data", str(images), "--out", str(folder / "run"), "--cache-dir"]
    return ["train", *places, str(folder / "cache"), "--resume", "auto", *OPTIONS.split(), *options]


def watched(words: list[str], folder: Path, event: int | None = None) -> int:
    """A command in a process group of its own, which is killed at an event on files in `folder`."""
    os.setpgid(0, 0)
    seen, pid = 0, os.getpid()

    def watch(name: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        inside = given and isinstance(given[0], str | os.PathLike)
        if name not in _FILE_EVENTS or not inside or os.getpid() != pid:
            return
        if os.fspath(given[0]).startswith(str(folder)):
            seen += 1
            if seen == event:
                os.kill(pid, signal.SIGKILL)

    sys.addaudithook(watch)
    code = main(words)
    (folder.parent / f"{folder.name}.events").write_text(str(seen))
    return code


def ended(process: Any) -> int:
    """The exit code of a process; what it has started ends, too."""
    process.join(120)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return int(process.exitcode)


def names(folder: Path) -> set[str]:
    """All files but the logs of TensorBoard, one of which is begun by every process."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("events.out")
    }


def assert_nothing_is_lost(whole: Path, killed: Path) -> None:
    """The two runs are equal, and no more files are left than of the one that was never killed."""
    assert_same_run(whole / "run", killed / "run")
    assert names(killed) == names(whole)
    text = (killed / "run" / "config.json").read_text()
    assert text.replace(str(killed), str(whole)) == (whole / "run" / "config.json").read_text()


@pytest.fixture(scope="module")
def whole(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that was never killed, and the number of events on its files."""
    folder = tmp_path_factory.mktemp("whole")
    assert ended(start(watched, command(image_folder, folder), folder)) == 0
    return folder, int((folder.parent / f"{folder.name}.events").read_text())


@linux
def test_a_run_that_is_killed_again_and_again(
    image_folder: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    """Five times before a file operation, five times at a random moment."""
    expected, count = whole
    assert count > 40
    words, generator, codes = command(image_folder, tmp_path), random.Random(0), []
    for _ in range(KILLS // 2):
        codes.append(ended(start(watched, words, tmp_path, generator.randrange(1, count // 2))))
        process = start(watched, words, tmp_path)
        time.sleep(generator.uniform(0.1, 1.0))
        kill(process)
        codes.append(ended(process))
    assert ended(start(watched, words, tmp_path)) == 0
    assert set(codes) <= {-signal.SIGKILL, 0}
    assert codes.count(-signal.SIGKILL) >= 4, "the run may have ended before"
    assert_nothing_is_lost(expected, tmp_path)


@linux
@pytest.mark.soak
def test_a_run_that_is_killed_at_every_file_operation(
    image_folder: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    """Before the image cache or a file of the run is opened, renamed or removed, one by one."""
    expected, count = whole
    for event in range(1, count + 1):
        folder = tmp_path / str(event)
        folder.mkdir()
        words = command(image_folder, folder)
        assert ended(start(watched, words, folder, event)) == -signal.SIGKILL
        assert ended(start(watched, words, folder)) == 0
        assert_nothing_is_lost(expected, folder)


def kill(process: Any) -> None:
    """Kill a process and what it has started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def kill_at_random(
    words: list[str], folder: Path, kills: int, seed: int, longest: float
) -> tuple[int, int]:
    """Start a command until it reaches its end, and kill it at random moments, `kills` in all.

    Returns:
        The exit code of the last process, and the number of processes that were killed.
    """
    generator, killed = random.Random(seed), 0
    while killed < kills:
        process = start(watched, words, folder)
        time.sleep(generator.uniform(0, longest))
        kill(process)
        code = ended(process)
        killed += code == -signal.SIGKILL
        if code != -signal.SIGKILL:
            return code, killed
    return ended(start(watched, words, folder)), killed


@linux
@pytest.mark.soak
def test_a_run_that_is_killed_200_times(
    image_folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Also within the evaluation, whose results are then those of a run that was never killed."""
    expected = tmp_path / "whole"
    expected.mkdir()
    options = ("--evaluate", "--workers", "1")
    assert ended(start(watched, command(image_folder, expected, *options), expected)) == 0
    kills, number = 0, 0
    while kills < 200:
        folder = tmp_path / str(number)
        folder.mkdir()
        words = command(image_folder, folder, *options)
        code, killed = kill_at_random(words, folder, min(20, 200 - kills), number, 4.0)
        assert code == 0
        kills, number = kills + killed, number + 1
        assert_nothing_is_lost(expected, folder)
    record_property("kills", kills)


@linux
def test_a_stopped_worker_keeps_no_training_out(image_folder: Path, tmp_path: Path) -> None:
    """A worker that waits for a disk outlives a killed training, which goes on beside it."""
    words = command(image_folder, tmp_path, "--epochs", "100000", "--workers", "1")
    processes: list[Any] = []
    workers: list[int] = []

    def train_beyond(checkpoint: Path) -> Any:
        # In this process's group: stopped processes of a group that loses its leader go on.
        process = start(main, words)
        processes.append(process)
        while checkpoints(checkpoint.parent)[:1] <= [checkpoint]:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    deadline = time.monotonic() + 120
    try:
        first = train_beyond(checkpoint_path(tmp_path / "run", 0))
        listed = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text()
        workers += map(int, listed.split())
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        first.kill()
        first.join()
        train_beyond(checkpoints(tmp_path / "run")[0])
        states = [Path(f"/proc/{worker}/stat").read_text().split()[2] for worker in workers]
        assert "T" in states
    finally:
        for process in processes:
            process.kill()
            process.join()
        for worker in workers:
            with contextlib.suppress(OSError):
                os.kill(worker, signal.SIGKILL)


TORCHRUN = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from conftest import small_backbone
    from vi_simsiam import models
    from vi_simsiam.cli import main
    from vi_simsiam.engine.step import TrainStep

    torch.set_num_threads(1)
    models.build_backbone = small_backbone
    marker, train = Path(sys.argv[1]), TrainStep.__call__

    def step(self, views):
        if os.environ["RANK"] == "1" and int(self.counter) == 6 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return train(self, views)

    TrainStep.__call__ = step
    sys.exit(main(sys.argv[2:]))
"""


@linux
@pytest.mark.soak
def test_torchrun_starts_killed_ranks_again(image_folder: Path, tmp_path: Path) -> None:
    """One of two ranks is killed in the second epoch; the other one ends, and both start again."""
    driver = tmp_path / "driver.py"
    driver.write_text(textwrap.dedent(TORCHRUN))
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += ["--max-restarts=2", "--monitor-interval=0.1", str(driver)]
    found = {}

    def train(name: str, marker: Path) -> None:
        folder = tmp_path / name
        folder.mkdir()
        words = [*launch, str(marker), *command(image_folder, folder)]
        given = environment(PYTHONPATH=path, OMP_NUM_THREADS="1")
        found[name] = subprocess.run(words, env=given, capture_output=True, text=True, timeout=240)

    (tmp_path / "undisturbed").touch()
    train("whole", tmp_path / "undisturbed")
    train("killed", tmp_path / "marker")
    for name, result in found.items():
        assert result.returncode == 0, f"{name}: {result.stderr[-3000:]}"
    assert (tmp_path / "marker").exists()
    assert_nothing_is_lost(tmp_path / "whole", tmp_path / "killed")
