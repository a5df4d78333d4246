"""`vi-simsiam train`: one run, or several seeds."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vi_simsiam.cli.parsing import given, parse, with_folders
from vi_simsiam.config import (
    LEAST_SIZE,
    AugmentConfig,
    TrainConfig,
    policy,
    preset,
)
from vi_simsiam.errors import CollapsedError, InputError
from vi_simsiam.paths import user_path
from vi_simsiam.settings import read_settings, updated
from vi_simsiam.text import counted, one_line, show

if TYPE_CHECKING:
    from vi_simsiam.data.datasets import Splits

_HELP = """usage: vi-simsiam train [OPTIONS]

Trains SimSiam or VI-SimSiam into a run folder. Without options: VI-SimSiam on
the embedded images, on a CPU in a few minutes. Size, length and network suit
the images wherever you leave them open.

  vi-simsiam train --data photos/ --out runs/photos --evaluate
  vi-simsiam train --data imagenette --method simsiam --epochs 100

  --data DATA        a folder of images, a pack file, or fashion-mini (embedded),
                     cifar10, imagenette, imagewoof
  --out FOLDER       the run folder (default: runs/DATA-METHOD-NNN)
  --method METHOD    vi-simsiam (default) or simsiam
  --evaluate         evaluate the trained run; accuracies need class folders
  --size PIXELS      side of the random views
  --epochs N         length of the run
  --batch-size N     images in a batch
  --lr RATE          peak learning rate
  --images N         train on so many of the images
  --seed N           another seed is another run (default: 0)
  --device DEVICE    auto (the GPU if there is one), cpu, cuda or cuda:N
  --resume           go on with the run in --out; --resume auto starts it if need be
  --overwrite        replace the run in --out
  --preset NAME      fixed settings: demo (embedded images), paper (ImageNette,
                     multi-crop) or default (SimSiam's, at 224 pixels)
  --config FILE      settings from a run's config.json or a YAML file (epochs: 20)
  --quiet            print warnings and results only

vi-simsiam train --help-all lists all options, with their defaults."""

_MANY_EPOCHS = 10**9
COLLAPSED = 3
"""Exit code of a training that --stop-on has ended."""
_RESUME: dict[str, Literal[True, False, "auto"]] = {"never": False, "always": True, "auto": "auto"}
"""By the option's value: the Trainer's."""


@dataclass(frozen=True)
class _Train:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: str | None = None
    """Fixed settings: default (SimSiam's at 224 pixels), demo or paper; None to fit the images."""
    settings: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """Settings from a run's config.json or YAML; above the preset, below the options."""
    policy: str | None = None
    """simsiam, multicrop, lightly-imagenette or none; overrides --config, except for sizes."""
    out: Path | None = None
    """Run folder; None for runs/DATA-METHOD-NNN, the first number that is free."""
    resume: Literal["never", "always", "auto"] = "never"
    """Go on with the run in --out and its settings; --data may name a copy of its images. auto
    starts the run where there is none, so that a job can be repeated as it is; --preset and
    --policy count at the start only. --resume alone is --resume always."""
    overwrite: bool = False
    """Replace the run in --out."""
    evaluate: bool = False
    """Evaluate the run when it is trained, as `vi-simsiam evaluate` does."""
    seeds: int | None = None
    """Train this many runs at once, each a process, from --seed on, into OUT/seed-N."""
    quiet: bool = False
    """Print warnings and results only."""


def train(arguments: list[str]) -> int:
    """Train one run, or several."""
    if {"-h", "--help"} & set(arguments):
        print(_HELP)
        return 0
    if "--help-all" in arguments:
        parse("train", _Train, ["--help"], default=_Train(TrainConfig()))
        return 0
    arguments = with_folders(_with_resume_value(arguments))
    config, settings, fitted = _starting_point(arguments)
    if fitted:  # once the images are known; until then no option may contradict
        augment = dataclasses.replace(config.augment, local_size=LEAST_SIZE)
        config = dataclasses.replace(config, epochs=_MANY_EPOCHS, augment=augment)
    options = parse("train", _Train, arguments, default=_Train(updated(config, settings)))
    out, resume = options.out, _RESUME[options.resume]
    if resume and out is None:
        raise InputError("resume: say which run with --out")

    from vi_simsiam.cli.evaluate import evaluate_run
    from vi_simsiam.data.subsets import labelled_splits
    from vi_simsiam.engine.distributed import joined
    from vi_simsiam.engine.processes import INTERRUPTED
    from vi_simsiam.engine.run import check_folder, load_run, open_splits
    from vi_simsiam.engine.train import Trainer
    from vi_simsiam.experiments.seeds import SEEDS, run_seeds

    if options.seeds is not None and out is None:
        raise InputError("seeds: say where with --out")
    if out is not None and (options.seeds is not None or (resume and (out / SEEDS).is_file())):
        return run_seeds(arguments, options.seeds, options.config.seed, out, resume=resume)

    going_on = False
    with joined(options.config.device) as world:
        report = show if world.is_main and not options.quiet else lambda line: None
        if out is not None:  # before anything is downloaded
            going_on = check_folder(out, resume=resume, overwrite=options.overwrite)
        with world.main_first():  # the main process downloads the images
            splits = open_splits(options.config, run=out if going_on else None)
        config, chosen, unlabelled = options.config, "", ""
        if fitted:
            config, chosen = _fitted(arguments, settings, config, splits, world.size)
        if options.evaluate:
            try:
                labelled_splits(splits)
            except InputError as error:
                unlabelled = f"no accuracies at the end: {error}"
        trainer = Trainer(
            config,
            out,
            resume=resume,
            overwrite=options.overwrite,
            world=world,
            splits=splits,
            quiet=options.quiet,
        )
        for line in filter(None, (chosen, unlabelled)):  # after the last possible refusal
            report(line)
        folder = trainer.folder
        images = counted(len(trainer.loader.source), "image")
        ranks = "" if world.size == 1 else f" on {world.size} ranks"
        report(
            f"{config.method} on {trainer.config.data}: {images}, "
            f"{counted(trainer.total_steps, 'step')}, {trainer.device}{ranks}, "
            f"loss by {trainer.backend}; run folder {folder}"
        )
        if trainer.step == trainer.total_steps:
            report("already at its last step: nothing is left to train")
        try:
            trainer.fit()
        except KeyboardInterrupt:
            if world.is_main:
                line = (
                    f"vi-simsiam: interrupted, saved at step {trainer.saver.step}; "
                    f"go on with: vi-simsiam train --out {shlex.quote(str(folder))} --resume"
                )
                print(one_line(line), file=sys.stderr)
            return INTERRUPTED
        except CollapsedError as error:
            if world.is_main:
                print(one_line(f"vi-simsiam: {error}"), file=sys.stderr)
            return COLLAPSED
        if options.evaluate:
            try:
                here = trainer.config
                run = load_run(
                    folder,
                    device=str(trainer.device),
                    data=here.data,
                    data_root=here.data_root,
                    cache_dir=here.cache_dir,
                )
                evaluate_run(run, world, quiet=options.quiet)
            except InputError as error:  # the training itself has succeeded
                if not unlabelled:
                    report(f"not evaluated: {error}")
    return 0


def _with_resume_value(arguments: list[str]) -> list[str]:
    """Put "always" behind a --resume without a value."""
    words: list[str] = []
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        alone = word == "--resume" and (following or "-").startswith("-")
        words += [word, "always"] if alone else [word]
    return words


def _starting_point(arguments: list[str]) -> tuple[TrainConfig, dict[str, Any], bool]:
    """Read the saved configuration on --resume, else that of preset and --policy.

    Also return the settings of --config, before which --policy goes except for the sizes, and True
    if settings that are not given are fitted to the images.
    """
    from vi_simsiam.engine.checkpoint import checkpoints
    from vi_simsiam.engine.origin import check_weights, placed
    from vi_simsiam.engine.run import CONFIG, read_config

    name, out, views, file, data, root = (
        given(arguments, option)
        for option in ("--preset", "--out", "--policy", "--config", "--data", "--data-root")
    )
    named: dict[str, Any] = {"data": data, "data_root": None if root is None else Path(root)}
    resume = given(arguments, "--resume") or "never"
    saved = None if out is None else user_path("out", out)
    if resume == "always" and name is None and saved and (saved / CONFIG).is_file():
        for option, value in (("config", file), ("policy", views)):
            if value is not None:
                raise InputError(
                    f"{option}, resume: only one of them can be given; "
                    "a run goes on with its own settings"
                )
        config = read_config(saved)
        if not checkpoints(saved):  # it begins anew
            check_weights(saved, config)
        return placed(saved, config, **named), {}, False
    config, settings = preset(name or "default"), _settings(arguments, named)
    if views is not None:
        config = dataclasses.replace(config, augment=policy(views))
        replaced = set(vars(config.augment)) - {"size", "local_size"}
        settings = {key: value for key, value in settings.items() if key not in replaced}
    if resume == "auto" and saved and checkpoints(saved):
        # Places in the user's file are named as those in the command are.
        places = {key: settings[key] for key in named if named[key] is None and key in settings}
        named |= {key: getattr(updated(config, places), key) for key in places}
        return placed(saved, read_config(saved), **named), settings, False
    return config, settings, name is None


def _settings(arguments: list[str], named: dict[str, Any]) -> dict[str, Any]:
    """The settings of --config; in a run's config.json, places that may be used.

    Args:
        arguments: of the command.
        named: the places of images that they name, as for `placed`.

    Raises:
        InputError: the run is from elsewhere, and what it names is not named by the user.
    """
    from vi_simsiam.engine.origin import check_code, check_weights, placed
    from vi_simsiam.engine.run import CONFIG

    if (file := given(arguments, "--config")) is None:
        return {}
    settings = read_settings(Path(file))
    if Path(file).name != CONFIG:
        return settings
    run = user_path("config", file).parent
    images = ("data", "data_root", "cache_dir")
    named_there = (*images, "init", "backbone")
    config = updated(
        TrainConfig(), {name: settings[name] for name in named_there if name in settings}
    )
    again = {name for name in named_there if given(arguments, _option(name)) is not None}
    check_weights(run, config, again)
    if "backbone" not in again:
        check_code(run, config)
    usable = placed(run, config, **named).to_dict()
    return settings | {name: usable[name] for name in images}


def _fitted(
    arguments: list[str],
    settings: dict[str, Any],
    config: TrainConfig,
    splits: Splits,
    ranks: int,
) -> tuple[TrainConfig, str]:
    """Fit the settings that are not given to the images; also return a line that names them."""
    from vi_simsiam.data.decoding import median_side
    from vi_simsiam.data.defaults import FITTED, suited

    images = counted(len(splits.train), "image")
    if len(splits.train) < 2:
        found = f"{splits.name} has {images}; training needs at least 2"
        raise InputError("; ".join((f"data: {found}", *splits.train.notes)))
    fixed = {
        name for name in FITTED if name in settings or given(arguments, _option(name)) is not None
    }
    named_policy = given(arguments, "--policy")
    views = None if named_policy is None else policy(named_policy)
    if views is not None:
        fixed |= {"crop_scale", "blur_prob"}
        if views.size != AugmentConfig.size:
            fixed.add("size")
    config = suited(
        config,
        splits.train,
        views=views,
        size=config.augment.size if "size" in fixed else None,
        epochs=config.epochs if "epochs" in fixed else None,
        ranks=ranks,
    )
    default = _Train(updated(config, settings))
    config = parse("train", _Train, arguments, default=default).config
    if config.augment.local_views == 0:
        fixed.add("local_size")
    values = {**vars(config), **vars(config.augment), **vars(config.model)}
    chosen = [f"{_option(name)} {_words(values[name])}" for name in FITTED if name not in fixed]
    if not chosen:
        return config, ""
    side = median_side(splits.train)
    pixels = f" of {side} pixels" if side else ""
    named = given(arguments, "--data") or "data" in settings
    embedded = "" if named else ", the embedded images"
    line = f"settings that suit {splits.name}{embedded} ({images}{pixels}): {' '.join(chosen)}"
    return config, line


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
