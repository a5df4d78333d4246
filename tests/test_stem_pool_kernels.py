"""The kernels that end a stem: their machine code."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from triton_tools import (
    CAPABILITIES,
    TYPES,
    Binary,
    compile_kernel,
    compiles,
    marked,
)

from vi_simsiam.kernels import stem_pool as kernel
from vi_simsiam.kernels import stem_pool_backward


def compile_for(
    capability: int, part: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> Binary:
    """The machine code of the launcher there, without such a GPU."""
    chosen = kernel.plan(*shape, 2, dtype.itemsize, 132)
    names = ("x_ptr", "y_ptr", "taken_ptr", "gradient_ptr", "x_gradient_ptr")
    types = dict.fromkeys(names, f"*{TYPES[dtype]}")
    types |= dict.fromkeys(("weight_ptr", "bias_ptr", "statistics_ptr", "sums_ptr"), "*fp32") | {
        "code_ptr": "*u8"
    }
    function = kernel.pool_kernel if part == "pool" else stem_pool_backward.gradient_kernel
    constants: dict[str, Any] = dict(chosen.pool if part == "pool" else chosen.gradient)
    return compile_kernel(function, capability, constants, types)


EVERY_DAY = {
    *((capability, "gradient", torch.bfloat16, 64) for capability in CAPABILITIES),
    *((capability, "pool", torch.bfloat16, 64) for capability in (90, 120)),
    (80, "pool", torch.float32, 63),
    (90, "gradient", torch.float32, 63),
    (100, "pool", torch.bfloat16, 63),
}


@compiles
@pytest.mark.parametrize(
    ("capability", "part", "dtype", "size"),
    [
        marked(*shape, every_day=shape in EVERY_DAY)
        for shape in itertools.product(
            CAPABILITIES, ("pool", "gradient"), (torch.bfloat16, torch.float32), (64, 63)
        )
    ],
)
def test_machine_code(capability: int, part: str, dtype: torch.dtype, size: int) -> None:
    binary = compile_for(capability, part, dtype, (128, 64, size, size))
    assert binary.spills == 0
    assert binary.registers <= (128 if part == "pool" else 168)
    # Elements move 16 bytes at a time, codes 8 or 4, and nothing goes through shared memory.
    assert binary.count("LDG", "128") >= (9 if part == "pool" else 8)
    assert binary.count("STG", "128") == (2 if part == "pool" else 4)
    assert binary.count("LDS") == binary.count("STS") == 0
