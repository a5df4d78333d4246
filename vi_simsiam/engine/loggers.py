"""Loggers of a training by name: TensorBoard's files, and the services wandb, MLflow and Trackio.

A service takes its account, server and project from its own environment variables, also those for
working offline. Its package is imported only where the service is named.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol, TypedDict

from vi_simsiam.checks import Rule
from vi_simsiam.config import PLACE_FIELDS, TrainConfig, flat
from vi_simsiam.data_names import data_label
from vi_simsiam.engine.run import LOGGERS
from vi_simsiam.errors import InputError, cut, none_of
from vi_simsiam.files import read_json, write_json
from vi_simsiam.paths import utf8_path
from vi_simsiam.text import one_line

_PROJECT = "vi-simsiam"
_OWN = "tensorboard"
_SECONDS_TO_FINISH = 60.0
"""For lines that are still to be sent when the training ends."""


class _Known(TypedDict):
    """A service's run of an earlier session, and the last step that it was given."""

    id: str
    step: Annotated[int, Rule(lambda x: 0 <= x < 2**53, "at least 0")]


class Logger(Protocol):
    """Takes the metrics of a run."""

    @property
    def id(self) -> str | None:
        """The name by which a resumed training finds the same run; None where it needs none."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step."""

    def close(self, failed: bool) -> None:
        """Finish what is still to be written; `failed` if the training did not reach its end."""


class _TensorBoard:
    """Writes events.out.tfevents.* into the run folder; later steps of an earlier session go."""

    id = None

    def __init__(self, folder: Path, config: TrainConfig, step: int, known: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._stack = contextlib.ExitStack()
        place = str(self._stack.enter_context(utf8_path(folder)))
        self._writer = SummaryWriter(place, purge_step=step + 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        with self._stack:
            self._writer.close()


class _Wandb:
    """Weights & Biases; its own files go to RUN/wandb."""

    def __init__(self, folder: Path, config: TrainConfig, step: int, known: str | None) -> None:
        import wandb

        self.id = known or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.name,
            id=self.id,
            resume="allow",
            dir=folder,
            config=_settings(config),
            settings=wandb.Settings(console="off", finish_timeout=_SECONDS_TO_FINISH),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """An MLflow run; MLFLOW_TRACKING_URI names the server or the local store."""

    def __init__(self, folder: Path, config: TrainConfig, step: int, known: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        if known is None and not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & {*os.environ}:
            mlflow.set_experiment(_PROJECT)
        name = folder.name if known is None else None
        self.id = str(mlflow.start_run(run_id=known, run_name=name).info.run_id)
        if known is None:  # they cannot be changed later
            mlflow.log_params(_settings(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class _Trackio:
    """A Trackio run, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set."""

    def __init__(self, folder: Path, config: TrainConfig, step: int, known: str | None) -> None:
        import trackio

        self.id = known or f"{folder.name}-{secrets.token_hex(4)}"  # its runs are found by name
        self._run = trackio.init(
            project=_PROJECT,
            name=self.id,
            resume="allow",
            config=_settings(config),
            embed=False,
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[Path, TrainConfig, int, str | None], Logger]] = {
    "tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow, "trackio": _Trackio,
}  # fmt: skip


class Loggers:
    """The loggers that a configuration names.

    A service that fails, at any time, is left out from then on, with a warning; only TensorBoard,
    whose files are the run's own, raises its errors.

    Args:
        folder: the run folder; it keeps the names of the services' runs.
        config: of the run.
        step: the step at which the training starts.
        logged: the last step that an earlier session logged; services that it used get later ones.
        warn: called with each warning, one line.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        *,
        step: int,
        logged: int,
        warn: Callable[[str], object],
    ) -> None:
        self._warn, self._loggers = warn, dict[str, Logger]()
        known = _known_runs(folder)
        for run in known.values():  # after several early ends the log is shorter than theirs
            run["step"] = max(run["step"], logged)
        for name in _names(config.log):
            run = known.get(name, {"id": "", "step": 0})
            with self._guarded(name):
                self._loggers[name] = logger = _KINDS[name](folder, config, step, run["id"] or None)
                if logger.id is not None:
                    known[name] = {"id": logger.id, "step": run["step"]}
        self._logged = {name: run["step"] for name, run in known.items()}
        if known:
            write_json(folder / LOGGERS, dict(known))

    def log(self, metrics: Mapping[str, float]) -> None:
        """Log a line of metrics, which has the key "step".

        Raises:
            OSError: TensorBoard's file could not be written.
        """
        step = int(metrics["step"])
        values = {name: value for name, value in metrics.items() if name != "step"}
        for name, logger in list(self._loggers.items()):
            if step > self._logged.get(name, 0):
                with self._guarded(name):
                    logger.log(values, step)

    def close(self, *, failed: bool) -> None:
        """Finish all loggers; `failed` if the training did not reach its end.

        Raises:
            OSError: TensorBoard's file could not be written.
        """
        for name, logger in sorted(self._loggers.items(), key=lambda item: item[0] == _OWN):
            with self._guarded(name):
                logger.close(failed)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each service raises its own
            if name == _OWN:
                raise
            self._loggers.pop(name, None)
            reason = cut(one_line((str(error).splitlines() or [type(error).__name__])[0]))
            self._warn(
                f"warning: {name} logs no more ({reason}); the training goes on, and "
                "metrics.jsonl has all its lines"
            )


def check_loggers(config: TrainConfig, resumed: Path | None) -> None:
    """Check, before a run begins, that its loggers can be used.

    Args:
        config: of the run.
        resumed: the folder of the run that goes on; None for a new run.

    Raises:
        InputError: an unknown logger, one that is not installed, or a damaged file in `resumed`.
    """
    for name in _names(config.log):
        if name not in _KINDS:
            raise none_of("log", name, _KINDS)
        found = importlib.util.find_spec("torch" if name == _OWN else name)
        if found is None or found.origin is None:  # no origin: a folder of that name, as wandb's
            raise InputError(
                f"log: {name} is not installed; install with pip install 'vi-simsiam[{name}]'"
            )
    if resumed is not None:
        _known_runs(resumed)


def _names(log: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in log.split(",")))


def _known_runs(folder: Path) -> dict[str, _Known]:
    """By service: the run that an earlier session logged to."""
    path = folder / LOGGERS
    return read_json(path, dict[str, _Known], "run") if os.path.lexists(path) else {}


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that determine a run, without folders of this machine."""
    named = {"data": data_label(config.data), "init": config.init and config.init.name}
    plain = flat(config.to_dict()) | named
    return {name: value for name, value in plain.items() if name not in PLACE_FIELDS}
