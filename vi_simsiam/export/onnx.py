"""A trained model as an ONNX graph, checked with onnxruntime.

The graph maps normalised images (batch, 3, S, S) to "embedding" (batch, F), and for VI-SimSiam also
to "loc" (batch, D), the unit mean direction, and "concentration" (batch,), kappa. The batch is of
any size; S is the size of the training views.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.checkpoint import naming
from vi_simsiam.errors import InputError
from vi_simsiam.export.formats import Outputs, forward, outputs
from vi_simsiam.models import SimSiam

ONNX_WEIGHTS = "model.onnx"
INPUT = "images"


class _Graph(nn.Module):
    """The outputs as a tuple, as the exporter needs them."""

    def __init__(self, model: SimSiam) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(forward(self.model, images).values())


def require_exporter() -> None:
    """Raise an InputError if onnx or onnxscript is not installed."""
    missing = [each for each in ("onnx", "onnxscript") if importlib.util.find_spec(each) is None]
    if missing:
        raise InputError(
            f"format: onnx needs {' and '.join(missing)}; "
            "install with pip install 'vi-simsiam[onnx]'"
        )


def write_onnx(model: SimSiam, config: TrainConfig, folder: Path) -> Outputs | None:
    """Write the model to FOLDER/model.onnx by PyTorch's exporter.

    Returns:
        The file's outputs as onnxruntime computes them on the CPU; None if it is not installed.
    """
    size = config.augment.size
    # Two images: the exporter takes a batch of one for a constant.
    example = torch.zeros(2, 3, size, size)
    names = list(outputs(model)(example))
    with _quiet():
        program = torch.onnx.export(
            _Graph(model).eval(),
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=names,
            dynamic_shapes={"images": {0: "batch"}},
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    with naming(folder / ONNX_WEIGHTS):
        program.save(str(folder / ONNX_WEIGHTS))
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    path, providers = str(folder / ONNX_WEIGHTS), ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, providers=providers)

    def compute(images: Tensor) -> dict[str, Tensor]:
        arrays = session.run(names, {INPUT: images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return compute


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's progress and its warnings about operators that are not used here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
