"""Triton's interpreter without work that changes no result (half of the time), and mended.

What a version of Triton does not have is left as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any


def prepare(interpreter: Any) -> None:
    """Patch the module `triton.runtime.interpreter`."""
    function = getattr(interpreter, "InterpretedFunction", None)
    if hasattr(interpreter, "_patch_lang") and hasattr(function, "rewrite"):
        _patch_once(interpreter, function)
    builder = getattr(interpreter, "interpreter_builder", None)
    if hasattr(builder, "create_splat"):
        _keep_booleans(type(builder))
    options = getattr(builder, "options", None)
    reports = getattr(options, "debug", True) or not dataclasses.is_dataclass(options)
    if hasattr(options, "sanitize_overflow") and not reports:
        # They are looked for at every operation, and reported with `debug` alone.
        builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _patch_once(interpreter: Any, function: Any) -> None:
    """Patch the language once for each device function, `tl.sum` among them, not at every call."""

    @functools.cache
    def rewritten(function: Any) -> Any:
        interpreter._patch_lang(function.fn)
        return function.rewrite()

    function.__call__ = lambda self, *arguments, **options: rewritten(self)(*arguments, **options)


def _keep_booleans(builder: Any) -> None:
    """Let a comparison of scalars be part of a mask.

    The interpreter spreads its result over a block with the type of what was compared, and that of
    Triton 3.9 refuses masks of another type than bool.
    """
    splat = builder.create_splat

    def create_splat(self: Any, type_: Any, scalar: Any) -> Any:
        block = splat(self, type_, scalar)
        if scalar.data.dtype == bool:
            block.data = block.data.astype(bool)
        return block

    builder.create_splat = create_splat
