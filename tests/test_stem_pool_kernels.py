"""The kernels that end a stem: their machine code."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton_tools import (
    CAPABILITIES,
    TYPES,
    Binary,
    NoGPU,
    compile_kernel,
    compiles,
    marked,
    without_gpu,
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


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoGPU]:
    kernels = (
        kernel.statistics_kernel,
        kernel.pool_kernel,
        stem_pool_backward.sums_kernel,
        stem_pool_backward.gradient_kernel,
    )
    yield from without_gpu(monkeypatch, kernels)


def _launch(images: int, channels: int, height: int, width: int, dtype: torch.dtype) -> None:
    """Both directions of two groups, without and with weights, in memory of any content."""
    groups, layout = 2, torch.channels_last
    x = torch.empty((images, channels, height, width), dtype=dtype).to(memory_format=layout)
    shape = images, channels, kernel.pooled(height), kernel.pooled(width)
    y, taken, gradient = (
        torch.empty(shape, dtype=dtype).to(memory_format=layout) for _ in range(3)
    )
    codes, statistics = torch.empty_like(y, dtype=torch.uint8), torch.empty(3, groups, channels)
    tickets = torch.zeros(16, dtype=torch.int32)
    chosen = kernel.plan(*x.shape, groups, dtype.itemsize, 132)
    for parameters in ([None] * 4, [torch.empty(channels) for _ in range(4)]):
        partials = torch.empty(2, groups, chosen.statistics.parts, channels)
        results = (y, taken, codes, statistics, partials, tickets)
        kernel.forward(x, *parameters, *results, chosen, groups=groups, momentum=0.1, eps=1e-5)
        partials = torch.empty(2, groups, chosen.sums.parts, channels)
        given = (gradient, x, taken, codes, *parameters[:2], statistics)
        results = (torch.empty_like(x), *parameters[:2], statistics[:2], partials, tickets)
        stem_pool_backward.backward(*given, *results, chosen, groups=groups)


@compiles
def test_machine_code_serves_images_of_other_sizes(no_gpu: NoGPU) -> None:
    _launch(8, 64, 64, 64, torch.bfloat16)
    # Four kernels, with and without parameters.
    assert len(no_gpu.launches) == len(no_gpu.loaded) == 8
    _launch(12, 64, 64, 64, torch.bfloat16)
    _launch(8, 64, 32, 64, torch.bfloat16)
    assert len(no_gpu.launches) == 24
    assert len(no_gpu.loaded) == 8
    _launch(8, 64, 63, 1, torch.bfloat16)
    assert len(no_gpu.loaded) > 8
