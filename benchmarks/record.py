"""Seconds from a cold start until a kNN accuracy is reached, for each change of a recipe.

Every run is a process of its own with empty caches. Its clock starts before the process and never
stops: imports, decoding, compiling, training and measuring count. Recipes are in `recipes.py`.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vi_simsiam.checks import SEED, choice, require
from vi_simsiam.config import TrainConfig
from vi_simsiam.data.subsets import labelled_splits
from vi_simsiam.data_names import data_label
from vi_simsiam.engine.processes import Process, last_line, supervise
from vi_simsiam.engine.run import open_splits, resolve_device
from vi_simsiam.errors import TrainingError, none_of
from vi_simsiam.experiments.progress import read_progress
from vi_simsiam.files import write_json
from vi_simsiam.text import cell, counted, markdown, markdown_grid, print_line

from .recipes import RECORDS, Record
from .results import (
    NOT_MEASURED,
    TOO_NOISY,
    UNCOMMITTED,
    Case,
    provenance,
    read_result,
    result_path,
    write_result,
)
from .tables import NOTHING, terminal_table, where

NAME = "record"
_WORKER = (sys.executable, "-m", "vi_simsiam.benchmarks.record_run")
_CACHES = (
    "CUDA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VI_SIMSIAM_CACHE",
    "XDG_CACHE_HOME",
)  # fmt: skip
_SEEDS = 5
"""Runs that a row and the row above must have for a gain."""
_ORIGIN = ("data", "commit", "device", "processor", "driver", "versions")
"""Parts of a case in which the row above must agree with it for a gain."""
_SAME = ("record", "title", "recipe", *_ORIGIN)
"""Parts of a case in which further seeds must agree with it."""


@dataclass(frozen=True)
class Options:
    """Options of `vi-simsiam bench record`."""

    record: str = "fashion-mini"
    """A record of benchmarks/recipes.py, such as imagenette-75. A name that is none of them lists
    all."""
    change: tuple[str, ...] = ()
    """Only these rows, by title or number; 0 is the base. None for all."""
    seeds: int = _SEEDS
    """Runs of every row, one after the other."""
    first_seed: int = 0
    """Seed of the first run."""
    data: str | None = None
    """The record's images at another place, as for `train`; None for the set by its name."""
    data_root: Path = Path("data")
    """Where downloaded data sets are kept or looked for."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """Folder for OUT/DEVICE/record.json; seeds that it has from the same commit, device and
    versions are not run again. None to print only."""


class _Run(Process):
    """A run of one row and seed, with its files in a folder of its own."""

    def __init__(self, record: Record, row: int, config: TrainConfig, base: Path) -> None:
        self.record, self.row, self.config = record, row, config
        self.folder = base / f"{row}-{config.seed}"
        self.run = self.folder / "run"
        self.name = f"seed {config.seed}, {record.rows[row].title}"
        super().__init__(self.folder / "log")

    def launch(self) -> None:
        """Start the clock, and the process with empty caches."""
        started = time.monotonic()
        self.folder.mkdir()
        spec = self.folder / "spec.json"
        record = self.record
        content = {"every": record.every, "val_images": record.val_images, "started": started}
        write_json(spec, {**content, "config": self.config.to_dict(), "folder": str(self.run)})
        caches = {name: str(self.folder / "caches" / name.lower()) for name in _CACHES}
        threads = torch.get_num_threads()
        self.start([*_WORKER, str(spec)], threads=threads, append=False, **caches)


def run(options: Options) -> dict[str, Any]:
    """Run what is not measured yet, print the table, and return the content of the result file.

    The result file is written after every run.

    Raises:
        InputError: an unknown record or row, an option that is not accepted, or data that is not
            there or has no labels.
        TrainingError: a run failed; no more are started.
        KeyboardInterrupt: a signal arrived.
    """
    choice("record", options.record, tuple(RECORDS))
    record = RECORDS[options.record]
    rows = [_row(record, given) for given in options.change] or list(range(len(record.rows)))
    require("seeds", options.seeds, 1 <= options.seeds <= 1000, "between 1 and 1000")
    first, last = options.first_seed, options.first_seed + options.seeds - 1
    require("first_seed", first, SEED.holds(first) and SEED.holds(last), SEED.accepted)
    console, device = Console(), resolve_device(options.device)
    path = options.out and result_path(options.out, NAME, device)
    result: dict[str, Any] = {"benchmark": NAME, "cases": []}
    if path is not None and path.exists():
        result = read_result(path, NAME)
    place: dict[str, Any] = {"data_root": options.data_root, "device": str(device)}
    place |= {} if options.data is None else {"data": options.data}
    configs = {row: replace(record.config(row), **place).located() for row in rows}
    labelled_splits(open_splits(configs[rows[0]]))  # downloads it: runs do not
    origin = {"device_type": device.type, **provenance(device)}
    cases = {row: _case(record, row, configs[row], origin, result["cases"]) for row in rows}
    with tempfile.TemporaryDirectory(prefix="vi-simsiam-record-") as folder:
        waiting = [
            _Run(record, row, replace(configs[row], seed=seed, offline=True), Path(folder))
            for seed in range(first, last + 1)
            for row in dict.fromkeys(rows)
            if all(known["seed"] != seed for known in cases[row]["runs"])
        ]
        if kept := options.seeds * len(cases) - len(waiting):
            print_line(console, f"{counted(kept, 'run')} of {path} kept")

        def ended(done: _Run) -> None:
            if done.exit != 0:
                waiting.clear()
                return
            if (commit := provenance(device)["commit"]) != origin["commit"]:
                raise TrainingError(
                    f"{done.name}: the code changed from {origin['commit']} to {commit} while it "
                    "ran; commit first, or measure in another worktree"
                )
            found = {"seed": done.config.seed, "progress": read_progress(done.run)}
            shutil.rmtree(done.folder)
            cases[done.row]["runs"].append(found)
            _add(result, cases[done.row])
            if path is not None:
                write_result(path, result)
            print_line(console, f"{done.name}: {_outcome(record, found)}")

        _run_all(waiting, console, ended)
    console.print(terminal_table(None, *_table(record, result)))
    if path is not None:
        print_line(console, f"written: {path}")
    return result


def _run_all(waiting: list[_Run], console: Console, ended: Callable[[_Run], None]) -> None:
    """Run one after the other; see `run` for the errors."""
    runs = list(waiting)

    def start_more() -> None:
        if waiting and not any(run.running for run in runs):
            waiting.pop(0).launch()

    def table() -> Table:
        shown = Table.grid(padding=(0, 2))
        for each in runs:
            if each.running:
                line = last_line(each.log)
                shown.add_row(*map(cell, (each.name, f"{each.elapsed:.0f} s", line)))
        return shown

    if supervise(runs, console, table=table, ended=ended, start_more=start_more):
        raise KeyboardInterrupt
    for failed in runs:
        if failed.exit:
            line = last_line(failed.log)
            raise TrainingError(f"{failed.name}: failed with exit code {failed.exit}: {line}")


def _row(record: Record, given: str) -> int:
    """The number of a row by its title or number."""
    titles = [row.title for row in record.rows]
    names = titles + [str(number) for number in range(len(titles))]
    if given not in names:
        raise none_of("change", given, names)
    return names.index(given) % len(titles)


def _case(
    record: Record, row: int, config: TrainConfig, origin: dict[str, Any], before: Sequence[Case]
) -> Case:
    """The case of a row, with the runs of `before` that are of the same code and machine."""
    case = {
        "record": record.name,
        "title": record.rows[row].title,
        "recipe": record.recipe(row),
        "data": data_label(config.data),
        **origin,
    }
    same = (old for old in before if _alike(case, old, _SAME))
    return case | {"runs": list(next(same, {"runs": []})["runs"])}


def _alike(case: Case, other: Case, names: Sequence[str]) -> bool:
    """True if these parts agree and the code is committed: other changes have the same mark."""
    committed = not str(case.get("commit")).endswith(UNCOMMITTED)
    return committed and all(case.get(name) == other.get(name) for name in names)


def _add(result: dict[str, Any], case: Case) -> None:
    """Add a case to a result, in place of an earlier one of its row."""
    key = case["record"], case["title"]
    others = [old for old in result["cases"] if (old["record"], old["title"]) != key]
    result["cases"] = [*others, case]


def seconds_to(threshold: float, run: dict[str, Any]) -> float:
    """Seconds until the first measurement that reached an accuracy; infinity without one."""
    reached = (x["knn200_seconds"] for x in run["progress"] if x["knn200"] >= threshold)
    return next(reached, math.inf)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of numbers that may be infinite.

    Between two values they are interpolated; next to an infinite one they are infinite.
    """
    ranked = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ranked) - 1)
        low, high = ranked[math.floor(place)], ranked[math.ceil(place)]
        return low if low == high else low + (high - low) * (place % 1)

    return at(0.25), at(0.5), at(0.75)


def markdown_tables(result: dict[str, Any]) -> str:
    """A table for each record that has a measured row, and the names of the others."""
    parts, missing = [], []
    for record in RECORDS.values():
        cases = [case for case in _measured(record, result) if case is not None]
        if not cases:
            missing.append(record.name)
            continue
        data = dict.fromkeys(markdown(case["data"]) for case in cases)
        places = dict.fromkeys(where(case) for case in cases)
        notes = [f"Data: {', '.join(data)}. {' '.join(places)}"]
        if record.published is not None:
            notes.append(f"Measured by others, on other hardware: {record.published}.")
        parts.append("\n\n".join([markdown_grid(*_table(record, result)), *notes]))
    if missing:
        parts.append(f"Not measured on this device: {', '.join(missing)}.")
    return "\n\n".join(parts) if len(missing) < len(RECORDS) else NOTHING


def _measured(record: Record, result: dict[str, Any]) -> list[Case | None]:
    """The case of each row; None where the recipe was not measured as it is now."""
    cases: list[Case] = result["cases"]

    def case_of(row: int) -> Case | None:
        title, recipe = record.rows[row].title, record.recipe(row)
        for case in cases:
            known = case["recipe"].items()
            # Settings that are new since then have a default that changes nothing.
            same = all(name in recipe and recipe[name] == value for name, value in known)
            if same and (case["record"], case["title"]) == (record.name, title):
                return case
        return None

    return [case_of(row) for row in range(len(record.rows))]


def _table(record: Record, result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a record's table."""
    head = [
        record.name,
        f"seconds to {_percent(record.threshold)}, median (quartiles)",
        "seeds that reached it",
        "last accuracy, median (range)",
        "times faster than the row above",
    ]
    rows, above = [], None
    for change, case in zip(record.rows, _measured(record, result), strict=True):
        gain, above = _gain(record, above, case), case
        if case is None:
            rows.append([change.title, NOT_MEASURED, "-", "-", "-"])
            continue
        found = _times(record, case)
        last = [run["progress"][-1]["knn200"] for run in case["runs"]]
        seconds = _range(*map(_seconds, quartiles(found)))
        reached = f"{sum(map(math.isfinite, found))} of {len(found)}"
        accuracy = _range(*map(_percent, (min(last), statistics.median(last), max(last))))
        rows.append([change.title, seconds, reached, accuracy, gain])
    return head, rows


def _range(low: str, middle: str, high: str) -> str:
    return middle if low == high else f"{middle} ({low} to {high})"


def _gain(record: Record, above: Case | None, case: Case | None) -> str:
    """Median of the row above over that of a row, where they can be compared and differ."""
    if above is None or case is None or min(len(above["runs"]), len(case["runs"])) < _SEEDS:
        return "-"
    if not _alike(case, above, _ORIGIN):
        return "-"
    before, after = (quartiles(_times(record, each)) for each in (above, case))
    if not (before[1] < math.inf and 0 < after[1] < math.inf):
        return "-"
    apart = before[0] > after[2] or before[2] < after[0]
    return f"{before[1] / after[1]:.2f}" if apart else TOO_NOISY


def _times(record: Record, case: Case) -> list[float]:
    """Seconds of each seed to the threshold."""
    return [seconds_to(record.threshold, run) for run in case["runs"]]


def _outcome(record: Record, run: dict[str, Any]) -> str:
    """One line on a finished run."""
    last, seconds = run["progress"][-1], seconds_to(record.threshold, run)
    reached = "not reached" if seconds == math.inf else f"after {_seconds(seconds)} s"
    end = f"{_percent(last['knn200'])} after {_seconds(last['knn200_seconds'])} s"
    return f"{_percent(record.threshold)} {reached}; at the end {end}"


def _seconds(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1}f}" if math.isfinite(value) else "not reached"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
