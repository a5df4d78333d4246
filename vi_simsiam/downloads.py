"""Downloads of data sets and weights, whose failures become one line."""

from __future__ import annotations

import contextlib
import socket
import tarfile
import zlib
from collections.abc import Iterator
from http.client import HTTPException

from vi_simsiam.errors import InputError

_SECONDS = 60.0
_FAILURES = (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError, zlib.error)


@contextlib.contextmanager
def downloading(name: str, url: str, remedy: str) -> Iterator[None]:
    """Raise InputError if a download fails, or if the server sends nothing for a minute.

    torchvision would wait forever. The message has the argument `name`, `url`, the reason, and
    `remedy`.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS)
    try:
        yield
    except _FAILURES as error:
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        message = f"{name}: {url} could not be downloaded ({reason}); {remedy}"
        raise InputError(message) from error
    finally:
        socket.setdefaulttimeout(before)
