"""The implementations of an operation that can run here, and reasons why others cannot."""

from __future__ import annotations

import functools
import importlib.util
import operator
import os
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vi_simsiam.errors import BackendUnavailableError, InputError, none_of

BACKENDS = ("eager", "triton", "cuda", "cpu")
"""Every backend computes the same function; `eager` is the reference in plain PyTorch."""

_PREFERENCE: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "cuda", "eager"),
    "cpu": ("cpu", "eager"),
}

PLAIN = (Tensor, torch.nn.Parameter, type(None))
"""Types of tensors with memory of their own."""
dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
"""The number of active modes of __torch_dispatch__."""
_TRACING = [
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")
]
_functorch_level = torch._C._functorch.peek_interpreter_stack
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton decides that once, too


@torch.compiler.assume_constant_result
def choose_backend(
    name: str,
    device_type: str,
    accepted: tuple[str, ...] = BACKENDS,
    preferred: tuple[str, ...] | None = None,
) -> str:
    """The backend to use for tensors on devices of a type.

    Args:
        name: one of `accepted`, or "auto" for the first of `preferred` that is available.
        device_type: of the tensors: "cuda", "cpu" or another.
        accepted: backends of the operation.
        preferred: fastest first, ending with one that is always available; the loss's by default.

    Raises:
        InputError: `name` is no backend.
        BackendUnavailableError: the backend was named explicitly and cannot run on this device.
    """
    if name == "auto":
        candidates = preferred or _PREFERENCE.get(device_type, ("eager",))
        return next(each for each in candidates if why_unavailable(each, device_type) is None)
    check_backend_name(name, accepted)
    reason = why_unavailable(name, device_type)
    if reason is not None:
        raise BackendUnavailableError(
            f"backend: {name!r} cannot run on {device_type} tensors: {reason}"
        )
    return name


def check_backend_name(name: str, accepted: tuple[str, ...] = BACKENDS) -> None:
    """Raise InputError unless `name` is "auto" or accepted, whether it can run here or not."""
    if name != "auto" and name not in accepted:
        raise none_of("backend", name, ("auto", *accepted))


def why_unavailable(name: str, device_type: str) -> str | None:
    """The reason why backend `name` cannot run on tensors of `device_type`, or None if it can."""
    if name == "eager":
        return None
    if name == "triton":
        if device_type != "cuda" and not interpreting():
            accepted = "CUDA tensors (or CPU tensors under TRITON_INTERPRET=1)"
            return f"it takes {accepted}, not {device_type}"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        return _triton_problem() if torch.cuda.is_available() and not interpreting() else None
    if device_type != name:
        return f"it takes {name.upper()} tensors, not {device_type}"
    module = extension()
    if module is None:
        return extension_problem()
    if name == "cuda" and not hasattr(module, "multiview_loss_cuda"):
        return "the extension was built without nvcc"
    if name == "cuda" and torch.cuda.is_available():
        return _cuda_problem(torch.cuda.current_device())
    return None


@functools.cache
def extension() -> ModuleType | None:
    """The compiled extension `vi_simsiam._C`, or None where the package was installed without it.

    Raises:
        InputError: VI_SIMSIAM_SIMD names vector instructions that do not run here.
    """
    try:
        module = importlib.import_module("vi_simsiam._C")
    except ImportError:
        return None
    try:
        module.build_info()
    except ValueError as error:
        raise InputError(str(error)) from None
    return module


def extension_problem() -> str:
    """The reason why `extension` is None: it was not built, or it does not load."""
    if importlib.util.find_spec("vi_simsiam._C") is None:
        return (
            "the C++ extension was not built "
            "(a C++ compiler and Python's headers at installation add it)"
        )
    try:
        importlib.import_module("vi_simsiam._C")
    except ImportError as error:
        return f"the C++ extension does not load ({error})"
    return "the C++ extension is there"


@functools.cache
def _triton_problem() -> str | None:
    """The reason why Triton cannot start; it needs a C compiler for its launcher."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # a missing compiler, header, driver or library each raises its own
        return f"Triton does not start ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return None


def interpreting() -> bool:
    """Return True if Triton kernels run in the interpreter, on CPU tensors."""
    return _INTERPRETING


@functools.cache
def _cuda_problem(device: int) -> str | None:
    """The reason why the kernels cannot run on the current GPU: its architecture or its driver."""
    problem: str | None = extension().cuda_problem()  # type: ignore[union-attr]
    return problem


def has_memory(*tensors: Tensor | None) -> bool:
    """True if a kernel may read and write at the tensors' addresses.

    False for fake tensors, other subclasses and negated views, and where a mode traces or
    transforms them.
    """
    for x in tensors:
        if x is not None and (type(x) not in PLAIN or x.is_neg()):
            return False
    return (
        not (dispatch_modes() and any(map(torch._C._get_dispatch_mode, _TRACING)))
        and _functorch_level() is None
        and forward_ad._current_level < 0
    )


def check_storage(name: str, *tensors: Tensor | None) -> None:
    """Raise InputError for a tensor that reaches beyond its storage, as one that was freed does.

    Called before every launch: kernels, and torch's own, read and write there unchecked.

    Args:
        name: of the argument, for the message.
        tensors: dense ones with memory of their own.

    Raises:
        InputError: a storage is smaller than its tensor, from `untyped_storage().resize_()` say.
    """
    for x in tensors:
        if x is None or not (extent := x.numel()):
            continue
        if not x.is_contiguous():
            strides = x.stride()
            extent = 1 + sum(map(operator.mul, x.shape, strides)) - sum(strides)
        needed = (x.storage_offset() + extent) * x.element_size()
        if (held := x.untyped_storage().nbytes()) < needed:
            raise InputError(
                f"{name}: shape {tuple(x.shape)} needs {needed:,} bytes of a storage that has "
                f"{held:,}; it was resized or freed"
            )
