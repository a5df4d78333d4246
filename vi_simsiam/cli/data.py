"""`vi-simsiam pack|views`: packed images, and pictures of random views."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image
from rich.console import Console

from vi_simsiam.cli.parsing import SourceOptions, given, parse, with_folders
from vi_simsiam.config import AugmentConfig, DecodeConfig, TrainConfig, policy
from vi_simsiam.errors import ImageWarning, InputError
from vi_simsiam.text import counted, show

_LEAST_SHOWN = 112
"""Smallest side in pixels of a drawn view; smaller views are enlarged to about this."""


@dataclass(frozen=True, kw_only=True)
class _Pack(SourceOptions):
    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Images in any form that --data of `train` takes."""
    out: Path
    """File to write, such as mine.pack; validation images go to mine.val.pack."""
    shorter_side: int | None = None
    """Make larger images smaller, to this many pixels on the shorter side."""
    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")] = field(default_factory=DecodeConfig)
    workers: int | None = None
    """Processes that decode; None for one a CPU core."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass(frozen=True, kw_only=True)
class _Views(SourceOptions):
    augment: Annotated[AugmentConfig, tyro.conf.arg(name="")]
    data: str = "fashion-mini"
    """A folder or several, a list (.txt, .csv), Parquet or tar files, a pack file, or
    fashion-mini (embedded), cifar10, imagenette, imagewoof."""
    policy: str | None = None
    """simsiam, multicrop, lightly-imagenette or none to start from; None for those of `train`."""
    decode: Annotated[DecodeConfig, tyro.conf.arg(name="")] = field(default_factory=DecodeConfig)
    out: Path = Path("views.png")
    """Picture to write: a row an image, the image first and then its views."""
    images: int = 8
    """Number of images."""
    seed: int = 0


def pack(arguments: list[str]) -> int:
    """Decode images once into one file."""
    options = parse("pack", _Pack, arguments)

    from vi_simsiam.data.cache import pack
    from vi_simsiam.data.datasets import validation_pack

    splits = options.open(options.images, options.decode)
    parts = [(splits.train, options.out)]
    if splits.val is not None:
        parts.append((splits.val, validation_pack(options.out)))
    for _, path in parts:
        if path.exists() and not options.overwrite:
            raise InputError(f"out: {path} exists; say --overwrite to replace it")
    for source, path in parts:
        unreadable = pack(
            source,
            path,
            workers=options.workers,
            shorter_side=options.shorter_side,
            console=Console(soft_wrap=True),
        )
        for image in unreadable:
            show(f"left out: {image}")
        images = counted(len(source) - len(unreadable), "image")
        show(f"written: {path} ({images}, {path.stat().st_size / 1e6:,.1f} MB)")
    return 0


def views(arguments: list[str]) -> int:
    """Draw images and their random views."""
    arguments = with_folders(arguments)
    name = given(arguments, "--policy")
    start = policy(name or "simsiam")
    options = parse("views", _Views, arguments, default=_Views(augment=start))

    from vi_simsiam.data.contact_sheet import contact_sheet
    from vi_simsiam.data.defaults import sized, suited, suited_size
    from vi_simsiam.files import write_atomically

    suffix = options.out.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"out: {options.out} must end in .png, .jpg, .jpeg or .webp")
    source = options.open(options.data, options.decode).train
    fixed = given(arguments, "--size") is not None or start.size != AugmentConfig.size
    size = options.augment.size if fixed else suited_size(source)
    start = sized(start, size) if name else suited(TrainConfig(), source, size=size).augment
    options = parse("views", _Views, arguments, default=_Views(augment=start))
    for note in source.notes:
        warnings.warn(note, ImageWarning, stacklevel=2)
    sheet = contact_sheet(source, options.augment, images=options.images, seed=options.seed)
    factor = max(1, _LEAST_SHOWN // options.augment.size)
    shown = sheet.resize((sheet.width * factor, sheet.height * factor), Image.Resampling.NEAREST)
    kind = Image.registered_extensions()[suffix]
    write_atomically(options.out, lambda file: shown.save(file, format=kind))
    show(options.out)
    return 0
