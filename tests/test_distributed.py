"""Several ranks: exchange, training as in one process, and no waiting for a failed rank."""

from __future__ import annotations

import io
import multiprocessing
import os
import queue
import socket
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from test_trainer import config, metrics
from torch import nn

from vi_simsiam import models
from vi_simsiam.config import AugmentConfig, TrainConfig
from vi_simsiam.engine import distributed, train
from vi_simsiam.engine import model as model_module
from vi_simsiam.engine.distributed import PeerError, World, joined
from vi_simsiam.engine.network import wrap
from vi_simsiam.errors import CollapsedError, ImageWarning, InputError, TrainingError
from vi_simsiam.models import SimSiam, build_model

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="needs torch built with gloo"
)


class Outcome(NamedTuple):
    value: Any
    error: str | None
    """The error's type, or None."""
    message: str
    """The error's message, or the reason that a PeerError keeps."""
    seconds: float


def run_ranks(
    case: Callable[..., Any], size: int, *arguments: object, timeout: float = 30.0
) -> list[Outcome]:
    """Run `case(world, *arguments)` in `size` joined processes; returns the outcomes in rank order.

    A rank that does not end within a minute fails the test.
    """
    context = multiprocessing.get_context("forkserver")  # torch is imported once, not by every rank
    context.set_forkserver_preload(["torch._dynamo", "vi_simsiam.engine.train"])
    outcomes, all_ended = context.Queue(), context.Event()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = []
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **address}
        given = (place, outcomes, all_ended, timeout, case, arguments)
        ranks.append(context.Process(target=_rank, args=given, daemon=True))
        ranks[-1].start()
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
    place: dict[str, str],
    outcomes: Any,
    all_ended: Any,
    timeout: float,
    case: Callable[..., Any],
    arguments: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(place)
    start = time.monotonic()
    value, name, message = None, None, ""
    try:
        with mock.patch.object(distributed, "TIMEOUT", timeout), joined("cpu") as world:
            value = case(world, *arguments)
    except Exception as error:
        name = type(error).__name__
        message = error.reason if isinstance(error, PeerError) else str(error)
    rank = int(place["RANK"])
    outcomes.put((rank, Outcome(value, name, message, time.monotonic() - start)))
    if rank == 0 and name is not None:
        # Without a launcher rank 0 holds the store, where the others read of the failure.
        all_ended.wait(5)


def values(outcomes: list[Outcome]) -> list[Any]:
    """The results of ranks that did not fail."""
    assert [outcome.message for outcome in outcomes] == [""] * len(outcomes)
    return [outcome.value for outcome in outcomes]


def collectives(world: World, file: Path) -> dict[str, Any]:
    """All collectives, with parts that differ between the ranks."""
    n = (3, 0, 1)[world.rank]
    with warnings.catch_warnings(record=True) as warned:
        warnings.warn("an image", ImageWarning, stacklevel=1)
    with world.main_first():
        if world.is_main:
            time.sleep(0.5)
            file.write_text("the cache")
        prepared = file.read_text()
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    network = wrap(model, world)
    for _ in range(2):
        network(torch.rand(4, 2) + 10 * world.rank).sum().backward()
    rows = torch.arange(n * 4, dtype=torch.float32).view(n, 2, 2) + 100 * world.rank
    infected = torch.tensor(float("nan") if world.rank == 1 else 1.0)
    return {
        "place": (world.rank, world.size, world.is_main, world.console().quiet, str(world.device)),
        "rows": world.gather_rows(rows).tolist(),
        "half": world.gather_rows(rows.to(torch.bfloat16)).dtype == torch.bfloat16,
        "labels": world.gather_rows(torch.full((n,), world.rank)).tolist(),
        "nothing": list(world.gather_rows(torch.empty(0, 5)).shape),
        "mean": world.all_mean(torch.tensor([1.0, 10.0]) * world.rank).tolist(),
        "infected": world.all_mean(infected).isnan().item(),
        "any": [world.any_rank(world.rank == 2), world.any_rank(False)],
        "exchanged": world.exchange({"rank": world.rank}),
        "shares": list(world.share(10)),
        "warned": len(warned),
        "running statistics": model[1].running_mean.tolist(),
        "prepared": prepared,
    }


def test_everything_that_ranks_exchange(tmp_path: Path) -> None:
    """Three ranks with 3, 0 and 1 rows."""
    rows = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]], [[200, 201], [202, 203]]]
    statistics = []
    for rank, found in enumerate(values(run_ranks(collectives, 3, tmp_path / "cache"))):
        assert found.pop("place") == (rank, 3, rank == 0, rank > 0, "cpu")
        assert found.pop("warned") == (rank == 0)
        assert found.pop("shares") == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]][rank]
        statistics.append(found.pop("running statistics"))
        assert found == {
            "rows": rows,
            "half": True,
            "labels": [0, 0, 0, 2],
            "nothing": [0, 5],
            "mean": [1.0, 10.0],
            "infected": True,
            "any": [True, False],
            "exchanged": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            "prepared": "the cache",
        }
    assert not np.allclose(statistics[0], statistics[1]), "each rank's own"


def real_run(
    world: World, config: TrainConfig, folder: Path
) -> tuple[str, dict[str, NDArray[Any]]]:
    """A whole run with a network without BatchNorm; returns the printed lines and the weights.

    Rank 1 begins with other weights, which rank 0's replace.
    """

    def build(config: TrainConfig) -> SimSiam:
        model = build_model(config)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm1d):
                    norm = nn.LayerNorm(child.num_features, elementwise_affine=child.affine)
                    setattr(parent, name, norm)
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
    with plain, mock.patch.object(model_module, "build_model", build):
        trainer = train.Trainer(config, folder, console=console, world=world)
        trainer.fit()
    weights = {name: value.numpy() for name, value in trainer.model.state_dict().items()}
    return console.file.getvalue(), weights  # type: ignore[attr-defined]


def test_the_trainer_on_two_ranks_is_the_trainer_on_one(image_folder: Path, tmp_path: Path) -> None:
    """Loss, norm of the gradient, learning rate and weights; rank 0 alone prints."""
    augment = AugmentConfig(size=12, local_views=2, local_size=8, blur_prob=0.0)
    settings = config(image_folder, epochs=2, log_every=1, lr=0.1, augment=augment)
    printed, expected = real_run(World(), settings, tmp_path / "one")
    first, second = values(run_ranks(real_run, 2, settings, tmp_path / "two"))
    assert first[0].count("epoch 1/2 ") == printed.count("epoch 1/2 ") == 1
    assert second[0] == ""
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == 10
    for name in ("step", "loss", "grad_norm", "lr"):
        numbers = [line[name] for line in one]
        assert [line[name] for line in two] == pytest.approx(numbers, rel=1e-5), name
    for name, value in expected.items():
        np.testing.assert_array_equal(first[1][name], second[1][name], err_msg=name)
        np.testing.assert_allclose(first[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def own_folder(world: World, config: TrainConfig, folder: Path) -> None:
    train.Trainer(config, folder / f"{world.rank}", resume="auto", world=world)


def test_ranks_go_on_from_one_checkpoint(image_folder: Path, tmp_path: Path) -> None:
    """As where each has a disk of its own: only rank 0's folder has the run."""
    settings = config(image_folder, epochs=1)
    trained = train.Trainer(settings, tmp_path / "0", console=Console(quiet=True))
    trained.fit()
    outcomes = run_ranks(own_folder, 2, settings, tmp_path)
    assert {outcome.error for outcome in outcomes} <= {"InputError", "PeerError"}
    messages = " ".join(outcome.message for outcome in outcomes)
    assert "checkpoint is 5 on rank 0 and None on rank 1" in messages


def collapsed_run(world: World, config: TrainConfig, folder: Path) -> tuple[int, float | None]:
    """The step at which a run ends that has collapsed from its start on, and its kNN accuracy."""

    def backbone(*given: object, **options: object) -> tuple[nn.Module, int]:
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), 12

    with mock.patch.object(models, "build_backbone", backbone):
        trainer = train.Trainer(config, folder, console=Console(quiet=True), world=world)
    with torch.no_grad():
        for weights in trainer.model.projector.parameters():
            weights.zero_()
    with pytest.raises(CollapsedError):
        trainer.fit()
    return trainer.step, trainer.knn


def test_ranks_end_at_the_same_step_and_share_the_accuracy(
    image_folder: Path, tmp_path: Path
) -> None:
    settings = config(image_folder, stop_on="collapse", log_every=5, knn_every=1)
    first, second = values(run_ranks(collapsed_run, 2, settings, tmp_path / "run"))
    assert first == second == (5, metrics(tmp_path / "run")[-1]["knn"])


def agreeing(world: World, pairs: list[list[Any]]) -> list[str]:
    """The error for each pair of values of the two ranks, or "agreed"; "workers" may differ."""
    found = []
    for pair in pairs:
        try:
            world.agree("configuration", pair[world.rank], ignore=("workers",))
            found.append("agreed")
        except InputError as error:
            found.append(str(error))
    return found


def test_differences_between_ranks_are_named() -> None:
    pairs = {
        "lr is 0.1 on rank 0 and 0.2 on": [{"lr": 0.1, "workers": 1}, {"lr": 0.2, "workers": 2}],
        "augment.crop.size is 32 on rank 0 and 28 on rank 1; it must be the same": [
            {"augment": {"crop": {"size": size}}} for size in (32, 28)
        ],
        "configuration is 100 on rank 0 and 99 on rank 1": [100, 99],
        "agreed": [{"lr": 1, "workers": 1}, {"lr": 1, "workers": 2}],
    }
    for rank in values(run_ranks(agreeing, 2, list(pairs.values()))):
        for message, found in zip(pairs, rank, strict=True):
            assert message in found


def all_fail(world: World) -> None:
    with world.together():
        world.agree("images", 10 + world.rank)


def test_of_ranks_that_fail_alike_one_reports() -> None:
    outcomes = run_ranks(all_fail, 2)
    assert sorted(str(outcome.error) for outcome in outcomes) == ["InputError", "PeerError"]
    message = "images is 10 on rank 0 and 11 on rank 1"
    assert any(message in outcome.message for outcome in outcomes)


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


@pytest.mark.parametrize(
    ("failing", "waits"), [(0, "end"), (1, "end"), (1, "agree"), (0, "main_first")]
)
def test_one_failing_rank_ends_all_at_once(failing: int, waits: str) -> None:
    """The rank that failed has the error, wherever the others wait; they only end."""
    outcomes = run_ranks(fails_in_setup, 3, failing, waits)
    own = ("FileNotFoundError", "no such folder: /data\nand more")
    others = ("PeerError", f"rank {failing}: no such folder: /data")
    for rank, outcome in enumerate(outcomes):
        assert outcome.seconds < 15, "the others did not wait for the timeout"
        assert (outcome.error, outcome.message) == (own if rank == failing else others)


def leaves_in_training(world: World) -> None:
    """Rank 1 fails on its own between two steps; rank 0 is at a collective by then."""
    world.all_mean(torch.zeros(()))
    if world.rank == 1:
        raise ValueError("the disk is full")
    world.all_mean(torch.zeros(()))


def test_a_rank_that_fails_in_training_releases_those_at_a_collective() -> None:
    first, second = run_ranks(leaves_in_training, 2)
    assert (second.error, second.message) == ("ValueError", "the disk is full")
    assert first.error == "PeerError"
    assert first.seconds < 15


def stalls(world: World, where: str) -> None:
    """Rank 1 does not come to a collective within the time."""
    world.all_mean(torch.zeros(()))
    if world.rank == 1:
        time.sleep(4)
    if where == "collective":
        world.all_mean(torch.zeros(()))
    else:
        world.exchange(None)


def test_a_rank_that_stalls_is_an_error_after_the_timeout() -> None:
    messages = {
        "collective": "ranks: contact with another rank was lost",
        "store": "ranks: no answer from [1] within 2 s",
    }
    with ThreadPoolExecutor() as pool:
        runs = pool.map(lambda where: run_ranks(stalls, 2, where, timeout=2.0), messages)
        for (first, _), message in zip(runs, messages.values(), strict=True):
            assert first.error == "TrainingError"
            assert message in first.message
            assert 2 <= first.seconds < 15


def test_what_ranks_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert World(size=2).local_batch(8) == 4
    for size in (7, 2, 0):
        message = f"batch_size: {size} cannot be divided among 2 ranks; .* multiple of 2"
        with pytest.raises(InputError, match=message):
            World(size=2).local_batch(size)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, local_rank in (("0", ""), ("x", "0"), ("2", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        message = f"ranks: RANK={rank}, .*LOCAL_RANK={local_rank}; .*; start with torchrun"
        with pytest.raises(InputError, match=message), joined("cpu"):
            pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(TrainingError, match="did not meet the others: .* MASTER_ADDR"), joined():
        pass
