"""What all benchmarks share: interleaved timing, provenance, and the result file."""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vi_simsiam.info import describe_device, installed_version

_WARM_UP = 3


def time_interleaved(
    providers: dict[str, Callable[[], object]], device: torch.device, *, rounds: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Wall time of one call of each provider, in microseconds, measured in turn so that all see the same machine.

    Args:
        providers: functions of no argument.
        device: synchronised around every measurement if it is a GPU.
        rounds: how often every provider is measured.
        repeats: calls in one measurement.

    Returns:
        For each provider the median, and the lower and upper quartile over the rounds.
    """
    for call in providers.values():
        for _ in range(_WARM_UP):
            call()
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in providers.items():
            _synchronise(device)
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            _synchronise(device)
            samples[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: _quartiles(values) for name, values in samples.items()}


def provenance(device: torch.device) -> dict[str, Any]:
    """Where, when and with what a result was measured."""
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
            **{p: installed_version(p) for p in ("torch", "triton", "vi-simsiam")},
        },
    }


def write_result(folder: Path, name: str, device: torch.device, content: dict[str, Any]) -> Path:
    """Write folder/DEVICE/name.json, DEVICE being the device's name in lower case."""
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = folder / re.sub(r"[^a-z0-9]+", "-", label.lower()) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median_us": median, "lower_us": low, "upper_us": high}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _git(*arguments: str) -> str | None:
    """What git says in the source tree; None outside of one or where git is not installed."""
    try:
        root = Path(__file__).parents[1]
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        models = []
    return f"{models[0]}, {len(models)} cores" if models else platform.processor()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
