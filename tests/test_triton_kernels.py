"""The Triton kernels: their numbers in the interpreter (or on a GPU), and what they compile to without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: numbers and machine code of its kernels are not checked")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from vi_simsiam.kernels import multiview_loss as kernel

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 is set: there is no machine code to check"
)


def _run_cases(interpret: bool, cases: str = "triton_cases.py", select: str = "") -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    path = Path(__file__).with_name(cases)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", str(path)]
    command += ["-k", select] if select else []
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout), result.stdout


def test_numbers_in_the_interpreter() -> None:
    _run_cases(interpret=True)


@pytest.mark.soak
def test_public_functions_in_the_interpreter() -> None:
    """Every test of the public losses once more with backend "triton"."""
    _run_cases(interpret=True, cases="test_multiview_loss.py", select="triton")


@pytest.mark.gpu
def test_numbers_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: would have run tests/triton_cases.py on it")
    _run_cases(interpret=False)


@dataclass(frozen=True)
class Binary:
    """What the assembler says about a compiled kernel."""

    registers: int
    stack: int
    ptx: str
    instructions: tuple[str, ...]

    def count(self, prefix: str, *parts: str) -> int:
        return sum(name.startswith(prefix) and all(part in name for part in parts) for name in self.instructions)


def compile_for(
    capability: int,
    *,
    dtype: torch.dtype,
    dim: int,
    views: int,
    globals_: int = 2,
    distribution: str = "power_spherical",
    with_grad: bool = True,
) -> CompiledKernel:
    """Compiles what the launcher would launch there for padded rows (strides divisible by 16); needs no such GPU."""
    double = dtype == torch.float64
    constants: dict[str, object] = dict(
        kernel.launch_arguments(
            dim, views, globals_, dtype.itemsize, spherical=distribution == "power_spherical", double=double
        )
    )
    options = {name: constants.pop(name) for name in ("num_warps", "maxnreg") if name in constants}
    if not with_grad:
        constants["grad_ptr"] = None
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    types = {"loss_ptr": "*fp64" if double else "*fp32"}
    types |= dict.fromkeys(("p_ptr", "z_ptr", "grad_ptr"), f"*{TYPES[dtype]}")
    for i, parameter in enumerate(kernel.multiview_loss_kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
        else:
            signature[name] = types.get(name, "i32")
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.multiview_loss_kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assemble(compiled: CompiledKernel, directory: Path) -> Binary:
    path = directory / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])

    def dump(option: str) -> str:
        command = [NVIDIA_TOOLS / "cuobjdump", option, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage"))
    assert usage is not None
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", dump("-sass"), re.MULTILINE)
    return Binary(int(usage[1]), int(usage[2]), compiled.asm["ptx"], tuple(names))


def _check_binary(binary: Binary, dtype: torch.dtype) -> None:
    assert binary.stack == 0
    assert binary.count("LDL") == binary.count("STL") == 0  # no spills
    # The registers of a multiprocessor hold 16 warps: 16 programs of one warp, two of 8.
    assert binary.registers <= (128 if dtype != torch.float64 else 168)
    assert binary.count("LDG", "128") >= 2
    # The raw concentrations are the only loads that are not 16 bytes wide; the loss and their gradient the only stores.
    assert binary.count("LDG") - binary.count("LDG", "128") <= 1
    assert binary.count("STG") - binary.count("STG", "128") <= 2
    if dtype != torch.float64:
        for inexact in ("lg2.approx", "ex2.approx", "sqrt.approx", "rcp.approx", "__nv_"):
            assert inexact not in binary.ptx


@compiles
@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "views", "resident"),
    [
        (90, torch.float32, 2048, 2, True),
        (90, torch.bfloat16, 2048, 8, True),
        (100, torch.float32, 8192, 2, True),
        (120, torch.float32, 16384, 2, False),
        (80, torch.bfloat16, 512, 8, True),
        (90, torch.float64, 2048, 2, True),
    ],
    ids=str,
)
def test_machine_code(
    capability: int, dtype: torch.dtype, dim: int, views: int, resident: bool, tmp_path: Path
) -> None:
    arguments = kernel.launch_arguments(dim, views, 2, dtype.itemsize, spherical=True, double=dtype == torch.float64)
    assert arguments["RESIDENT"] is resident
    _check_binary(assemble(compile_for(capability, dtype=dtype, dim=dim, views=views), tmp_path), dtype)


@compiles
def test_machine_code_without_gradient_stores_the_loss_alone(tmp_path: Path) -> None:
    compiled = compile_for(90, dtype=torch.float32, dim=512, views=2, with_grad=False)
    assert assemble(compiled, tmp_path).count("STG") == 1


@compiles
def test_scale_and_minimum_keep_their_digits() -> None:
    compiled = compile_for(90, dtype=torch.float64, dim=2, views=2)
    assert compiled.asm["ptx"].count(".param .f64") == 2


@compiles
@pytest.mark.soak
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distribution", ["power_spherical", "cosine"])
@pytest.mark.parametrize("views", [2, 8, 16])
@pytest.mark.parametrize("dim", [128, 512, 2048, 8192])
def test_machine_code_of_every_shape(
    capability: int, dtype: torch.dtype, distribution: str, views: int, dim: int, tmp_path: Path
) -> None:
    compiled = compile_for(capability, dtype=dtype, dim=dim, views=views, distribution=distribution)
    _check_binary(assemble(compiled, tmp_path), dtype)


@pytest.mark.parametrize(
    ("dim", "views", "globals_", "itemsize", "double", "expected"),
    [
        (2, 2, 2, 4, False, (2, 2, 2, True, 1)),
        (512, 2, 2, 4, False, (2, 2, 512, True, 1)),
        (2048, 2, 2, 2, False, (2, 2, 2048, True, 4)),
        (2048, 3, 1, 4, False, (4, 1, 2048, True, 8)),
        (2048, 8, 2, 2, False, (4, 2, 2048, True, 8)),  # all 8 at once would need 80 registers a thread
        (8192, 2, 2, 4, False, (2, 2, 8192, True, 16)),
        (8192, 8, 2, 4, False, (1, 2, 8192, True, 16)),
        (8193, 2, 2, 4, False, (2, 2, 8192, False, 8)),
        (8192, 2, 2, 8, True, (2, 2, 4096, False, 8)),
        (64, 16, 16, 4, False, (2, 16, 64, True, 1)),
        (2048, 16, 16, 4, False, (16, 16, 1024, False, 8)),
    ],
)
def test_launch_arguments(
    dim: int, views: int, globals_: int, itemsize: int, double: bool, expected: tuple[int | bool, ...]
) -> None:
    arguments = kernel.launch_arguments(dim, views, globals_, itemsize, spherical=True, double=double)
    assert tuple(arguments[name] for name in ("BLOCK_V", "BLOCK_G", "BLOCK_D", "RESIDENT", "num_warps")) == expected
