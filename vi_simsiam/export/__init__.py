"""Exports of a trained run: torchvision, timm, safetensors or ONNX weights, with a model card.

They can be published on the Hugging Face Hub.
"""

from __future__ import annotations

from vi_simsiam.export.folder import FORMATS, export_run
from vi_simsiam.export.formats import load_safetensors
from vi_simsiam.export.hub import from_pretrained, push_to_hub

__all__ = ["FORMATS", "export_run", "from_pretrained", "load_safetensors", "push_to_hub"]
