"""Errors that a user can resolve, each printed as one line; other exceptions are bugs."""

from __future__ import annotations

import errno
from collections.abc import Iterable

_SHOWN = 16
"""Accepted values that a message lists at most."""
_LONGEST = 300


class UserError(Exception):
    """Base of the errors below."""


class InputError(UserError, ValueError):
    """A value cannot be used; the message has the argument, the value and the accepted values."""


class BackendUnavailableError(UserError, RuntimeError):
    """A backend named explicitly cannot run here; the message has the reason."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on (a non-finite loss, say). Saved files stay usable."""


class CollapsedError(TrainingError):
    """A training ended early since it has collapsed; the run was saved and can go on."""


class LineWarning(UserWarning):
    """Base of the warnings below, each printed as one line."""


class ImageWarning(LineWarning):
    """Images were left out, decoded with a loss or labelled otherwise."""


class RunWarning(LineWarning):
    """A file of a run is damaged or of an earlier step, or a file system has no locks."""


def is_full(error: OSError) -> bool:
    """True for a full disk, an exceeded quota or a limit on the file's size."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_memory(error: Exception) -> bool:
    """True for an allocation that failed, by Python, NumPy or torch."""
    failed = ("DefaultCPUAllocator", "out of memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in failed)


def none_of(name: str, value: object, accepted: Iterable[str]) -> InputError:
    """The error for a value that is not accepted, with the most similar accepted one."""
    accepted = list(accepted)
    shown = accepted[:_SHOWN]
    if len(accepted) > _SHOWN:
        shown.append(f"... ({len(accepted)} in all)")
    similar = did_you_mean(str(value), accepted)
    return InputError(f"{name}: {cut(repr(value))} is none of {', '.join(shown)}{similar}")


def cut(text: str) -> str:
    """Return text, cut off where it is longer than a line of a message should hold."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def did_you_mean(given: str, accepted: Iterable[str]) -> str:
    """ "; did you mean 'train'?" if one of `accepted` is similar to `given`, else empty."""
    from difflib import get_close_matches

    near = get_close_matches(given[:_LONGEST].lower(), list(accepted), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
