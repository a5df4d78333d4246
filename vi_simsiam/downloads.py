"""What downloads of data sets and weights share."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

_SECONDS = 60.0


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Let a server that gives nothing for a minute be an OSError: torchvision waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
