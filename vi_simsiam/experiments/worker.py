"""One run of an experiment: `python -m vi_simsiam.experiments.worker SPEC.json PARENT-PROCESS`.

Trains, then measures, and skips what is done already: a killed run continues where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.checkpoint import write_json
from vi_simsiam.engine.run import CHECKPOINT, check_config, read_config
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import TrainingError, UserError
from vi_simsiam.experiments.measure import Progress, measure_run
from vi_simsiam.experiments.runner import TRAINED, locked

_SECONDS_TO_LOCK = 90.0
"""Time to wait for an earlier process of the same run, which may still be saving."""


def main(path: Path) -> int:
    """Do the run of the specification in `path`.

    Returns:
        The exit code: 0 done, 2 failed for a reason that is printed, 130 interrupted.
    """
    try:
        spec = json.loads(path.read_text())
        folder = Path(spec["folder"])
        lock, busy = folder.with_name(f".{folder.name}.lock"), f"run: another process uses {folder}"
        with locked(lock, busy, seconds=_SECONDS_TO_LOCK):
            print(work(spec), flush=True)
        return 0
    except UserError as error:
        print(f"vi-simsiam: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(": ".join(("interrupted", *interruption.args)), flush=True)
        return 130


def work(spec: dict[str, Any]) -> str:
    """Do the run of a specification and write its result file; returns a line on the result."""
    result, folder = Path(spec["result"]), Path(spec["folder"])
    config = TrainConfig.from_dict(spec["config"])
    if result.is_file():
        return "measured before"
    try:
        trained, diverged = train(config, folder, spec["progress_every"]), None
    except TrainingError as error:
        if "not finite" not in str(error):
            raise
        # Divergence is a result, too: the same seed would end in the same way. The rest of the
        # message names a path of this machine.
        trained, diverged = None, str(error).partition(";")[0]
    content = measure_run(spec, config, trained)
    if diverged is not None:
        content["diverged"] = diverged
    write_json(result, content)
    if not spec["measures"]:  # only the training counts, so the weights are not kept
        shutil.rmtree(folder)
    if diverged is not None:
        return f"diverged: {diverged}"
    if not spec["measures"]:
        return f"cosine {content['curve']['cosine'][-1]:.2f}"
    return "  ".join(f"{name} {100 * share:.1f} %" for name, share in content["accuracy"].items())


def train(config: TrainConfig, folder: Path, progress_every: int | None = None) -> dict[str, Any]:
    """Train a run or continue it.

    Returns:
        The content of RUN/trained.json: steps, images, seconds and device of the training.

    Raises:
        InputError: the folder holds a run with another configuration, or data is missing.
        TrainingError: the training cannot continue.
        KeyboardInterrupt: a signal arrived; the message names the step that was saved.
    """
    done = folder / TRAINED
    if done.is_file():
        check_config(read_config(folder), config, folder)
        before: dict[str, Any] = json.loads(done.read_text())
        return before
    # Without a checkpoint, the folder of a killed run holds nothing to keep.
    resume = (folder / CHECKPOINT).is_file()
    console = Console(soft_wrap=True)
    trainer = Trainer(config, folder, resume=resume, overwrite=not resume, console=console)
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


def _end_with(parent: int) -> None:
    """Save and end when the process that started this one has ended, in whatever way."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    sys.exit(main(Path(sys.argv[1])))
