"""VI-SimSiam: uncertainty-aware self-supervised learning with fused Power Spherical loss kernels."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from vi_simsiam.distributions import HypersphericalUniform, PowerSpherical
from vi_simsiam.models import SimSiam, VISimSiam

try:
    __version__ = version("vi-simsiam")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["HypersphericalUniform", "PowerSpherical", "SimSiam", "VISimSiam", "__version__"]
