"""What runs here: versions, devices, and for every backend whether it is available or why not."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

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

_PACKAGES = ("torch", "torchvision", "triton", "numpy")


def report() -> str:
    """The text of `vi-simsiam info`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        f"vi-simsiam   {vi_simsiam.__version__}",
        f"python       {platform.python_version()} on {platform.platform(terse=True)} {platform.machine()}",
        *(f"{package:13}{installed_version(package)}" for package in _PACKAGES),
        f"device       {describe_device(device)}",
        f"extension    {describe_extension()}",
        f"loss         {choose_backend('auto', device.type)} (backend auto on {device.type})",
    ]
    for name in BACKENDS:
        home = "cpu" if name in ("cpu", "eager") or interpreting() else "cuda"
        reason = why_unavailable(name, home)
        if reason is None and home == "cuda" and device.type != "cuda":
            reason = "no CUDA device found"
        lines.append(f"  {name:11}{'available' if reason is None else f'not available: {reason}'}")
    return "\n".join(lines)


def describe_device(device: torch.device) -> str:
    """One line about a device: its name, memory, compute capability and driver, or the CPU's cores and threads."""
    if device.type != "cuda":
        return f"cpu ({counted(torch.get_num_threads(), 'thread')}, {torch.backends.cpu.get_cpu_capability()}); no CUDA device found"
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB, compute capability {capability})"


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


def installed_version(package: str) -> str:
    """The version of an installed distribution, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
