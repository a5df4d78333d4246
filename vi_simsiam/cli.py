"""The command line: `vi-simsiam train|evaluate|knn|linear|figures|pack|views|info|bench`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar
from unittest import mock

import tyro
from rich.console import Console

from vi_simsiam.config import AugmentConfig, TrainConfig, policy, preset
from vi_simsiam.errors import InputError, UserError

_Options = TypeVar("_Options")

RunPath = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class _Train:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: str = "default"
    """Starting point of the configuration: default, demo or paper."""
    policy: str | None = None
    """Starting point of the augmentation: simsiam, multicrop, lightly-imagenette or none; None for the preset's."""
    out: Path | None = None
    """Run folder; None for runs/DATA-METHOD-NNN, the first number that is free."""
    resume: bool = False
    """Go on with the run in --out, whose configuration is then the starting point."""
    overwrite: bool = False
    """Replace the run in --out."""
    evaluate: bool = False
    """Evaluate the run when it is trained, as `vi-simsiam evaluate` does."""
    seeds: int | None = None
    """Train this many runs at once, each a process, with --seed and the seeds after it, into OUT/seed-N."""


@dataclass(frozen=True)
class _Evaluate:
    run: RunPath
    """A run folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int | None = None
    """Processes that read images; None for a number that suits the device."""
    data: str | None = None
    """The data set, where it has moved since training; None for the run's own."""
    data_root: Path | None = None
    """Where downloaded data sets are; None for the run's own."""
    cache_dir: Path | None = None
    """Where decoded images are kept; None for the run's own place."""


@dataclass(frozen=True)
class _Knn(_Evaluate):
    k: int = 20
    """Number of neighbours."""
    temperature: float = 0.1
    """Neighbours are weighted by exp(cosine / temperature)."""


@dataclass(frozen=True)
class _Linear(_Evaluate):
    preset: str = "default"
    """default, or paper (the paper's protocol with a held-out fifth of the training set)."""


@dataclass(frozen=True)
class _Figures(_Evaluate):
    pass


@dataclass(frozen=True)
class _Pack:
    images: Annotated[str, tyro.conf.Positional]
    """A folder of images, or a data set by name."""
    out: Path
    """File to write, such as mine.pack; validation images go to mine.val.pack. Train on it with --data pack:mine.pack."""
    shorter_side: int | None = None
    """Make larger images smaller, to this many pixels on the shorter side."""
    workers: int | None = None
    """Processes that decode; None for one a CPU core."""
    data_root: Path = Path("data")
    """Where downloaded data sets are kept or looked for."""
    offline: bool = False
    """Never download."""
    overwrite: bool = False
    """Replace the file where there is one."""


@dataclass(frozen=True)
class _Views:
    augment: Annotated[AugmentConfig, tyro.conf.arg(name="")]
    data: str = "fashion-mini"
    """A data set by name, folder:PATH or pack:FILE."""
    policy: str = "simsiam"
    """Starting point of the augmentation: simsiam, multicrop, lightly-imagenette or none."""
    out: Path = Path("views.png")
    """Picture to write: a row an image, the image first and then its views."""
    images: int = 8
    """Number of images."""
    seed: int = 0
    data_root: Path = Path("data")
    """Where downloaded data sets are kept or looked for."""
    offline: bool = False
    """Never download."""


@dataclass(frozen=True)
class _Info:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the input cannot be used, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    try:
        if given[0] not in _COMMANDS:
            raise InputError(f"command: {given[0]!r} is none of {', '.join(_COMMANDS)}")
        return _COMMANDS[given[0]][0](given[1:])
    except UserError as error:
        if str(error):
            print(f"vi-simsiam: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"vi-simsiam: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vi-simsiam: interrupted", file=sys.stderr)
        return 130


def _train(arguments: list[str]) -> int:
    options = _parse("train", _Train, arguments, default=_Train(_starting_point(arguments)))
    if options.resume and options.out is None:
        raise InputError("resume: say which run with --out")

    from vi_simsiam.engine.distributed import joined
    from vi_simsiam.engine.seeds import SEEDS, run_seeds
    from vi_simsiam.engine.trainer import Trainer

    if options.seeds is not None and options.out is None:
        raise InputError("seeds: say where with --out")
    if options.out is not None and (options.seeds is not None or (options.resume and (options.out / SEEDS).is_file())):
        return run_seeds(arguments, options.seeds, options.config.seed, options.out)

    with joined(options.config.device) as world:
        trainer = Trainer(options.config, options.out, resume=options.resume, overwrite=options.overwrite, world=world)
        folder = trainer.folder
        if world.is_main:
            ranks = "" if world.size == 1 else f" on {world.size} ranks"
            print(
                f"{options.config.method} on {options.config.data}: {len(trainer.loader.source):,} images, "
                f"{trainer.total_steps:,} steps, {trainer.device}{ranks}, loss by {trainer.backend}; run folder {folder}"
            )
        try:
            trainer.fit()
        except KeyboardInterrupt:
            if world.is_main:
                print(
                    f"vi-simsiam: interrupted, saved at step {trainer.saved_step}; "
                    f"go on with: vi-simsiam train --out {folder} --resume",
                    file=sys.stderr,
                )
            return 130
        if options.evaluate:
            from vi_simsiam.engine.run import load_run
            from vi_simsiam.evaluation.summary import evaluate_run

            try:
                evaluate_run(load_run(folder, device=str(trainer.device)), world)
            except InputError as error:  # trained all the same: data without labels, say
                if world.is_main:
                    print(f"not evaluated: {error}")
    return 0


def _evaluate(arguments: list[str]) -> int:
    options = _parse("evaluate", _Evaluate, arguments)

    from vi_simsiam.engine.distributed import joined
    from vi_simsiam.evaluation.summary import evaluate_run

    with joined(options.device) as world:
        evaluate_run(_open(options, str(world.device)), world)
    return 0


def _knn(arguments: list[str]) -> int:
    options = _parse("knn", _Knn, arguments)

    from vi_simsiam.evaluation.features import collect, labelled_splits
    from vi_simsiam.evaluation.knn import KnnConfig, evaluate_knn
    from vi_simsiam.evaluation.summary import summary_line

    config = KnnConfig(k=options.k, temperature=options.temperature)
    run = _open(options)
    images = len(labelled_splits(run)["train"])
    if config.k > images:  # known now, not after all features are computed
        raise InputError(f"k: {config.k} must be at most {images}, the number of training images")
    print(summary_line("kNN", evaluate_knn(collect(run), config)))
    return 0


def _linear(arguments: list[str]) -> int:
    options = _parse("linear", _Linear, arguments)

    from vi_simsiam.evaluation.features import collect
    from vi_simsiam.evaluation.linear import evaluate_linear, linear_preset
    from vi_simsiam.evaluation.summary import summary_line, summary_table

    config = linear_preset(options.preset)
    result = evaluate_linear(collect(_open(options)), config)
    Console().print(summary_table({"linear": result}))
    print(summary_line("linear", result))
    return 0


def _figures(arguments: list[str]) -> int:
    options = _parse("figures", _Figures, arguments)

    from vi_simsiam.evaluation.figures import draw_curves, draw_kappa

    for path in (draw_curves(options.run), draw_kappa(_open(options))):
        if path is not None:
            print(path)
    return 0


def _pack(arguments: list[str]) -> int:
    options = _parse("pack", _Pack, arguments)

    from vi_simsiam.data.cache import pack
    from vi_simsiam.data.datasets import open_dataset, validation_pack

    spec = f"folder:{options.images}" if Path(options.images).expanduser().is_dir() else options.images
    splits = open_dataset(spec, root=options.data_root, download=not options.offline)
    out = options.out.expanduser()
    parts = [(splits.train, out), *([] if splits.val is None else [(splits.val, validation_pack(out))])]
    taken = next((path for _, path in parts if path.exists()), None)
    if taken is not None and not options.overwrite:
        raise InputError(f"out: {taken} exists; say --overwrite to replace it")
    for source, path in parts:
        unreadable = pack(
            source, path, workers=options.workers, shorter_side=options.shorter_side, console=Console(soft_wrap=True)
        )
        for image in unreadable:
            print(f"left out: {image.path} ({image.reason})")
        print(f"written: {path} ({len(source) - len(unreadable):,} images, {path.stat().st_size / 1e6:,.1f} MB)")
    return 0


def _views(arguments: list[str]) -> int:
    start = policy(_said(arguments, "--policy") or "simsiam")
    options = _parse("views", _Views, arguments, default=_Views(start))

    from vi_simsiam.data.contact_sheet import contact_sheet
    from vi_simsiam.data.datasets import open_dataset

    if options.images < 1:
        raise InputError(f"images: {options.images} must be at least 1")
    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"out: {options.out} must end in .png, .jpg, .jpeg or .webp")
    source = open_dataset(options.data, root=options.data_root, download=not options.offline).train
    contact_sheet(source, options.augment, images=options.images, seed=options.seed).save(options.out)
    print(options.out)
    return 0


def _info(arguments: list[str]) -> int:
    _parse("info", _Info, arguments)

    from vi_simsiam.info import report

    print(report())
    return 0


def _bench(arguments: list[str]) -> int:
    import importlib

    benchmarks = {
        "loss": ("multiview_loss", "time the loss: eager, torch.compile and the fused backends"),
        "augment": ("augment", "views a second: ours, torchvision, lightly and kornia"),
        "step": ("step", "the training step by phase, against the network alone"),
        "train": ("train", "whole trainings: ours, plain and tuned PyTorch, lightly"),
        "compare": ("compare", "two result files case by case; exits 1 if anything became slower"),
        "accuracy": ("accuracy", "errors of the loss at large concentrations"),
        "report": ("report", "write the tables in Markdown files from the result files they name"),
    }
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: vi-simsiam bench {'|'.join(benchmarks)} [OPTIONS]\n")
        print("\n".join(f"  {name:10}{about}" for name, (_, about) in benchmarks.items()))
        return 0
    if not arguments or arguments[0] not in benchmarks:
        raise InputError(f"bench: {' '.join(arguments[:1]) or 'nothing'!r} is none of {', '.join(benchmarks)}")
    benchmark: Any = importlib.import_module(f"vi_simsiam.benchmarks.{benchmarks[arguments[0]][0]}")
    outcome = benchmark.run(_parse(f"bench {arguments[0]}", benchmark.Options, arguments[1:]))
    return outcome if isinstance(outcome, int) else 0


def _open(options: _Evaluate, device: str | None = None) -> Any:
    from vi_simsiam.engine.run import load_run

    return load_run(
        options.run,
        device=device or options.device,
        workers=options.workers,
        data=options.data,
        data_root=options.data_root,
        cache_dir=options.cache_dir,
    )


def _starting_point(arguments: list[str]) -> TrainConfig:
    """The configuration that the other options change: the saved one on --resume, else the preset's."""
    name, out, views = (_said(arguments, option) for option in ("--preset", "--out", "--policy"))
    if "--resume" in arguments and name is None and out and (Path(out) / "config.json").is_file():
        from vi_simsiam.engine.run import read_config

        return read_config(Path(out))
    config = preset(name or "default")
    return config if views is None else dataclasses.replace(config, augment=policy(views))


def _said(arguments: list[str], option: str) -> str | None:
    """The value that an option is given, if it is: known before tyro reads all the others."""
    value = None
    for name, following in zip(arguments, [*arguments[1:], ""], strict=True):
        given, _, attached = name.partition("=")
        if given == option:
            value = attached or following
    return value


def _parse(command: str, kind: type[_Options], arguments: list[str], default: _Options | None = None) -> _Options:
    """`arguments` as an instance of `kind`; what tyro has to say against them becomes one line."""
    said = io.StringIO()
    # One line takes a wide terminal: tyro would break a long path in two.
    wide = {} if {"-h", "--help"} & set(arguments) else {"COLUMNS": "10000"}
    try:
        with contextlib.redirect_stderr(said), mock.patch.dict(os.environ, wide):
            parsed: _Options = tyro.cli(
                kind,
                prog=f"vi-simsiam {command}",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes,),
                default=tyro.MISSING_NONPROP if default is None else default,
            )
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
        # A box: title, message, a rule, then advice.
        lines = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]
        message = " ".join(lines[: next((i for i, line in enumerate(lines) if set(line) <= set("─╰╯")), len(lines))])
        message = re.sub(r"^Error parsing \w+: ", "", message)
        raise InputError(f"{message} (see vi-simsiam {command} --help)") from None


def _usage() -> str:
    commands = "\n".join(f"  {name:10}{about}" for name, (_, about) in _COMMANDS.items())
    return f"usage: vi-simsiam COMMAND [OPTIONS]\n\n{commands}\n\nvi-simsiam COMMAND --help lists a command's options."


_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train SimSiam or VI-SimSiam into a run folder"),
    "evaluate": (_evaluate, "kNN, linear probe and figures of a run, with a summary"),
    "knn": (_knn, "k-nearest-neighbour accuracy of a run's frozen features"),
    "linear": (_linear, "linear-probe accuracy of a run's frozen features"),
    "figures": (_figures, "curves.png and kappa.png of a run"),
    "pack": (_pack, "decode images once into one file to train on"),
    "views": (_views, "a picture of some images and their random views"),
    "info": (_info, "versions, devices, and which backends are available"),
    "bench": (_bench, "benchmarks: bench loss|augment|step|train|compare|accuracy|report"),
}
