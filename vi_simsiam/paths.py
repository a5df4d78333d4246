"""Paths given by users, and names whose bytes are not UTF-8, as in old archives.

In memory and in JSON files such a name has a lone surrogate for each byte that is not UTF-8
(`os.fsdecode`); CSV files hold the bytes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vi_simsiam.errors import InputError


def user_path(name: str, given: str | os.PathLike[str]) -> Path:
    """Return a path with ~ or ~user at its start replaced by that home folder.

    A name that begins with ~ and is no user's, such as ~lock.png, is not changed. Without a home
    folder (HOME is not set and the user has no entry in the password file), neither is a path that
    exists literally.

    Raises:
        InputError: the path needs a home folder, and there is none; `name` is the argument's.
    """
    path = Path(os.path.expanduser(given))
    if path.parts[:1] == ("~",) and not os.path.lexists(path):
        raise InputError(
            f"{name}: {given}: this user has no home folder; set HOME, or give the path without ~"
        )
    return path


def printable(text: str) -> str:
    """Return text as valid Unicode, with bytes of names that are not UTF-8 written as \\udce9."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """Give `path` or a link to it that is UTF-8, as libraries in C++ and Rust need it."""
    if printable(str(path)) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "link")
        link.symlink_to(path.absolute())
        yield link
