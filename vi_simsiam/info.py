"""Versions, devices and backends: the content of `vi-simsiam info`."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import vi_simsiam
from vi_simsiam.ops.backends import (
    BACKENDS,
    choose_backend,
    extension,
    extension_problem,
    interpreting,
    why_unavailable,
)
from vi_simsiam.text import counted

NOT_INSTALLED = "not installed"
_PACKAGES = ("torch", "torchvision", "triton", "numpy")


def facts() -> dict[str, Any]:
    """The content of `vi-simsiam info` as plain JSON types."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backends = {}
    for name in BACKENDS:
        reason = why_unavailable(name, home(name))
        if reason is None and home(name) == "cuda" and device.type != "cuda":
            reason = "no CUDA device found"
        backends[name] = {"available": reason is None, "why": reason}
    return {
        "vi-simsiam": vi_simsiam.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.platform(terse=True)} {platform.machine()}",
        "packages": {package: installed_version(package) for package in _PACKAGES},
        "device": {"type": device.type, "description": describe_device(device)},
        "extension": describe_extension(),
        "loss": choose_backend("auto", device.type),
        "backends": backends,
    }


def home(backend: str) -> str:
    """The type of the device that a backend is meant for."""
    if backend == "cpu" or interpreting() or (backend == "eager" and not torch.cuda.is_available()):
        return "cpu"
    return "cuda"


def report(found: dict[str, Any]) -> str:
    """The text of `vi-simsiam info` for its `facts`."""
    device = found["device"]
    lines = [
        f"vi-simsiam   {found['vi-simsiam']}",
        f"python       {found['python']} on {found['platform']}",
        *(f"{package:13}{number}" for package, number in found["packages"].items()),
        f"device       {device['description']}",
        f"extension    {found['extension']}",
        f"loss         {found['loss']} (backend auto on {device['type']})",
    ]
    for name, each in found["backends"].items():
        state = "available" if each["available"] else f"not available: {each['why'] or ''}"
        lines.append(f"  {name:11}{state}")
    return "\n".join(lines)


def describe_device(device: torch.device) -> str:
    """A GPU's name, memory and compute capability, or the CPU's threads and SIMD, in one line."""
    if device.type != "cuda":
        threads = counted(torch.get_num_threads(), "thread")
        simd = torch.backends.cpu.get_cpu_capability()
        return f"cpu ({threads}, {simd}); no CUDA device found"
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{properties.name} ({memory}, compute capability {capability})"


def describe_extension() -> str:
    """One line about the compiled extension."""
    module = extension()
    if module is None:
        return f"none: {extension_problem()}; the package runs without it"
    built = module.build_info()
    cuda = (
        f"CUDA {built['cuda']} for {' '.join(built['architectures'])}"
        if built["cuda"]
        else "no CUDA (built without nvcc)"
    )
    return f"{built['compiler']}, SIMD {built['simd']}, {cuda}"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of vi-simsiam, Python and those of `packages` that are installed."""
    found = {package: installed_version(package) for package in packages}
    return {
        "vi-simsiam": vi_simsiam.__version__,
        "python": platform.python_version(),
        **{package: number for package, number in found.items() if number != NOT_INSTALLED},
    }


def installed_version(package: str) -> str:
    """The version of an installed distribution, or `NOT_INSTALLED`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED
