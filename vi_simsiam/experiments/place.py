"""Where the runs of an experiment happen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vi_simsiam.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where and how the runs happen: it may change whenever an experiment is gone on with."""

    data_root: Path = Path("data")
    """Where downloaded data sets are kept or looked for."""
    offline: bool = False
    """Never download."""
    cache_dir: Path | None = None
    """Where decoded images are kept; None for the user's cache folder."""
    devices: tuple[str, ...] = ()
    """cuda:0, cuda:1, ... or cpu; none for every GPU, or the CPU without any."""
    parallel: int | None = None
    """Runs at once on each device; None for one on a GPU, and one for every core on a CPU."""
    threads: int | None = None
    """Threads of a run's operations; None for the cores shared among the runs, and one on a CPU."""
    workers: int | None = None
    """Processes that prepare views on a CPU and read images for evaluation; None for a number that suits the device."""

    def slots(self) -> list[str]:
        """The device of every run that there is room for at a time, one device after the other.

        Raises:
            InputError: a device that is not here, or a number that is not accepted.
        """
        import torch

        from vi_simsiam.data.decoding import cores
        from vi_simsiam.engine.run import resolve_device

        for name, least in (("parallel", 1), ("threads", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name}: {value} is not accepted; it must be at least {least}")
        found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        devices = list(self.devices) or found or ["cpu"]
        for device in devices:
            resolve_device(device)
        on_cpu = all(device == "cpu" for device in devices)
        return devices * (self.parallel or (cores() if on_cpu else 1))
