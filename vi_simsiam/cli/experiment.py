"""`vi-simsiam experiment`: the runs of an experiment, and its summary."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vi_simsiam.cli.parsing import parse
from vi_simsiam.errors import InputError
from vi_simsiam.experiments.plan import Place, PlanOptions
from vi_simsiam.paths import user_path
from vi_simsiam.text import show


@dataclass(frozen=True)
class _Experiment(Place, PlanOptions):
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = tyro.MISSING
    """table1, tuned, controls, kappa, further, stability, lightly-imagenette or deaths."""
    out: Path | None = None
    """Folder of the experiment; None for runs/experiments/NAME. The same command continues it."""


def experiment(arguments: list[str]) -> int:
    """Run or continue the experiment; returns 0 all done, 1 a run failed, 130 interrupted."""
    options = parse("experiment", _Experiment, arguments)

    from vi_simsiam.experiments.catalogue import plan
    from vi_simsiam.experiments.deaths import summarise_deaths
    from vi_simsiam.experiments.figures import draw
    from vi_simsiam.experiments.runner import MARKDOWN, RESULTS, run_experiment
    from vi_simsiam.experiments.tables import summarise

    if options.init is not None and not user_path("init", options.init).exists():
        raise InputError(f"init: {options.init} is not there; give a run or a file of weights")
    out = options.out or Path("runs") / "experiments" / options.name
    again = shlex.join(["vi-simsiam", "experiment", *arguments])
    code = run_experiment(plan(options.name, options), out, options, again)
    if any((out / RESULTS).glob("*.json")):
        if options.name == "deaths":
            show(summarise_deaths(out))
            return code
        summarise(out)
        for path in (out / MARKDOWN, *draw(out)):
            show(path)
    return code
