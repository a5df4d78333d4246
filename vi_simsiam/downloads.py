"""Time limit of downloads of data sets and weights."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

_SECONDS = 60.0


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Raise OSError if a server sends nothing for a minute; torchvision would wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
