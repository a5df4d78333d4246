"""A launch that looks its machine code up once instead of letting Triton derive it from every argument again.

Triton binds the arguments, describes each of them and turns the description into a string to find the compiled kernel,
at every launch: tens of microseconds on the host, several times what a small batch takes on the GPU. The caller
knows better what of all this can change and says so with a key; `CompiledKernel` does the rest as ever, with the
current stream, Triton's hooks and its own launcher.
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
        key: equal for two calls only if Triton would launch the same machine code for both; None where the caller does
            not know: Triton chooses then.
        grid: number of programs along each axis.
        arguments: the kernel's run-time arguments, which precede the compile-time ones in its signature.
        constants: its compile-time arguments and compiler options.
    """
    known = _compiled.get(key)
    if known is not None:
        compiled, rest = known
        compiled[grid](*arguments, *rest)
        return
    compiled = kernel[grid](*arguments, **constants)
    if key is not None and isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
        _compiled[key] = (
            compiled,
            tuple(constants[parameter.name] for parameter in kernel.params[len(arguments) :]),
        )


def aligned(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all addresses are divisible by 16, which is what Triton looks at in an address."""
    combined = 0
    for tensor in tensors:
        if tensor is not None:
            combined |= tensor.data_ptr()
    return not combined & 15


def kind(stride: int) -> int:
    """What Triton looks at in a number of fixed type: whether it is divisible by 16, 1, or neither."""
    return min(stride, 2) if stride & 15 else 0
