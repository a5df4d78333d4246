"""`vi-simsiam fit-kappa`: a mean direction and a concentration for a finished encoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from vi_simsiam.cli.parsing import parse
from vi_simsiam.config import ModelConfig, TrainConfig
from vi_simsiam.text import show


@dataclass(frozen=True, kw_only=True)
class _FitKappa:
    encoder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")]
    """A run folder, or a backbone by name as for `train --backbone`."""
    data: str
    """The images: a folder, file or data set; several folders are 'folders:["a", "b"]'."""
    out: Path
    """The run folder to write."""
    pretrained: bool = False
    """The weights that the library of a named backbone publishes for it."""
    init: Path | None = None
    """Weights of a named backbone, as for `train --init`."""
    size: int | None = None
    """Side of the views in pixels; None for the run's, or one that suits."""
    images: int | None = None
    """Use this many of the images; None for all of them."""
    views: int = 8
    """Random views of each image whose features are computed."""
    epochs: int = 30
    """Passes over the features."""
    seed: int = 0
    """Seed of the views, of the images held out, and of the fitted layers."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int | None = None
    """Processes that read images; None for a number that suits the device."""
    data_root: Path = Path("data")
    """Where downloaded data sets are kept or looked for."""
    offline: bool = False
    """Never download."""
    cache_dir: Path | None = None
    """Folder of decoded images; None for the user's cache folder."""
    overwrite: bool = False
    """Replace the run in --out."""


def fit_kappa(arguments: list[str]) -> int:
    """Fit a mean direction and a concentration to a frozen encoder."""
    options = parse("fit-kappa", _FitKappa, arguments)

    from vi_simsiam.fitting import fit_concentration

    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in fields}
    del given["epochs"]
    config = TrainConfig(**given, model=ModelConfig(pretrained=options.pretrained))
    fitted = fit_concentration(
        options.encoder,
        options.data,
        out=options.out,
        config=config,
        size=options.size,
        views=options.views,
        epochs=options.epochs,
        overwrite=options.overwrite,
        console=Console(soft_wrap=True),
    )
    found = fitted.calibration
    show(
        f"calibration on views of images held out: expected cosine {found['expected']:.3f}, "
        f"observed {found['observed']:.3f}, mean error {found['error']:.3f}"
    )
    show(f"written: {options.out}; vi-simsiam rank {options.out} IMAGES ranks images by kappa")
    return 0
