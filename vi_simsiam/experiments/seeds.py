"""Several runs that differ in their seed, at the same time on one device, each in a process.

A small network leaves most of a GPU idle, so runs that share it finish sooner than one after the
other. Each run is the same as `vi-simsiam train --seed N` alone, in a folder of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from vi_simsiam.checks import require
from vi_simsiam.config import differing_fields
from vi_simsiam.data.decoding import cores
from vi_simsiam.engine.checkpoint import checkpoints
from vi_simsiam.engine.log import read_log
from vi_simsiam.engine.origin import is_own, mark
from vi_simsiam.engine.processes import INTERRUPTED, Process, last_line, supervise
from vi_simsiam.engine.run import Resume, read_config
from vi_simsiam.engine.verdict import problem
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.results import read_result
from vi_simsiam.experiments.agreement import seed_agreement
from vi_simsiam.experiments.forms import Seeds
from vi_simsiam.experiments.runner import holds, outcome
from vi_simsiam.files import read_json, write_json
from vi_simsiam.text import cell, counted, print_line

SEEDS = "seeds.json"
_TRAIN = (sys.executable, "-m", "vi_simsiam", "train")
# Options that every run gets anew, and those that a resumed run has from its config.json; the value
# is True if an argument follows the option.
_OWN_OPTIONS = {
    "--seeds": True, "--seed": True, "--out": True, "--resume": True, "--overwrite": False,
    "--no-overwrite": False,
}  # fmt: skip
_FIRST_OPTIONS = {"--config": True, "--preset": True, "--policy": True}
_EVALUATIONS = {"kNN": "knn", "linear": "linear"}


class _Seed(Process):
    """One run, and the process that trains it; `seconds` are those of this session."""

    def __init__(self, out: Path, before: dict[str, Any]) -> None:
        self.seed = before["seed"]
        self.name, self.folder = f"seed {self.seed}", out / f"seed-{self.seed}"
        super().__init__(out / f"seed-{self.seed}.log")
        if before["exit"] == 0:  # an earlier session finished it
            self.exit, self.seconds = 0, before.get("seconds", 0.0)

    def train(self, words: Sequence[str], threads: int, *, resume: bool) -> None:
        """Start the process; on resume its output is appended to the log."""
        words = [*_TRAIN, *words, "--seed", str(self.seed), "--out", str(self.folder)]
        if resume and checkpoints(self.folder):
            words = [*_without(words, _FIRST_OPTIONS), "--resume"]
        elif resume:  # killed before its first checkpoint
            words = [*words, "--resume", "auto"]
        self.start(words, threads=threads, append=resume)

    def result(self) -> dict[str, Any]:
        """The run's entry in seeds.json."""
        top1 = {}
        # A running one leaves its results behind with every checkpoint.
        for name, evaluation in _EVALUATIONS.items() if self.exit is not None else ():
            with contextlib.suppress(InputError, KeyError):  # damaged, or not of these features
                if (found := read_result(self.folder, evaluation)) is not None:
                    top1[name] = found["top1"]["trained"]
        lines: list[dict[str, Any]] = []
        with contextlib.suppress(InputError):  # another file in its place
            lines, _ = read_log(self.folder)
        return {
            "seed": self.seed,
            "folder": self.folder.name,
            "state": self.state,
            "exit": self.exit,
            "process": self.pid,
            "seconds": round(self.seconds, 3),
            "metrics": lines[-1] if lines else None,
            "top1": top1,
        }

    def line(self) -> str:
        """The outcome of the run."""
        if self.exit != 0:
            return outcome(self.name, self, None)
        result = self.result()
        top1 = [f"{name} top-1 {100 * share:.1f} %" for name, share in result["top1"].items()]
        done, trouble = "  ".join(top1) or last_line(self.log), problem(result["metrics"] or {})
        if trouble not in done:  # the last line of a log may be the verdict
            done += f"  {trouble}"
        return outcome(self.name, self, done)


def run_seeds(
    arguments: Sequence[str],
    seeds: int | None,
    first_seed: int,
    out: Path,
    *,
    resume: Resume = False,
) -> int:
    """Train several seeds at the same time, each in OUT/seed-N with its output in OUT/seed-N.log.

    Prints the state of every run, its result at the end, and the number of runs an hour; with
    `--evaluate` also the share of neighbours that the runs have in common, see `seed_agreement`.
    OUT/seeds.json holds the same. A run that fails does not affect the others. SIGINT and SIGTERM
    are passed on to all runs, which save a checkpoint; `--resume` continues the unfinished ones.

    Args:
        arguments: those of `vi-simsiam train`; on --resume others are added to the earlier ones.
        seeds: number of runs; None on --resume for the same number as before.
        first_seed: seed of the first run; ignored on --resume.
        out: folder of all runs.
        resume: go on with the runs there; "auto" if there are any.

    Returns:
        The exit code: 0 all done, 1 a run failed, 130 interrupted.

    Raises:
        InputError: a number or folder that cannot be used.
    """
    console, out = Console(), out.absolute()
    overwrite = "--overwrite" in arguments
    if resume and overwrite:
        raise InputError("resume, overwrite: only one of them can be given")
    if "RANK" in os.environ:
        raise InputError(
            "seeds: not under torchrun; each run is one process, started with vi-simsiam train"
        )
    resume = (out / SEEDS).is_file() if resume == "auto" else resume
    given = _without(arguments, _OWN_OPTIONS)
    if resume:
        before = _resumed(out, seeds, given)
    else:
        before = _planned(out, seeds or 0, first_seed, overwrite=overwrite)
    earlier = before["arguments"]
    if given == earlier[-len(given) :]:
        given = earlier
    else:
        moved = {"--data": True} if "--data" in given else {}
        given = [*_without(earlier, moved), *given]
    words = [*given, "--overwrite"] if overwrite else given
    runs = [_Seed(out, result) for result in before["runs"]]
    pending = [run for run in runs if run.exit is None]
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def write() -> dict[str, Any]:
        """Write seeds.json, so that even a killed command can be resumed; returns its content."""
        seconds, finished = time.monotonic() - started, sum(run.exit == 0 for run in pending)
        whole = not resume and all(run.exit is not None for run in runs)
        results = [run.result() for run in runs]
        content = {
            "arguments": given,
            "seconds": round(seconds, 3),
            "runs_per_hour": round(3600 * finished / seconds, 3) if whole else None,
            "runs": results,
        }
        mark(out, _named(given, results))
        write_json(out / SEEDS, content)
        return content

    def start_all() -> None:
        if waiting := [run for run in pending if run.state == "waiting"]:
            write()  # killed now, they go on with --resume auto
            for run in waiting:
                run.train(words, max(1, cores() // len(waiting)), resume=resume)
            write()

    def ended(run: _Seed) -> None:
        write()
        print_line(console, run.line())

    def table() -> Table:
        """A line for every run: its state and the last line of its log."""
        grid = Table.grid(padding=(0, 2))
        for run in runs:
            line = last_line(run.log)[: max(20, console.width - 24)]
            grid.add_row(*map(cell, (run.name, run.state, line)))
        return grid

    interrupted = supervise(pending, console, table=table, ended=ended, start_more=start_all)
    content = write()
    done = all(run.exit == 0 for run in runs)
    if done and len(runs) > 1 and "--evaluate" in given:
        try:
            content["agreement"] = seed_agreement([run.folder for run in runs])
            write_json(out / SEEDS, content)
        except InputError as error:  # the trainings themselves have succeeded
            print_line(console, f"neighbours not compared: {error}")
    _report(out, content, console)
    if done:
        return 0
    return INTERRUPTED if interrupted else 1


def finished(path: Path) -> list[Path]:
    """The finished runs in a folder of several seeds, in the order of the seeds; else the run.

    Raises:
        InputError: no run has finished, runs differ in more than their seed and the place of their
            images, or a file is damaged.
    """
    if not (path / SEEDS).is_file():
        return [path]
    runs = read_json(path / SEEDS, Seeds, "run")["runs"]
    done = [path / f"seed-{run['seed']}" for run in runs if run["exit"] == 0]
    if not done:
        raise InputError(f"run: no run in {path} has finished")
    configs = {run: read_config(run) for run in done}
    for run, config in configs.items():
        same = dataclasses.replace(configs[done[0]], seed=config.seed, data=config.data)
        if differing := differing_fields(same, config):
            fields = "; ".join(differing)
            raise InputError(f"run: {run} differs from {done[0]} in more than its seed: {fields}")
    return done


def _report(out: Path, content: dict[str, Any], console: Console) -> None:
    """Print the results of all runs together."""
    runs, rate = content["runs"], content["runs_per_hour"]
    done = sum(run["exit"] == 0 for run in runs)
    for name in _EVALUATIONS if done == len(runs) else ():
        shares = [100 * run["top1"][name] for run in runs if name in run["top1"]]
        if len(shares) > 1:
            mean, sd = statistics.mean(shares), statistics.stdev(shares)
            text = f"{name} top-1: mean {mean:.1f} %, standard deviation {sd:.1f} %"
            print_line(console, f"{text} over {len(shares)} seeds")
    if (found := content.get("agreement")) is not None:
        shares = [100 * share for share in found["pairs"].values()]
        spread = f" ({min(shares):.1f} to {max(shares):.1f} %)" if len(shares) > 1 else ""
        print_line(
            console,
            f"neighbours in common: {statistics.mean(shares):.1f} %{spread} of the "
            f"{found['neighbours']} nearest, over {counted(len(shares), 'pair')} of seeds and "
            f"{found['images']:,} {found['split']} images",
        )
    pace = f", {rate:.3g} runs/hour ({content['seconds']:.0f} s)" if rate else ""
    command = shlex.join(["vi-simsiam", "train", "--out", str(out), "--resume"])
    again = f"; go on with: {command}" if done < len(runs) else ""
    print_line(console, f"{done} of {len(runs)} runs done{pace}{again}")


def _planned(out: Path, seeds: int, first_seed: int, *, overwrite: bool) -> dict[str, Any]:
    """The content of seeds.json before the first run is started."""
    require("seeds", seeds, seeds >= 1, "at least 1")
    possible = 0 <= first_seed <= 2**63 - seeds
    require("seed", first_seed, possible, "at least 0, and the last one below 2**63")
    if holds(out, SEEDS) and not overwrite:
        raise InputError(
            f"out: {out} already holds runs; say --resume to go on or --overwrite to replace them"
        )
    return {
        "arguments": [],
        "runs": [{"seed": seed, "exit": None} for seed in range(first_seed, first_seed + seeds)],
    }


def _resumed(out: Path, seeds: int | None, given: list[str]) -> dict[str, Any]:
    """The content of seeds.json of an earlier session; `given` are the arguments of this one."""
    if not (out / SEEDS).is_file():
        raise InputError(f"resume: {out} holds no {SEEDS} to go on from")
    before = cast(dict[str, Any], read_json(out / SEEDS, Seeds, "resume"))
    for run in before["runs"]:
        if _is_running(run.get("process"), out / f"seed-{run['seed']}"):
            raise InputError(
                f"resume: seed {run['seed']} in {out} is still running, as process {run['process']}"
            )
    earlier = before["arguments"]  # where they are given again, the file adds nothing to them
    if given != earlier and not is_own(out, _named(earlier, before["runs"])):
        raise InputError(
            f"resume: this user has not started the runs in {out} here, or {SEEDS} was changed "
            f"since; go on with one at a time: --out {out / 'seed-N'} --resume --data DATA"
        )
    count = len(before["runs"])
    require("seeds", seeds, seeds in (None, count), f"{count}, as {out} was started with")
    return before


def _named(arguments: list[str], runs: list[dict[str, Any]]) -> list[Any]:
    """The parts of a seeds.json that act, see `engine.origin`."""
    return [arguments, [run["seed"] for run in runs]]


def _is_running(process: object, folder: Path) -> bool:
    """True if this process trains into `folder`; its number may be another program's."""
    try:
        return os.fsencode(folder) in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended, or this is no Linux
        return False


def _without(arguments: Sequence[str], options: dict[str, bool]) -> list[str]:
    """`arguments` without `options` and, where the option's value is True, what follows them."""
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
