"""The Triton kernels: their numbers in the interpreter (or on a GPU), and what they compile to
without one.

`python tests/test_triton_kernels.py` compiles every shape that the tests know and writes the
registers it takes to tests/static/triton_registers.json.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_tools import (
    CAPABILITIES,
    TYPES,
    Binary,
    NoGPU,
    Registers,
    compile_kernel,
    compiles,
    marked,
    run_cases,
    without_gpu,
)

from vi_simsiam.kernels import multiview_loss as kernel
from vi_simsiam.kernels import scale_gradient, stem_convolution

REGISTERS = Registers("triton_registers.json")
CASES = {
    "loss": ("triton_cases.py", "triton_function_cases.py"),
    "network": (
        *("triton_batch_norm_cases.py", "test_storage.py", "triton_stem_pool_cases.py"),
        *("triton_stem_cases.py", "triton_augment_cases.py"),
    ),
}


@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_numbers_in_the_interpreter(cases: tuple[str, ...]) -> None:
    run_cases(True, *cases)


def test_public_edge_cases_in_the_interpreter() -> None:
    select = "triton and (extremes or raises_kappa or given or padded or empty) and not gradcheck"
    run_cases(True, "test_multiview_loss.py", "test_multiview_loss_autograd.py", select=select)


@pytest.mark.soak
@pytest.mark.parametrize("part", ["", "_autograd", "_modules"])
def test_public_functions_in_the_interpreter(part: str) -> None:
    """Every test of the public losses once more with backend "triton"."""
    run_cases(True, f"test_multiview_loss{part}.py", select="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_numbers_on_the_gpu(cases: tuple[str, ...]) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device: would have run {', '.join(cases)} on it")
    run_cases(False, *cases)


def compile_for(
    capability: int,
    *,
    dtype: torch.dtype,
    dim: int,
    views: int,
    globals_: int = 2,
    form: str = "raw",
    with_grad: bool = True,
    with_mean: bool = True,
) -> Binary:
    """The machine code of the launcher there, without such a GPU."""
    double = dtype == torch.float64
    constants: dict[str, Any] = dict(
        kernel.launch_arguments(
            *(dim, views, globals_, dtype.itemsize),
            width=dim + 16 if form in ("raw", "quadratic") and with_grad else dim,
            spherical=form != "cosine",
            quadratic=form == "quadratic",
            double=double,
        )
    )
    given, absent = form == "given", {}
    for names, present in (
        (["grad_ptr"], with_grad),
        (["mean_ptr", "ticket_ptr"], with_mean),
        (["kappa_ptr"], given),
        (["kappa_grad_ptr"], given and with_grad),
    ):
        absent |= {} if present else dict.fromkeys(names)
    inputs, sums = f"*{TYPES[dtype]}", "*fp64" if double else "*fp32"
    types = dict.fromkeys(("loss_ptr", "mean_ptr", "kappa_ptr", "kappa_grad_ptr"), sums)
    types |= {
        "p_ptrs": (inputs,) * views,
        "z_ptrs": (inputs,) * globals_,
        "grad_ptr": inputs,
        "ticket_ptr": "*i32",
    }
    return compile_kernel(kernel.multiview_loss_kernel, capability, constants | absent, types)


def compile_scale(
    capability: int, gradient: torch.dtype, out: torch.dtype, *, per_sample: bool
) -> Binary:
    """The kernel that scales rows of 2064 columns, as the launcher would launch it."""
    _, constants = scale_gradient._launch_arguments(
        2, 4096, 2064, in_place=gradient == out, per_sample=per_sample
    )
    factor = "*fp64" if gradient == torch.float64 else "*fp32"
    types = {"grad_ptr": f"*{TYPES[gradient]}", "out_ptr": f"*{TYPES[out]}", "factor_ptr": factor}
    return compile_kernel(
        scale_gradient.scale_gradient_kernel,
        capability,
        constants | {"kappa_grad_ptr": None},
        types,
    )


def _check_binary(binary: Binary, dtype: torch.dtype, form: str = "raw") -> None:
    assert binary.spills == 0
    # The registers of a multiprocessor hold 16 warps: 16 programs of one warp, two of 8.
    assert binary.registers <= (128 if dtype != torch.float64 else 176)
    rows = binary.count("LDG", "128") - binary.count("LDG", "128", "STRONG")
    assert rows >= 2
    # The losses are loaded past the L1 cache. Of all others only concentrations are not 16 bytes
    # wide; of the stores theirs and their gradient's, which zeros pad, the loss, the mean and the
    # ticket.
    assert binary.count("LDG") - binary.count("LDG", "STRONG") - rows <= (form != "cosine")
    assert binary.count("LDG", "128", "STRONG") == 16
    assert binary.count("STG", "128") >= 1
    assert binary.count("STG") - binary.count("STG", "128") <= 3 + (form != "cosine")
    assert binary.count("ATOM") == 1
    # The ticket is taken after the losses have arrived, and what the L1 cache holds is forgotten
    # then.
    order = [name.split(".")[0] for name in binary.instructions]
    assert order.index("MEMBAR") < order.index("ATOMG") < order.index("CCTL")
    if dtype != torch.float64:
        for inexact in ("lg2.approx", "ex2.approx", "sqrt.approx", "rcp.approx", "__nv_"):
            assert inexact not in binary.ptx


def _name(capability: int, dtype: torch.dtype, form: str, dim: int, views: int) -> str:
    return f"sm_{capability} {TYPES[dtype]} {form} D={dim} V={views}"


AXES = ("dtype", "form", "dim", "views")
SHAPES = [
    shape
    for shape in itertools.product(
        CAPABILITIES,
        (torch.float32, torch.bfloat16),
        ("raw", "quadratic", "cosine", "given"),
        (128, 512, 2048, 8192),
        (2, 8),
    )
    if shape[2] == "quadratic" or shape[0] == 90  # the forms differ in scalars alone
]
EVERY_DAY = {
    (90, torch.float32, "quadratic", 2048, 2),
    (90, torch.bfloat16, "raw", 2048, 8),
    (80, torch.bfloat16, "quadratic", 512, 8),
    (100, torch.float32, "quadratic", 128, 2),
    (120, torch.bfloat16, "quadratic", 8192, 2),
    (90, torch.float32, "cosine", 2048, 8),
    (90, torch.bfloat16, "given", 512, 2),
}


@compiles
@pytest.mark.parametrize(
    "shape",
    [marked(x, every_day=x in EVERY_DAY, name=_name(*x)) for x in SHAPES],
)
def test_machine_code(shape: tuple[int, torch.dtype, str, int, int]) -> None:
    capability, dtype, form, *_ = shape
    binary = compile_for(capability, **dict(zip(AXES, shape[1:], strict=True)))
    _check_binary(binary, dtype, form)
    REGISTERS.check(_name(*shape), binary)


@compiles
@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "views", "resident"),
    [
        (120, torch.float32, 16384, 2, False),
        (90, torch.float64, 2048, 2, True),
        (90, torch.float32, 2048, 16, True),
    ],
    ids=str,
)
def test_machine_code_of_long_double_and_many_rows(
    capability: int, dtype: torch.dtype, dim: int, views: int, resident: bool
) -> None:
    double = dtype == torch.float64
    arguments = kernel.launch_arguments(
        dim, views, 2, dtype.itemsize, width=dim, spherical=True, double=double
    )
    assert arguments["RESIDENT"] is resident
    _check_binary(compile_for(capability, dtype=dtype, dim=dim, views=views), dtype)


@compiles
def test_machine_code_without_gradient_and_mean_stores_the_loss_alone() -> None:
    binary = compile_for(
        90, dtype=torch.float32, dim=512, views=2, with_grad=False, with_mean=False
    )
    assert (binary.count("STG"), binary.count("ATOM"), binary.count("MEMBAR")) == (1, 0, 0)


@compiles
@pytest.mark.parametrize(
    ("capability", "gradient", "out", "per_sample"),
    [
        (80, torch.bfloat16, torch.bfloat16, False),
        (90, torch.float32, torch.float16, True),
        (100, torch.bfloat16, torch.bfloat16, False),
        (120, torch.float32, torch.float16, True),
    ],
    ids=str,
)
def test_machine_code_of_the_scaling(
    capability: int, gradient: torch.dtype, out: torch.dtype, per_sample: bool
) -> None:
    binary = compile_scale(capability, gradient, out, per_sample=per_sample)
    assert binary.spills == 0
    assert binary.registers <= 64  # eight programs share a multiprocessor
    # 32 elements of a thread, and of each of its four rows a factor, or one factor.
    assert binary.count("LDG", "128") == 32 * gradient.itemsize // 16
    assert binary.count("STG", "128") == binary.count("STG") == 32 * out.itemsize // 16
    assert binary.count("LDG") - binary.count("LDG", "128") <= (8 if per_sample else 1)


@compiles
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code_of_the_blocks_of_pixels(capability: int) -> None:
    types = {"images_ptr": "*bf16", "out_ptr": "*bf16"}
    constants = {"PIXELS": stem_convolution._PIXELS, "num_warps": stem_convolution._WARPS}
    binary = compile_kernel(stem_convolution.blocks_of_pixels_kernel, capability, constants, types)
    assert binary.spills == 0
    assert binary.registers <= 128
    assert binary.count("STG", "128") == binary.count("STG")


@compiles
def test_numbers_keep_their_digits() -> None:
    binary = compile_for(90, dtype=torch.float64, dim=2, views=2)
    assert binary.ptx.count(".param .f64") == 6


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoGPU]:
    yield from without_gpu(
        monkeypatch, (kernel.multiview_loss_kernel, scale_gradient.scale_gradient_kernel)
    )


def _launch(
    dim: int = 16, samples: int = 4, shift: int = 0, stride: int = 32, **changes: Any
) -> None:
    dtype = changes.pop("dtype", torch.float32)

    def rows() -> Tensor:
        return torch.empty(samples * stride + 16, dtype=dtype)[shift:].as_strided(
            (samples, stride), (stride, 1)
        )

    arguments: dict[str, Any] = {
        "predictions": [rows(), rows()],
        "targets": [rows()[:, :dim], rows()[:, :dim]],
        "concentration": None,
        "loss": torch.empty(samples),
        "mean": torch.empty(()),
        "ticket": torch.zeros(3, dtype=torch.int32)[1:2],
        "gradient": torch.empty(2, samples, stride),
        "concentration_gradient": None,
    }
    arguments |= {"distribution": "cosine", "link": "softplus", "scale": 1.0, "minimum": 0.0}
    arguments |= {"gain": 1.0, "cosine": 0.0, "weight": 1.0, "gradient_weight": 0.5}
    kernel.multiview_loss(**(arguments | changes))


@compiles
def test_known_launches_take_what_triton_would(no_gpu: NoGPU) -> None:
    concentration = {"distribution": "power_spherical", "concentration": torch.ones(2, 4)}
    variants: list[dict[str, Any]] = [
        {},
        {"samples": 16},  # a multiple of 16 is no other number
        {"samples": 1},
        {"shift": 1},
        {"stride": 24},
        {"dtype": torch.bfloat16},
        {"gradient": None},
        {"gradient": torch.empty(2, 4, 33)[..., :32]},
        {"mean": None, "ticket": None},
        concentration | {"concentration_gradient": torch.empty(2, 4)},
    ]
    # Samples may differ, and one sample's strides are those of any row.
    assert len(set(no_gpu.choices(_launch, variants))) == len(variants) - 2


@compiles
def test_known_scalings_take_what_triton_would(no_gpu: NoGPU) -> None:
    def scale(
        samples: int = 4, number: bool = True, dtype: torch.dtype = torch.float32, stride: int = 32
    ) -> None:
        gradient = torch.empty(2, samples, stride)[..., :17]
        factor = torch.ones(()) if number else torch.ones(samples)
        out = gradient if dtype == torch.float32 else gradient.to(dtype)
        scale_gradient.scale_gradient(gradient, factor, out, None)

    variants: list[dict[str, Any]] = [{}, {"samples": 7}, {"number": False}]
    variants += [{"dtype": torch.float16}, {"stride": 33}]
    assert len(set(no_gpu.choices(scale, variants))) == 4


if __name__ == "__main__":
    REGISTERS.write(
        (_name(*shape), compile_for(shape[0], **dict(zip(AXES, shape[1:], strict=True))))
        for shape in SHAPES
    )
