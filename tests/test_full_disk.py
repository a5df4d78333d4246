"""A full disk, simulated by a limit on the size of files: one line, and old files are kept."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inference_cases import save_run
from rich.console import Console
from rich.filesize import decimal

from vi_simsiam.cli import main
from vi_simsiam.config import AugmentConfig, ModelConfig, TrainConfig
from vi_simsiam.engine.checkpoint import checkpoint_path
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import TrainingError
from vi_simsiam.files import write_atomically

resource = pytest.importorskip("resource")


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """Limit the size of every file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def trainer(small_network: None, image_folder: Path, tmp_path: Path) -> Trainer:
    """Two epochs with a line in the log for every step, and one checkpoint before the first."""
    config = TrainConfig(
        data=f"folder:{image_folder}",
        epochs=2,
        batch_size=8,
        workers=0,
        device="cpu",
        log_every=1,
        save_every=1e6,
        augment=AugmentConfig(size=8, blur_prob=0.0),
        model=ModelConfig(dim=8, projector_hidden=8, predictor_hidden=8),
    )
    return Trainer(config, tmp_path / "run", console=Console(quiet=True))


def test_a_checkpoint_names_the_room_that_it_needs(trainer: Trainer) -> None:
    path = checkpoint_path(trainer.folder, 0)
    with room(4000), pytest.raises(TrainingError, match=r"are free\); there is none yet"):
        trainer.fit()
    assert not path.exists()
    trainer._save()
    before = path.read_bytes()
    names = sorted(entry.name for entry in trainer.folder.iterdir())
    message = (
        rf"the checkpoint {path} could not be written \(File too large: "
        rf"it needs {decimal(len(before))}, [\d.]+ \w+ are free\); the one before is kept"
    )
    with room(4000), pytest.raises(TrainingError, match=message):
        trainer._save()
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in trainer.folder.iterdir()) == names


@pytest.mark.parametrize("full", ["metrics.jsonl", "events.out.tfevents.*"])
def test_a_log_that_cannot_be_written_ends_the_training(
    full: str, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line: TensorBoard's thread prints nothing."""
    tracebacks: list[object] = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    log = trainer.folder / "metrics.jsonl"
    with contextlib.ExitStack() as stack:

        def fill() -> None:
            (path,) = trainer.folder.glob(full)
            stack.enter_context(room(path.stat().st_size))

        message = rf"the logs in {trainer.folder} could not be written \(File too large\)"
        with pytest.raises(TrainingError, match=message):
            trainer.fit(epoch_done=fill)
    assert 6 <= trainer.step < 10, "in the second epoch"
    assert tracebacks == []
    assert threading.excepthook == tracebacks.append
    again = Trainer(trainer.config, trainer.folder, resume=True, console=Console(quiet=True))
    again.fit()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 11))


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Also where torch.save hides the reason."""
    path = tmp_path / "file"
    path.write_text("old")
    tensor = torch.zeros(500)
    for write in (lambda file: file.write(bytes(2000)), lambda file: torch.save(tensor, file)):
        with room(1000), pytest.raises(OSError, match="File too large") as error:
            write_atomically(path, write)
        assert error.value.filename == str(path)
        assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda file: 1 / 0)


def test_a_command_ends_in_one_line(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, images, out = save_run(tmp_path / "run"), image_folder / "train", tmp_path / "out"
    out.mkdir()
    for command, named in (
        (f"embed {run} {images} --out {out}/table.parquet --device cpu", ""),
        (f"rank {run} {images} --out {out}/order --device cpu", "/order.csv"),
        (f"views --data {images} --out {out}/views.png", "/views.png"),
        (f"export {run} --format torchvision --out {out}/weights", "/.weights.*/model.pth"),
    ):
        with room(500):
            assert main(command.split()) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(f"vi-simsiam: {out}{named}: File too large", line)
        assert list(out.iterdir()) == []
