"""One run of a record, in a process of its own: `python -m vi_simsiam.benchmarks.record_run SPEC`.

It imports no more than it needs: the clock runs since before the process began.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Console

from vi_simsiam.config import TrainConfig
from vi_simsiam.data.subsets import at_most, labelled_splits
from vi_simsiam.engine.processes import INTERRUPTED
from vi_simsiam.engine.run import open_splits
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import UserError
from vi_simsiam.experiments.progress import Progress
from vi_simsiam.files import read_json
from vi_simsiam.text import one_line


class Spec(TypedDict):
    """The specification of a run.

    `started` is a time of `time.monotonic`, which all processes of a machine share.
    """

    config: dict[str, Any]
    every: int
    val_images: int | None
    folder: str
    started: float


def main(path: Path) -> int:
    """Train, and measure kNN accuracy on the way; the lines go to progress.jsonl in the folder.

    Returns:
        The exit code: 0 done, 2 failed for a reason that is printed, 130 interrupted.
    """
    try:
        spec = read_json(path, Spec, "spec")
        config = TrainConfig.from_dict(spec["config"])
        splits = open_splits(config)
        val = at_most(labelled_splits(splits)["val"], spec["val_images"])
        console = Console(soft_wrap=True)
        trainer = Trainer(config, spec["folder"], console=console, splits=splits)
        measure = Progress(
            trainer, spec["every"], val=val, clock=lambda: time.monotonic() - spec["started"]
        )
        trainer.fit(epoch_done=measure)
        return 0
    except UserError as error:
        print(one_line(f"vi-simsiam: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
