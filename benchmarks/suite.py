"""Common parts of a benchmark run: choice of cases, time limit of --short, resume, result file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from vi_simsiam.engine.run import resolve_device
from vi_simsiam.errors import InputError
from vi_simsiam.text import print_line

from . import plots
from .results import provenance, read_result, result_path, write_result
from .targets import targets_for, targets_table

_Case = TypeVar("_Case", bound=Any)


@dataclass(frozen=True)
class SuiteOptions:
    """Options of every benchmark that measures cases."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    short: bool = False
    """Only the telling cases, within a few minutes."""
    only: str = ""
    """Only cases whose name contains this. What no name contains lists all names."""
    rounds: int = 15
    """Measurements of every provider; the median is reported."""
    out: Path | None = None
    """Folder for OUT/DEVICE/BENCHMARK.json and its plots; None to print only."""
    resume: Annotated[
        bool,
        tyro.conf.arg(
            help="Keep the cases that the result file in --out already has from the same commit, "
            "device and versions."
        ),
    ] = False

    least_rounds: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if self.rounds < self.least_rounds:
            raise InputError(f"rounds: {self.rounds} must be at least {self.least_rounds}")
        if self.resume and self.out is None:
            raise InputError("resume: say where the result file is with --out")


def only_cases(examples: str, name: str) -> Any:
    """The help of an `--only` that chooses cases by their names."""
    return tyro.conf.arg(
        help=f"Only cases whose name contains this, such as {examples}; a name is {name}. "
        "What no name contains lists all names."
    )


class Suite:
    """One run of the benchmark of that name; the result file names the versions of `packages`."""

    def __init__(
        self,
        benchmark: str,
        options: SuiteOptions,
        console: Console | None = None,
        packages: Iterable[str] = (),
    ) -> None:
        self.options = options
        self.console = console or Console()
        self.device = resolve_device(options.device)
        self.path = None
        if options.out is not None:
            self.path = result_path(options.out, benchmark, self.device)
        self.result: dict[str, Any] = {
            "benchmark": benchmark,
            "device_type": self.device.type,
            **provenance(self.device, packages),
            "cases": [],
        }
        if options.resume and self.path is not None and self.path.exists():
            before = read_result(self.path, benchmark)
            for name in ("commit", "device", "driver", "versions"):
                old, new = before.get(name), self.result[name]
                if old != new:
                    raise InputError(
                        f"resume: {self.path} was measured with {name} {old}, now it is {new}"
                    )
            self.result["cases"] = list(before["cases"])

    def cases(
        self, cases: Sequence[_Case], seconds: float, clock: Callable[[], float] = time.perf_counter
    ) -> Iterator[tuple[_Case, float]]:
        """Yield the cases to measure, each with the share of the time limit used before it.

        When the limit of --short, `seconds`, is nearly used up, the other cases are left out.

        Raises:
            InputError: --only fits none of them.
        """
        wanted = [case for case in cases if self.options.only in case.name]
        if not wanted:
            there = "with --short there are" if self.options.short else "there are"
            names = ", ".join(repr(case.name) for case in cases)
            raise InputError(
                f"only: no case's name contains {self.options.only!r}; {there} {names}"
            )
        limit = seconds if self.options.short else math.inf
        start = clock()
        for case in wanted:
            if any(case.name == known["name"] for known in self.result["cases"]):
                continue
            used = clock() - start
            if used > 0.85 * limit:
                self.say(f"left out: {case.name}; --short has used {used:.0f} s")
                continue
            yield case, used / limit

    def say(self, line: str) -> None:
        """Print a line as it is."""
        print_line(self.console, line)

    def add(self, found: dict[str, Any], *tables: Table) -> None:
        """Add the result of a case, or replace an earlier one of that name, and print tables."""
        cases = {case["name"]: case for case in self.result["cases"]} | {found["name"]: found}
        self.result["cases"] = list(cases.values())
        for table in tables:
            self.console.print(table)
        if self.path is not None:
            write_result(self.path, self.result)

    def finish(self) -> dict[str, Any]:
        """Print the targets, draw the plots beside the result file, and return its content."""
        result = self.result
        if targets := targets_for(result["benchmark"], result["device_type"], result["cases"]):
            self.console.print(targets_table(targets))
        if self.path is not None:
            for written in (self.path, *plots.draw(self.result, self.path.parent)):
                self.say(f"written: {written}")
        return self.result
