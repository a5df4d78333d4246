"""Stand-ins for the packages of logging services: the calls that a training makes, recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass
class Kept:
    """A run as a service keeps it."""

    settings: dict[str, Any]
    lines: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    sessions: int = 1
    ends: list[object] = field(default_factory=list)


class Service(ModuleType):
    """A service's package and its server: the runs by their id."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, origin="a stand-in")
        self.runs: dict[str, Kept] = {}
        self.broken: Callable[[int], bool] = lambda step: False

    def _open(self, id: str, settings: dict[str, Any]) -> Kept:
        if id in self.runs:
            self.runs[id].sessions += 1
        return self.runs.setdefault(id, Kept(settings))

    def _log(self, kept: Kept, metrics: dict[str, float], step: int) -> None:
        if self.broken(step):
            raise ConnectionError("no route to the server\nat line 1")
        kept.lines.append((step, metrics))


class Wandb(Service):
    def Settings(self, *, console: str, finish_timeout: float) -> SimpleNamespace:
        assert console == "off"
        return SimpleNamespace(finish_timeout=finish_timeout)

    def init(
        self,
        *,
        project: str,
        name: str,
        id: str,
        resume: str,
        dir: Path,
        config: dict[str, Any],
        settings: SimpleNamespace,
    ) -> SimpleNamespace:
        assert (project, name, resume) == ("vi-simsiam", dir.name, "allow")
        assert dir.is_dir()
        kept = self._open(id, config)
        return SimpleNamespace(
            log=lambda metrics, *, step: self._log(kept, metrics, step),
            finish=lambda *, exit_code: kept.ends.append(exit_code == 0),
        )


class Mlflow(Service):
    def set_experiment(self, name: str) -> None:
        assert name == "vi-simsiam"

    def start_run(self, *, run_id: str | None, run_name: str | None) -> SimpleNamespace:
        assert (run_id is None) == (run_name is not None)
        assert run_id is None or run_id in self.runs
        self.active = self._open(run_id or f"run{len(self.runs)}", {})
        return SimpleNamespace(info=SimpleNamespace(run_id=list(self.runs)[-1]))

    def log_params(self, settings: dict[str, Any]) -> None:
        assert not self.active.settings, "they cannot be changed"
        self.active.settings = settings

    def log_metrics(self, metrics: dict[str, float], *, step: int) -> None:
        self._log(self.active, metrics, step)

    def end_run(self, status: str) -> None:
        self.active.ends.append(status == "FINISHED")


class Trackio(Service):
    def init(
        self, *, project: str, name: str, resume: str, config: dict[str, Any], embed: bool
    ) -> SimpleNamespace:
        assert (project, resume, embed) == ("vi-simsiam", "allow", False)
        kept = self._open(name, config)
        return SimpleNamespace(
            log=lambda metrics, *, step: self._log(kept, metrics, step),
            finish=lambda: kept.ends.append(True),
        )


SERVICES: dict[str, type[Service]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> Service:
    """Put a stand-in in the place of a service's package."""
    service = SERVICES[name](name)
    monkeypatch.setitem(sys.modules, name, service)
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(variable, raising=False)
    return service
