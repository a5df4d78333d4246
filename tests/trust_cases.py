"""Files that would make another file if they were executed."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def pickled(trap: Path) -> bytes:
    return pickle.dumps(Payload(trap), protocol=2)


def archived(trap: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": 1, "model": Payload(trap)}, buffer)
    return buffer.getvalue()
