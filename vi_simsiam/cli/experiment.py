"""`vi-simsiam experiment`: an experiment's runs, and what they show."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vi_simsiam.cli.parsing import parse
from vi_simsiam.experiments.plan import PlanOptions


@dataclass(frozen=True)
class _Experiment(PlanOptions):
    name: Annotated[str, tyro.conf.Positional] = tyro.MISSING
    """table1, tuned, controls, stability or lightly-imagenette."""
    out: Path | None = None
    """Folder of the experiment; None for runs/experiments/NAME. The same command goes on with what is there."""
    data_root: Path = Path("data")
    """Where downloaded data sets are kept or looked for."""
    offline: bool = False
    """Never download."""
    cache_dir: Path | None = None
    """Where decoded images are kept; None for vi-simsiam/ in the user's cache folder."""
    devices: tuple[str, ...] = ()
    """cuda:0, cuda:1, ... or cpu, over which the runs are spread; none for every GPU, or the CPU without any."""
    parallel: int | None = None
    """Runs at once on each device; None for one on a GPU, and one for every core on a CPU."""
    threads: int | None = None
    """Threads of each run; None for the cores shared among the runs of GPUs, and one on a CPU."""
    workers: int | None = None
    """Processes of each run that prepare views on a CPU and read images; None for a number that suits the device."""


def experiment(arguments: list[str]) -> int:
    """Run the experiment, or go on with it; returns the exit code: 0 all done, 2 a run failed, 130 interrupted."""
    options = parse("experiment", _Experiment, arguments)

    from vi_simsiam.experiments.figures import draw
    from vi_simsiam.experiments.plan import plan
    from vi_simsiam.experiments.runner import RESULTS, Place, run_experiment
    from vi_simsiam.experiments.tables import MARKDOWN, summarise

    said = {field.name: getattr(options, field.name) for field in dataclasses.fields(PlanOptions)}
    place = {field.name: getattr(options, field.name) for field in dataclasses.fields(Place)}
    planned = plan(options.name, PlanOptions(**said))
    out = options.out or Path("runs") / "experiments" / options.name
    again = shlex.join(["vi-simsiam", "experiment", *arguments])
    code = run_experiment(planned, out, Place(**place), again=again)
    if any((out / RESULTS).glob("*.json")):
        summarise(out)
        for path in (out / MARKDOWN, *draw(out)):
            print(path)
    return code
