"""Paths as users write them, on the command line and in Python."""

from __future__ import annotations

import os
from pathlib import Path

from vi_simsiam.errors import InputError


def user_path(name: str, given: str | os.PathLike[str]) -> Path:
    """A path with ~ or ~user at its start replaced by that home folder.

    A name that begins with ~ and is no user's, such as ~lock.png, stays as it is, and so does ~ without a home folder
    (HOME is not set and the user has no entry in the password file) where the path exists literally.

    Args:
        name: of the argument, for the message.
        given: the path; one that does not begin with ~ is returned unchanged.

    Raises:
        InputError: the path needs a home folder, and there is none.
    """
    path = Path(os.path.expanduser(given))
    if path.parts[:1] == ("~",) and not os.path.lexists(path):
        raise InputError(f"{name}: {given}: this user has no home folder; set HOME, or give the path without ~")
    return path
