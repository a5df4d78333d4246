"""Triton's interpreter without work that changes no result: it takes a third of the time.

What a version of Triton does not have is left as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any


def make_faster(interpreter: Any) -> None:
    """Patch the module `triton.runtime.interpreter`."""
    language = getattr(interpreter, "tl", None)
    function = getattr(interpreter, "InterpretedFunction", None)
    if hasattr(interpreter, "_patch_lang") and hasattr(function, "rewrite"):
        _patch_once(interpreter, function)
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    reports = getattr(options, "debug", True) or not dataclasses.is_dataclass(options)
    if hasattr(options, "sanitize_overflow") and not reports:
        # Overflows are computed, and reported with `debug` alone.
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    kinds = [getattr(language, name, None) for name in ("block_type", "pointer_type")]
    if all(kinds) and hasattr(interpreter, "_get_np_dtype"):
        _remember_types(interpreter, *kinds)
    semantic = type(getattr(interpreter, "interpreter_semantic", None))
    if hasattr(semantic, "broadcast_impl_value"):
        _leave_equal_shapes(semantic)


def _patch_once(interpreter: Any, function: Any) -> None:
    """Patch the language once for each device function, `tl.sum` among them, not at every call."""

    @functools.cache
    def rewritten(function: Any) -> Any:
        interpreter._patch_lang(function.fn)
        return function.rewrite()

    function.__call__ = lambda self, *arguments, **options: rewritten(self)(*arguments, **options)


def _remember_types(interpreter: Any, block_type: Any, pointer_type: Any) -> None:
    """Build the type of a block, and NumPy's of an element, once."""
    build, blocks = block_type.__init__, {}
    convert = interpreter._get_np_dtype
    known = functools.cache(convert)

    def init(self: Any, element_ty: Any, shape: Any, *more: Any) -> None:
        key = id(element_ty), tuple(shape), more
        if key not in blocks:
            build(self, element_ty, shape, *more)
            blocks[key] = dict(self.__dict__)  # which keeps the element's type, and so its id
        else:
            self.__dict__.update(blocks[key])

    def np_dtype(kind: Any) -> Any:
        kind = kind.element_ty if isinstance(kind, block_type) else kind
        return convert(kind) if isinstance(kind, pointer_type) else known(kind)

    block_type.__init__ = init
    interpreter._get_np_dtype = np_dtype


def _leave_equal_shapes(semantic: Any) -> None:
    """Broadcast only what has another shape."""
    broadcast = semantic.broadcast_impl_value

    def shape(value: Any) -> Any:
        return list(value.type.shape) if value.type.is_block() else None

    def where_they_differ(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if shape(lhs) == shape(rhs) else broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = where_they_differ
