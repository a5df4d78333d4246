"""The model that a training begins with."""

from __future__ import annotations

import dataclasses
import re

import torch

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.checkpoint import load_last
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.run import CONFIG, read_config
from vi_simsiam.errors import InputError
from vi_simsiam.models import SimSiam, build_model

# The last layer of SimSiam's predictors, a part of that layer where the concentration is separate.
_APART = re.compile(r"^((?:local_)?predictor\.3)\.(weight|bias)$")


def initial_model(config: TrainConfig, world: World, *, fresh: bool) -> SimSiam:
    """The model of a run on its device, with the weights of the seed or of the frozen run.

    Args:
        config: of the run.
        world: the ranks that train together.
        fresh: load the weights that the run begins with; False if a checkpoint replaces them.

    Raises:
        InputError: the frozen run cannot be used.
    """
    # The weights of a run replace torchvision's.
    pretrained = fresh and config.model.pretrained and config.frozen_run is None
    parts = dataclasses.replace(config.model, pretrained=pretrained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(dataclasses.replace(config, model=parts)).to(world.device)
    if config.frozen_run is not None and fresh:
        _load_frozen(model, config)
    model.to(memory_format=torch.channels_last)
    if config.sync_batch_norm and not world.alone:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    return model


def _load_frozen(model: SimSiam, config: TrainConfig) -> None:
    """Load the weights of the SimSiam run `config.frozen_run` into `model`, built for `config`.

    Raises:
        InputError: no run there, a run of another method or model, or a damaged file.
    """
    path = config.frozen_run
    assert path is not None
    if not (path / CONFIG).is_file():
        raise InputError(f"frozen_run: {path} holds no run; it must be the folder of a SimSiam run")
    saved = read_config(path)
    if saved.method != "simsiam":
        raise InputError(
            f"frozen_run: {path} is a run of {saved.method}; it must be one of simsiam"
        )
    theirs, given = dataclasses.asdict(saved.model), dataclasses.asdict(config.model)
    others = [name for name in given if name != "pretrained" and theirs[name] != given[name]]
    if others:
        changes = "; ".join(f"{name}: {theirs[name]} -> {given[name]}" for name in others)
        raise InputError(f"frozen_run: the model of {path} is another one; {changes}")
    weights = {
        _APART.sub(r"\1.mean.\2", name): value
        for name, value in load_last(path).model.items()
        if not name.startswith("target.")  # the moving average of a run with ema
    }
    own = {name: value for name, value in model.state_dict().items() if ".concentration." in name}
    try:
        model.load_state_dict(own | weights)
    except RuntimeError as error:
        text = f"the checkpoint of {path} does not fit the model that {CONFIG} describes"
        raise InputError(f"frozen_run: {text}") from error
