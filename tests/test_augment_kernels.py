"""The kernels that make views: what they compile to without a GPU.

`python tests/test_augment_kernels.py` compiles every kernel that the tests know and writes the
registers it takes to tests/static/augment_registers.json.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from triton_tools import (
    CAPABILITIES,
    TYPES,
    Binary,
    NoGPU,
    Registers,
    compile_kernel,
    compiles,
    marked,
    without_gpu,
)

from vi_simsiam.kernels import augment as kernel
from vi_simsiam.kernels import blur, colour
from vi_simsiam.ops import augment as reference

REGISTERS = Registers("augment_registers.json")
NAMES = ("resize", "colour", "blur_rows", "blur_columns")


def test_the_table_is_the_package_s() -> None:
    column, operation = reference.Column, reference.ColourOperation
    names = ("START", "STRIDE", "HEIGHT", "WIDTH", "FLIP", "ORDER", "GRAY", "BRIGHTNESS", "SIGMA")
    for name in names:
        assert getattr(kernel, name).value == column[name], name
    for name in ("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"):
        assert getattr(colour, name).value == operation[name], name
        # The factors are found by the operation's code.
        assert column[name] - column.BRIGHTNESS == operation[name] - operation.BRIGHTNESS
    assert (kernel.COLUMNS.value, blur.BLUR_TAPS.value) == (
        reference.TABLE_COLUMNS,
        reference.BLUR_TAPS,
    )
    means = (blur.RED_MEAN, blur.GREEN_MEAN, blur.BLUE_MEAN)
    deviations = (blur.RED_DEVIATION, blur.GREEN_DEVIATION, blur.BLUE_DEVIATION)
    assert tuple(x.value for x in means) == reference.IMAGENET_MEAN
    assert tuple(x.value for x in deviations) == reference.IMAGENET_STD


def compile_for(capability: int, dtype: torch.dtype, name: str, size: int) -> Binary:
    """The machine code of the launcher there, without such a GPU."""
    function, _, constants = kernel.launches(size)[NAMES.index(name)]
    types = dict.fromkeys(("scratch_ptr", "sums_ptr"), "*fp32")
    types |= {"pixels_ptr": "*u8", "table_ptr": "*i32", "out_ptr": f"*{TYPES[dtype]}"}
    return compile_kernel(function, capability, constants, types)


SHAPES = [
    shape
    for shape in itertools.product(
        CAPABILITIES, (torch.float32, torch.bfloat16), NAMES, (32, 64, 96, 128, 224)
    )
    # The others do not depend on the output's dtype.
    if shape[1] == torch.float32 or shape[2] in ("colour", "blur_columns")
]
EVERY_DAY = {
    (80, torch.float32, "resize", 96),
    (90, torch.float32, "colour", 128),
    (100, torch.bfloat16, "colour", 64),
    (120, torch.float32, "blur_rows", 224),
    (90, torch.bfloat16, "blur_columns", 96),
}


def _name(capability: int, dtype: torch.dtype, name: str, size: int) -> str:
    return f"sm_{capability} {TYPES[dtype]} {name} S={size}"


@compiles
@pytest.mark.parametrize(
    "shape",
    [marked(x, every_day=x in EVERY_DAY, name=_name(*x)) for x in SHAPES],
)
def test_machine_code(shape: tuple[int, torch.dtype, str, int]) -> None:
    _, dtype, name, _ = shape
    binary = compile_for(*shape)
    assert binary.spills == 0
    # Registers of a multiprocessor: 16 programs of one warp, eight of four.
    assert binary.registers <= (128 if name == "resize" else 64)
    loads, wide_loads = binary.count("LDG"), binary.count("LDG", "128")
    stores, wide_stores = binary.count("STG"), binary.count("STG", "128")
    if name == "resize":
        # Eight numbers of the table and a factor, the first words of four rows, and three more for
        # every four pixels.
        assert loads <= 9 + 4 + 12
        assert stores == 24 + 1  # a row of 32 lanes at a time, and the sum of grey
        # Older releases pass addresses and rows between the lanes through shared memory.
        assert binary.count("BAR") == 0 or triton.__version__.startswith(("3.6.", "3.7."))
    else:
        rows = 2 if name == "blur_rows" else 1
        interleaved = 0 if name == "blur_rows" else {torch.float32: 3, torch.bfloat16: 2}[dtype]
        planar = 0 if name == "blur_columns" else 3 * rows
        assert stores == wide_stores == interleaved + planar
        assert name != "colour" or wide_loads == 3
    if name == "blur_rows":
        order = [instruction.split(".")[0] for instruction in binary.instructions]
        last_load = max(i for i, x in enumerate(order) if x == "LDG")
        # In place: nothing is written before all is read.
        assert "BAR" in order[last_load : order.index("STG")]
    REGISTERS.check(_name(*shape), binary)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoGPU]:
    yield from without_gpu(monkeypatch, [each for each, _, _ in kernel.launches(8)])


@compiles
def test_known_launches_take_what_triton_would(no_gpu: NoGPU) -> None:
    """With odd sizes the sums lie at an address that the number of views decides."""

    def augment(views: int = 16, dtype: torch.dtype = torch.float32, shift: int = 0) -> None:
        size = 9
        workspace = torch.empty(kernel.workspace_bytes(views, size) + 16, dtype=torch.uint8)
        out = torch.empty(views, size, size, 3, dtype=dtype)
        table = torch.empty(views, 16, dtype=torch.int32)
        pixels = torch.empty(16, dtype=torch.uint8)[shift:]
        kernel.augment(pixels, table, out, workspace[4 * shift :])

    variants: list[dict[str, Any]] = [{}, {"views": 1}, {"dtype": torch.bfloat16}, {"shift": 1}]
    codes = no_gpu.choices(augment, variants)
    # bfloat16 changes the two kernels that write it, an odd address of the workspace all four.
    assert len(set(codes)) == 4 + 2 + 4
    grids = [launched[:3] for launched in no_gpu.launches]
    assert grids[:4] == [(16 * 2, 1, 1), (16, 1, 1), (16, 1, 1), (16, 1, 1)]
    augment(views=0)
    assert len(no_gpu.launches) == 3 * len(codes)


if __name__ == "__main__":
    REGISTERS.write((_name(*shape), compile_for(*shape)) for shape in SHAPES)
