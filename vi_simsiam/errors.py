"""Errors that a user can mend. The command line prints them as one line; other exceptions are bugs."""

from __future__ import annotations


class UserError(Exception):
    """Base of the errors below."""


class InputError(UserError, ValueError):
    """A value cannot be used; the message names the argument, what was given and what is accepted."""


class BackendUnavailableError(UserError, RuntimeError):
    """A backend named explicitly cannot run here; the message says why."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on (a non-finite loss, say). What was saved before stays usable."""
