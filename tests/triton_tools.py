"""Tools of the Triton kernels' tests: machine code without a GPU, and cases in the interpreter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import run_tests

pytest.importorskip(
    "triton",
    reason="Triton is not installed: numbers and machine code of its kernels are not checked",
)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from vi_simsiam.kernels import launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
"""Device of the kernels' cases: the CPU in the interpreter, else a GPU."""
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float64: "fp64", torch.float32: "fp32"}
TYPES |= {torch.float16: "fp16", torch.bfloat16: "bf16"}
CAPABILITIES = (80, 90, 100, 120)
compiles = pytest.mark.skipif(
    INTERPRETED,
    reason="TRITON_INTERPRET=1 is set: there is no machine code to check",
)


def marked(*shape: object, every_day: bool, name: str | None = None) -> Any:
    """A case that only `make soak` runs, unless it is for every day."""
    marks = [] if every_day else [pytest.mark.soak]
    return pytest.param(*shape, id=name or "-".join(map(str, shape)), marks=marks)


def run_cases(interpret: bool, *cases: str, select: str = "") -> None:
    """Run files of tests/ in the interpreter, or on a GPU, where a file compiles 200 kernels."""
    options = ["-k", select] if select else []
    options += [f"tests/{name}" for name in cases]
    if interpret:  # pytest takes seconds to load the plugins that it finds
        run_tests(*options, TRITON_INTERPRET="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    else:
        run_tests("-n", "4", *options, TRITON_INTERPRET="0")


@dataclass(frozen=True)
class Binary:
    """Resources and instructions of a compiled kernel, by the disassembler."""

    registers: int
    stack: int
    ptx: str
    instructions: tuple[str, ...]

    def count(self, prefix: str, *parts: str) -> int:
        return sum(
            name.startswith(prefix) and all(part in name for part in parts)
            for name in self.instructions
        )

    @property
    def spills(self) -> int:
        """Bytes of stack and instructions that use it."""
        return self.stack + self.count("LDL") + self.count("STL")


def compile_kernel(
    function: Any, capability: int, constants: dict[str, Any], types: dict[str, Any]
) -> Binary:
    options = {name: constants[name] for name in ("num_warps", "maxnreg") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for i, parameter in enumerate(function.params):
        name = parameter.name
        signature[name] = (
            "constexpr" if name in constants else types.get(name, parameter.annotation_type)
        )
        if isinstance(signature[name], tuple):
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(len(signature[name]))}
        elif signature[name] not in ("constexpr", "fp64") and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    return _assemble(
        triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    )


def _assemble(compiled: CompiledKernel) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [NVIDIA_TOOLS / "cuobjdump", "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert usage is not None
    names = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", dump, re.MULTILINE
    )
    return Binary(int(usage[1]), int(usage[2]), compiled.asm["ptx"], tuple(names))


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of the step, which ran once before, and the results that a replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


class Registers:
    """Registers that kernels take, in a table of tests/static/ under the version of Triton.

    A version that is not in there is held to the absolute limits alone.
    """

    def __init__(self, table: str) -> None:
        self.path = Path(__file__).parent / "static" / table

    def check(self, name: str, binary: Binary) -> None:
        """At most as many as in the table."""
        known = json.loads(self.path.read_text()).get(triton.__version__)
        assert known is None or binary.registers <= known[name], name

    def write(self, binaries: Iterable[tuple[str, Binary]]) -> None:
        """Replace what the table holds of this version."""
        table = json.loads(self.path.read_text())
        table[triton.__version__] = {name: binary.registers for name, binary in binaries}
        self.path.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")


class NoGPU:
    """Stands for the driver of a GPU: kernels are compiled, and a launch only recorded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launches: list[tuple[Any, ...]] = []
        self.utils = self

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *arguments: self.launches.append(arguments)

    def load_binary(self, name: str, *_: Any) -> tuple[int, ...]:
        self.loaded.append(name)
        return len(self.loaded), len(self.loaded), 0, 0, 1024

    def choices(self, run: Callable[..., None], variants: Iterable[dict[str, Any]]) -> list[int]:
        """The machine code of each launch of the variants.

        They are run three times: for Triton to choose, with its choice known, and with nothing
        known again. All three launch the same with the same arguments.
        """
        for again in (False, False, True):
            if again:
                launch._compiled.clear()
            for variant in variants:
                run(**variant)
        count = len(self.launches) // 3
        chosen, known = self.launches[:count], self.launches[count : 2 * count]
        codes: list[int] = [launched[4] for launched in chosen]
        assert [launched[4] for launched in self.launches] == codes * 3
        assert len(self.loaded) == len(set(codes))
        for first, second in zip(chosen, known, strict=True):
            assert (second[:6], len(second)) == (first[:6], len(first))
            assert all(map(_same_kind, second[9:], first[9:]))
        return codes

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 17}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def unload_module(self, _: int) -> None:
        pass


def _same_kind(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same_kind, a, b))
    return (a.shape, a.dtype) == (b.shape, b.dtype) if isinstance(a, Tensor) else a == b


def without_gpu(monkeypatch: pytest.MonkeyPatch, kernels: Sequence[Any]) -> Iterator[NoGPU]:
    """A driver that launches nothing, and `kernels` as if never compiled, before and after."""
    driver = NoGPU()
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    for each in kernels:
        each.device_caches.clear()
    yield driver
    launch._compiled.clear()  # a compiled kernel unloads itself through its driver
    for each in kernels:
        each.device_caches.clear()
