"""`vi-simsiam clean`: copies, blank or unrelated images, and doubtful labels of a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from vi_simsiam.cli.parsing import SourceOptions, of_images, parse
from vi_simsiam.data_names import LISTING_KINDS, data_spec
from vi_simsiam.errors import InputError
from vi_simsiam.paths import user_path
from vi_simsiam.text import counted, show

if TYPE_CHECKING:
    from vi_simsiam.config import DecodeConfig
    from vi_simsiam.data.sources import ImageSource


@dataclass(frozen=True, kw_only=True)
class _Clean(SourceOptions):
    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """A folder or a data set; training and validation images are compared with each other."""
    encoder: Path
    """A run folder."""
    out: Path = Path("cleaning")
    """Folder to write: issues.csv, scores.csv, a picture for each kind, index.html."""
    similarity: float = 0.95
    """Correlation of two aligned thumbnails from which images are near duplicates."""
    checkpoint: Literal["last", "best"] = "last"
    """Weights of the run: the last, or those with the best kNN accuracy during training."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int | None = None
    """Threads that read images; None for a number that suits the device."""
    batch_size: int = 256
    """Images that the network takes at a time."""
    overwrite: bool = False
    """Replace earlier results."""


def clean(arguments: list[str]) -> int:
    """List copies, blank and unrelated images, and likely label errors; no image is changed."""
    options = parse("clean", _Clean, arguments)

    from vi_simsiam.cleaning.find import KINDS, examine
    from vi_simsiam.cleaning.report import ISSUES, PAGE, check_folder, write_findings
    from vi_simsiam.inference.encoder import load

    check_folder(options.out, options.overwrite)
    encoder = load(
        options.encoder, options.device, workers=options.workers, checkpoint=options.checkpoint
    )
    findings = examine(
        encoder,
        _parts(options, encoder.config.decode),
        options.out.parent,
        batch_size=options.batch_size,
        similarity=options.similarity,
        console=Console(stderr=True),
    )
    write_findings(findings, options.out, f"Problems of {options.images}")
    show(f"{counted(len(findings.where), 'image')} read; no image was changed")
    for kind in KINDS:
        issues = findings.of_kind(kind)
        worst = f"  {issues[0].path} ({issues[0].reason})" if issues else ""
        show(f"{kind:16}{len(issues):>8,}{worst}")
    show(f"written: {options.out / ISSUES}; open {options.out / PAGE}")
    return 0


def _parts(options: _Clean, decode: DecodeConfig) -> list[ImageSource]:
    """Training and validation images of a data set; every image of a folder without these."""
    from vi_simsiam.data.datasets import ACCEPTED
    from vi_simsiam.inference.images import open_images

    try:
        splits = options.open(options.images, decode)
    except InputError as error:
        raise of_images(error, options.images, ACCEPTED) from None
    kind = data_spec(options.images).partition(":")[0]
    if splits.val is None and splits.train.labels is None and kind not in LISTING_KINDS:
        path = user_path("images", options.images)
        if path.is_dir():
            return [open_images(path, decode)]
    return [part for part in (splits.train, splits.val) if part is not None]
