"""Cluttered colour scenes: a tinted garment on a ground of waves and scattered shapes.

A harder training set than the embedded garments, made from them without a download:
`python tests/cluttered.py FOLDER` writes FOLDER/train/CLASS/*.png and FOLDER/val/CLASS/*.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.run import open_splits

SIDE = 32
_SHAPES = 6


def write_scenes(folder: Path, *, train: int = 4000, val: int = 1000, seed: int = 0) -> None:
    """Write the scenes of the first `train` and `val` images of the embedded set."""
    splits = open_splits(TrainConfig().located())
    assert splits.val is not None
    for name, source, count in (("train", splits.train, train), ("val", splits.val, val)):
        assert source.labels is not None
        for index in range(count):
            place = folder / name / str(source.labels[index])
            place.mkdir(parents=True, exist_ok=True)
            random = np.random.default_rng((seed, name == "val", index))
            scene(source.image(index), random).save(place / f"{index:05}.png")


def scene(garment: Image.Image, random: np.random.Generator) -> Image.Image:
    """One scene of SIDE x SIDE pixels."""
    ground = Image.fromarray(_waves(random))
    draw = ImageDraw.Draw(ground)
    for _ in range(_SHAPES):
        x, y = random.integers(-4, SIDE, 2).tolist()
        width, height = random.integers(3, 14, 2).tolist()
        colour = tuple(random.integers(0, 256, 3).tolist())
        shape = draw.rectangle if random.random() < 0.5 else draw.ellipse
        shape((x, y, x + width, y + height), fill=colour)
    side = int(random.integers(14, 25))
    mask = garment.convert("L").resize((side, side), Image.Resampling.BILINEAR)
    place = tuple(random.integers(0, SIDE - side + 1, 2).tolist())
    ground.paste(tuple(random.integers(0, 256, 3).tolist()), place, mask)
    return ground


def _waves(random: np.random.Generator) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    frequency, phase = random.uniform(-4, 4, (2, 3)), random.uniform(0, 2 * np.pi, 3)
    turns = rows[..., None] * frequency[0] + columns[..., None] * frequency[1]
    waves = np.sin(2 * np.pi * turns + phase)
    return (127.5 + 80 * waves + random.uniform(-40, 40, 3)).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    write_scenes(Path(sys.argv[1]))
