"""`vi-simsiam export|push-to-hub`: a run's weights for other tools and people."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vi_simsiam.cli.parsing import RunPath, parse
from vi_simsiam.errors import InputError
from vi_simsiam.text import show

if TYPE_CHECKING:
    from vi_simsiam.engine.run import Run

# Embedded, hence always available: an export is checked on it if the run's own images are gone.
_STAND_IN = "fashion-mini"


@dataclass(frozen=True, kw_only=True)
class _Exported:
    run: RunPath
    """A run folder."""
    checkpoint: Literal["last", "best"] = "last"
    """Weights of the run: the last, or those with the best kNN accuracy during training."""
    data: str | None = None
    """The data set, where it has moved since training; a few images check the export."""
    data_root: Path | None = None
    """Where downloaded data sets are; None for the run's own."""


@dataclass(frozen=True, kw_only=True)
class _Export(_Exported):
    format: str
    """torchvision, timm (the backbone), safetensors (the whole model) or onnx (a graph)."""
    out: Path | None = None
    """Folder to write; None for RUN/export/FORMAT."""
    overwrite: bool = False
    """Replace an earlier export in that folder."""


@dataclass(frozen=True, kw_only=True)
class _PushToHub(_Exported):
    repo_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO_ID")]
    """The repository on the Hugging Face Hub: USER/NAME, or NAME for the user of the token."""
    format: str = "safetensors"
    """safetensors (the whole model, for vi_simsiam.from_pretrained), timm, torchvision or onnx."""
    private: bool = False
    """Make the repository private."""


def export(arguments: list[str]) -> int:
    """Write a run's weights, settings and model card."""
    options = parse("export", _Export, arguments)

    from vi_simsiam.export import export_run

    run = _open(options)
    folder = export_run(run, options.format, options.out, overwrite=options.overwrite, report=show)
    show(f"written: {folder}")
    return 0


def push_to_hub(arguments: list[str]) -> int:
    """Write a run's weights, settings and model card to the Hugging Face Hub."""
    options = parse("push-to-hub", _PushToHub, arguments)

    from vi_simsiam.export import push_to_hub

    address = push_to_hub(
        _open(options),
        options.repo_id,
        format=options.format,
        private=options.private,
        report=show,
    )
    show(f"published: {address}")
    return 0


def _open(options: _Exported) -> Run:
    """Open the run on the CPU, with embedded images if its own are not on this machine."""
    from vi_simsiam.data.datasets import open_dataset
    from vi_simsiam.engine.origin import placed
    from vi_simsiam.inference.encoder import load

    run = load(options.run, "cpu", checkpoint=options.checkpoint).run
    try:  # nothing is downloaded: a few images are enough
        config = placed(run.path, run.config, data=options.data, data_root=options.data_root)
        splits = open_dataset(
            config.data, root=config.data_root, download=False, decode=config.decode
        )
    except InputError as reason:
        if options.data is not None or not run.config.decode.is_rgb:  # unlike the stand-in
            raise
        show(f"checked on {_STAND_IN}, not on the run's own images ({reason})")
        splits = open_dataset(_STAND_IN)
    return dataclasses.replace(run, splits=splits)
