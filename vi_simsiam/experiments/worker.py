"""One run of an experiment, in a process of its own: `python -m vi_simsiam.experiments.worker SPEC.json`.

Trains, then measures, each unless it is done; what is killed in between goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vi_simsiam.config import TrainConfig, differing_fields
from vi_simsiam.engine.checkpoint import write_json
from vi_simsiam.engine.run import CHECKPOINT, read_config
from vi_simsiam.engine.trainer import Trainer
from vi_simsiam.errors import InputError, TrainingError, UserError
from vi_simsiam.experiments.measure import Progress, measure_run
from vi_simsiam.experiments.runner import TRAINED

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SECONDS_TO_LOCK = 90.0
_PARENT_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one run; returns the exit code: 0 done, 2 failed for a reason that is printed, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if len(given) not in (1, 3) or (len(given) == 3 and given[1] != "--parent"):
            raise InputError("worker: say SPEC.json, and at most --parent PROCESS")
        if len(given) == 3:
            _end_with(int(given[2]))
        spec = json.loads(Path(given[0]).read_text())
        with _locked(Path(spec["folder"])):
            print(work(spec), flush=True)
        return 0
    except UserError as error:
        print(f"vi-simsiam: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(
            f"interrupted{': ' if interruption.args else ''}{' '.join(interruption.args)}",
            flush=True,
        )
        return 130


def work(spec: dict[str, Any]) -> str:
    """Do what `spec` says and write its result file; returns a line on the result.

    Raises:
        UserError: it cannot be done.
        KeyboardInterrupt: a signal arrived; the run can be gone on with.
    """
    result, folder = Path(spec["result"]), Path(spec["folder"])
    config = TrainConfig.from_dict(spec["config"])
    if result.is_file():
        return "measured before"
    try:
        trained = train(config, folder, progress_every=spec["progress_every"])
    except TrainingError as error:
        if "not finite" not in str(error):
            raise
        # That it cannot be trained so is a result, too: the same seed would end the same way.
        reason = str(error).partition(";")[
            0
        ]  # what follows names the checkpoint by a path of this machine
        write_json(result, {**measure_run(spec, config, None), "diverged": reason})
        _drop(spec)
        return f"diverged: {reason}"
    content = measure_run(spec, config, trained)
    write_json(result, content)
    _drop(spec)
    if not spec["measures"]:
        return f"cosine {content['curve']['cosine'][-1]:.2f}"
    return "  ".join(f"{name} {100 * share:.1f} %" for name, share in content["accuracy"].items())


def _drop(spec: dict[str, Any]) -> None:
    """Delete the weights of a run of which only the training counts."""
    if not spec["measures"]:
        shutil.rmtree(spec["folder"])


def train(
    config: TrainConfig, folder: Path, *, progress_every: int | None = None
) -> dict[str, Any]:
    """Train, or go on; returns the content of RUN/trained.json: steps, images and seconds of the training.

    Raises:
        InputError: the folder holds a run with another configuration, or data that is not there.
        TrainingError: the training cannot go on.
        KeyboardInterrupt: a signal arrived; says the step that was saved.
    """
    done = folder / TRAINED
    if done.is_file():
        if differing := differing_fields(read_config(folder), config):
            raise InputError(
                f"run: {folder} was trained with another configuration: {'; '.join(differing)}"
            )
        trained: dict[str, Any] = json.loads(done.read_text())
        return trained
    resume = (folder / CHECKPOINT).is_file()
    # A run that was killed before its first checkpoint has left a folder that holds nothing of worth.
    trainer = Trainer(
        config, folder, resume=resume, overwrite=not resume, console=Console(soft_wrap=True)
    )
    progress = None if progress_every is None else Progress(trainer, progress_every)
    try:
        trainer.fit(epoch_done=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"saved at step {trainer.saved_step}") from None
    trained = {
        "steps": trainer.total_steps,
        "images": len(trainer.loader.source),
        "seconds": round(trainer.seconds, 3),
        "device": str(trainer.device),
    }
    write_json(done, trained)
    return trained


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep two processes from training one run; the one before may still be saving."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        deadline = time.monotonic() + _SECONDS_TO_LOCK
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise InputError(f"run: another process is at work on {folder}") from None
                time.sleep(0.2)
        yield


def _end_with(parent: int) -> None:
    """Save and end when the process that started this one is gone, however it ended."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
