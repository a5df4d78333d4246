"""The cases that loss, pipelines, steps and trainings are measured on, and their inputs.

Inputs of the loss are like those of training: one tensor for each view, D + 1 columns (Power
Spherical) in rows padded to a multiple of 16. The padding is not part of the tensor: a gradient for
it would cost the providers that are not fused a copy. Images are files in a folder, or generated
ones, as JPEG.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vi_simsiam.config import AugmentConfig
from vi_simsiam.config import policy as named_policy
from vi_simsiam.data.datasets import ACCEPTED, Splits, open_dataset
from vi_simsiam.data.sources import FileSource, ImageSource
from vi_simsiam.data.subsets import subset
from vi_simsiam.errors import InputError
from vi_simsiam.ops.multiview_loss import LossForm

FORWARD, BOTH = "forward", "forward_backward"
MODES = {FORWARD: "forward", BOTH: "forward + backward"}
"""Titles of the two modes: an operation under no_grad, and with its gradient."""

_ALIGNMENT = 16


@dataclass(frozen=True)
class Case:
    """`views` predictions (batch, dim + 1), cosine: dim, and `targets` targets (batch, dim)."""

    batch: int
    dim: int
    views: int = 2
    targets: int = 2
    dtype: str = "float32"
    distribution: str = "power_spherical"

    @property
    def name(self) -> str:
        """Name of the case in results; unique."""
        size, views = f"{self.batch}x{self.dim}", f"{self.views}x{self.targets}"
        return f"{self.distribution} {size} {views} {self.dtype}"

    @property
    def width(self) -> int:
        """Columns of a prediction without its padding."""
        return self.dim + (self.distribution == "power_spherical")

    @property
    def form(self) -> LossForm:
        """The loss, with concentrations as in training: around dim - 1."""
        cosine = self.distribution == "cosine"
        return LossForm("cosine") if cosine else LossForm("power_spherical", float(self.dim - 1))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of all inputs."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def least_bytes(self, mode: str) -> int:
        """Bytes that must move: predictions and targets read, and with gradient, that written."""
        predictions = self.views * self.width * (2 if mode == BOTH else 1)
        return (predictions + self.targets * self.dim) * self.batch * self.torch_dtype.itemsize


_LARGE_BATCH, _BF16 = 32768, "bfloat16"
_TELLING = {
    "cuda": (
        Case(64, 2048, dtype=_BF16),
        Case(_LARGE_BATCH, 2048, dtype=_BF16),
        Case(_LARGE_BATCH, 2048),
        Case(256, 2048),
        Case(1024, 2048, dtype=_BF16),
        Case(256, 2048, 8, dtype=_BF16),
        Case(4096, 2048, 8, dtype=_BF16),
        Case(4096, 8192),
    ),
    "cpu": (
        *(Case(batch, dim) for batch, dim in ((256, 2048), (64, 2048), (1024, 2048), (64, 512))),
        Case(256, 2048, dtype=_BF16),
    ),
}
_GRID = itertools.product(
    (_BF16, "float32"), (2, 8), (2048, 512, 128, 8192), (64, 256, 1024, 4096, _LARGE_BATCH)
)
_SMALL = ((64, 128), (256, 512), (1024, 512), (4096, 512), (64, 8192), (256, 8192))
_FULL = {
    "cuda": (
        *(Case(batch, dim, views, dtype=dtype) for dtype, views, dim, batch in _GRID),
        Case(256, 2048, dtype=_BF16, distribution="cosine"),
        Case(_LARGE_BATCH, 2048, dtype=_BF16, distribution="cosine"),
        Case(_LARGE_BATCH, 2048, distribution="cosine"),
    ),
    "cpu": (
        *(Case(batch, dim) for batch, dim in _SMALL),
        Case(64, 2048, 8),
        Case(256, 2048, 8),
        Case(64, 2048, dtype=_BF16),
        Case(256, 2048, distribution="cosine"),
    ),
}


def cases_for(device_type: str, *, short: bool) -> tuple[Case, ...]:
    """The cases in the order in which they are measured, the telling ones first.

    On a CPU they are those that fit its memory.
    """
    telling = _TELLING[device_type]
    return telling if short else tuple(dict.fromkeys(telling + _FULL[device_type]))


Inputs = tuple[list[Tensor], list[Tensor]]
"""Predictions and targets, the arguments of a provider."""


def draw_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    """Random views of common directions, cosines around 0.8; the padding is NaN."""
    dtype = case.torch_dtype
    common = torch.randn(case.batch, case.dim, device=device, generator=generator)

    def view() -> Tensor:
        return common + 0.5 * torch.randn(case.batch, case.dim, device=device, generator=generator)

    predictions = []
    for _ in range(case.views):
        row = math.ceil(case.width / _ALIGNMENT) * _ALIGNMENT
        padded = torch.full((case.batch, row), math.nan, device=device, dtype=dtype)
        padded[:, : case.dim] = view()
        if case.width > case.dim:
            padded[:, case.dim] = torch.randn(case.batch, device=device, generator=generator)
        predictions.append(padded[:, : case.width].detach().requires_grad_())
    return predictions, [view().to(dtype) for _ in range(case.targets)]


_OCTAVES = (3, 6, 12, 24, 48)
"""Sizes of the random fields in a generated image; coarse ones are stronger, as in photographs."""
_QUALITY = 90
_TINTS = ((40, 0, 0), (0, 40, 0), (0, 0, 40), (0, 0, 0))
"""Added to red, green and blue; the classes of generated images."""
_CLASSES = [f"tint {i}" for i in range(len(_TINTS))]


@dataclass(frozen=True)
class ViewCase:
    """Two global views of `size` pixels and `local_views` of `local_size`, for `batch` images."""

    batch: int
    size: int
    local_views: int = 0
    local_size: int = 0
    sides: tuple[int, int] = (160, 213)
    """Shorter and longer side of generated images, in pixels."""

    @property
    def label(self) -> str:
        """Readable name of the views, such as "2x128+6x64"."""
        local = f"+{self.local_views}x{self.local_size}" if self.local_views else ""
        return f"2x{self.size}{local}"

    @property
    def name(self) -> str:
        """Name of the case in results; unique."""
        return f"{self.label} batch {self.batch}"

    @property
    def views(self) -> int:
        """Views of all images of a batch."""
        return self.batch * (2 + self.local_views)

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Shapes of the views of a batch, global ones first."""
        sizes = [self.size] * 2 + [self.local_size] * self.local_views
        return [(self.batch, 3, size, size) for size in sizes]

    @property
    def policy(self) -> AugmentConfig:
        """SimSiam's views, or multi-crop's where there are local ones."""
        if self.local_views == 0:
            return dataclasses.replace(named_policy("simsiam"), size=self.size)
        local: dict[str, Any] = {"local_views": self.local_views, "local_size": self.local_size}
        return dataclasses.replace(named_policy("multicrop"), size=self.size, **local)


SMALL_IMAGES = ViewCase(64, 32, sides=(32, 32))
"""CIFAR-10's."""

_LARGE = (320, 427)
_ALL_VIEWS = {
    "cuda": tuple(
        case
        for batch in (64, 256)
        for case in (
            ViewCase(batch, 128),
            ViewCase(batch, 224, sides=_LARGE),
            ViewCase(batch, 128, 6, 64),
            ViewCase(batch, 224, 6, 96, _LARGE),
        )
    ),
    "cpu": (SMALL_IMAGES, ViewCase(64, 128, sides=(128, 128))),
}
_TELLING_VIEWS = {"cuda": _ALL_VIEWS["cuda"][:2], "cpu": _ALL_VIEWS["cpu"][:1]}


def view_cases(device_type: str, *, short: bool) -> tuple[ViewCase, ...]:
    """The cases in the order in which they are measured, the telling ones first."""
    return (_TELLING_VIEWS if short else _ALL_VIEWS)[device_type]


def image_files(data: str, folder: Path, *, count: int, sides: tuple[int, int]) -> list[str]:
    """Paths of `count` image files, with repeats where there are fewer.

    They are those of "folder:PATH", or "generated" ones of these `sides` in pixels, written into
    `folder`.

    Raises:
        InputError: other data, no such folder, or one without images.
    """
    if data == "generated":
        paths = generate(folder, count=min(count, 256), sides=sides)
    elif data.startswith("folder:") and data != "folder:":
        chosen = _evenly(open_dataset(data).train, count)  # files are listed class by class
        paths = [chosen.describe(i) for i in range(len(chosen))]
    else:
        raise InputError(f"data: {data!r} must be generated or folder:PATH")
    return [paths[i % len(paths)] for i in range(count)]


def labelled_images(
    data: str, root: Path, folder: Path, *, images: int | None, side: int
) -> Splits:
    """Training and validation images with labels, at most `images` of each, evenly spread.

    `data` is as in `vi-simsiam train --data`, downloaded to `root`, or "generated": 256 images of
    `side` pixels, or `images`, written into `folder`.

    Raises:
        InputError: no such data set, or one without labels or validation images.
    """
    if data == "generated":
        count, sources = images or 256, []
        for seed, split in enumerate(("train", "val")):
            paths = generate(
                folder / split, count=count, sides=(side, side), seed=seed, tinted=True
            )
            labels = np.arange(count) % len(_TINTS)
            sources.append(FileSource(paths, labels, _CLASSES, f"generated/{split}"))
        return Splits(data, *sources)
    try:
        found = open_dataset(data, root=root)
    except InputError as error:
        raise InputError(str(error).replace(ACCEPTED, f"generated, {ACCEPTED}")) from None
    if found.val is None or found.train.labels is None or found.val.labels is None:
        raise InputError(f"data: {data!r} must have labels and validation images")
    return Splits(found.name, _evenly(found.train, images), _evenly(found.val, images))


def _evenly(source: ImageSource, count: int | None) -> ImageSource:
    """`count` evenly spread images; all for None, and if there are no more."""
    if count is None or count >= len(source):
        return source
    return subset(source, np.linspace(0, len(source) - 1, count).astype(np.int64))


def generate(
    folder: Path, *, count: int, sides: tuple[int, int], seed: int = 0, tinted: bool = False
) -> list[str]:
    """Write random JPEG images that have structure at every scale, and return their paths.

    `sides` are the shorter and longer side in pixels; every other image is upright. `tinted`
    images are of four classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = [str(folder / f"{i:05d}.jpg") for i in range(count)]
    for i, path in enumerate(paths):
        width, height = sides if i % 2 else sides[::-1]
        total = generator.normal(0.0, 6.0, (height, width, 3)).astype(np.float32)
        total += 128
        if tinted:
            total += np.array(_TINTS[i % len(_TINTS)], np.float32)
        for octave in _OCTAVES:
            fields = generator.normal(0.0, 130 / octave**0.5, (3, octave, octave))
            for channel, field in enumerate(fields.astype(np.float32)):
                part = Image.fromarray(field).resize((width, height), Image.Resampling.BICUBIC)
                total[..., channel] += np.asarray(part)
        Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(path, quality=_QUALITY)
    return paths
