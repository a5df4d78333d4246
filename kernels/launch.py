"""Launches by a key of the caller, without Triton's own search for the compiled kernel.

At every launch Triton binds the arguments, describes each of them and turns the description into a
string to find the compiled kernel: tens of microseconds on the host, several times what a small
batch takes on the GPU. The caller's key holds only what can change; `CompiledKernel` does the rest
as usual, with the current stream, Triton's hooks and its own launcher.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel

_compiled: dict[Hashable, tuple[CompiledKernel, tuple[Any, ...]]] = {}


def launch(
    kernel: Any,
    key: Hashable | None,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
) -> None:
    """Launches `kernel` on the current stream of the current device.

    Args:
        kernel: from `triton.jit`.
        key: equal for two calls only if Triton would launch the same machine code for both; None
            to let Triton choose.
        grid: number of programs along each axis.
        arguments: the kernel's run-time arguments, which precede the compile-time ones in its
            signature.
        constants: its compile-time arguments and compiler options.
    """
    known = _compiled.get(key)
    if known is not None:
        compiled, rest = known
        compiled[grid](*arguments, *rest)
        return
    compiled = kernel[grid](*arguments, **constants)
    if key is not None and isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
        rest = tuple(constants[parameter.name] for parameter in kernel.params[len(arguments) :])
        _compiled[key] = compiled, rest


def aligned(tensors: Iterable[Tensor | None]) -> bool:
    """Return True if 16 divides all addresses: all that Triton specialises on in an address."""
    combined = 0
    for tensor in tensors:
        if tensor is not None:
            combined |= tensor.data_ptr()
    return not combined & 15


def kind(stride: int) -> int:
    """The class of a number that Triton specialises on: divisible by 16, equal to 1, or neither."""
    return min(stride, 2) if stride & 15 else 0
