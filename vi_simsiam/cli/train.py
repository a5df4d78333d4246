"""`vi-simsiam train`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vi_simsiam.cli.parsing import parse, said
from vi_simsiam.config import TrainConfig, policy, preset
from vi_simsiam.errors import InputError


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


def train(arguments: list[str]) -> int:
    """Train one run, or several."""
    options = parse("train", _Train, arguments, default=_Train(_starting_point(arguments)))
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


def _starting_point(arguments: list[str]) -> TrainConfig:
    """The configuration that the other options change: the saved one on --resume, else the preset's."""
    name, out, views = (said(arguments, option) for option in ("--preset", "--out", "--policy"))
    if "--resume" in arguments and name is None and out and (Path(out) / "config.json").is_file():
        from vi_simsiam.engine.run import read_config

        return read_config(Path(out))
    config = preset(name or "default")
    return config if views is None else dataclasses.replace(config, augment=policy(views))
