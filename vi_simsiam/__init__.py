"""VI-SimSiam: uncertainty-aware self-supervised learning with fused Power Spherical loss kernels.

Names are imported on first use; until then nothing is loaded, not even PyTorch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vi_simsiam.distributions import HypersphericalUniform, PowerSpherical
    from vi_simsiam.export.hub import from_pretrained
    from vi_simsiam.fitting import fit_concentration
    from vi_simsiam.inference.encoder import load
    from vi_simsiam.models import SimSiam, VISimSiam

    __version__: str

__all__ = [
    "HypersphericalUniform",
    "PowerSpherical",
    "SimSiam",
    "VISimSiam",
    "__version__",
    "fit_concentration",
    "from_pretrained",
    "load",
]

_MODULE_OF = {
    "HypersphericalUniform": "distributions",
    "PowerSpherical": "distributions",
    "SimSiam": "models",
    "VISimSiam": "models",
    "fit_concentration": "fitting",
    "from_pretrained": "export.hub",
    "load": "inference.encoder",
}
_MODULES = (
    *("config", "data", "distributions", "engine", "errors", "export"),
    *("functional", "inference", "models", "nn", "ops"),
)


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        value = _version()
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f"vi_simsiam.{_MODULE_OF[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"vi_simsiam.{name}")
    else:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__]
        )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vi-simsiam")
    except PackageNotFoundError:  # a source tree that is not installed
        return "0+unknown"
