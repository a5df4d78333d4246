"""`vi-simsiam info --check`: the checks of what is available here, one after the other, and a line
for each."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vi_simsiam.info import home
from vi_simsiam.ops.backends import BACKENDS, interpreting
from vi_simsiam.self_check_cases import OPERATIONS, Case, captured_step, training_step
from vi_simsiam.text import counted

_LATER = 2
"""The last calls, of whose times the median is given."""


@dataclass(frozen=True)
class Finding:
    """The outcome of a check, with the fields of the JSON."""

    name: str
    passed: bool | None
    """None for what cannot run here."""
    why: str | None = None
    """The reason why it failed or cannot run."""
    error: float | None = None
    """Largest error of the result that came closest to its limit, relative to the result's largest
    value."""
    allowed: float | None = None
    """The limit of that result."""
    first_call_seconds: float | None = None
    """With compilation."""
    later_call_seconds: float | None = None

    def verdict(self) -> str:
        """The line to print behind the name."""
        word = {True: "ok", False: "FAILED", None: "skipped"}[self.passed]
        parts = [self.why or ""]
        if self.error is not None:
            parts.append(f"error {self.error:.1e} (allowed {self.allowed:.1e})")
        if self.first_call_seconds is not None:
            calls = f"first call {_time(self.first_call_seconds)}"
            if self.later_call_seconds is not None:
                calls += f", then {_time(self.later_call_seconds)}"
            parts.append(calls)
        return f"{word:8} {'   '.join(filter(None, parts))}"


def run_checks(
    backends: Mapping[str, Mapping[str, Any]], begin: Callable[[str], object] = lambda name: None
) -> Iterator[Finding]:
    """Run each check of the available backends. An extension that does not load is a failure.

    Args:
        backends: as in `info.facts`.
        begin: called with the name of each check before it, which a broken driver may end with the
            process.
    """

    def perform(name: str, prepare: Callable[[], Case]) -> Finding:
        begin(name)
        return _perform(name, prepare)

    def skip(name: str, why: str) -> Finding:
        begin(name)
        return Finding(name, False if "does not load" in why else None, f"not available: {why}")

    for backend in BACKENDS:
        why = backends[backend]["why"]
        operations = [item for item in OPERATIONS.items() if backend in item[1].backends]
        if why is not None:
            yield skip(f"{backend} ({counted(len(operations), 'operation')})", why)
            continue
        for name, operation in operations:
            for dtype in (torch.float32, torch.bfloat16):
                prepare = partial(operation.case, backend, torch.device(home(backend)), dtype)
                yield perform(f"{name}, {backend}, {str(dtype).removeprefix('torch.')}", prepare)
    device = torch.device(home("eager"))
    kernels = device.type == "cuda" and backends["triton"]["available"]
    yield perform("training step, float32", partial(training_step, device, kernels))
    captured = "captured step, bfloat16"
    if kernels:
        yield perform(captured, partial(captured_step, device))
    else:
        yield skip(captured, backends["triton"]["why"] or "Triton is interpreted")


def summary(findings: Sequence[Finding]) -> str:
    """The last line."""
    verdicts = [each.passed for each in findings]
    passed, failed, skipped = (verdicts.count(verdict) for verdict in (True, False, None))
    checks = counted(passed + failed, "check")
    result = f"{failed} of {checks} failed" if failed else f"{checks} passed"
    return f"{result}, {skipped} skipped" if skipped else result


def _perform(name: str, prepare: Callable[[], Case]) -> Finding:
    times: list[float] = []
    held: list[tuple[float, float]] = []
    try:
        with _repeatable():
            case = prepare()
            for expected in case.expected:
                start = time.perf_counter()
                results = case.run()
                if any(result.is_cuda for result in results):
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
                shapes, wanted = ([x.shape for x in each] for each in (results, expected))
                if shapes != wanted:
                    raise ValueError(f"results of the shapes {shapes}, not {wanted}")
                held += [_error(x, y, case.allowed) for x, y in zip(results, expected, strict=True)]
    except Exception as problem:  # a card, driver or compiler may raise anything
        first = str(problem).strip().splitlines()[:1]
        return Finding(name, False, ": ".join([type(problem).__name__, *first]))
    first_call = times[0]
    later = statistics.median(times[-_LATER:]) if len(times) > _LATER else None
    if not all(math.isfinite(error) for error, _ in held):
        return Finding(name, False, "results are not finite", None, None, first_call, later)
    error, allowed = max(held, key=lambda pair: pair[0] / pair[1])
    why = None if error <= allowed else "wrong results"
    return Finding(name, why is None, why, error, allowed, first_call, later)


def _error(result: Tensor, exact: Tensor, allowed: float) -> tuple[float, float]:
    """Largest error relative to the largest value, and its limit, with rounding to bfloat16."""
    error = (result.cpu().double() - exact).abs().max() / exact.abs().max()
    # A gradient is rounded once, and again with its factor; the interpreter truncates, which takes
    # twice as much.
    if result.dtype == torch.bfloat16:
        allowed += torch.finfo(result.dtype).eps * (1 + interpreting())
    return error.item(), allowed


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """The same inputs everywhere, and convolutions in full precision and a fixed order."""
    flags = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
    cudnn = torch.backends.cudnn.flags(**flags)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), cudnn:
        if interpreting():  # of values in lanes that a kernel discards
            warnings.simplefilter("ignore", RuntimeWarning)
        torch.manual_seed(0)
        yield


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
