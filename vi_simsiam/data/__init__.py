"""Images, random views of them, and loaders that make batches."""

from __future__ import annotations

from vi_simsiam.data.device import DeviceFeed
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.views import Batch

__all__ = ["Batch", "DeviceFeed", "MultiViewLoader"]
