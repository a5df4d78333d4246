"""Several runs that differ in their seed, side by side on one device: one process each.

A small network leaves most of a GPU idle; runs that share it finish sooner than one after the other. Each run is what
`vi-simsiam train --seed N` alone would be, in a folder of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vi_simsiam.data.decoding import cores
from vi_simsiam.engine.checkpoint import write_json
from vi_simsiam.engine.processes import Process, end, last_line, signals, watch
from vi_simsiam.engine.run import CHECKPOINT, METRICS
from vi_simsiam.engine.verdict import problem
from vi_simsiam.errors import InputError

SEEDS = "seeds.json"
_TRAIN = (sys.executable, "-m", "vi_simsiam", "train")
# Options of the command that every run gets anew, and whether a value follows.
_OWN_OPTIONS = {
    "--seeds": True, "--seed": True, "--out": True, "--resume": False, "--no-resume": False, "--overwrite": False,
    "--no-overwrite": False,
}  # fmt: skip
_EVALUATIONS = {"kNN": "knn.json", "linear": "linear.json"}


class _Seed(Process):
    """One run, and the process that trains it; `seconds` are those of this session."""

    def __init__(self, seed: int, out: Path) -> None:
        super().__init__(out / f"seed-{seed}.log")
        self.seed = seed
        self.folder = out / f"seed-{seed}"

    def train(
        self, command: Sequence[str], arguments: Sequence[str], threads: int, *, resume: bool
    ) -> None:
        """Start the process; what it prints goes to the log, appended on resume."""
        own = ["--seed", str(self.seed), "--out", str(self.folder)]
        # A run that ended before its first checkpoint may have left a folder, which only --overwrite takes.
        again = "--resume" if (self.folder / CHECKPOINT).is_file() else "--overwrite"
        resumed = [again] if resume else []
        if resumed == ["--resume"]:  # the run goes on with its own settings
            arguments = _without(arguments, {"--config": True, "--preset": True, "--policy": True})
        self.start([*command, *arguments, *own, *resumed], threads=threads, append=resume)

    def result(self) -> dict[str, Any]:
        """What is known of the run, as it is written to seeds.json."""
        top1 = {name: _top1(self.folder / file) for name, file in _EVALUATIONS.items()}
        return {
            "seed": self.seed,
            "folder": self.folder.name,
            "state": self.state,
            "exit": self.exit,
            "process": self.pid,
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
    out = out.absolute()
    resume, overwrite = "--resume" in arguments, "--overwrite" in arguments
    given = _without(arguments, _OWN_OPTIONS)
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
    with signals() as received:
        try:
            for run in pending:
                if not received:
                    run.train(command, passed, threads, resume=resume)
            batch.write()
            batch.watch(received)
        finally:
            end(pending)
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
        watch(self.pending, received, console=self.console, table=self.table, ended=self.ended)

    def ended(self, run: _Seed) -> None:
        """Note the end of a run, and say what became of it."""
        self.write()
        self.console.print(self.line(run), highlight=False, markup=False, soft_wrap=True)

    def table(self) -> Table:
        """One line for every run: its state and the last thing that it said."""
        table = Table.grid(padding=(0, 2))
        for run in self.runs:
            table.add_row(
                f"seed {run.seed}",
                run.state,
                last_line(run.log)[: max(20, self.console.width - 24)],
            )
        return table

    def line(self, run: _Seed) -> str:
        """What became of a run."""
        if run.exit == 0:
            result = run.result()
            top1 = [f"{name} top-1 {100 * share:.1f} %" for name, share in result["top1"].items()]
            found, trouble = "  ".join(top1) or last_line(run.log), problem(result["metrics"] or {})
            if trouble not in found:  # the last line of a log may be the verdict
                found += f"  {trouble}"
            return f"seed {run.seed}: done in {run.seconds:.0f} s  {found}"
        if run.state == "failed":
            return f"seed {run.seed}: failed with exit code {run.exit}: {last_line(run.log)} (see {run.log})"
        return f"seed {run.seed}: {run.state}  {last_line(run.log)}"

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
                self.console.print(
                    f"{text} over {len(shares)} seeds", highlight=False, soft_wrap=True
                )
        done = f"{len(self.runs) - len(unfinished)} of {len(self.runs)} runs done"
        rate = content["runs_per_hour"]
        pace = f", {rate:.3g} runs/hour ({content['seconds']:.0f} s)" if rate else ""
        again = f"; go on with: vi-simsiam train --out {self.out} --resume" if unfinished else ""
        self.console.print(f"{done}{pace}{again}", highlight=False, markup=False, soft_wrap=True)
        if interrupted and unfinished:
            return 130
        return 1 if unfinished else 0


def _check(
    out: Path, seeds: int | None, first_seed: int, *, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Refuse what cannot be used; the content of seeds.json on resume."""
    if resume and overwrite:
        raise InputError("resume, overwrite: only one of them can be said")
    if "RANK" in os.environ:
        raise InputError(
            "seeds: not under torchrun; each run is one process, started with vi-simsiam train"
        )
    if seeds is not None and seeds < 1:
        raise InputError(f"seeds: {seeds} is not accepted; it must be at least 1")
    if not resume and seeds is None:
        raise InputError("seeds: nothing given; it must be at least 1")
    if first_seed < 0 or first_seed + (seeds or 1) > 2**63:
        raise InputError(
            f"seed: {first_seed} is not accepted; it must be at least 0, and the last one below 2**63"
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file, not a folder")
    file = out / SEEDS
    if not resume:
        if file.is_file() and not overwrite:
            raise InputError(
                f"out: {out} already holds runs; say --resume to go on or --overwrite to replace them"
            )
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
            raise InputError(
                f"resume: seed {run['seed']} in {out} is still running, as process {run['process']}"
            )
    if seeds not in (None, len(numbers)):
        raise InputError(f"seeds: {out} was started with {len(numbers)} seeds, not {seeds}")
    return before


def _is_running(process: object, folder: Path) -> bool:
    """Whether that process trains into `folder`: its number may be another program's by now."""
    try:
        return os.fsencode(folder) in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:  # gone, or no Linux
        return False


def _without(arguments: Sequence[str], options: dict[str, bool]) -> list[str]:
    """`arguments` without `options`, each of which maps to whether a value follows it."""
    kept, skip = [], False
    for word in arguments:
        name, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif name in options:
            skip = options[name] and not equals
        else:
            kept.append(word)
    return kept


def _last_metrics(path: Path) -> dict[str, Any] | None:
    """The last line of metrics.jsonl, if there is a whole one."""
    with contextlib.suppress(ValueError):
        metrics = json.loads(last_line(path))
        return metrics if isinstance(metrics, dict) else None
    return None


def _top1(path: Path) -> float | None:
    """The trained encoder's accuracy in a result file."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads(path.read_text())["top1"]["trained"])
    return None
