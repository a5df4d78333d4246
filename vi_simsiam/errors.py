"""Errors that a user can mend. The command line prints them as one line; other exceptions are bugs."""

from __future__ import annotations

import errno
from collections.abc import Iterable

_SHOWN = 16
"""Accepted values that a message lists at most."""


class UserError(Exception):
    """Base of the errors below."""


class InputError(UserError, ValueError):
    """A value cannot be used; the message names the argument, what was given and what is accepted."""


class BackendUnavailableError(UserError, RuntimeError):
    """A backend named explicitly cannot run here; the message says why."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on (a non-finite loss, say). What was saved before stays usable."""


class ImageWarning(UserWarning):
    """Images were left out, decoded with a loss or labelled otherwise. The command line prints it as one line."""


def is_full(error: OSError) -> bool:
    """Whether a file could not be written for want of room: on the disk, in the user's quota, or below a limit of its size."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def none_of(name: str, value: object, accepted: Iterable[str]) -> InputError:
    """The error for a value that is not among those accepted, with the most similar of them. A long list is cut."""
    accepted = list(accepted)
    shown = (
        accepted
        if len(accepted) <= _SHOWN
        else [*accepted[:_SHOWN], f"... ({len(accepted)} in all)"]
    )
    return InputError(
        f"{name}: {value!r} is none of {', '.join(shown)}{did_you_mean(str(value), accepted)}"
    )


def did_you_mean(given: str, accepted: Iterable[str]) -> str:
    """ "; did you mean 'train'?" where one of `accepted` is similar to what was given, else nothing."""
    from difflib import get_close_matches

    near = get_close_matches(given.lower(), list(accepted), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
