"""Inputs for the CUDA kernels on the emulation: how they lie in memory, the call, and the
definition in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from vi_simsiam.config import Link
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss

FORMS = ("cosine", "raw", "given")
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
Fields = list[tuple[str, Any]]


def _fields(kind: Any, names: str) -> Fields:
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


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def rows(count: int, width: int, stride: int, offset: int, dtype: torch.dtype) -> Tensor:
    """(count, width) of NaN with that row stride, beginning `offset` elements after an address
    divisible by 64."""
    storage = torch.full((count * stride + offset + 64,), float("nan"), dtype=dtype)
    start = (-storage.data_ptr() % 64) // storage.element_size() + offset
    return storage[start : start + count * stride].view(count, stride)[:, :width]


@dataclass
class Case:
    views: int
    targets: int
    batch: int
    dim: int
    form: str = "raw"
    dtype: torch.dtype = F32
    target_dtype: torch.dtype | None = None
    gradient_dtype: torch.dtype | None = None
    padding: int = 0
    offset: int = 0
    target_offset: int = 0
    """Elements by which the rows miss 16-byte alignment, if the stride does not already."""
    aligned: bool = True
    mean: bool = True
    wants_gradient: bool = True
    scale: float = 1.0
    minimum: float = 0.25
    link: Link = "softplus"
    gain: float = 1.0
    cosine: float = 0.0
    opposed: bool = False
    """The targets of every second sample point away from its predictions, so that a smaller kappa
    fits."""
    seed: int = 0
    predictions: list[Tensor] = field(default_factory=list)
    targets_: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.target_dtype = self.target_dtype or self.dtype
        self.real = torch.float64 if self.dtype == F64 else F32
        self.gradient_dtype = self.gradient_dtype or (F32 if self.dtype == F16 else self.dtype)
        self.used = self.dim + (self.form == "raw")
        self.width = self.used + self.padding
        generator = torch.Generator().manual_seed(self.seed)

        def randn(columns: int) -> Tensor:
            return torch.randn(self.batch, columns, generator=generator, dtype=F64)

        common = randn(self.dim)
        stride = -(-self.width // 16) * 16 if self.aligned else self.width | 1
        target_stride = -(-self.dim // 16) * 16 if self.aligned else self.dim
        for _ in range(self.views):
            row = rows(self.batch, self.width, stride, self.offset, self.dtype)
            row[:, : self.dim] = 3 * (randn(self.dim) + common)
            row[:, self.dim : self.used] = randn(self.used - self.dim)
            self.predictions.append(row)
        for _ in range(self.targets):
            row = rows(self.batch, self.dim, target_stride, self.target_offset, self.target_dtype)
            row[:] = randn(self.dim) + common
            row[::2] *= -1 if self.opposed else 1
            self.targets_.append(row)
        self.concentration = None
        if self.form == "given":
            kappa = torch.rand(self.views, self.batch, generator=generator)
            self.concentration = self.scale * kappa.to(self.real)
        self.weight = 2 / (self.targets * (self.views - 1))

    def run(self, kernels: Any) -> dict[str, Tensor]:
        nan = float("nan")
        stride = -(-self.width // 16) * 16
        buffer = rows(self.views * self.batch, stride, stride, 0, self.gradient_dtype)
        gradient = buffer.view(self.views, self.batch, stride)
        out = {
            "loss": torch.full((self.batch,), nan, dtype=self.real),
            "mean": torch.full((), nan, dtype=self.real),
            "gradient": gradient[..., : self.width],
            "between": gradient[..., self.width :],
            "concentration_gradient": torch.full((self.views, self.batch), nan, dtype=self.real),
        }
        wants, given = self.wants_gradient, self.concentration
        by_given = out["concentration_gradient"] if wants and given is not None else None
        problem = LossProblem(
            *(FORMS.index(self.form), get_args(Link).index(self.link), self.views, self.targets),
            *(self.batch, self.dim, self.width),
            concentration=_address(given),
            loss=_address(out["loss"]),
            mean=_address(out["mean"] if self.mean else None),
            gradient=_address(gradient if wants else None),
            concentration_gradient=_address(by_given),
            prediction_stride=self.predictions[0].stride(0),
            target_stride=self.targets_[0].stride(0),
            gradient_view_stride=gradient.stride(0),
            gradient_stride=gradient.stride(1),
            scale=self.scale,
            minimum=self.minimum,
            gain=self.gain,
            cosine=self.cosine,
            weight=self.weight,
            gradient_weight=self.weight / 7,
        )
        for field_name, tensors in (("predictions", self.predictions), ("targets", self.targets_)):
            for i, tensor in enumerate(tensors):
                getattr(problem, field_name)[i] = tensor.data_ptr()
        ticket = torch.zeros((), dtype=torch.int32)
        codes = (CODES[dtype] for dtype in (self.dtype, self.target_dtype, self.gradient_dtype))
        error = kernels.loss(
            ctypes.byref(problem), *codes, ctypes.c_void_p(ticket.data_ptr() if self.mean else None)
        )
        if error is not None:
            raise RuntimeError(error.decode())
        assert ticket == 0
        return out

    @property
    def loss(self) -> LossForm:
        if self.form == "raw":
            options = {"link": self.link, "gain": self.gain, "cosine": self.cosine}
            return LossForm("power_spherical", self.scale, self.minimum, **options)
        return LossForm("cosine" if self.form == "cosine" else "power_spherical")

    def concentrations(self) -> Tensor:
        if self.concentration is not None:
            return self.concentration.double()
        raw = torch.stack([row[:, self.dim].double() for row in self.predictions])
        return self.loss.concentration(raw)

    def reference(self) -> dict[str, Tensor]:
        """The eager loss in float64 on the same rounded inputs, and a seventh of its gradients."""
        p = [row.double().clone().requires_grad_() for row in self.predictions]
        z = [row.double() for row in self.targets_]
        leaves = p
        kappa = None
        if self.concentration is not None:
            kappa = self.concentration.double().clone().requires_grad_()
            leaves = [*p, kappa]
        loss = eager_loss(p, z, self.loss, kappa)
        *gradients, last = torch.autograd.grad(
            loss.sum() / 7, leaves, allow_unused=True, materialize_grads=True
        )
        return {
            "loss": loss.detach(),
            "gradient": torch.stack([*gradients, last][: self.views]),
            "concentration_gradient": last,
        }


@dataclass
class Scaling:
    views: int = 3
    batch: int = 13
    width: int = 70
    dtype: torch.dtype = F32
    out_dtype: torch.dtype | None = None
    stride: int = 80
    factor: Sequence[float] = (0.3,)
    expanded: bool = True

    def run(self, kernels: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        real = F64 if self.dtype == F64 else F32
        gradient = rows(self.views * self.batch, self.width, self.stride, 0, self.dtype)
        gradient[:] = torch.randn(gradient.shape, generator=generator, dtype=F64)
        before = gradient.clone()
        concentration = torch.randn(self.views, self.batch, generator=generator, dtype=real)
        factor = torch.tensor(self.factor, dtype=real)
        out = gradient
        if self.out_dtype:
            out = rows(self.views * self.batch, self.width, self.stride, 0, self.out_dtype)
        scaled = concentration.clone()
        problem = ScaleProblem(
            *(self.views, self.batch, self.width),
            gradient=_address(gradient),
            gradient_view_stride=self.batch * self.stride,
            gradient_stride=self.stride,
            out=_address(out),
            out_view_stride=self.batch * self.stride,
            out_stride=self.stride,
            concentration_gradient=_address(scaled),
            factor=_address(factor),
            factor_stride=0 if self.expanded else 2,
        )
        error = kernels.scale(ctypes.byref(problem), CODES[self.dtype], CODES[out.dtype])
        assert error is None
        factors = factor.expand(self.batch) if self.expanded else factor[::2]
        by_row = factors.repeat(self.views)[:, None]
        assert torch.equal(out, (before.to(real) * by_row).to(out.dtype))
        assert torch.equal(scaled, concentration * factors)
        between = (len(out) - 1, self.stride - self.width)
        assert out.as_strided(between, (self.stride, 1), self.width).isnan().all()
