"""What all benchmarks share: interleaved timing, failures as results, provenance, and the result file."""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from vi_simsiam.errors import InputError
from vi_simsiam.info import describe_device, installed_version
from vi_simsiam.text import counted

_LEAST_ROUNDS = 5

_Key = TypeVar("_Key", bound=Hashable)

_SECONDS = 30.0
"""That git and nvidia-smi may take."""


def interleave(
    measures: Mapping[_Key, Callable[[], float]],
    *,
    rounds: int,
    seconds: float,
    least: int = _LEAST_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[_Key, dict[str, float]], dict[_Key, str]]:
    """Take every measure once a round, in turn, so that all see the same machine.

    Args:
        measures: functions that measure once and return microseconds.
        rounds: how often each is taken.
        seconds: no new round begins after this long.
        least: never fewer rounds than this (or `rounds`, where that is less).
        clock: the time in seconds.

    Returns:
        For each measure the median, the lower and the upper quartile and the number of rounds; and for each that
        raised, the reason. A measure that raised is not taken again.
    """
    samples: dict[_Key, list[float]] = {key: [] for key in measures}
    failures: dict[_Key, str] = {}
    start = clock()
    for done in range(rounds):
        if done >= least and clock() - start > seconds:
            break
        for key, measure in measures.items():
            if key in failures:
                continue
            try:
                samples[key].append(measure())
            except Exception as error:
                failures[key] = failure_reason(error)
    return {
        key: quartiles(values) for key, values in samples.items() if key not in failures
    }, failures


def quartiles(values: list[float]) -> dict[str, float]:
    """Median, lower and upper quartile of times in microseconds; a single time is all three."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median_us": median, "lower_us": low, "upper_us": high, "rounds": len(values)}


def failure_reason(error: BaseException) -> str:
    """One line for the result file, with paths relative to the working folder.

    Running out of memory inside a graph capture surfaces as the capture's own error.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(
            cause, torch.OutOfMemoryError | MemoryError
        ) or "can't allocate memory" in str(cause):
            return "out of memory"
        cause = cause.__cause__ or cause.__context__
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return reason.replace(f"{Path.cwd()}/", "")


def provenance(device: torch.device, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Where, when and with what a result was measured; `packages` are peers whose versions count, too."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": f"{commit}+changes" if changed else commit,
        "device": describe_device(device),
        "processor": _processor(),
        "driver": _driver() if device.type == "cuda" else None,
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda if device.type == "cuda" else None,
            **{p: installed_version(p) for p in ("torch", "triton", "vi-simsiam", *packages)},
        },
    }


def result_path(folder: Path, name: str, device: torch.device) -> Path:
    """folder/DEVICE/name.json, DEVICE being the device's name in lower case; made now, before anything is measured."""
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    folder = folder / re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.json"


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Write a result file in one step: a run that is killed leaves the last complete one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def read_result(path: Path, *benchmarks: str) -> dict[str, Any]:
    """A result file of that benchmark, or of one of them.

    Raises:
        InputError: no such file, no JSON, another benchmark's, or an older version's.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"results: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"results: {path} is no JSON file ({error})") from error
    found = content.get("benchmark") if isinstance(content, dict) else None
    if found not in benchmarks:
        raise InputError(
            f"results: {path} holds benchmark {found!r}, not {' or '.join(map(repr, benchmarks))}"
        )
    if "device_type" not in content:
        raise InputError(f"results: {path} is of an older version; measure it again")
    return content  # type: ignore[no-any-return]


def _git(*arguments: str) -> str | None:
    """What git says in the source tree; None outside of one or where git is not installed."""
    try:
        root = Path(__file__).parents[1]
        return subprocess.run(
            ["git", *arguments],
            capture_output=True,
            text=True,
            cwd=root,
            check=True,
            timeout=_SECONDS,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        models = []
    return f"{models[0]}, {counted(len(models), 'core')}" if models else platform.processor()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(
            query, capture_output=True, text=True, check=True, timeout=_SECONDS
        ).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
