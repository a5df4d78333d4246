"""Run all runs of a plan side by side, each in a process of its own, and continue after a stop.

OUT/plan.json             what is run and compared, written before any run starts
OUT/runs/ARM-seed-N/      run folders, with the specification ARM-seed-N.json and ARM-seed-N.log
OUT/results/ARM-seed-N.json
OUT/trials/               the same for trials, and OUT/chosen.json with the settings they chose
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vi_simsiam.config import TrainConfig
from vi_simsiam.data.cache import cached
from vi_simsiam.data.decoding import cores
from vi_simsiam.engine.checkpoint import write_json
from vi_simsiam.engine.processes import INTERRUPTED, Process, last_line, supervise
from vi_simsiam.engine.run import open_splits
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.features import labelled_splits
from vi_simsiam.experiments.plan import Arm, Place, Plan, Trials, settings
from vi_simsiam.text import counted, print_line

PLAN, CHOSEN, RUNS, RESULTS, TRIALS = "plan.json", "chosen.json", "runs", "results", "trials"
TRAINED = "trained.json"
"""File in a run folder whose training is finished; only the measurements may be missing."""
_WORKER = (sys.executable, "-m", "vi_simsiam.experiments.worker")
_FAILED = 2


def outcome(name: str, run: Process, done: str | None) -> str:
    """One line on a run that has ended; `done` is its result, None for a run without one."""
    if done is not None:
        return f"{name}: done in {run.seconds:.0f} s  {done}"
    if run.state == "interrupted":
        return f"{name}: interrupted  {last_line(run.log)}"
    return f"{name}: failed with exit code {run.exit}: {last_line(run.log)} (see {run.log})"


def holds(out: Path, name: str) -> bool:
    """Return True if the folder `out` holds the file `name`, and False if it is new or empty.

    Raises:
        InputError: `out` is a file, or holds other files.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file, not a folder")
    if (out / name).is_file():
        return True
    # A killed command may leave its lock and a temporary file of `name`.
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    if any(left != ".lock" and not left.startswith(f".{name}.") for left in names):
        raise InputError(f"out: {out} holds other files; give an empty or new folder")
    return False


@contextlib.contextmanager
def locked(path: Path, busy: str, *, seconds: float = 0.0) -> Iterator[None]:
    """Lock the file `path` against other processes.

    Raises:
        InputError: another process still holds the lock after `seconds`; the message is `busy`.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds, poll_interval=0.2)
    except Timeout:
        raise InputError(busy) from None
    except (OSError, NotImplementedError) as error:
        raise InputError(f"out: {path} cannot be locked ({error})") from error
    try:
        yield
    finally:
        lock.release()


class Run(Process):
    """One run of an arm, and its process.

    `base` is the folder of runs/ and results/, and `spec` the run's specification, without what
    follows from the arm and the seed.
    """

    def __init__(self, arm: Arm, seed: int, base: Path, spec: dict[str, Any]) -> None:
        self.arm, self.seed, self.spec = arm, seed, spec
        self.name = f"{arm.name}-seed-{seed}"
        self.folder, self.result = base / RUNS / self.name, base / RESULTS / f"{self.name}.json"
        self.after = None if arm.after is None else base / RUNS / f"{arm.after}-seed-{seed}"
        self.slot: int | None = None
        self.blocked = False
        super().__init__(base / RUNS / f"{self.name}.log")

    @property
    def finished(self) -> bool:
        """True if the run has a result."""
        return self.result.is_file()

    @property
    def waiting(self) -> bool:
        """True if the run is yet to be started."""
        return self.state == "waiting" and not self.finished and not self.blocked

    def launch(self, command: Sequence[str], device: str, threads: int, place: Place) -> None:
        """Write the specification and start the process."""
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
            frozen_run=self.after,
        ).located()
        content = {
            **self.spec,
            "arm": self.arm.name,
            "seed": self.seed,
            "config": config.to_dict(),
            "folder": str(self.folder),
            "result": str(self.result),
        }
        for path in (self.folder, self.result):
            path.parent.mkdir(parents=True, exist_ok=True)
        spec = self.folder.with_name(f"{self.name}.json")
        write_json(spec, content)
        arguments = [*command, str(spec), "--parent", str(os.getpid())]
        self.start(arguments, threads=threads, append=True)


def run_experiment(
    plan: Plan,
    out: Path,
    place: Place,
    *,
    again: str = "",
    command: Sequence[str] | None = None,
    console: Console | None = None,
) -> int:
    """Run the unfinished runs of a plan in `out`, trials first.

    A run that fails does not affect the others, and is tried again the next time. A run whose loss
    stops being finite has a result without an accuracy.

    Args:
        plan: what to run.
        out: folder of the whole experiment.
        place: devices and folders.
        again: command that continues, printed if something is left to do.
        command: started for each run, with the path of its specification; None for `worker`.
        console: where to print; None for standard output.

    Returns:
        The exit code: 0 all done, 2 a run failed, 130 interrupted.

    Raises:
        InputError: a folder with other content or of other options, or a device or data that is not
            available.
    """
    console, out, trials = console or Console(), out.absolute(), plan.trials
    slots = place.slots()
    _check(plan, out)

    def batch(runs: list[Run]) -> int:
        return _Batch(runs, slots, place, console, command or _WORKER, again).run()

    runs = _runs(plan, plan.arms, out)
    tried = []
    if trials is not None and not (out / CHOSEN).is_file():
        tried = _runs(plan, trials.arms, out / TRIALS, trials=trials)
    left = [run.arm for run in (*tried, *runs) if not run.finished]
    _decode(left, place, console, measured=bool(plan.measures))
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", f"out: another command is running the experiment in {out}"):
        _check(plan, out)  # another command may have started here while images were decoded
        if not (out / PLAN).is_file():
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            write_json(out / PLAN, {**plan.described(), "created": now})
        if trials is not None and tried:
            if code := batch(tried):
                return code
            _choose(trials, tried, out / CHOSEN)
        if trials is not None:
            _, arms = trials.choose(json.loads((out / CHOSEN).read_text())["accuracy"])
            runs = _runs(plan, arms, out)
        return batch(runs)


def _runs(
    plan: Plan, arms: Sequence[Arm], base: Path, *, trials: Trials | None = None
) -> list[Run]:
    """The runs of the arms, seed by seed, so that early results can be compared."""
    spec = {
        "experiment": plan.experiment,
        "measures": list(plan.measures) if trials is None else [trials.measure],
        "uncertainty": trials is None and bool(plan.measures),
        "val_images": plan.options.val_images,
        "progress_every": plan.progress_every,
    }
    return [
        Run(arm, seed, base, spec)
        for seed in (plan.seeds if trials is None else (trials.seed,))
        for arm in arms
        if arm.seeds is None or seed < arm.seeds
    ]


def _choose(trials: Trials, runs: list[Run], path: Path) -> None:
    """Freeze the settings that the trials choose."""
    results = {run.arm.name: json.loads(run.result.read_text()) for run in runs}
    # A trial whose loss stopped being finite counts as a trial with accuracy 0.
    accuracy = {name: each["accuracy"].get(trials.measure, 0.0) for name, each in results.items()}
    best, arms = trials.choose(accuracy)
    chosen = {arm.name: {"trial": best[arm.name], **settings(arm.config)} for arm in arms}
    write_json(path, {"measure": trials.measure, "accuracy": accuracy, "chosen": chosen})


@dataclass
class _Batch:
    """Runs that wait, are running or have ended, and what is shown of them."""

    runs: list[Run]
    slots: list[str]
    place: Place
    console: Console
    command: Sequence[str]
    again: str

    def run(self) -> int:
        """Run all; returns the exit code."""
        total = counted(len(self.runs), "run")
        if kept := self._finished():
            print_line(self.console, f"{kept} of {total} finished and kept")
        received = supervise(
            self.runs,
            self.console,
            table=self.table,
            ended=self.ended,
            start_more=self.start_more,
        )
        done = self._finished()
        print_line(self.console, f"{done} of {total} done")
        if done == len(self.runs):
            return 0
        if self.again:
            print_line(self.console, f"go on with: {self.again}")
        return INTERRUPTED if received else _FAILED

    def start_more(self) -> None:
        """Start runs on free slots, once the runs that they start from are trained."""
        for run in self.runs:
            if not run.waiting:
                continue
            if run.after is not None and not (run.after / TRAINED).is_file():
                before = next((other for other in self.runs if other.folder == run.after), None)
                if before is None or not (before.running or before.waiting):
                    run.blocked = True
                    reason = f"not started: {run.after.name}, which it starts from, is not trained"
                    print_line(self.console, f"{run.name}: {reason}")
                continue
            taken = {other.slot for other in self.runs if other.running}
            free = next((slot for slot in range(len(self.slots)) if slot not in taken), None)
            if free is None:
                return
            run.slot = free
            shared = 1 if "cpu" in self.slots else max(1, cores() // len(self.slots))
            threads = self.place.threads or shared
            run.launch(self.command, self.slots[free], threads, self.place)

    def ended(self, run: Run) -> None:
        """Print the outcome of a run."""
        done = last_line(run.log) if run.exit == 0 and run.finished else None
        print_line(self.console, outcome(run.name, run, done))

    def table(self) -> Table:
        """A line for every running run, and the number of all others."""
        table = Table.grid(padding=(0, 2))
        for run in self.runs:
            if run.running:
                clock = time.strftime("%H:%M:%S", time.gmtime(run.elapsed))
                device = "" if run.slot is None else self.slots[run.slot]
                line = last_line(run.log)[: max(20, self.console.width - len(run.name) - 24)]
                table.add_row(*map(escape, (run.name, device, clock, line)))
        states = [run.state for run in self.runs if not run.finished]
        counts = f"{self._finished()} of {len(self.runs)} done, {states.count('waiting')} waiting"
        failed = states.count("failed")
        table.add_row(f"{counts}, {failed} failed" if failed else counts)
        return table

    def _finished(self) -> int:
        return sum(run.finished for run in self.runs)


def _decode(arms: Sequence[Arm], place: Place, console: Console, *, measured: bool) -> None:
    """Open every data set and decode its images once, before several runs do at the same time.

    Raises:
        InputError: a data set that is not available, has too few images, or cannot be evaluated on.
    """
    fields = ("data", "images", "held_out", "split_seed", "distinct")
    selections: dict[tuple[Any, ...], TrainConfig] = {}
    for arm in arms:
        selections.setdefault(tuple(getattr(arm.config, name) for name in fields), arm.config)
    for config in selections.values():
        with console.status(escape(f"reading {config.data}"), spinner="line"):
            here = dataclasses.replace(config, data_root=place.data_root, offline=place.offline)
            splits = open_splits(here.located())
            if measured:
                labelled_splits(splits)  # raises before the first run is trained
            for source in (splits.train, splits.val):
                if source is not None:
                    cached(source, cache_dir=place.cache_dir)


def _check(plan: Plan, out: Path) -> None:
    """Refuse a folder that holds another plan or something else.

    Raises:
        InputError: see `run_experiment`.
    """
    if not holds(out, PLAN):
        return
    file, described = out / PLAN, json.loads(json.dumps(plan.described()))
    try:
        saved = json.loads(file.read_text())
        before = {"experiment": saved["experiment"], **saved["options"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"out: {file} is damaged") from error
    for name, value in {"experiment": plan.experiment, **described["options"]}.items():
        if before.get(name) != value:
            raise InputError(
                f"{name}: {_shown(value)} is not what {out} was started with, "
                f"{_shown(before.get(name))}; use that, or another --out"
            )
    changed = ", ".join(name for name, value in described.items() if saved.get(name) != value)
    if changed:
        raise InputError(
            f"out: {out} was planned by another version of vi-simsiam, with other {changed}; use "
            "another --out"
        )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
