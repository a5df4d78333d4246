"""Run all runs of a plan side by side, each in a process of its own, and continue after a stop.

OUT/plan.json             what is run and compared, written before any run starts
OUT/runs/ARM-seed-N/      run folders, with the specification ARM-seed-N.json and ARM-seed-N.log
OUT/results/ARM-seed-N.json
OUT/trials/               the same for trials, and OUT/chosen.json with the settings they chose
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from vi_simsiam.checks import require
from vi_simsiam.data.cache import cached
from vi_simsiam.data.decoding import cores
from vi_simsiam.data.subsets import labelled_splits
from vi_simsiam.data_names import foreign_spec, located_spec
from vi_simsiam.engine.processes import INTERRUPTED, Process, last_line, locked, supervise
from vi_simsiam.engine.run import open_splits, resolve_device
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.foreign import open_sets
from vi_simsiam.experiments.forms import Chosen, read_plan, read_run
from vi_simsiam.experiments.plan import (
    PRIMARY_MEASURE,
    TRIAL_SEED,
    Arm,
    Place,
    Plan,
    PlanOptions,
    settings,
)
from vi_simsiam.files import read_json, write_json
from vi_simsiam.text import cell, counted, print_line

PLAN, CHOSEN, RUNS, RESULTS, TRIALS = "plan.json", "chosen.json", "runs", "results", "trials"
MARKDOWN = "summary.md"
TRAINED = "trained.json"
"""File in a run folder whose training is finished; only the measurements may be missing."""
_WORKER = (sys.executable, "-m", "vi_simsiam.experiments.worker")


def outcome(name: str, run: Process, done: str | None) -> str:
    """One line on a run that has ended; `done` is its result, None for a run without one."""
    if done is not None:
        return f"{name}: done in {run.seconds:.0f} s  {done}"
    if run.state == "interrupted":
        return f"{name}: interrupted  {last_line(run.log)}"
    return f"{name}: failed with exit code {run.exit}: {last_line(run.log)} (see {run.log})"


def holds(out: Path, name: str) -> bool:
    """Return True if `out` holds the file `name`, and False if it is a new or empty folder.

    Hidden files do not count: a killed command may leave its lock and a temporary file. Raises
    InputError if `out` is a file or holds other files.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file, not a folder")
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    if name not in names and not all(other.startswith(".") for other in names):
        raise InputError(f"out: {out} holds other files; give an empty or new folder")
    return name in names


class Run(Process):
    """One run of an arm, its files and its process."""

    def __init__(self, plan: Plan, arm: Arm, seed: int, out: Path) -> None:
        base = out if arm.trial_of is None else out / TRIALS
        self.plan, self.arm, self.seed = plan, arm, seed
        self.name = f"{arm.name}-seed-{seed}"
        self.folder, self.result = base / RUNS / self.name, base / RESULTS / f"{self.name}.json"
        self.after = None if arm.after is None else base / RUNS / f"{arm.after}-seed-{seed}"
        self.device = ""
        super().__init__(base / RUNS / f"{self.name}.log")

    @property
    def finished(self) -> bool:
        """True if the run has a result."""
        return self.result.is_file()

    def launch(self, device: str, threads: int, place: Place) -> None:
        """Write the specification and start the process."""
        self.device = device
        # On a CPU a run has one core, and prepares its views between steps.
        workers = 0 if place.workers is None and device == "cpu" else place.workers
        config = dataclasses.replace(
            self.arm.config,
            seed=self.seed,
            device=device,
            workers=workers,
            data_root=place.data_root,
            offline=place.offline,
            cache_dir=place.cache_dir,
        ).located()
        plan, trial = self.plan, self.arm.trial_of is not None
        content = {
            "experiment": plan.experiment,
            "measures": [PRIMARY_MEASURE] if trial else list(plan.measures),
            "uncertainty": not trial and bool(plan.measures),
            "ood": [
                f"{kind}={located_spec(data)}" for kind, data in map(foreign_spec, plan.options.ood)
            ],
            "val_images": plan.options.val_images,
            "progress_every": plan.progress_every,
            "arm": self.arm.name,
            "seed": self.seed,
            "config": config.to_dict(),
            "fitted": self.arm.fitted,
            "after": self.after and str(self.after),
            "folder": str(self.folder),
            "result": str(self.result),
        }
        for path in (self.folder, self.result):
            path.parent.mkdir(parents=True, exist_ok=True)
        spec = self.folder.with_name(f"{self.name}.json")
        write_json(spec, content)
        self.start([*_WORKER, str(spec)], threads=threads, append=True)


def run_experiment(plan: Plan, out: Path, place: Place, again: str) -> int:
    """Run the unfinished runs of a plan in `out`, trials first.

    A run that fails does not affect the others, and is tried again the next time. A run whose loss
    stops being finite has a result without an accuracy. `again` is the command that continues,
    printed if something is left to do.

    Returns:
        The exit code: 0 all done, 1 a run failed, 130 interrupted.

    Raises:
        InputError: a folder with other content or of other options, or a device or data that is not
            available.
    """
    console, out, slots = Console(), out.absolute(), _slots(place)
    _check(plan, out)
    runs, trials = _runs(plan, plan.arms, out), []
    if not (out / CHOSEN).is_file():
        trials = [Run(plan, trial, TRIAL_SEED, out) for trial in plan.trials]
    _decode([run.arm for run in (*trials, *runs) if not run.finished], plan, place, console)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", f"out: another command is running the experiment in {out}"):
        _check(plan, out)  # another command may have started here while images were decoded
        if not (out / PLAN).is_file():
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            write_json(out / PLAN, {**plan.described(), "created": now})
        if trials:
            if code := _run_all(trials, slots, place, console, again):
                return code
            _choose(plan, trials, out / CHOSEN)
        if plan.trials:
            runs = _runs(plan, plan.tuned(_accuracies(plan, out / CHOSEN)).values(), out)
        return _run_all(runs, slots, place, console, again)


def _slots(place: Place) -> list[str]:
    """The device of each run that can happen at the same time."""
    for name, least in (("parallel", 1), ("threads", 1), ("workers", 0)):
        value = getattr(place, name)
        require(name, value, value is None or value >= least, f"at least {least}")
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices = list(place.devices) or gpus or ["cpu"]
    for device in devices:
        resolve_device(device)
    on_cpu = all(device == "cpu" for device in devices)
    return devices * (place.parallel or (cores() if on_cpu else 1))


def _runs(plan: Plan, arms: Iterable[Arm], out: Path) -> list[Run]:
    """The runs of the arms, seed by seed, so that early results can be compared."""
    return [
        Run(plan, arm, seed, out)
        for seed in range(plan.options.seeds)
        for arm in arms
        if arm.seeds is None or seed < arm.seeds
    ]


def _choose(plan: Plan, trials: Sequence[Run], path: Path) -> None:
    """Freeze the settings that the trials choose."""
    # A trial whose loss stopped being finite counts as a trial with accuracy 0.
    accuracy = {
        run.arm.name: read_run(run.result)["accuracy"].get(PRIMARY_MEASURE, 0.0) for run in trials
    }
    chosen = {
        arm.name: {"trial": trial, **settings(arm.config)}
        for trial, arm in plan.tuned(accuracy).items()
    }
    write_json(path, {"measure": PRIMARY_MEASURE, "accuracy": accuracy, "chosen": chosen})


def _accuracies(plan: Plan, path: Path) -> dict[str, float]:
    """The accuracies of the trials by which settings were chosen."""
    found = read_json(path, Chosen, "out")["accuracy"]
    if missing := [trial.name for trial in plan.trials if trial.name not in found]:
        raise InputError(f"out: {path} is damaged; it lacks the accuracy of {missing[0]}")
    return found


def _run_all(
    runs: Sequence[Run], slots: Sequence[str], place: Place, console: Console, again: str
) -> int:
    """Run those that have no result yet, as many at once as `slots`; returns the exit code."""
    total = counted(len(runs), "run")
    waiting = [run for run in runs if not run.finished]
    threads = place.threads or (1 if "cpu" in slots else max(1, cores() // len(slots)))
    if kept := len(runs) - len(waiting):
        print_line(console, f"{kept} of {total} finished and kept")

    def start_more() -> None:
        """Start runs on free devices, once the runs that they start from are trained."""
        for run in list(waiting):
            running = [other for other in runs if other.running]
            free = Counter(slots) - Counter(other.device for other in running)
            if not free:
                return
            if run.after is None or (run.after / TRAINED).is_file():
                waiting.remove(run)
                run.launch(max(free, key=lambda device: free[device]), threads, place)
            elif all(other.folder != run.after for other in (*waiting, *running)):
                waiting.remove(run)
                reason = f"{run.after.name}, which it starts from, is not trained"
                print_line(console, f"{run.name}: not started: {reason}")

    def ended(run: Run) -> None:
        done = last_line(run.log) if run.exit == 0 and run.finished else None
        print_line(console, outcome(run.name, run, done))

    interrupted = supervise(
        runs, console, table=lambda: _table(runs, console.width), ended=ended, start_more=start_more
    )
    done = sum(run.finished for run in runs)
    print_line(console, f"{done} of {total} done")
    if done == len(runs):
        return 0
    print_line(console, f"go on with: {again}")
    return INTERRUPTED if interrupted else 1


def _table(runs: Sequence[Run], width: int) -> Table:
    """A line for every running run, and the number of all others."""
    table = Table.grid(padding=(0, 2))
    for run in runs:
        if run.running:
            clock = time.strftime("%H:%M:%S", time.gmtime(run.elapsed))
            line = last_line(run.log)[: max(20, width - len(run.name) - 24)]
            table.add_row(*map(cell, (run.name, run.device, clock, line)))
    states = Counter("done" if run.finished else run.state for run in runs)
    counts = f"{states['done']} of {len(runs)} done, {states['waiting']} waiting"
    table.add_row(counts + (f", {states['failed']} failed" if states["failed"] else ""))
    return table


def _decode(arms: Sequence[Arm], plan: Plan, place: Place, console: Console) -> None:
    """Open every data set and decode its images once, before several runs do at the same time."""
    fields = attrgetter("data", "images", "held_out", "split_seed", "distinct")
    for config in {fields(arm.config): arm.config for arm in arms}.values():
        with console.status(cell(f"reading {config.data}"), spinner="line"):
            here = dataclasses.replace(config, data_root=place.data_root, offline=place.offline)
            here = here.located()
            splits, foreign = open_splits(here), []
            if plan.measures:  # raises before the first run is trained
                labelled_splits(splits)
                foreign = [each.source for each in open_sets(plan.options.ood, splits, here)]
            for source in (splits.train, splits.val, *foreign):
                if source is not None:
                    cached(source, cache_dir=place.cache_dir)


def _check(plan: Plan, out: Path) -> None:
    """Refuse a folder that holds another plan or something else."""
    if not holds(out, PLAN):
        return
    saved, described = read_plan(out / PLAN), json.loads(json.dumps(plan.described()))
    defaults = json.loads(json.dumps(dataclasses.asdict(PlanOptions())))
    before = {"experiment": saved["experiment"], **defaults, **saved["options"]}
    if not plan.trials:
        before["trials"] = plan.options.trials  # their number decides nothing
    for name, value in {"experiment": plan.experiment, **described["options"]}.items():
        if before.get(name) != value:
            raise InputError(
                f"{name}: {_shown(value)} is not what {out} was started with, "
                f"{_shown(before.get(name))}; use that, or another --out"
            )
    del described["options"]  # compared above, where a version without an option had its default
    changed = ", ".join(name for name, value in described.items() if saved.get(name) != value)
    if changed:
        raise InputError(
            f"out: {out} was planned by another version of vi-simsiam, with other {changed}; use "
            "another --out"
        )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
