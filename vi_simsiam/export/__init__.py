"""Exports of a trained run: torchvision, timm, safetensors or ONNX weights, with a model card."""

from __future__ import annotations

from vi_simsiam.export.folder import FORMATS, export_run
from vi_simsiam.export.formats import load_safetensors

__all__ = ["FORMATS", "export_run", "load_safetensors"]
