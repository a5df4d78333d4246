"""`vi-simsiam embed|rank`: a trained run on your images.

`vi-simsiam info|bench`: the installation, and benchmarks.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from vi_simsiam.cli import BENCHMARKS
from vi_simsiam.cli.parsing import RunPath, SourceOptions, of_images, parse
from vi_simsiam.data_names import LISTING_KINDS, data_spec
from vi_simsiam.errors import InputError, none_of
from vi_simsiam.paths import user_path
from vi_simsiam.text import counted, show

if TYPE_CHECKING:
    from vi_simsiam.config import DecodeConfig
    from vi_simsiam.data.sources import ImageSource
    from vi_simsiam.inference.embed import Table
    from vi_simsiam.inference.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class _Images(SourceOptions):
    run: RunPath
    """A run folder, or that of several seeds, whose first run is compared with the others."""
    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """A folder (at any depth), an image, or a data set (its validation images, if any)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int | None = None
    """Threads that read images; None for a number that suits the device."""
    checkpoint: Literal["last", "best"] = "last"
    """Weights of the run: the last, or those with the best kNN accuracy during training."""
    views: int | None = None
    """Join this many random views of each image; None for the one un-augmented view."""
    seed: int = 0
    """Seed of the random views."""
    batch_size: int = 256
    """Images, or views, that the network takes at a time."""
    overwrite: bool = False
    """Replace existing files."""
    out: Path = Path()
    """Where to write."""


@dataclass(frozen=True, kw_only=True)
class _Embed(_Images):
    out: Path = Path("features.parquet")
    """File to write: path, embedding, kappa, label-free scores, neighbours of every image."""
    neighbours: int = 5
    """Nearest neighbours of each image by the cosine of embeddings; 0 for none."""
    reference: str | None = None
    """Measure distances to these images: a folder, or a data set's training images; None for those
    that are embedded."""


@dataclass(frozen=True, kw_only=True)
class _Rank(_Images):
    out: Path = Path("ranking")
    """Files to write, without suffix: OUT.csv, all images, and OUT.png, the two ends."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 16
    """Images at each end of the picture."""
    by: str = "kappa"
    """Score to rank by: kappa, or one that SimSiam has, too: embedding_norm, that of a layer
    (layer1_norm or stage1_norm), knn_distance, mahalanobis; of several seeds neighbour_agreement.
    """


@dataclass(frozen=True)
class _Info:
    json: bool = False
    """Print it as JSON, for programs."""
    check: bool = False
    """Also check each kernel and a training step against a reference; exit code 1 on an error."""


def embed(arguments: list[str]) -> int:
    """Write a run's representations of images as a Parquet file."""
    options = parse("embed", _Embed, arguments)
    if options.out.suffix.lower() != ".parquet":
        raise InputError(
            f"out: {options.out} must end in .parquet (pandas, Polars, DuckDB and R read it)"
        )
    if options.neighbours < 0:
        raise InputError(f"neighbours: {options.neighbours} must be at least 0")
    _check_free([options.out], options.overwrite)

    from vi_simsiam.experiments.seeds import finished
    from vi_simsiam.inference.embed import describe, with_agreement, write_parquet

    encoders = [_load(options, run) for run in finished(options.run)]
    encoder, references = encoders[0], None
    source = among = _source(options.images, options, encoder.config.decode, train=False)
    if options.reference is not None:
        among = _source(options.reference, options, encoder.config.decode, train=True)
    tables = _collect(options, encoders, source)
    if options.reference is not None:
        references = _collect(options, encoders, among)
    table = with_agreement(tables, references, encoder.device)
    about = describe(encoder, source, options.views, options.seed)
    about["neighbours_among"] = among.name
    about["seeds"] = [each.config.seed for each in encoders]
    write_parquet(
        table,
        options.out,
        neighbours=options.neighbours,
        reference=None if references is None else references[0],
        device=encoder.device,
        metadata=about,
        console=Console(stderr=True),
    )
    if table.concentration is None:
        print("concentration and uncertainty are empty: a SimSiam run predicts none")
    show(_written(options.out, table))
    return 0


def rank(arguments: list[str]) -> int:
    """Write the most and the least certain images."""
    options = parse("rank", _Rank, arguments)
    if options.k < 1:
        raise InputError(f"k: {options.k} must be at least 1")
    out = options.out
    if out.suffix.lower() in (".csv", ".png"):
        out = out.with_suffix("")
    listing, picture = out.with_name(f"{out.name}.csv"), out.with_name(f"{out.name}.png")
    _check_free([listing, picture], options.overwrite)

    from vi_simsiam.experiments.seeds import finished
    from vi_simsiam.files import write_atomically
    from vi_simsiam.inference.embed import with_agreement
    from vi_simsiam.inference.label_free import AGREEMENT
    from vi_simsiam.inference.ranking import draw_ranking, rankable, score_values, write_ranking

    runs, by = finished(options.run), options.by
    encoder = _load(options, runs[0])
    source = _source(options.images, options, encoder.config.decode, train=False)
    accepted = rankable(encoder.model, several=len(runs) > 1)
    if by == "kappa" and by not in accepted:
        raise InputError(
            f"run: {options.run} is SimSiam, which predicts no concentration to rank by; "
            "vi-simsiam does, and --by knn_distance needs none"
        )
    if by == AGREEMENT and by not in accepted:
        raise InputError(
            f"by: {AGREEMENT} compares several seeds; {options.run} is one run, and not a folder "
            "of vi-simsiam train --seeds"
        )
    if by not in accepted:
        raise none_of("by", by, accepted)
    others = runs[1:] if by == AGREEMENT else []
    encoders = [encoder, *(_load(options, run) for run in others)]
    tables = _collect(options, encoders, source, embeddings=by != "kappa")
    table = with_agreement(tables, None, encoder.device)
    values = score_values(table, by, encoder.device)
    drawn = draw_ranking(table, by, values, encoder.model.dim, options.k)
    write_ranking(table, by, values, listing)
    write_atomically(picture, lambda file: drawn.save(file, format="PNG", optimize=True))
    show(_written(listing, table))
    show(f"written: {picture}")
    return 0


def _check_free(paths: list[Path], overwrite: bool) -> None:
    for path in paths:
        if path.is_dir():
            raise InputError(f"out: {path} is a folder, not a file")
        if not path.parent.is_dir():
            raise InputError(f"out: {path.parent} is no folder; make it first")
        if path.exists() and not overwrite:
            raise InputError(f"out: {path} exists; say --overwrite to replace it")


def _load(options: _Images, run: Path) -> Encoder:
    from vi_simsiam.inference.encoder import load

    return load(run, options.device, workers=options.workers, checkpoint=options.checkpoint)


def _collect(
    options: _Images, encoders: list[Encoder], source: ImageSource, *, embeddings: bool = True
) -> list[Table]:
    """Encode a source by each of the runs; the first shows progress and skipped images."""
    from vi_simsiam.inference.embed import collect

    settings = {name: getattr(options, name) for name in ("views", "seed", "batch_size")}
    settings |= {"folder": options.out.parent, "embeddings": embeddings}
    consoles = [Console(stderr=True), *[None] * (len(encoders) - 1)]
    return [
        collect(encoder, source, console=console, **settings)
        for encoder, console in zip(encoders, consoles, strict=True)
    ]


def _source(images: str, options: _Images, decode: DecodeConfig, *, train: bool) -> ImageSource:
    """Open a path if it exists, else a data set's training or, if it has any, validation images."""
    from vi_simsiam.data.datasets import ACCEPTED
    from vi_simsiam.inference.images import open_images

    kind = data_spec(images).partition(":")[0]
    if kind not in ("folders", *LISTING_KINDS) and user_path("images", images).exists():
        return open_images(images, decode)
    try:
        splits = options.open(images, decode)
    except InputError as error:
        raise of_images(error, images, f"an image, {ACCEPTED}") from None
    return splits.train if train or splits.val is None else splits.val


def _written(path: Path, table: Table) -> str:
    skipped = f", {len(table.skipped):,} skipped" if table.skipped else ""
    return f"written: {path} ({counted(len(table.indices), 'image')}{skipped})"


def info(arguments: list[str]) -> int:
    """Print versions, devices and backends."""
    options = parse("info", _Info, arguments)

    from vi_simsiam.info import facts, report

    def put(text: str, end: str = "\n") -> None:
        if not options.json:
            print(text, end=end, flush=True)  # a check may take long to compile, or end the process

    found = facts()
    put(report(found))
    checks = []
    if options.check:
        from vi_simsiam.self_check import check, planned, summary

        for name, prepare in planned(found["backends"]):
            put(f"{name:46} ", end="")
            checks.append(check(name, prepare))
            put(checks[-1].verdict())
        put(summary(checks))
        found["checks"] = [asdict(finding) for finding in checks]
    if options.json:
        print(json.dumps(found, indent=2))
    return int(any(finding.passed is False for finding in checks))


def bench(arguments: list[str]) -> int:
    """Run a benchmark."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(f"usage: vi-simsiam bench {'|'.join(BENCHMARKS)} [OPTIONS]\n")
        print("\n".join(f"  {name:12}{about}" for name, (_, about) in BENCHMARKS.items()))
        return 0
    if name not in BENCHMARKS:
        raise none_of("bench", name or "nothing", BENCHMARKS)
    benchmark: Any = importlib.import_module(f"vi_simsiam.benchmarks.{BENCHMARKS[name][0]}")
    outcome = benchmark.run(parse(f"bench {name}", benchmark.Options, rest))
    return outcome if isinstance(outcome, int) else 0
