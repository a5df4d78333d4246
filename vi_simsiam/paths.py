"""Paths as users write them, and names whose bytes are not UTF-8, as those in old archives.

In memory such a name is text with a lone surrogate for each byte that is not UTF-8 (`os.fsdecode`), and so it is in JSON
files; CSV files hold the bytes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
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
        raise InputError(
            f"{name}: {given}: this user has no home folder; set HOME, or give the path without ~"
        )
    return path


def printable(text: str) -> str:
    """Text for files and pictures that must be Unicode, with each byte of a name that is not UTF-8 as \\udce9."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """A path to the same place that is UTF-8, as libraries in C++ and Rust need it: `path` itself, or else a link to it."""
    if printable(str(path)) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "link")
        link.symlink_to(path.absolute())
        yield link
