"""Several runs that differ in their seed, side by side on one device: one process each.

A small network leaves most of a GPU idle; runs that share it finish sooner than one after the other. Each run is what
`vi-simsiam train --seed N` alone would be, in a folder of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from vi_simsiam.data.decoding import cores
from vi_simsiam.engine.checkpoint import write_json
from vi_simsiam.engine.run import CHECKPOINT, METRICS
from vi_simsiam.errors import InputError

SEEDS = "seeds.json"
_TRAIN = (sys.executable, "-m", "vi_simsiam", "train")
# Options of the command that every run gets anew, and whether a value follows.
_OWN_OPTIONS = {
    "--seeds": True, "--seed": True, "--out": True, "--resume": False, "--no-resume": False, "--overwrite": False,
    "--no-overwrite": False,
}  # fmt: skip
_POLL_SECONDS = 0.2
_SAVING_SECONDS = 60.0
_EVALUATIONS = {"kNN": "knn.json", "linear": "linear.json"}


@dataclass
class _Seed:
    """One run, and the process that trains it."""

    seed: int
    out: Path
    exit: int | None = None
    """Exit code, None until it has ended."""
    seconds: float = 0.0
    """From the process's start to its end, in this session."""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    started: float = 0.0

    @property
    def folder(self) -> Path:
        return self.out / f"seed-{self.seed}"

    @property
    def log(self) -> Path:
        return self.out / f"seed-{self.seed}.log"

    @property
    def state(self) -> str:
        if self.exit is None:
            return "running" if self.process else "waiting"
        return {0: "done", 130: "interrupted"}.get(self.exit, "failed")

    def start(self, command: Sequence[str], arguments: Sequence[str], threads: int, *, resume: bool) -> None:
        """Start the process; what it prints goes to the log, appended on resume."""
        own = ["--seed", str(self.seed), "--out", str(self.folder)]
        # A run that ended before its first checkpoint may have left a folder, which only --overwrite takes.
        again = "--resume" if (self.folder / CHECKPOINT).is_file() else "--overwrite"
        resumed = [again] if resume else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab" if resume else "wb") as log:
            self.process = subprocess.Popen(
                [*command, *arguments, *own, *resumed],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # A terminal's Ctrl-C would reach the run beside our signal, and the second one ends it at once.
                start_new_session=True,
            )
        self.started = time.monotonic()

    def poll(self) -> bool:
        """Whether it has ended; notes how."""
        if self.exit is None and self.process is not None and self.process.poll() is not None:
            code = self.process.returncode
            # Before the trainer handles signals they end the process.
            self.exit = 130 if code in (-signal.SIGINT, -signal.SIGTERM) else code
            self.seconds = time.monotonic() - self.started
        return self.exit is not None

    def stop(self) -> None:
        """Ask it to save a checkpoint and to end."""
        if self.process is not None:
            self.process.terminate()

    def kill(self) -> None:
        """End it at once, with the processes that it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def result(self) -> dict[str, Any]:
        """What is known of the run, as it is written to seeds.json."""
        top1 = {name: _top1(self.folder / file) for name, file in _EVALUATIONS.items()}
        return {
            "seed": self.seed,
            "folder": self.folder.name,
            "state": self.state,
            "exit": self.exit,
            "process": self.process.pid if self.process and self.exit is None else None,
            "seconds": round(self.seconds, 3),
            "metrics": _last_metrics(self.folder / METRICS),
            "top1": {name: share for name, share in top1.items() if share is not None},
        }


def run_seeds(
    arguments: Sequence[str],
    seeds: int | None,
    first_seed: int,
    out: Path,
    *,
    command: Sequence[str] = _TRAIN,
    console: Console | None = None,
) -> int:
    """Train the seeds first_seed, first_seed + 1, ... at the same time, each in OUT/seed-N with its output in OUT/seed-N.log.

    Prints what every run is doing, its result at the end, and how many runs an hour that makes; OUT/seeds.json holds
    the same. A run that fails leaves the others alone. SIGINT and SIGTERM are passed on to all runs, which save a
    checkpoint; with `--resume` those that are not finished go on.

    Args:
        arguments: of `vi-simsiam train`; of these --seeds, --seed and --out are replaced, and --resume and --overwrite
            are minded here. On --resume they are added to those that the runs were started with.
        seeds: number of runs; None on --resume for as many as there were.
        first_seed: seed of the first run; on --resume the one of the start counts.
        out: folder of all of them.
        command: what is started for each.
        console: where to print; None for standard output.

    Returns:
        The exit code: 0 all done, 1 a run failed, 130 interrupted.

    Raises:
        InputError: a number or folder that cannot be used.
    """
    console = console or Console()
    out = out.expanduser().absolute()
    resume, overwrite = "--resume" in arguments, "--overwrite" in arguments
    given = _without_own(arguments)
    before = _check(out, seeds, first_seed, resume=resume, overwrite=overwrite)
    if before is not None:
        given = [*before["arguments"], *given]
        count, first_seed = len(before["runs"]), before["runs"][0]["seed"]
    else:
        assert seeds is not None
        count = seeds
    runs = [_Seed(first_seed + i, out) for i in range(count)]
    if before is not None:
        for run, result in zip(runs, before["runs"], strict=True):
            if result["exit"] == 0:
                run.exit, run.seconds = 0, result["seconds"]
    out.mkdir(parents=True, exist_ok=True)
    pending = [run for run in runs if run.exit is None]
    batch = _Batch(out, given, runs, pending, console, started=time.monotonic(), resumed=resume)
    threads = max(1, cores() // max(1, len(pending)))
    passed = [*given, "--overwrite"] if overwrite else given
    with _signals() as received:
        try:
            for run in pending:
                if not received:
                    run.start(command, passed, threads, resume=resume)
            batch.write()
            batch.watch(received)
        finally:
            _end(pending)
    return batch.report(interrupted=bool(received))


@dataclass
class _Batch:
    """All runs of one call, what is shown of them and written about them."""

    out: Path
    arguments: list[str]
    runs: list[_Seed]
    pending: list[_Seed]
    """Those that this session trains."""
    console: Console
    started: float
    resumed: bool

    def watch(self, received: list[int]) -> None:
        """Wait until all have ended; pass signals on, the second one as an end without a checkpoint."""
        passed = 0
        with Live(self.table(), console=self.console, transient=True, auto_refresh=False) as live:
            while True:
                ended = [run for run in self.pending if run.exit is None and run.poll()]
                for run in ended:
                    self.write()
                    self.console.print(self.line(run), highlight=False, markup=False, soft_wrap=True)
                if len(received) > passed:
                    passed = len(received)
                    for run in self.pending:
                        if passed == 1:
                            run.stop()
                        else:
                            run.kill()
                if not any(run.process is not None and run.exit is None for run in self.pending):
                    return
                if self.console.is_terminal:
                    live.update(self.table(), refresh=True)
                time.sleep(_POLL_SECONDS)

    def table(self) -> Table:
        """One line for every run: its state and the last thing that it said."""
        table = Table.grid(padding=(0, 2))
        for run in self.runs:
            table.add_row(f"seed {run.seed}", run.state, _last_line(run.log)[: max(20, self.console.width - 24)])
        return table

    def line(self, run: _Seed) -> str:
        """What became of a run."""
        if run.exit == 0:
            top1 = [f"{name} top-1 {100 * share:.1f} %" for name, share in run.result()["top1"].items()]
            return f"seed {run.seed}: done in {run.seconds:.0f} s  {'  '.join(top1) or _last_line(run.log)}"
        if run.state == "failed":
            return f"seed {run.seed}: failed with exit code {run.exit}: {_last_line(run.log)} (see {run.log})"
        return f"seed {run.seed}: {run.state}  {_last_line(run.log)}"

    def content(self) -> dict[str, Any]:
        """seeds.json. Runs an hour are those of this session, and none if it only finished what was begun before."""
        seconds = time.monotonic() - self.started
        finished = sum(run.exit == 0 for run in self.pending)
        whole = not self.resumed and all(run.exit is not None for run in self.runs)
        return {
            "arguments": self.arguments,
            "seconds": round(seconds, 3),
            "runs_per_hour": round(3600 * finished / seconds, 3) if whole else None,
            "runs": [run.result() for run in self.runs],
        }

    def write(self) -> None:
        """Write seeds.json as things are, so that even a run killed the hard way can be resumed."""
        write_json(self.out / SEEDS, self.content())

    def report(self, *, interrupted: bool) -> int:
        """Print the results of all runs together; returns the exit code."""
        content = self.content()
        write_json(self.out / SEEDS, content)
        unfinished = [run for run in self.runs if run.exit != 0]
        for name in _EVALUATIONS:
            shares = [100 * each["top1"][name] for each in content["runs"] if name in each["top1"]]
            if len(shares) > 1 and not unfinished:
                text = f"{name} top-1: mean {statistics.mean(shares):.1f} %, standard deviation {statistics.stdev(shares):.1f} %"
                self.console.print(f"{text} over {len(shares)} seeds", highlight=False, soft_wrap=True)
        done = f"{len(self.runs) - len(unfinished)} of {len(self.runs)} runs done"
        rate = content["runs_per_hour"]
        pace = f", {rate:.3g} runs/hour ({content['seconds']:.0f} s)" if rate else ""
        again = f"; go on with: vi-simsiam train --out {self.out} --resume" if unfinished else ""
        self.console.print(f"{done}{pace}{again}", highlight=False, markup=False, soft_wrap=True)
        if interrupted and unfinished:
            return 130
        return 1 if unfinished else 0


def _check(out: Path, seeds: int | None, first_seed: int, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Refuse what cannot be used; the content of seeds.json on resume."""
    if resume and overwrite:
        raise InputError("resume, overwrite: only one of them can be said")
    if "RANK" in os.environ:
        raise InputError("seeds: not under torchrun; each run is one process, started with vi-simsiam train")
    if seeds is not None and seeds < 1:
        raise InputError(f"seeds: {seeds} is not accepted; it must be at least 1")
    if not resume and seeds is None:
        raise InputError("seeds: nothing given; it must be at least 1")
    if first_seed < 0 or first_seed + (seeds or 1) > 2**63:
        raise InputError(f"seed: {first_seed} is not accepted; it must be at least 0, and the last one below 2**63")
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file, not a folder")
    file = out / SEEDS
    if not resume:
        if file.is_file() and not overwrite:
            raise InputError(f"out: {out} already holds runs; say --resume to go on or --overwrite to replace them")
        if out.is_dir() and not file.is_file() and any(out.iterdir()):
            raise InputError(f"out: {out} holds other files; give an empty or new folder")
        return None
    if not file.is_file():
        raise InputError(f"resume: {out} holds no {SEEDS} to go on from")
    try:
        before: dict[str, Any] = json.loads(file.read_text())
        numbers = [int(run["seed"]) for run in before["runs"]]
        well = bool(numbers) and all({"exit", "seconds"} <= run.keys() for run in before["runs"])
        well = well and all(isinstance(word, str) for word in before["arguments"])
    except (ValueError, KeyError, TypeError, AttributeError):
        well = False
    if not well:
        raise InputError(f"resume: {file} is damaged")
    for run in before["runs"]:
        if _is_running(run.get("process"), out / f"seed-{run['seed']}"):
            raise InputError(f"resume: seed {run['seed']} in {out} is still running, as process {run['process']}")
    if seeds not in (None, len(numbers)):
        raise InputError(f"seeds: {out} was started with {len(numbers)} seeds, not {seeds}")
    return before


def _is_running(process: object, folder: Path) -> bool:
    """Whether that process trains into `folder`: its number may be another program's by now."""
    try:
        return str(folder).encode() in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:  # gone, or no Linux
        return False


def _without_own(arguments: Sequence[str]) -> list[str]:
    """`arguments` without the options that every run gets anew."""
    kept, skip = [], False
    for word in arguments:
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif name in _OWN_OPTIONS:
            skip = _OWN_OPTIONS[name] and not equals
        else:
            kept.append(word)
    return kept


def _end(runs: list[_Seed]) -> None:
    """Leave no process behind: where something went wrong here, runs still get the time to save a checkpoint."""
    deadline = time.monotonic() + _SAVING_SECONDS
    for run in runs:
        run.stop()
    for run in runs:
        if run.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(max(0.0, deadline - time.monotonic()))
        run.kill()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that receives every SIGINT and SIGTERM."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {}
    with contextlib.suppress(ValueError):  # signals reach the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _last_line(path: Path) -> str:
    """The last line that says something."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""
    return ""


def _last_metrics(path: Path) -> dict[str, float] | None:
    """The last line of metrics.jsonl, if there is a whole one."""
    with contextlib.suppress(ValueError):
        metrics: dict[str, float] = json.loads(_last_line(path))
        return metrics
    return None


def _top1(path: Path) -> float | None:
    """The trained encoder's accuracy in a result file."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads(path.read_text())["top1"]["trained"])
    return None
