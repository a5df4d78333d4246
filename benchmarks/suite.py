"""What a run of any benchmark does: choose cases, keep the time of --short, and write the result file after each case."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from rich.console import Console
from rich.table import Table

from vi_simsiam.engine.run import resolve_device
from vi_simsiam.errors import InputError

from .harness import provenance, read_result, result_path, write_result
from .tables import say, targets_table
from .targets import Target

_SAME = ("commit", "device", "driver", "versions")
"""What must not differ between the runs that one result file comes from."""


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
    resume: bool = False
    """Keep the cases that the result file in --out already has from the same commit, device and versions."""

    least_rounds: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if self.rounds < self.least_rounds:
            raise InputError(f"rounds: {self.rounds} must be at least {self.least_rounds}")
        if self.resume and self.out is None:
            raise InputError("resume: say where the result file is with --out")


class Named(Protocol):
    """A case as far as the suite is concerned."""

    @property
    def name(self) -> str:
        """What the case is called in results; unique."""


_Case = TypeVar("_Case", bound=Named)


class Suite:
    """One run of a benchmark.

    Args:
        benchmark: its name, which is that of its result file.
        options: what to measure.
        console: where to print; None for standard output.
        packages: peers whose versions the result file names.
    """

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
        self.path = (
            None if options.out is None else result_path(options.out, benchmark, self.device)
        )
        self.result: dict[str, Any] = {
            "benchmark": benchmark,
            "device_type": self.device.type,
            **provenance(self.device, packages),
            "cases": [],
        }
        if options.resume and self.path is not None and self.path.exists():
            self.result["cases"] = self._kept(self.path)

    def cases(
        self, cases: Sequence[_Case], seconds: float, clock: Callable[[], float] = time.perf_counter
    ) -> Iterator[tuple[_Case, float]]:
        """The cases that are to be measured, and how long those before have taken in shares of the time there is.

        Args:
            cases: in the order in which they are measured.
            seconds: the time for --short; when it is nearly used, what is left is named and left out.
            clock: the time in seconds.

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
        """Print a line as it is: no break within a path, and no brackets taken for a style."""
        say(self.console, line)

    def add(self, found: dict[str, Any], *tables: Table) -> None:
        """Keep a case's result, in the place of an earlier one of that name, and show tables of it."""
        cases = {case["name"]: case for case in self.result["cases"]} | {found["name"]: found}
        self.result["cases"] = list(cases.values())
        for table in tables:
            self.console.print(table)
        if self.path is not None:
            write_result(self.path, self.result)

    def finish(
        self, targets: Sequence[Target], draw: Callable[[dict[str, Any], Path], Sequence[Path]]
    ) -> dict[str, Any]:
        """Show the targets, draw the plots beside the result file, and return its content."""
        if targets:
            self.console.print(targets_table(targets))
        if self.path is not None:
            for written in (self.path, *draw(self.result, self.path.parent)):
                self.say(f"written: {written}")
        return self.result

    def _kept(self, path: Path) -> list[dict[str, Any]]:
        """The cases of the result file at `path`, if it was measured as this run measures."""
        before = read_result(path, self.result["benchmark"])
        for name in _SAME:
            if before.get(name) != self.result[name]:
                raise InputError(
                    f"resume: {path} was measured with {name} {before.get(name)}, now it is {self.result[name]}"
                )
        return list(before["cases"])
