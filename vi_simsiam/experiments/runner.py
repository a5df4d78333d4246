"""All runs of a plan, side by side in processes of their own, as often interrupted and gone on with as one likes.

OUT/plan.json             what is run and compared, written before any run starts
OUT/runs/ARM-seed-N/      run folders, with ARM-seed-N.json (what the process is told) and ARM-seed-N.log beside them
OUT/results/ARM-seed-N.json
OUT/trials/               the same for trials, and OUT/chosen.json what they chose
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vi_simsiam.data.cache import cached
from vi_simsiam.data.decoding import cores
from vi_simsiam.engine.checkpoint import write_json
from vi_simsiam.engine.processes import INTERRUPTED, Process, end, last_line, signals, watch
from vi_simsiam.engine.run import open_splits
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.features import labelled_splits
from vi_simsiam.experiments.plan import Arm, Place, Plan, settings
from vi_simsiam.text import counted

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PLAN, CHOSEN, RUNS, RESULTS, TRIALS = "plan.json", "chosen.json", "runs", "results", "trials"
TRAINED = "trained.json"
"""In a run folder once its training is finished; what is missing then is to measure it."""
_WORKER = (sys.executable, "-m", "vi_simsiam.experiments.worker")
_FAILED = 2


@dataclass(frozen=True)
class Task:
    """One run of an arm."""

    arm: Arm
    seed: int
    base: Path
    """The folder that runs/ and results/ are in."""
    spec: dict[str, Any] = field(repr=False)
    """What the process is told beside its device."""

    @property
    def name(self) -> str:
        """The name of its folder and files."""
        return run_name(self.arm.name, self.seed)

    @property
    def result(self) -> Path:
        """Its result file."""
        return self.base / RESULTS / f"{self.name}.json"

    @property
    def after(self) -> Path | None:
        """The folder of the run that must be trained first."""
        return (
            None
            if self.arm.after is None
            else self.base / RUNS / run_name(self.arm.after, self.seed)
        )


def run_name(arm: str, seed: int) -> str:
    """The name of a run's folder and files."""
    return f"{arm}-seed-{seed}"


def run_experiment(
    plan: Plan,
    out: Path,
    place: Place,
    *,
    again: str = "",
    command: Sequence[str] | None = None,
    console: Console | None = None,
) -> int:
    """Run what is not finished of a plan in `out`; whatever is there of the same plan is gone on with.

    Trials come first. A run that fails leaves the others alone, and is tried again the next time. One whose loss stops
    being finite has a result that says so, and no accuracy.

    Args:
        plan: what to run.
        out: folder of the whole experiment.
        place: devices and folders.
        again: the command that goes on, to be printed where something is left to do.
        command: what is started for each run, with the file that describes it; None for `worker`.
        console: where to print; None for standard output.

    Returns:
        The exit code: 0 all done, 2 a run failed, 130 interrupted.

    Raises:
        InputError: a folder of something else or of other options, a device or data that is not here.
    """
    console, command = console or Console(), command or _WORKER
    out = out.absolute()
    slots = place.slots()
    _check(plan, out)
    trials = (
        []
        if plan.trials is None
        else _tasks(plan, plan.trials.arms, (plan.trials.seed,), out / TRIALS, trial=True)
    )
    tasks = _tasks(plan, plan.arms, plan.seeds, out)
    if (out / CHOSEN).is_file():
        trials = []
    left = [task.arm for task in (*trials, *tasks) if not task.result.is_file()]
    _decode(left, place, console, bool(plan.measures))
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _check(plan, out)  # another command may have begun here while the images were decoded
        _write_plan(plan, out)
        if plan.trials is not None:
            if trials:
                code = _Batch(trials, slots, place, console, command, again).run()
                if code:
                    return code
                _choose(plan, trials, out / CHOSEN)
            _, arms = plan.trials.choose(json.loads((out / CHOSEN).read_text())["accuracy"])
            tasks = _tasks(plan, arms, plan.seeds, out)
        return _Batch(tasks, slots, place, console, command, again).run()


def _tasks(
    plan: Plan, arms: Sequence[Arm], seeds: Sequence[int], base: Path, *, trial: bool = False
) -> list[Task]:
    """The runs of the arms, seed by seed, so that what is there early can be compared."""
    measures = [plan.trials.measure] if trial and plan.trials is not None else list(plan.measures)
    spec = {
        "experiment": plan.experiment,
        "measures": measures,
        "uncertainty": not trial and bool(measures),
        "val_images": plan.options.val_images,
        "progress_every": plan.progress_every,
    }
    return [
        Task(arm, seed, base, spec)
        for seed in seeds
        for arm in arms
        if arm.seeds is None or seed < arm.seeds
    ]


def _choose(plan: Plan, tasks: list[Task], path: Path) -> None:
    """Freeze the settings that the trials choose."""
    trials = plan.trials
    assert trials is not None
    results = {task.arm.name: json.loads(task.result.read_text()) for task in tasks}
    # A trial whose loss stopped being finite was a trial, too.
    accuracy = {
        name: result["accuracy"].get(trials.measure, 0.0) for name, result in results.items()
    }
    best, arms = trials.choose(accuracy)
    chosen = {arm.name: {"trial": best[arm.name], **settings(arm.config)} for arm in arms}
    write_json(path, {"measure": trials.measure, "accuracy": accuracy, "chosen": chosen})


class _Run(Process):
    """A task and its process."""

    def __init__(self, task: Task) -> None:
        self.task = task
        folder = task.base / RUNS
        super().__init__(folder / f"{task.name}.log")
        self.folder, self.spec = folder / task.name, folder / f"{task.name}.json"
        self.slot: int | None = None

    def train(
        self, command: Sequence[str], slot: int, device: str, threads: int, place: Place
    ) -> None:
        """Write what the process is to do, and start it."""
        task, workers = self.task, place.workers
        if workers is None and device == "cpu":
            workers = 0  # a run has a core to itself and prepares its views in between
        config = dataclasses.replace(
            task.arm.config,
            seed=task.seed,
            device=device,
            workers=workers,
            data_root=place.data_root,
            offline=place.offline,
            cache_dir=place.cache_dir,
            frozen_run=task.after,
        ).located()
        spec = {
            **task.spec,
            "arm": task.arm.name,
            "seed": task.seed,
            "config": config.to_dict(),
            "folder": str(self.folder),
            "result": str(task.result),
        }
        write_json(self.spec, spec)
        self.slot = slot
        self.start(
            [*command, str(self.spec), "--parent", str(os.getpid())], threads=threads, append=True
        )


@dataclass
class _Batch:
    """Runs that wait, are at work or have ended, and what is shown of them."""

    tasks: list[Task]
    slots: list[str]
    place: Place
    console: Console
    command: Sequence[str]
    again: str

    def __post_init__(self) -> None:
        self.runs = [_Run(task) for task in self.tasks if not task.result.is_file()]
        self.blocked: dict[str, str] = {}
        """Runs that cannot start, and why."""

    def run(self) -> int:
        """Run all; returns the exit code."""
        kept = len(self.tasks) - len(self.runs)
        if kept:
            self.say(f"{kept} of {counted(len(self.tasks), 'run')} finished and kept")
        if self.runs:
            for name in (RUNS, RESULTS):
                (self.tasks[0].base / name).mkdir(parents=True, exist_ok=True)
        with signals() as received:
            try:
                self.start_more()
                watch(
                    self.runs,
                    received,
                    console=self.console,
                    table=self.table,
                    ended=self.ended,
                    start_more=self.start_more,
                )
            finally:
                end(self.runs)
        missing = sum(not task.result.is_file() for task in self.tasks)
        self.say(f"{len(self.tasks) - missing} of {counted(len(self.tasks), 'run')} done")
        if missing and self.again:
            self.say(f"go on with: {self.again}")
        if received and missing:
            return INTERRUPTED
        return _FAILED if missing else 0

    def start_more(self) -> None:
        """Start what there is room for and what nothing else must come before."""
        for run in self.runs:
            after = run.task.after
            if run.state != "waiting" or run.task.name in self.blocked:
                continue
            if after is not None and not (after / TRAINED).is_file():
                before = next((other for other in self.runs if other.folder == after), None)
                if before is None or before.exit is not None or before.task.name in self.blocked:
                    self.blocked[run.task.name] = (
                        f"not started: {after.name}, which it starts from, is not trained"
                    )
                    self.say(f"{run.task.name}: {self.blocked[run.task.name]}")
                continue
            taken = {other.slot for other in self.runs if other.running}
            free = next((slot for slot in range(len(self.slots)) if slot not in taken), None)
            if free is None:
                return
            run.train(self.command, free, self.slots[free], self._threads(), self.place)

    def ended(self, run: _Run) -> None:
        """Say what became of a run."""
        name, seconds, last = run.task.name, run.seconds, last_line(run.log)
        if run.exit == 0 and run.task.result.is_file():
            self.say(f"{name}: done in {seconds:.0f} s  {last}")
        elif run.state == "interrupted":
            self.say(f"{name}: interrupted  {last}")
        else:
            self.say(f"{name}: failed with exit code {run.exit}: {last} (see {run.log})")

    def table(self) -> Table:
        """A line for every run at work, and the number of all others."""
        table = Table.grid(padding=(0, 2))
        finished = sum(task.result.is_file() for task in self.tasks)
        waiting = sum(run.state == "waiting" for run in self.runs)
        failed = sum(run.state == "failed" for run in self.runs)
        counts = f"{finished} of {len(self.tasks)} done, {waiting} waiting" + (
            f", {failed} failed" if failed else ""
        )
        for run in self.runs:
            if run.running:
                clock = time.strftime("%H:%M:%S", time.gmtime(run.elapsed))
                device = "" if run.slot is None else self.slots[run.slot]
                said = last_line(run.log)[: max(20, self.console.width - len(run.task.name) - 24)]
                table.add_row(*map(escape, (run.task.name, device, clock, said)))
        table.add_row(counts)
        return table

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _threads(self) -> int:
        if self.place.threads is not None:
            return self.place.threads
        return 1 if "cpu" in self.slots else max(1, cores() // len(self.slots))


def _decode(arms: Sequence[Arm], place: Place, console: Console, measured: bool) -> None:
    """Open every data set and decode its images once, before several runs would at the same time.

    Raises:
        InputError: a data set that is not there, has fewer images than are asked for, or cannot be evaluated on.
    """
    seen = set()
    for config in (arm.config for arm in arms):
        selection = (
            config.data,
            config.images,
            config.held_out,
            config.split_seed,
            config.distinct,
        )
        if selection in seen:
            continue
        seen.add(selection)
        with console.status(escape(f"reading {config.data}"), spinner="line"):
            located = dataclasses.replace(
                config, data_root=place.data_root, offline=place.offline
            ).located()
            splits = open_splits(located)
            if measured:
                labelled_splits(splits)  # known now, not when the first run is trained
            for source in (splits.train, splits.val):
                if source is not None:
                    cached(source, cache_dir=place.cache_dir)


def _check(plan: Plan, out: Path) -> None:
    """Refuse a folder that holds another plan or something else.

    Raises:
        InputError: see `run_experiment`.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file, not a folder")
    file, described = out / PLAN, json.loads(json.dumps(plan.described()))
    if not file.is_file():
        # The lock, and what a killed command leaves of an unwritten plan, are no other files.
        if out.is_dir() and any(
            not file.name.startswith((".lock", f".{PLAN}.")) for file in out.iterdir()
        ):
            raise InputError(f"out: {out} holds other files; give an empty or new folder")
        return
    try:
        saved = json.loads(file.read_text())
        before = {"experiment": saved["experiment"], **saved["options"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"out: {file} is damaged") from error
    given = {"experiment": described["experiment"], **described["options"]}
    for name, value in given.items():
        if before.get(name) != value:
            raise InputError(
                f"{name}: {_said(value)} is not what {out} was started with, {_said(before.get(name))}; say that, or "
                "another --out"
            )
    changed = [name for name, value in described.items() if saved.get(name) != value]
    if changed:
        raise InputError(
            f"out: {out} was planned by another version of vi-simsiam, with other {', '.join(changed)}; say another --out"
        )


def _write_plan(plan: Plan, out: Path) -> None:
    """Write plan.json, if it is not there."""
    if not (out / PLAN).is_file():
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(out / PLAN, {**plan.described(), "created": now})


def _said(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep two commands from running one experiment at the same time; ends with the process at the latest."""
    with (out / ".lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(
                    f"out: another command is running the experiment in {out}"
                ) from None
        yield
