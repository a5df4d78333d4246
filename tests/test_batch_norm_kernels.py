"""The kernels of the fused BatchNorm: their machine code."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from triton_tools import CAPABILITIES, TYPES, Binary, compile_kernel, compiles, marked

from vi_simsiam.kernels import batch_norm as kernel
from vi_simsiam.kernels import batch_norm_backward


def compile_for(
    capability: int,
    part: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 65536,
    channels: int = 64,
    residual: bool = False,
) -> Binary:
    """The machine code of the launcher there, for two groups of aligned rows; checks registers."""
    is_forward = part in ("statistics", "normalise", "single")
    tensors = 1 if is_forward else 2 + residual
    chosen = kernel.plan(rows, channels, 2, dtype.itemsize, tensors, 132)
    assert chosen.single == part.startswith("single")
    elements = f"*{TYPES[dtype]}"
    types = dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr", "gradient_ptr"), elements)
    types |= dict.fromkeys(("x_gradient_ptr", "residual_gradient_ptr"), elements)
    numbers = "weight bias running_mean running_var statistics partials sums weight_gradient"
    types |= {f"{name}_ptr": "*fp32" for name in (*numbers.split(), "bias_gradient")}
    types["ticket_ptr"] = "*i32"
    applies = part in ("normalise", "gradient")
    constants: dict[str, Any] = dict(chosen.apply if applies else chosen.reduce)
    if part != "statistics":
        constants["RELU"] = not (part == "gradient" and residual)
    if not residual:
        constants |= {"residual_ptr": None, "residual_gradient_ptr": None}
        constants |= {} if is_forward else {"y_ptr": None}
    function = {
        "statistics": kernel.statistics_kernel,
        "normalise": kernel.normalise_kernel,
        "single": kernel.single_kernel,
        "sums": batch_norm_backward.sums_kernel,
        "gradient": batch_norm_backward.gradient_kernel,
        "single gradient": batch_norm_backward.single_kernel,
    }[part]
    known = {parameter.name for parameter in function.params} | {"num_warps"}
    constants = {name: value for name, value in constants.items() if name in known}
    binary = compile_kernel(function, capability, constants, types)
    assert binary.spills == 0
    # Two programs of 8 warps share a multiprocessor, or four of 4, or one of 16.
    assert binary.registers <= 128, constants
    return binary


PARTS = ("statistics", "normalise", "sums", "gradient")
EVERY_DAY = {
    (90, "statistics", torch.bfloat16, True),
    *((90, part, torch.bfloat16, add) for part in PARTS[1:] for add in (False, True)),
    *((80, part, torch.float32, True) for part in ("normalise", "sums")),
    *((100, part, torch.bfloat16, True) for part in ("statistics", "gradient")),
    *((120, part, torch.float32, True) for part in ("statistics", "gradient")),
}
SINGLE_EVERY_DAY = {
    *((90, part, rows, rows > 64) for part in ("single", "single gradient") for rows in (64, 1024)),
    *((capability, "single gradient", 1024, True) for capability in (80, 100, 120)),
}


@compiles
@pytest.mark.parametrize(
    ("capability", "part", "dtype", "residual"),
    [
        marked(*shape, every_day=shape in EVERY_DAY)
        for shape in itertools.product(
            CAPABILITIES, PARTS, (torch.bfloat16, torch.float32), (False, True)
        )
    ],
)
def test_machine_code(capability: int, part: str, dtype: torch.dtype, residual: bool) -> None:
    binary = compile_for(capability, part, dtype=dtype, residual=residual)
    # Elements move 16 bytes at a time; what else is loaded and stored are numbers of channels.
    assert binary.count("LDG", "128") >= (1 if part == "statistics" else 4)
    if part in ("normalise", "gradient"):
        assert binary.count("STG", "128") == binary.count("STG") > 0


@compiles
@pytest.mark.parametrize(
    ("capability", "part", "rows", "channels", "residual"),
    [
        marked(
            *(capability, part, *shape, residual),
            every_day=(capability, part, shape[0], residual) in SINGLE_EVERY_DAY,
        )
        for capability, part, shape, residual in itertools.product(
            CAPABILITIES, ("single", "single gradient"), ((64, 2048), (1024, 512)), (False, True)
        )
    ],
)
def test_machine_code_of_a_single_launch(
    capability: int, part: str, rows: int, channels: int, residual: bool
) -> None:
    compile_for(capability, part, rows=rows, channels=channels, residual=residual)
