"""Machine code of csrc/: no spills, 16-byte loads and stores, and registers as recorded.

Registers belong to a version of nvcc: tests/static/nvcc_<version>.json holds them, and for a
version without a file only the limits that hold everywhere are tested. `python
tests/test_cuda_kernels.py` compiles everything and writes the file of the nvcc at hand. The numbers
that the kernels compute are tested in test_cuda_emulation.py. Every day only some kernels of the
loss are compiled, `make soak` compiles csrc/ whole.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100, 120)
SOURCES = ("multiview_loss.cu", "scale_gradient.cu")
MODES = ("small", "two_views", "many_views")
TYPES = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16"}
MOST_REGISTERS = 128
EVERY_DAY = (
    "resident small float float wide",
    "resident small bfloat16 bfloat16 wide",
    "resident two_views float float wide",
    "resident two_views half half narrow",
    "resident two_views bfloat16 float wide",
    "resident many_views float float wide",
    "resident many_views bfloat16 bfloat16 wide",
    "streamed float float wide",
    "streamed bfloat16 bfloat16 narrow",
    "streamed double double wide",
)
"""Each kernel of the loss, mode, width of its loads and size of an element."""


@dataclass(frozen=True)
class Kernel:
    """Resources and instructions of a kernel, by the disassembler."""

    registers: int
    stack: int
    instructions: Counter[str]

    def count(self, prefix: str, *parts: str, without: str = " ") -> int:
        return sum(
            count
            for name, count in self.instructions.items()
            if name.startswith(prefix)
            and all(part in name for part in parts)
            and without not in name
        )


def readable(mangled: str) -> str:
    """resident_kernel<Mode(1), float, float, true> as "resident two_views float float wide", and so
    on."""
    found = re.search(r"(resident|streamed|scale_gradient)_kernelI(.*?)EEv", mangled)
    assert found is not None, mangled
    words, types = [found[1]], []
    for token in re.findall(
        r"LNS\w*?4ModeE\dE|Lb[01]|13__nv_bfloat16|6__half|S\d*_|[fd]", found[2]
    ):
        if token.startswith("LNS"):
            words.append(MODES[int(token[-2])])
        elif token.startswith("Lb"):
            words += [*types, "wide" if token == "Lb1" else "narrow"]
        else:
            types.append(types[-1] if token.startswith("S") else TYPES[token])
    return " ".join(words)


def instance(name: str) -> str:
    """The C++ that instantiates the kernel of a readable name."""
    kernel, *mode, prediction, target, width = name.split()
    types = {"half": "__half", "bfloat16": "__nv_bfloat16"}
    given, against = (types.get(each, each) for each in (prediction, target))
    chosen = [*(f"Mode::{each}" for each in mode), given, against, str(width == "wide").lower()]
    return (
        f"template __global__ void {kernel}_kernel<{', '.join(chosen)}>("
        f"const __grid_constant__ MultiviewProblem, "
        f"const __grid_constant__ Settings<Compute<{given}>>);\n"
    )


def some_kernels(folder: Path) -> Path:
    """A source with the loss kernels of every day alone."""
    headers = "".join(f'#include "multiview_loss_{x}.cuh"\n' for x in ("resident", "streamed"))
    instances = "".join(map(instance, EVERY_DAY))
    source = folder / "some_kernels.cu"
    source.write_text(f"{headers}namespace vi_simsiam {{ namespace {{\n{instances}}} }}\n")
    return source


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    assert found is not None, text
    return found[1]


def cuobjdump() -> str | None:
    """The disassembler of the toolkit, or the one that Triton brings along."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    path = (
        Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        if triton and triton.origin
        else None
    )
    return str(path) if path and path.is_file() else None


def compile_kernels(architecture: int, folder: Path, whole: bool = True) -> dict[str, Kernel]:
    kernels = {}
    loss, scale = (ROOT / "csrc" / source for source in SOURCES)
    for source in (loss if whole else some_kernels(folder), scale):
        cubin = folder / f"{source.name}.{architecture}.cubin"
        flags = ["-O3", "-std=c++17", "-DVI_SIMSIAM_CUDA", f"-arch=sm_{architecture}", "-cubin"]
        command = ["nvcc", *flags, "-I", ROOT / "csrc", source, "-o", cubin]
        subprocess.run(command, check=True)

        def dump(option: str, cubin: Path = cubin) -> str:
            return subprocess.run(
                [str(cuobjdump()), option, cubin], capture_output=True, text=True, check=True
            ).stdout

        usage = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+)", dump("-res-usage"))
        code = dict(
            re.findall(r"Function : (\w+)\n(.*?)(?=\s*Function : |\Z)", dump("-sass"), re.DOTALL)
        )
        for name, registers, stack in usage:
            mnemonic = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
            instructions = Counter(re.findall(mnemonic, code[name], re.MULTILINE))
            kernels[readable(name)] = Kernel(int(registers), int(stack), instructions)
    return kernels


def table_path() -> Path:
    return ROOT / "tests" / "static" / f"nvcc_{nvcc_version()}.json"


@pytest.mark.parametrize(
    ("architecture", "whole"),
    [(90, False), *(pytest.param(a, True, marks=pytest.mark.soak) for a in ARCHITECTURES)],
)
def test_machine_code(architecture: int, whole: bool, tmp_path: Path) -> None:
    what = "registers, spills and load widths of the CUDA kernels are not checked"
    if shutil.which("nvcc") is None:
        pytest.skip(f"no nvcc: {what}")
    if cuobjdump() is None:
        pytest.skip(f"no cuobjdump in the CUDA toolkit or in Triton: {what}")
    codes = subprocess.run(
        ["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout
    if f"sm_{architecture}" not in codes.split():
        pytest.skip(f"this nvcc does not support sm_{architecture}: {what} there")

    kernels = compile_kernels(architecture, tmp_path, whole)
    expected = expected_kernels()
    if not whole:
        expected = {*EVERY_DAY, *(name for name in expected if name.startswith("scale"))}
    assert set(kernels) == expected <= expected_kernels()
    for name, kernel in kernels.items():
        assert kernel.stack == 0, name
        assert kernel.count("LDL") == kernel.count("STL") == 0, name  # no spills
        assert kernel.registers <= (64 if "small" in name else MOST_REGISTERS), name
        if "scale" not in name:
            # Logarithms are polynomials; an approximate one (2e-7 absolute) would show times the
            # concentration.
            assert kernel.count("MUFU.LG2") == kernel.count("MUFU.SQRT") == 0, name
        if name.endswith("wide"):
            check_widths(name, kernel)
    if table_path().is_file():
        table = json.loads(table_path().read_text())[f"sm_{architecture}"]
        known = {name: count for name, count in table.items() if name in expected}
        assert {name: kernel.registers for name, kernel in kernels.items()} == known, (
            f"see the top of {__file__}"
        )


def expected_kernels() -> set[str]:
    pairs = ["float float", "double double"] + [
        f"{h} {t}" for h in ("half", "bfloat16") for t in (h, "float")
    ]
    scaled = ("float float", "double double", "bfloat16 bfloat16", "float half")
    same = [f"{t} {t}" for t in ("float", "half", "bfloat16")]
    names = [f"streamed {pair}" for pair in pairs] + [f"scale_gradient {pair}" for pair in scaled]
    names += [f"resident two_views {pair}" for pair in same]
    only_wide = [f"resident small {pair} wide" for pair in same]
    for mode in ("two_views", "many_views"):
        only_wide += [f"resident {mode} {pair} wide" for pair in pairs if pair != "double double"]
    return {f"{name} {width}" for name in names for width in ("wide", "narrow")} | set(only_wide)


def check_widths(name: str, kernel: Kernel) -> None:
    """Aligned rows are read and written 16 bytes at a time, and little else is."""
    words = name.split()
    if words[0] == "scale_gradient":
        assert kernel.count("LDG", "128") == (8 if "half" in words else 4), name
        assert kernel.count("STG", "128") == 4, name
        return
    chunks = {"small": 1, "two_views": 4 if "float float" in name else 2, "many_views": 2}.get(
        words[1], 1
    )
    vectors = (
        2 if words[-2] != words[-3] else 1
    )  # float targets of a chunk of eight 16-bit predictions
    assert kernel.count("LDG", "128") >= chunks * (2 + 2 * vectors), name
    assert kernel.count("STG", "128") >= 2 * chunks, name
    # Else the concentration (STRONG: the losses of the mean), and what follows the directions, the
    # loss, the mean.
    assert kernel.count("LDG", without="128") - kernel.count("LDG", "STRONG", without="128") <= 4, (
        name
    )
    assert kernel.count("STG", without="128") <= 8, name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        registers = {
            f"sm_{a}": {
                name: kernel.registers
                for name, kernel in sorted(compile_kernels(a, Path(temporary)).items())
            }
            for a in ARCHITECTURES
        }
    table_path().write_text(json.dumps(registers, indent=1) + "\n")
    print(table_path())
