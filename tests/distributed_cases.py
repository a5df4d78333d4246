"""Cases of test_distributed.py, each run by several ranks, and their start."""

from __future__ import annotations

import io
import multiprocessing
import os
import queue
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from vi_simsiam import models
from vi_simsiam.config import TrainConfig
from vi_simsiam.engine import train
from vi_simsiam.engine.distributed import PeerError, World, joined
from vi_simsiam.engine.network import wrap
from vi_simsiam.errors import ImageWarning, InputError
from vi_simsiam.models import SimSiam, build_model

Case = Callable[..., Any]


class Outcome(NamedTuple):
    value: Any
    """The result of the case."""
    error: str | None
    """Its error's type, or None."""
    message: str
    """Its error's message, or the reason that a PeerError keeps."""
    seconds: float
    """From the moment that the rank began to the end."""


def run_ranks(case: Case, size: int, *arguments: object, timeout: float = 30.0) -> list[Outcome]:
    """Run `case(world, *arguments)` in `size` joined processes; returns the outcomes in rank order.

    A rank that does not end within a minute fails the test.
    """
    # A forked rank has imported torch already.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    outcomes, all_ended = context.Queue(), context.Event()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(
            target=_rank,
            args=(case, rank, size, port, timeout, arguments, outcomes, all_ended),
            daemon=True,
        )
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    found: dict[int, Outcome] = {}
    try:
        while len(found) < size:
            rank, outcome = outcomes.get(timeout=60)
            found[rank] = outcome
    except queue.Empty:
        raise AssertionError(f"only ranks {sorted(found)} ended: {found}") from None
    finally:
        all_ended.set()
        for process in ranks:
            process.join(5)
            process.kill()
    return [found[rank] for rank in range(size)]


def _rank(
    case: Case,
    rank: int,
    size: int,
    port: int,
    timeout: float,
    arguments: tuple[object, ...],
    outcomes: Any,
    all_ended: Any,
) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    start = time.monotonic()
    try:
        with joined("cpu", timeout=timeout) as world:
            value = case(world, *arguments)
        outcome = Outcome(value, None, "", time.monotonic() - start)
    except Exception as error:
        message = error.reason if isinstance(error, PeerError) else str(error)
        outcome = Outcome(None, type(error).__name__, message, time.monotonic() - start)
    outcomes.put((rank, outcome))
    if rank == 0 and outcome.error:
        # Without a launcher rank 0 holds the store, where the others read of the failure.
        all_ended.wait(5)


def collectives(world: World, file: Path) -> dict[str, Any]:
    """All collectives, with parts that differ between the ranks."""
    n = (3, 0, 1)[world.rank]
    with warnings.catch_warnings(record=True) as warned:
        warnings.warn("an image", ImageWarning, stacklevel=1)
    rows = torch.arange(n * 4, dtype=torch.float32).view(n, 2, 2) + 100 * world.rank
    return {
        "place": (world.rank, world.size, world.is_main, world.console().quiet, str(world.device)),
        "rows": world.gather_rows(rows).tolist(),
        "half": world.gather_rows(rows.to(torch.bfloat16)).dtype == torch.bfloat16,
        "labels": world.gather_rows(torch.full((n,), world.rank)).tolist(),
        "nothing": list(world.gather_rows(torch.empty(0, 5)).shape),
        "mean": world.all_mean(torch.tensor([1.0, 10.0]) * world.rank).tolist(),
        "infected": world.all_mean(torch.tensor(float("nan") if world.rank == 1 else 1.0))
        .isnan()
        .item(),
        "any": [world.any_rank(world.rank == 2), world.any_rank(False)],
        "broadcast": world.broadcast_object({"folder": f"runs/{world.rank}"}),
        "shares": list(world.share(10)),
        "warned": len(warned),
        "running statistics": running_statistics(world),
        "prepared": rank_0_prepares(world, file),
    }


def agreeing(world: World, pairs: list[list[Any]]) -> list[str]:
    """The error for each pair of values of the two ranks, or "agreed"; "workers" may differ."""
    found = []
    for values in pairs:
        try:
            world.agree("configuration", values[world.rank], ignore=("workers",))
            found.append("agreed")
        except InputError as error:
            found.append(str(error))
    return found


def uneven_rows(world: World) -> None:
    world.gather_rows(torch.zeros(2, 3 + world.rank))


def fails_in_setup(world: World, failing: int, waits: str) -> None:
    """One rank fails while the others wait at another place."""
    with world.together():
        if world.rank == failing:
            time.sleep(0.2)
            raise FileNotFoundError("no such folder: /data\nand more")
        if waits == "agree":
            world.agree("images", 10)
        elif waits == "main_first":
            with world.main_first():
                pass


def all_fail(world: World) -> None:
    with world.together():
        world.agree("images", 10 + world.rank)


def rank_0_prepares(world: World, file: Path) -> str:
    with world.main_first():
        if world.is_main:
            time.sleep(0.5)
            file.write_text("the cache")
        return file.read_text()


def leaves_in_training(world: World) -> None:
    """Rank 1 fails on its own between two steps; rank 0 is at a collective by then."""
    world.all_mean(torch.zeros(()))
    if world.rank == 1:
        raise ValueError("the disk is full")
    world.all_mean(torch.zeros(()))


def stalls(world: World, where: str) -> None:
    """Rank 1 does not come to a collective within the time."""
    world.all_mean(torch.zeros(()))
    if world.rank == 1:
        time.sleep(3)
    if where == "collective":
        world.all_mean(torch.zeros(()))
    else:
        world.exchange(None)


def without_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm by GroupNorm or LayerNorm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(8, child.num_features))
        elif isinstance(child, nn.BatchNorm1d):
            setattr(module, name, nn.LayerNorm(child.num_features, elementwise_affine=child.affine))
        else:
            without_batch_norm(child)


def running_statistics(world: World) -> list[float]:
    """BatchNorm's running mean after a step on images that differ between the ranks."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    network = wrap(model, world)
    network(torch.rand(4, 2) + 10 * world.rank).sum().backward()
    network(torch.rand(4, 2) + 10 * world.rank).sum().backward()
    return model[1].running_mean.tolist()


def real_run(
    world: World, config: TrainConfig, folder: Path
) -> tuple[str, dict[str, NDArray[Any]]]:
    """A whole run with a network without BatchNorm; returns the printed lines and the weights.

    Rank 1 begins with other weights, which rank 0's replace.
    """

    def build(config: TrainConfig) -> SimSiam:
        model = build_model(config)
        without_batch_norm(model)
        with torch.no_grad():
            for weights in model.parameters():
                weights += world.rank
        return model

    def backbone(*given: object, **options: object) -> tuple[nn.Module, int]:
        convolution = nn.Conv2d(3, 8, 3, stride=2)
        pool = nn.AdaptiveAvgPool2d(1)
        return nn.Sequential(convolution, nn.GroupNorm(2, 8), nn.ReLU(), pool, nn.Flatten()), 8

    console = Console(file=io.StringIO(), width=200)
    plain = mock.patch.object(models, "build_backbone", backbone)
    with plain, mock.patch.object(train, "build_model", build):
        trainer = train.Trainer(config, folder, console=console, world=world)
        trainer.fit()
    weights = {name: value.numpy() for name, value in trainer.model.state_dict().items()}
    return console.file.getvalue(), weights  # type: ignore[attr-defined]
