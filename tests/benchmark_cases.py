"""What the tests of the benchmarks share: providers, a timer that reads a script, and the result of such a run."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vi_simsiam.benchmarks import multiview_loss, timers
from vi_simsiam.benchmarks.cases import Case, draw_inputs
from vi_simsiam.benchmarks.providers import Provider
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss

CPU = torch.device("cpu")
TINY = Case(3, 20)


class ScriptedTimer:
    """Says of every prepared call, in order, how long it takes; the copy of a mode comes first."""

    distinct_bytes = 0

    def __init__(self, *microseconds: float | Exception) -> None:
        self.script = list(microseconds)
        self.prepared = 0

    def prepare(self, call: Callable[[Any], object], sets: Sequence[Any], nbytes: int) -> timers.Measures:
        call(sets[0])
        value = self.script[self.prepared % len(self.script)]
        self.prepared += 1
        if isinstance(value, Exception):
            raise value
        return {"time": lambda: value, "host": lambda: value / 2}

    def peak_bytes(self, call: Callable[[], object]) -> int:
        return 1024

    def release(self) -> None:
        pass


def given(form: LossForm, factor: float = 1.0) -> Provider:
    """Eager, wrong by a factor."""
    return lambda predictions, targets: factor * eager_loss(predictions, targets, form).mean()


def out_of_memory(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def shown(table: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def scripted_result() -> dict[str, Any]:
    """A result file's content, as a run with scripted times writes it: cpu takes 10 us, eager 40, torch.compile 20."""
    options = multiview_loss.Options(device="cpu", short=True, only="64x512", rounds=5)

    def some(form: LossForm, device: torch.device) -> dict[str, Provider | str]:
        return {"eager": given(form), "torch.compile": given(form), "cpu": given(form)}

    timer = ScriptedTimer(5, 40, 20, 10)
    return multiview_loss.run(options, Console(file=io.StringIO()), providers=some, timer=timer)


def drawn(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    inputs = draw_inputs(case, CPU, torch.Generator().manual_seed(0))
    return inputs.predictions, inputs.targets


def slower(result: dict[str, Any], factor: float, *, spread: float = 0.0, copied: float = 1.0) -> dict[str, Any]:
    """The same result where cpu needs `factor` times as long, and the copy `copied` times."""
    changed = copy.deepcopy(result)
    for case in changed["cases"]:
        for mode in ("forward", "forward_backward"):
            times = case["providers"]["cpu"][mode]["time"]
            times["median_us"] *= factor
            times["lower_us"], times["upper_us"] = (times["median_us"] * (1 + s * spread / 2) for s in (-1, 1))
            case["copy"][mode]["median_us"] *= copied
    return changed
