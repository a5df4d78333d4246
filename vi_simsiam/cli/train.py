"""`vi-simsiam train`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vi_simsiam.cli.config_file import read_settings, updated
from vi_simsiam.cli.parsing import parse, said
from vi_simsiam.config import LEAST_SIZE, AugmentConfig, TrainConfig, policy, preset
from vi_simsiam.errors import InputError
from vi_simsiam.paths import user_path
from vi_simsiam.text import counted

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
  --resume           go on with the run in --out
  --overwrite        replace the run in --out
  --preset NAME      fixed settings: demo (embedded images), paper (ImageNette,
                     multi-crop) or default (SimSiam's, at 224 pixels)
  --config FILE      settings from a run's config.json or a YAML file (epochs: 20)
  --quiet            print warnings and results only

vi-simsiam train --help-all lists all options, with their defaults."""


_MANY_EPOCHS = 10**9


@dataclass(frozen=True)
class _Train:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: str | None = None
    """Fixed settings to start from: default (SimSiam's at 224 pixels), demo or paper; None for those that suit the images."""
    settings: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """Settings from a run's config.json or a YAML file; options go before them, and they before the preset."""
    policy: str | None = None
    """Starting point of the augmentation: simsiam, multicrop, lightly-imagenette or none; None for the preset's, or what
    suits the images. It goes before --config, but for the sizes."""
    out: Path | None = None
    """Run folder; None for runs/DATA-METHOD-NNN, the first number that is free."""
    resume: bool = False
    """Go on with the run in --out, whose configuration is then the starting point; --data may name a copy of its images."""
    overwrite: bool = False
    """Replace the run in --out."""
    evaluate: bool = False
    """Evaluate the run when it is trained, as `vi-simsiam evaluate` does."""
    seeds: int | None = None
    """Train this many runs at once, each a process, with --seed and the seeds after it, into OUT/seed-N."""
    quiet: bool = False
    """Print warnings and results only."""


@dataclass(frozen=True)
class _Start:
    """The starting point that the options change."""

    config: TrainConfig
    settings: dict[str, Any]
    """Those of --config."""
    views: AugmentConfig | None
    """Those of --policy."""
    open: bool
    """Whether what is not said is to suit the images."""

    @property
    def default(self) -> _Train:
        """Defaults for the first reading of the options; with `open`, loose enough that no option contradicts them."""
        config = self.config
        if self.open:
            augment = dataclasses.replace(config.augment, local_size=LEAST_SIZE)
            config = dataclasses.replace(config, epochs=_MANY_EPOCHS, augment=augment)
        return _Train(updated(config, self.settings))


def train(arguments: list[str]) -> int:
    """Train one run, or several."""
    if {"-h", "--help"} & set(arguments):
        print(_HELP)
        return 0
    if "--help-all" in arguments:
        parse("train", _Train, ["--help"], default=_Train(TrainConfig()))
        return 0
    start = _starting_point(arguments)
    options = parse("train", _Train, arguments, default=start.default)
    if options.resume and options.out is None:
        raise InputError("resume: say which run with --out")

    from vi_simsiam.engine.distributed import joined
    from vi_simsiam.engine.run import check_folder, load_run, open_splits
    from vi_simsiam.engine.trainer import Trainer
    from vi_simsiam.evaluation.features import labelled_splits
    from vi_simsiam.evaluation.summary import evaluate_run
    from vi_simsiam.experiments.seeds import SEEDS, run_seeds

    if options.seeds is not None and options.out is None:
        raise InputError("seeds: say where with --out")
    if options.out is not None and (
        options.seeds is not None or (options.resume and (options.out / SEEDS).is_file())
    ):
        return run_seeds(arguments, options.seeds, options.config.seed, options.out)

    with joined(options.config.device) as world:
        report = print if world.is_main and not options.quiet else lambda line: None
        if options.out is not None:  # known before anything is downloaded
            check_folder(options.out, resume=options.resume, overwrite=options.overwrite)
        with world.main_first():  # it downloads the images if that is to be done
            splits = open_splits(options.config, run=options.out if options.resume else None)
        chosen = ""
        if start.open:
            config, chosen = _suited(arguments, start, options.config, splits, world.size)
            options = dataclasses.replace(options, config=config)
        unlabelled = None
        if options.evaluate:
            try:
                labelled_splits(splits)
            except InputError as error:
                unlabelled = f"no accuracies at the end: {error}"
        trainer = Trainer(
            options.config,
            options.out,
            resume=options.resume,
            overwrite=options.overwrite,
            world=world,
            splits=splits,
            quiet=options.quiet,
        )
        for line in filter(None, (chosen, unlabelled)):  # once nothing is refused any more
            report(line)
        folder = trainer.folder
        ranks = "" if world.size == 1 else f" on {world.size} ranks"
        report(
            f"{options.config.method} on {trainer.config.data}: {counted(len(trainer.loader.source), 'image')}, "
            f"{counted(trainer.total_steps, 'step')}, {trainer.device}{ranks}, loss by {trainer.backend}; run folder {folder}"
        )
        if trainer.step == trainer.total_steps:
            report("already at its last step: nothing is left to train")
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
            try:
                evaluate_run(
                    load_run(folder, device=str(trainer.device)), world, quiet=options.quiet
                )
            except InputError as error:  # trained all the same
                if unlabelled is None:
                    report(f"not evaluated: {error}")
    return 0


def _starting_point(arguments: list[str]) -> _Start:
    """The saved configuration on --resume, else the preset's, with --config's settings and over them --policy's.

    Sizes in the file stay.
    """
    from vi_simsiam.engine.run import CONFIG, read_config

    name, out, views = (said(arguments, option) for option in ("--preset", "--out", "--policy"))
    file = said(arguments, "--config")
    saved = None if out is None else user_path("out", out)
    if (
        "--resume" in arguments
        and name is None
        and saved is not None
        and (saved / CONFIG).is_file()
    ):
        for option, given in (("config", file), ("policy", views)):
            if given is not None:
                raise InputError(
                    f"{option}, resume: only one of them can be said; a run goes on with its own settings"
                )
        return _Start(read_config(saved), {}, None, open=False)
    config = preset(name or "default")
    augment = None if views is None else policy(views)
    if augment is not None:
        config = dataclasses.replace(config, augment=augment)
    settings = {} if file is None else read_settings(Path(file))
    if augment is not None:
        replaced = {field.name for field in dataclasses.fields(augment)} - {"size", "local_size"}
        settings = {name: value for name, value in settings.items() if name not in replaced}
    return _Start(config, settings, augment, open=name is None)


def _suited(
    arguments: list[str], start: _Start, given: TrainConfig, splits: Splits, ranks: int
) -> tuple[TrainConfig, str]:
    """The configuration where what is not said suits the images, and a line that names what was chosen, if anything was."""
    from vi_simsiam.data.decoding import median_side
    from vi_simsiam.data.defaults import FITTED, suited
    from vi_simsiam.engine.run import CONFIG, read_config

    if len(splits.train) < 2:
        raise InputError(
            f"data: {splits.name} has {counted(len(splits.train), 'image')}; training needs at least 2"
        )
    fixed = {
        name
        for name in FITTED
        if name in start.settings or said(arguments, _option(name)) is not None
    }
    if start.views is not None:
        fixed |= {"crop_scale", "blur_prob"}
        if start.views.size != AugmentConfig.size:
            fixed |= {"size"}
    frozen = given.frozen_run
    network = read_config(frozen) if frozen and (frozen / CONFIG).is_file() else None
    if network is not None and "size" not in fixed:
        given = dataclasses.replace(
            given, augment=dataclasses.replace(given.augment, size=network.augment.size)
        )
        fixed |= {"size"}
    config = suited(
        given,
        splits.train,
        views=start.views,
        size=given.augment.size if "size" in fixed else None,
        epochs=given.epochs if "epochs" in fixed else None,
        ranks=ranks,
    )
    if network is not None:  # its weights fit no other model
        views = dataclasses.replace(
            config.augment,
            local_views=network.augment.local_views,
            local_size=network.augment.local_size,
        )
        config = dataclasses.replace(config, model=network.model, augment=views)
        fixed |= {"stem", "dim"}
    options = parse("train", _Train, arguments, default=_Train(updated(config, start.settings)))
    values = dataclasses.asdict(options.config)
    values |= values["augment"] | values["model"]
    left = [
        name
        for name in FITTED
        if name not in fixed and (name != "local_size" or values["local_views"])
    ]
    chosen = " ".join(f"{_option(name)} {_words(values[name])}" for name in left)
    side = median_side(splits.train)
    images = (
        f"{counted(len(splits.train), 'image')} of {side} pixels"
        if side
        else counted(len(splits.train), "image")
    )
    if not left:
        return options.config, ""
    embedded = (
        "" if said(arguments, "--data") or "data" in start.settings else ", the embedded images"
    )
    return options.config, f"settings that suit {splits.name}{embedded} ({images}): {chosen}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
