"""No wait on a process or thread is endless: it becomes one line with a remedy."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import multiprocessing.synchronize
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from queue import SimpleQueue
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from processes import start
from test_trainer import config

from vi_simsiam import downloads
from vi_simsiam.cli import main
from vi_simsiam.config import AugmentConfig, DecodeConfig
from vi_simsiam.data import Batch, MultiViewLoader, datasets, workers
from vi_simsiam.data.decoding import decode
from vi_simsiam.data.loader import eval_loader
from vi_simsiam.data.sources import ArraySource, FileSource
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError, TrainingError
from vi_simsiam.inference import images

POLICY = AugmentConfig(size=8, local_views=2, local_size=8)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 10, 12, 3), dtype=np.uint8)


class Stuck(ArraySource):
    """Images on a disk that stops answering after the third."""

    def image(self, index: int) -> Image.Image:
        if index > 2:
            time.sleep(3600)
        return super().image(index)


def training_batches(workers: int) -> int:
    batches = MultiViewLoader(ArraySource(PIXELS), POLICY, 4, workers=workers)
    try:
        return sum(1 for _ in batches.epoch(0))
    finally:
        batches.close()


def test_workers_need_no_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Containers have little in /dev/shm, where semaphores and shared tensors lie."""
    refuse = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    for kind in (torch.Tensor, torch.UntypedStorage):
        monkeypatch.setitem(ForkingPickler._extra_reducers, kind, refuse)
    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", refuse)
    monkeypatch.setattr(workers, "PATIENCE", 20.0)
    assert training_batches(workers=1) == 2
    assert len(list(eval_loader(ArraySource(PIXELS), 8, 4, 1))) == 2
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    chunks = decode(FileSource([tmp_path / "a.png"] * 3), workers=2, mean_bytes=8 << 20)
    assert len(list(chunks)) == 3


def test_a_worker_that_lives_and_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 0.5)
    message = r"^workers: no images have come .* --workers 0 works without them$"
    with pytest.raises(TrainingError, match=message):
        list(eval_loader(Stuck(PIXELS), 8, 4, 1))
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


def test_a_process_that_decodes_and_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = decode(Stuck(PIXELS), workers=2, mean_bytes=8 << 20)
    assert next(chunks).kept == [0]
    start = time.monotonic()
    chunks.close()
    assert time.monotonic() - start < 60  # of an hour
    monkeypatch.setattr(workers, "PATIENCE", 1.0)
    with pytest.raises(TrainingError, match="^array: no images have come from the workers for 1 s"):
        list(decode(Stuck(PIXELS), workers=2, mean_bytes=8 << 20))
    assert not multiprocessing.active_children()


def read_stuck(errors: Path) -> None:
    sys.stderr = errors.open("w", buffering=1)
    images.PATIENCE = 0.2
    list(images.read(Stuck(PIXELS), np.asarray, chunk=2, threads=2))


def test_a_thread_that_gives_nothing_does_not_keep_the_program(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    process = multiprocessing.get_context("fork").Process(target=read_stuck, args=(errors,))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 1
    message = "array: no images have come from the threads for 600 s; a disk may not answer\n"
    assert errors.read_text().endswith(message)


def test_a_server_that_gives_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/imagenette.tgz"
        published = dataclasses.replace(datasets._PUBLISHED["imagenette"], url=url)
        monkeypatch.setitem(datasets._PUBLISHED, "imagenette", published)
        message = r"imagenette\.tgz could not be downloaded \(.*timed out.*\); an unpacked"
        with pytest.raises(InputError, match=message):
            datasets.open_dataset("imagenette", root=tmp_path)
    assert socket.getdefaulttimeout() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed there")
def test_threads_close_the_animation_that_they_kept_open(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), level) for level in (0, 100, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    source = FileSource([tmp_path / "a.gif"], decode=DecodeConfig(frames="all"))
    jobs: SimpleQueue[object] = SimpleQueue()
    for job in ((0, Future[object]()), None):  # the first frame only
        jobs.put(job)
    images._work(source.image, jobs)  # type: ignore[arg-type]
    assert not [each for each in Path("/proc/self/fd").iterdir() if each.resolve().name == "a.gif"]


def test_a_rank_that_is_to_stop_does_not_read_a_lost_batch_for_ever(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks wait for it up to their common step."""
    trainer, tried = Trainer(config(image_folder, workers=0), tmp_path / "run"), []

    def batches(epoch: int, step: int) -> Iterator[Batch]:
        tried.append(step)
        raise OSError("the disk is gone")
        yield

    monkeypatch.setattr(trainer.loader, "epoch", batches)
    monkeypatch.setattr(trainer.world, "size", 2)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(OSError, match="the disk is gone"):
        next(trainer._outputs(None, 5, [signal.SIGTERM]))
    assert 2 < len(tried) < 30


@pytest.fixture(scope="module")
def run_folder(
    small_runs: None, image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run with a log, kernels and two checkpoints; a pipe lies among its images."""
    root = tmp_path_factory.mktemp("pipes")
    data = shutil.copytree(image_folder, root / "data")
    os.mkfifo(data / "train" / "dark" / "pipe.png")
    words = f"train --data {data} --out {root / 'run'} --epochs 2 --knn-every 1 --size 16 --dim 16"
    assert main([*words.split(), "--device", "cpu", "--workers", "0", "--quiet"]) == 0
    return root / "run"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize("command", ["train --resume --out", "knn --workers 0", "doctor"])
def test_pipes_in_place_of_the_files_of_a_run(
    command: str, run_folder: Path, tmp_path: Path
) -> None:
    """Each file in turn: a pipe has no writer, and opening it as usual waits for one."""
    names = sorted(path.name for path in run_folder.iterdir())
    assert {"config.json", "kernels.json", "metrics.jsonl"} <= set(names)
    for name in names:
        folder = shutil.copytree(run_folder, tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
    written = tmp_path / "codes.json"
    written.write_text("{}")
    process = start(in_each, command, [tmp_path / name for name in names], written)
    process.join(120)
    process.kill()
    found = json.loads(written.read_text())
    # The doctor's code for a problem is that of a traceback elsewhere.
    accepted = {0, 1, 2} if command == "doctor" else {0, 2}
    assert found.keys() == set(names), "it waits for the file after the last one"
    assert set(found.values()) <= accepted, found


def in_each(command: str, folders: list[Path], written: Path) -> int:
    """Run a command on one folder after the other, and write the exit codes so far to a file."""
    codes: dict[str, int] = {}
    for folder in folders:
        codes[folder.name] = main([*command.split(), str(folder)])
        written.write_text(json.dumps(codes))
    return 0
