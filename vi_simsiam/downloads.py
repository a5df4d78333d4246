"""Downloads of data sets and weights: failures become one line, archives stay in their folder."""

from __future__ import annotations

import contextlib
import socket
import tarfile
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from unittest import mock

from vi_simsiam.errors import InputError

_SECONDS = 60.0
_FAILURES = (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError, zlib.error)


@contextlib.contextmanager
def downloading(name: str, url: str, remedy: str) -> Iterator[None]:
    """Raise InputError if a download fails, or if the server sends nothing for a minute.

    torchvision would wait forever. The message has the argument `name`, `url`, the reason, and
    `remedy`. A tar archive whose content would lie outside its folder, links and devices included,
    is refused: torchvision unpacks by the default of `tarfile`.
    """
    safe = staticmethod(tarfile.data_filter)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS)
    try:
        with mock.patch.object(tarfile.TarFile, "extraction_filter", safe, create=True):
            yield
    except _FAILURES as error:
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        message = f"{name}: {url} could not be downloaded ({reason}); {remedy}"
        raise InputError(message) from error
    finally:
        socket.setdefaulttimeout(before)
