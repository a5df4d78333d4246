"""Loggers by name: one run of a service over several sessions, and a service that fails."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NoReturn

import pytest
from logger_cases import SERVICES, stand_in
from rich.console import Console
from test_trainer import QUIET, Watched, config, metrics, train

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.checkpoint import checkpoints
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError
from vi_simsiam.files import read_json

pytestmark = pytest.mark.usefixtures("small_network")


def interrupted(settings: TrainConfig, folder: Path, at: int, *, resume: bool = False) -> None:
    """Train up to a step."""
    trainer = Trainer(settings, folder, resume=resume, console=QUIET)

    def stop() -> None:
        if trainer.step == at - 1:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.train_step = Watched(trainer.train_step, stop)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def figures(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """The lines of metrics.jsonl as a service should have them."""
    others = {"step", "state", "since"}
    return [
        (int(line["step"]), {name: x for name, x in line.items() if name not in others})
        for line in metrics(folder)
    ]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_keeps_one_run_over_several_sessions(
    name: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps are those of the log, once each, also where checkpoints were lost: the second
    session begins at step 3, and ends before it has reached the end of the first."""
    service, folder = stand_in(name, monkeypatch), tmp_path / "run"
    settings = config(image_folder, log=f"{name}, tensorboard", log_every=1, keep=3)
    interrupted(settings, folder, at=5)
    for path in checkpoints(folder)[:2]:
        path.unlink()
    interrupted(settings, folder, at=4, resume=True)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    train(settings, folder, resume=True)
    (kept,) = service.runs.values()
    assert kept.sessions == 3
    expected = figures(folder)
    assert [step for step, _ in kept.lines] == [step for step, _ in expected] == [*range(1, 11)]
    for (_, found), (_, line) in zip(kept.lines, expected, strict=True):
        assert found.keys() == line.keys()
        for figure in ("loss", "cosine", "lr", "grad_norm"):
            assert found[figure] == line[figure]
    assert kept.ends == [name == "trackio"] * 2 + [True]
    assert kept.settings["data"] == f"folder:{image_folder.name}"
    assert kept.settings["augment.size"] == 16
    assert not [value for value in kept.settings.values() if str(image_folder.parent) in str(value)]
    assert list(folder.glob("events.out.tfevents.*"))

    train(settings, folder, overwrite=True)
    assert len(service.runs) == 2, "another run"


@pytest.mark.parametrize("first", [1, 6])
def test_a_service_that_fails_is_left_out(
    first: int, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one warning; the other service and the log have all lines."""
    failing, other = stand_in("wandb", monkeypatch), stand_in("mlflow", monkeypatch)
    failing.broken = lambda step: step >= first
    printed = io.StringIO()
    settings = config(image_folder, log="wandb,mlflow", log_every=1)
    Trainer(settings, tmp_path / "run", console=Console(file=printed, width=300)).fit()
    warnings = [line for line in printed.getvalue().splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: wandb logs no more (no route to the server); the training goes on, and "
        "metrics.jsonl has all its lines"
    ]
    (left_out,), (kept,) = failing.runs.values(), other.runs.values()
    assert [step for step, _ in left_out.lines] == list(range(1, first))
    assert [step for step, _ in kept.lines] == [line["step"] for line in metrics(tmp_path / "run")]
    assert len(kept.lines) == 10
    assert not list((tmp_path / "run").glob("events.out.tfevents.*")), "not named"


def test_a_service_that_cannot_be_opened_or_closed_is_left_out(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object, **options: object) -> NoReturn:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(stand_in("wandb", monkeypatch), "init", fails)
    monkeypatch.setattr(stand_in("mlflow", monkeypatch), "end_run", fails)
    printed = io.StringIO()
    settings = config(image_folder, log="wandb,mlflow")
    Trainer(settings, tmp_path / "run", console=Console(file=printed, width=300)).fit()
    for name in ("wandb", "mlflow"):
        assert f"warning: {name} logs no more (not logged in)" in printed.getvalue()
    assert read_json(tmp_path / "run" / "loggers.json", dict[str, Any], "run").keys() == {"mlflow"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_is_not_installed_is_one_line(
    name: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name, as wandb makes it where it runs, is no package."""
    (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(InputError, match=f"log: {name} is not installed") as raised:
        Trainer(config(image_folder, log=name), tmp_path / "run", console=QUIET)
    assert f"pip install 'vi-simsiam[{name}]'" in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_loggers_are_checked_before_the_folder_is_touched(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="log: 'wandv' is none of tensorboard.*mean 'wandb'"):
        Trainer(config(image_folder, log="wandv"), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
    stand_in("trackio", monkeypatch)
    settings = config(image_folder, log="trackio", epochs=1)
    train(settings, tmp_path / "run")
    for content in ('{"trackio": 3}', '{"trackio": {"id": "a", "step": -1}}', "{"):
        (tmp_path / "run" / "loggers.json").write_text(content)
        with pytest.raises(InputError, match=r"loggers\.json is damaged"):
            Trainer(settings, tmp_path / "run", resume=True, console=QUIET)


@pytest.mark.parametrize("name", SERVICES)
def test_the_package_itself_offline(
    name: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sessions without a warning; files lie in the folder of the run, or where they must."""
    pytest.importorskip(name, reason=f"needs pip install 'vi-simsiam[{name}]'")
    for variable in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "service"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    folder, printed = tmp_path / "run", io.StringIO()
    settings = config(image_folder, log=name, log_every=1)
    interrupted(settings, folder, at=4)
    console = Console(file=printed, width=300)
    Trainer(settings, folder, resume=True, console=console).fit()
    assert "warning" not in printed.getvalue()
    (run,) = read_json(folder / "loggers.json", dict[str, Any], "run").values()
    assert run["step"] == 4
    if name == "wandb":
        sessions = list((folder / "wandb").glob(f"offline-run-*-{run['id']}/run-{run['id']}.wandb"))
        assert len(sessions) == 2
    elif name == "mlflow":
        client = importlib.import_module("mlflow").MlflowClient()
        history = client.get_metric_history(run["id"], "loss")
        found = sorted((line.step, line.value) for line in history)
        assert found == [(line["step"], line["loss"]) for line in metrics(folder)]
        assert client.get_run(run["id"]).info.status == "FINISHED"
    else:
        storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        lines = storage.get_logs("vi-simsiam", run["id"])
        assert [(line["step"], line["loss"]) for line in lines if "loss" in line] == [
            (line["step"], line["loss"]) for line in metrics(folder)
        ]
