"""Memory, descriptors, threads and the time of a step do not grow in the course of a process."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import resource
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console
from test_trainer import config as small_config

from vi_simsiam.cli import main
from vi_simsiam.config import AugmentConfig, TrainConfig
from vi_simsiam.data import MultiViewLoader
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.engine.train import Trainer

pytestmark = [
    pytest.mark.usefixtures("small_runs"),
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux counts them there"),
]
MOST_KILOBYTES = 150
"""Growth in a cycle that is noise: a few kilobytes were measured, and pages of the allocator."""


class Used(NamedTuple):
    descriptors: int
    threads: int
    processes: int
    kilobytes: int


def used() -> Used:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    descriptors, kilobytes = len(os.listdir("/proc/self/fd")), int(status["RssAnon"].split()[0])
    processes = len(Path("/proc/self/task", str(os.getpid()), "children").read_text().split())
    return Used(descriptors, int(status["Threads"]), processes, kilobytes)


def check_flat(cycle: Callable[[], object], cycles: int = 5, warm: int = 3) -> None:
    """A leak grows every time; the allocator may take more memory once."""
    for _ in range(warm):
        cycle()
    before = used()
    for again in (True, False):
        for _ in range(cycles):
            cycle()
        after = used()
        if not (again and after.kilobytes - before.kilobytes >= MOST_KILOBYTES * cycles):
            break
        before = after
    check_growth(before, after, cycles)


def check_growth(before: Used, after: Used, cycles: int) -> None:
    grown = Used(*(new - old for old, new in zip(before, after, strict=True)))
    assert max(grown[:3]) < cycles, grown  # a thread may still be ending
    assert grown.kilobytes < MOST_KILOBYTES * cycles, grown


def config(image_folder: Path, **changes: Any) -> TrainConfig:
    return small_config(image_folder, **{"epochs": 1, **changes})


def train(settings: TrainConfig, folder: Path, **options: Any) -> Trainer:
    return Trainer(settings, folder, console=Console(quiet=True), **options)


def resuming(settings: TrainConfig, folder: Path) -> Callable[[], None]:
    """Each call goes on with one run for an epoch, in a Trainer of its own."""

    def resume() -> None:
        trainer = train(settings, folder, resume="auto")
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(epoch_done=lambda: os.kill(os.getpid(), signal.SIGINT))

    return resume


def test_epochs_logs_checkpoints_and_measurements(image_folder: Path, tmp_path: Path) -> None:
    trainer = train(config(image_folder, epochs=20, knn_every=1), tmp_path / "run")
    found: dict[int, Used] = {}

    def epoch_done() -> None:
        if trainer.step in (50, 100):
            found[trainer.step] = used()

    trainer.fit(epoch_done=epoch_done)
    check_growth(found[50], found[100], 10)


@pytest.mark.parametrize("workers", [0, 1])
def test_new_runs(image_folder: Path, tmp_path: Path, workers: int) -> None:
    settings = config(image_folder, workers=workers)
    check_flat(lambda: train(settings, tmp_path / "run", overwrite=True).fit())


def test_resumes(image_folder: Path, tmp_path: Path) -> None:
    check_flat(resuming(config(image_folder, epochs=100), tmp_path / "run"))


def test_epochs_of_a_loader_and_loaders_left_open(image_folder: Path) -> None:
    source, policy = open_dataset(str(image_folder)).train, AugmentConfig(size=16)

    def leave_open() -> None:
        next(iter(MultiViewLoader(source, policy, 8, workers=1)))

    check_flat(leave_open)
    loader = MultiViewLoader(source, policy, 8, workers=1)
    check_flat(lambda: list(loader), 10)
    loader.close()


def test_evaluations(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(image_folder), tmp_path / "run").fit()
    command = ["knn", str(tmp_path / "run"), "--k", "5", "--device", "cpu", "--workers", "1"]
    check_flat(lambda: main(command))
    capsys.readouterr()


def in_little_memory(run: Callable[[], None]) -> None:
    """Run in a process that may take 64 MB more than it has."""

    def limited() -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        data = next(int(line.split()[1]) for line in lines if line.startswith("VmData"))
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, ((data << 10) + (64 << 20), most))
        run()

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join(1200)
    process.kill()
    assert process.exitcode == 0


@pytest.mark.soak
def test_ten_thousand_steps(image_folder: Path, tmp_path: Path) -> None:
    """The last epochs take as long as the first, in a process with little memory."""
    trainer = train(config(image_folder, epochs=2000, save_every=1.0), tmp_path / "run")
    found: list[Used] = []
    ends: list[float] = []

    def epoch_done() -> None:
        ends.append(time.perf_counter())
        if len(ends) % 100 == 0:
            found.append(used())

    def steps() -> None:
        trainer.fit(epoch_done=epoch_done)
        check_growth(found[1], found[-1], 18)
        seconds = [end - start for start, end in itertools.pairwise(ends)]
        first, last = statistics.median(seconds[:500]), statistics.median(seconds[-500:])
        assert last < 1.5 * first

    in_little_memory(steps)


@pytest.mark.soak
def test_many_resumes(image_folder: Path, tmp_path: Path) -> None:
    resume = resuming(config(image_folder, epochs=500), tmp_path / "run")
    in_little_memory(lambda: check_flat(resume, 200))


@pytest.mark.soak
def test_many_whole_evaluations(image_folder: Path, tmp_path: Path) -> None:
    train(config(image_folder), tmp_path / "run").fit()
    command = ["evaluate", str(tmp_path / "run"), "--device", "cpu", "--workers", "1"]
    main(command)  # OpenBLAS waits forever where it cannot allocate its buffers
    in_little_memory(lambda: check_flat(lambda: main(command), 30, warm=10))
