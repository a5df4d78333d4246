"""Result files: provenance, reading and writing."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vi_simsiam.errors import InputError
from vi_simsiam.info import describe_device, installed_version
from vi_simsiam.text import counted


def provenance(device: torch.device, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Date, commit, hardware and versions of a result; `packages` are peers to list as well."""
    commit = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    driver = None
    if device.type == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = (_output(*query) or "").partition("\n")[0] or None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": f"{commit}+changes" if changed else commit,
        "device": describe_device(device),
        "processor": _processor(),
        "driver": driver,
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda if device.type == "cuda" else None,
            **{p: installed_version(p) for p in ("torch", "triton", "vi-simsiam", *packages)},
        },
    }


def result_path(folder: Path, name: str, device: torch.device) -> Path:
    """Return folder/DEVICE/name.json, DEVICE being the lower-case name of the device.

    The folder is created now, so that a wrong path fails before anything is measured.
    """
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
    """Read a result file of one of these benchmarks.

    Raises:
        InputError: no such file, not JSON, another benchmark's, or an older version's.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"results: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"results: {path} is no JSON file ({error})") from error
    found = content.get("benchmark") if isinstance(content, dict) else None
    if found not in benchmarks:
        expected = " or ".join(map(repr, benchmarks))
        raise InputError(f"results: {path} holds benchmark {found!r}, not {expected}")
    if "device_type" not in content:
        raise InputError(f"results: {path} is of an older version; measure it again")
    return content  # type: ignore[no-any-return]


def _output(*command: str) -> str | None:
    """Output of a command in the source tree; None where it fails or is not installed."""
    root = Path(__file__).parents[1]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=root, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return f"{models[0]}, {counted(len(models), 'core')}"
    except (OSError, IndexError):
        return platform.processor()
