"""Result files: provenance, reading, writing, and the times in them.

A result file holds cases, a case holds providers, and a provider holds the quartiles of its times.
In files of the loss and of BatchNorm they are found under a mode ("forward") and a metric ("time",
"host"), in the others under "time" alone.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import torch

from vi_simsiam.errors import InputError
from vi_simsiam.files import read_json
from vi_simsiam.info import describe_device, installed_version
from vi_simsiam.text import counted

from .forms import FORMS

# Names of the providers that comparisons are about.
FUSED = ("triton", "cuda", "cpu")
EAGER = ("torch, view by view", "torch", "torch without cuDNN")
COMPILED = ("torch.compile", "torch.compile max-autotune")
OURS, OURS_SIMSIAM = "vi-simsiam", "vi-simsiam, method simsiam"
LIGHTLY = "lightly"
STEP, AT_HAND, NETWORK = "step", "step on views at hand", "network alone"
NETWORK_COMPILED, NETWORK_KERNELS = f"{NETWORK}, torch.compile", f"{NETWORK}, kernels"

Case = dict[str, Any]
Times = dict[str, float]


class _Named(TypedDict):
    benchmark: str


NOT_MEASURED = "not measured"
UNCOMMITTED = "+changes"
"""End of the commit of a result whose source tree had changes."""
TOO_NOISY = "too noisy to tell"
_NOISY = 0.2
LEGEND = (
    "Too noisy to tell: the quartiles of a time that is compared lie "
    f"{100 * _NOISY:.0f} % of its median or more apart."
)


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
        "commit": f"{commit}{UNCOMMITTED}" if changed else commit,
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
        InputError: there is none, it is another benchmark's, or it is damaged.
    """
    found = read_json(path, _Named, "results", finite=False)["benchmark"]
    if found not in benchmarks:
        expected = " or ".join(map(repr, benchmarks))
        raise InputError(f"results: {path} holds benchmark {found[:40]!r}, not {expected}")
    return cast(dict[str, Any], read_json(path, FORMS[found], "results", finite=False))


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


class Ratio(NamedTuple):
    """One time over another, and whether they are too noisy for a verdict."""

    value: float
    noisy: bool

    def shown(self, form: str = "{:.2f} x") -> str:
        """Format the ratio for a cell."""
        return TOO_NOISY if self.noisy else form.format(self.value)


def spread(times: Times) -> float:
    """Distance between the quartiles of a time over its median."""
    return (times["upper_us"] - times["lower_us"]) / times["median_us"]


def noisy(*times: Times | None) -> bool:
    """Return True if the spread of any of these times is too large for a verdict."""
    return any(found is not None and spread(found) >= _NOISY for found in times)


def ratio(over: Times, under: Times) -> Ratio:
    """Ratio of two medians."""
    return Ratio(over["median_us"] / under["median_us"], noisy(over, under))


def times_of(
    case: Case, provider: str, mode: str | None = None, metric: str = "time"
) -> Times | None:
    """Quartiles of a provider on a case; None where it has none, as with every wrong result."""
    found = case["providers"].get(provider)
    if found is None or not found["correct"]:
        return None
    times: Times | None = (found if mode is None else found[mode] or {}).get(metric)
    return times


def fastest(
    case: Case, providers: Iterable[str], mode: str | None = None, metric: str = "time"
) -> tuple[str, Times] | None:
    """The provider with the smallest median, and its quartiles; None where none has a time."""
    found = [
        (name, times)
        for name in providers
        if (times := times_of(case, name, mode, metric)) is not None
    ]
    return min(found, key=lambda item: item[1]["median_us"]) if found else None


def speed_up(
    case: Case,
    ours: Sequence[str],
    theirs: Sequence[str],
    mode: str | None = None,
    metric: str = "time",
) -> Ratio | None:
    """Speed-up of the fastest of `ours` over the fastest of `theirs`."""
    own, other = fastest(case, ours, mode, metric), fastest(case, theirs, mode, metric)
    return ratio(other[1], own[1]) if own and other else None


def floor_of(case: Case) -> str:
    """The network alone, with the layers that training uses."""
    return NETWORK_KERNELS if NETWORK_KERNELS in case["providers"] else NETWORK


def step_with(layers: str, default: str) -> str:
    """The step on views at hand with these layers; with those of training it has the short name."""
    return AT_HAND if layers == default else f"{AT_HAND}, {layers}"


def exposed_share(case: Case) -> Ratio | None:
    """Share of the step by which the augmentation makes it longer."""
    exposed, whole = case["phases"].get("exposed augmentation"), times_of(case, STEP)
    if exposed is None or whole is None:
        return None
    return Ratio(exposed / whole["median_us"], noisy(whole, times_of(case, AT_HAND)))


def case_label(case: Case) -> str:
    """Readable name of a case, such as "256 x 2048, 8 views, bfloat16"."""
    if "label" in case:
        return str(case["label"])
    views = ""
    if (case["views"], case["targets"]) != (2, 2):
        views = f", {counted(case['views'], 'view')}"
    cosine = ", cosine" if case["distribution"] == "cosine" else ""
    return f"{case['batch']} x {case['dim']}{views}, {case['dtype']}{cosine}"
