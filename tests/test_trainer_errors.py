"""Training ended from outside: a dead worker, a GPU that is too small, no network."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from test_trainer import QUIET, Watched, checkpoint, config, same, train, weights

from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError, TrainingError


@pytest.mark.usefixtures("small_network")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of POSIX")
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


@pytest.mark.usefixtures("small_network")
def test_a_gpu_that_is_too_small_is_one_readable_error(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config(image_folder), tmp_path / "run", console=QUIET)

    def exhausted() -> None:
        text = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of 8 GiB."
        raise torch.OutOfMemoryError(text)

    monkeypatch.setattr(trainer, "train_step", Watched(trainer.train_step, exhausted))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 8 * 10**9))
    message = r"Tried to allocate 20.00 GiB \(1.0 of 8.0 GB are free\); a smaller --batch-size"
    with pytest.raises(TrainingError, match=message):
        trainer.fit()


@pytest.mark.usefixtures("small_network")
def test_a_run_killed_while_its_configuration_was_written_is_started_again(
    image_folder: Path, tmp_path: Path
) -> None:
    """The unfinished file does not count as another file, and is removed."""
    folder = tmp_path / "run"
    folder.mkdir()
    remains = folder / ".config.json.0123456789abcdef"
    remains.write_text("{")
    (folder / ".mine").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        Trainer(config(image_folder, epochs=1), folder, overwrite=True, console=QUIET)
    (folder / ".mine").unlink()
    assert remains.exists()
    train(config(image_folder, epochs=1), folder, overwrite=True)
    assert not remains.exists()
    assert (folder / "checkpoint.pt").is_file()


def test_a_batch_that_is_too_large_is_refused_before_anything_is_decoded(
    image_folder: Path, tmp_path: Path
) -> None:
    settings = config(image_folder, batch_size=41, cache_dir=tmp_path / "cache")
    message = r"batch_size: 41 must be at most 40, the images in .*train"
    with pytest.raises(InputError, match=message):
        Trainer(settings, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("offline", "message"),
    [
        (False, r"https://.*/(\S+) could not be downloaded \(no route\); a copy is .* HERE/\1$"),
        (True, r"no copy of the weights found \(looked for HERE/\S+\), and downloading is off$"),
    ],
)
def test_missing_weights_are_one_line(
    offline: bool, message: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_route(*arguments: object, **named: object) -> None:
        assert not offline
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_route)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    settings = config(image_folder, offline=offline)
    model = dataclasses.replace(settings.model, pretrained=True)
    message = "pretrained: " + message.replace("HERE", str(tmp_path / "hub" / "checkpoints"))
    with pytest.raises(InputError, match=message):
        Trainer(dataclasses.replace(settings, model=model), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
