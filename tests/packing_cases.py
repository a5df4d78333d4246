"""Images to be packed: in files of every kind, and in a data set."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vi_simsiam.data.pack_file import FORMAT_VERSION, MAGIC, PROLOGUE
from vi_simsiam.data.sources import FileSource, ImageSource


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(source: ImageSource) -> list[list]:
    return [np.asarray(source.image(index)).tolist() for index in range(len(source))]


def stored_files(folder: Path) -> FileSource:
    """Seven images of seven sizes in two classes, stored in seven ways, in a new folder."""
    folder.mkdir(parents=True)
    colour = [Image.fromarray(noise(5 + i, 9 - i, i)) for i in range(7)]
    colour[0].save(folder / "rgb.png")
    colour[1].convert("L").save(folder / "gray.png")
    colour[2].quantize(16).save(folder / "palette.gif")
    Image.fromarray(np.asarray(colour[3])[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    colour[4].convert("RGBA").save(folder / "alpha.png")
    colour[5].convert("CMYK").save(folder / "print.jpg")
    colour[6].convert("1").save(folder / "bits.tif")
    paths = sorted(folder.iterdir())
    return FileSource(paths, np.arange(7, dtype=np.int64) % 2, ("even", "odd"), str(folder))


class Items:
    """A map-style data set of PIL images with labels; one of them may be lost."""

    def __init__(self, count: int, lost: int | None = None) -> None:
        self.count, self.lost = count, lost

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == self.lost:
            raise FileNotFoundError("it is gone")
        return Image.fromarray(noise(2 + index % 3, 3, index)), index


def parts(whole: bytes) -> tuple[bytes, dict[str, Any]]:
    """Body (sections between prologue and header) and header of a pack file's bytes."""
    _, _, start, length, _, _ = PROLOGUE.unpack(whole[: PROLOGUE.size])
    return whole[PROLOGUE.size : start], json.loads(whole[start : start + length])


def sealed(body: bytes, header: dict[str, Any] | bytes) -> bytes:
    """A pack file of any body and header, with checksums that are right."""
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    start = PROLOGUE.size + len(body)
    values = (MAGIC, FORMAT_VERSION, start, len(header), zlib.crc32(header))
    prologue = PROLOGUE.pack(*values, 0)[:-4]
    return prologue + struct.pack("<I", zlib.crc32(prologue)) + body + header


def with_body(header: dict[str, Any], body: bytes) -> dict[str, Any]:
    """The header with the checksums of another body of less than 64 MiB."""
    return header | {"checksums": [zlib.crc32(body)] if body else []}
