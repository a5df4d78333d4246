"""The model that a training begins with, and the weights of its backbone at that time."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.checkpoint import Checkpoint, load_last
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.run import CONFIG, START
from vi_simsiam.errors import InputError
from vi_simsiam.models import SimSiam, build_model
from vi_simsiam.text import print_line
from vi_simsiam.weights import load_backbone, read_tensors


def initial_model(
    config: TrainConfig, world: World, console: Console | None, *, fresh: bool
) -> SimSiam:
    """The model of a run on its device, with the weights of the seed or of `init`.

    Args:
        config: of the run.
        world: the ranks that train together.
        console: destination of a line on the weights of `init`; None for no line.
        fresh: load the weights that the run begins with; False if a checkpoint replaces them.

    Raises:
        InputError: the weights of `init` cannot be used.
    """
    parts = dataclasses.replace(config.model, pretrained=fresh and config.model.pretrained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(dataclasses.replace(config, model=parts))
        if config.init is not None and fresh:
            line = _load_init(model, config.init)
            if console is not None:
                print_line(console, line)
        model.to(world.device)
    model.to(memory_format=torch.channels_last)
    if config.sync_batch_norm and not world.alone:
        # In place. timm's knows its layers that hold an activation, too.
        from timm.layers.norm_act import convert_sync_batchnorm

        convert_sync_batchnorm(model)
    return model


def starting_backbone(folder: Path, backbone: nn.Module) -> nn.Module | None:
    """A copy of a run's backbone with the weights that the run began with; None for random ones.

    Raises:
        InputError: their file is damaged or of another network.
    """
    path = folder / START
    if not path.is_file():
        return None
    copied = copy.deepcopy(backbone)
    Checkpoint.load(path).restore(copied)
    return copied


def save_start(folder: Path, config: TrainConfig, model: SimSiam) -> None:
    """Keep the backbone's weights at the start of a run, unless they are random.

    Raises:
        TrainingError: they could not be written.
    """
    if config.init is not None or config.model.pretrained:
        Checkpoint(0, 0.0, 1, model.backbone.state_dict()).save(folder / START)


def _load_init(model: SimSiam, path: Path) -> str:
    """Load the weights in a run folder or a file into the backbone; a line on how many fit."""
    if not path.is_dir():
        tensors = read_tensors(path)
    elif (path / CONFIG).is_file():
        saved = load_last(path).model.items()
        tensors = {name: value for name, value in saved if name.startswith("backbone.")}
    else:
        raise InputError(f"init: {path} holds no run (no {CONFIG} there)")
    line = load_backbone(model.backbone, tensors, str(path))
    if model.target is not None:  # the moving average begins with the model
        model.add_target()
    return line
