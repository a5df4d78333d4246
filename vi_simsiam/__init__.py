"""VI-SimSiam: uncertainty-aware self-supervised learning with fused Power Spherical loss kernels."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from vi_simsiam.distributions import HypersphericalUniform, PowerSpherical
from vi_simsiam.models import SimSiam, VISimSiam

if TYPE_CHECKING:
    from vi_simsiam.inference.encoder import Encoder

try:
    __version__ = version("vi-simsiam")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["HypersphericalUniform", "PowerSpherical", "SimSiam", "VISimSiam", "__version__", "load"]


def load(run_folder: str | Path, device: str = "auto") -> Encoder:
    """Open a trained run to encode images with it: ``vi_simsiam.load(RUN).encode(images).uncertainty``.

    Args:
        run_folder: the folder that training wrote.
        device: "auto" (the GPU where there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: no run there, a damaged file, or no such device.
    """
    from vi_simsiam.inference.encoder import load as open_encoder

    return open_encoder(run_folder, device)
