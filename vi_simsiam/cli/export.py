"""`vi-simsiam export`: a run as a folder of weights that others load."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vi_simsiam.cli.parsing import RunPath, parse
from vi_simsiam.errors import InputError, none_of

if TYPE_CHECKING:
    from vi_simsiam.engine.run import Run

# Embedded, hence always there: what an export is checked on where the run's own images are not.
_STAND_IN = "fashion-mini"


@dataclass(frozen=True)
class _Export:
    run: RunPath
    """A run folder."""
    format: str
    """torchvision, timm (the backbone), safetensors (the whole model) or onnx (a graph)."""
    out: Path | None = None
    """Folder to write; None for RUN/export/FORMAT."""
    overwrite: bool = False
    """Replace an earlier export in that folder."""
    data: str | None = None
    """The data set, where it has moved since training: what was written is checked on a few of its images."""
    data_root: Path | None = None
    """Where downloaded data sets are; None for the run's own."""


def export(arguments: list[str]) -> int:
    """Write a run's weights, settings and model card."""
    options = parse("export", _Export, arguments)

    from vi_simsiam.export import FORMATS, export_run

    if options.format not in FORMATS:
        raise none_of("format", options.format, FORMATS)
    folder = export_run(
        _open(options), options.format, options.out, overwrite=options.overwrite, report=print
    )
    print(f"written: {folder}")
    return 0


def _open(options: _Export) -> Run:
    """The run on the CPU, with its own images, or with the embedded ones where those are not on this machine."""
    from vi_simsiam.data.datasets import open_dataset
    from vi_simsiam.inference.encoder import load

    run = load(options.run, "cpu").run
    try:
        # Never downloaded: a few images are all that is needed.
        root = options.data_root or run.config.data_root
        splits = open_dataset(
            options.data or run.config.data, root=root, download=False, decode=run.config.decode
        )
    except InputError as reason:
        if options.data is not None:
            raise
        print(f"checked on {_STAND_IN}, not on the run's own images ({reason})")
        splits = open_dataset(_STAND_IN)
    return dataclasses.replace(run, splits=splits)
