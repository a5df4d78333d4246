"""Backend "cuda" on CPU tensors: its kernels' source on the emulation of tests/cuda_emulation/.

The process of a test with VI_SIMSIAM_EMULATION, the path of the compiled emulation, has this
backend (see losses.py); test_cuda_emulation.py compiles it.
"""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from vi_simsiam.config import Link
from vi_simsiam.ops import backends, multiview_loss_fused

_FORMS = ("cosine", "raw_concentration", "given_concentration")
_DTYPES = ("float32", "float64", "bfloat16", "float16")


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class LossProblem(ctypes.Structure):
    """MultiviewProblem of csrc/multiview_loss.h."""

    _fields_ = (
        _fields(ctypes.c_int, "form link")
        + _fields(ctypes.c_int64, "views target_views batch dim width")
        + _fields(ctypes.c_void_p * 16, "predictions targets")
        + _fields(ctypes.c_void_p, "concentration loss mean gradient concentration_gradient")
        + _fields(ctypes.c_int64, "prediction_stride target_stride")
        + _fields(ctypes.c_int64, "gradient_view_stride gradient_stride")
        + _fields(ctypes.c_double, "scale minimum gain cosine weight gradient_weight")
    )


class ScaleProblem(ctypes.Structure):
    """ScaledGradient of csrc/multiview_loss.h."""

    _fields_ = (
        _fields(ctypes.c_int64, "views batch width")
        + _fields(ctypes.c_void_p, "gradient")
        + _fields(ctypes.c_int64, "gradient_view_stride gradient_stride")
        + _fields(ctypes.c_void_p, "out")
        + _fields(ctypes.c_int64, "out_view_stride out_stride")
        + _fields(ctypes.c_void_p, "concentration_gradient factor")
        + _fields(ctypes.c_int64, "factor_stride")
    )


class Emulation:
    """Stands for the extension `vi_simsiam._C`, with its CUDA functions alone."""

    def __init__(self, library: str) -> None:
        self.library = ctypes.CDLL(library)
        self.library.loss.restype = self.library.scale.restype = ctypes.c_char_p
        self.library.launches.restype = ctypes.c_int64
        self.configure()

    def configure(
        self, multiprocessors: int = 2, blocks: int = 2, seed: int = 0, error: int = 0
    ) -> None:
        """Set the emulated GPU, the order of its threads and the error of a launch."""
        self.library.configure(multiprocessors, blocks, 1 << 20, seed, error)

    def multiview_loss_cuda(
        self,
        *,
        predictions: list[int],
        targets: list[int],
        form: str,
        link: str,
        gradient_strides: tuple[int, int],
        prediction_dtype: str,
        target_dtype: str,
        gradient_dtype: str,
        ticket: int,
        stream: int,
        **fields: Any,
    ) -> None:
        problem = LossProblem(
            *(_FORMS.index(form), get_args(Link).index(link), len(predictions), len(targets)),
            gradient_view_stride=gradient_strides[0],
            gradient_stride=gradient_strides[1],
            **fields,
        )
        problem.predictions[: len(predictions)] = predictions
        problem.targets[: len(targets)] = targets
        codes = map(_DTYPES.index, (prediction_dtype, target_dtype, gradient_dtype))
        own = ctypes.c_uint32(0)
        _raise(self.library.loss(ctypes.byref(problem), *codes, ctypes.byref(own)))
        assert own.value == 0

    def scale_gradient_cuda(
        self,
        *,
        gradient_strides: tuple[int, int],
        out_strides: tuple[int, int],
        gradient_dtype: str,
        out_dtype: str,
        stream: int,
        **fields: Any,
    ) -> None:
        problem = ScaleProblem(
            gradient_view_stride=gradient_strides[0],
            gradient_stride=gradient_strides[1],
            out_view_stride=out_strides[0],
            out_stride=out_strides[1],
            **fields,
        )
        codes = map(_DTYPES.index, (gradient_dtype, out_dtype))
        _raise(self.library.scale(ctypes.byref(problem), *codes))


def _raise(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())


def emulate(library: str, patch: pytest.MonkeyPatch) -> Emulation:
    """Let the fused losses launch on the emulation, whatever backend runs here."""
    emulation = Emulation(library)
    patch.setattr(multiview_loss_fused, "extension", lambda: emulation)
    patch.setattr(backends, "why_unavailable", lambda name, device_type: None)
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return emulation
