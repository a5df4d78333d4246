"""Several ranks: exchange, training as in one process, and no waiting for a failed rank."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import distributed_cases as cases
import numpy as np
import pytest
import torch
from distributed_cases import Outcome, run_ranks
from rich.console import Console
from test_trainer import config, metrics

from vi_simsiam.config import AugmentConfig
from vi_simsiam.engine.distributed import World, joined
from vi_simsiam.engine.network import sync_batch_norm, wrap
from vi_simsiam.errors import InputError

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="needs torch built with gloo"
)

ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *ADDRESS):
        monkeypatch.delenv(name, raising=False)


def values(outcomes: list[Outcome]) -> list[Any]:
    """The results of ranks that did not fail."""
    assert [outcome.message for outcome in outcomes] == [""] * len(outcomes)
    return [outcome.value for outcome in outcomes]


@pytest.mark.usefixtures("no_launcher")
def test_a_process_alone_is_a_world_of_one_without_a_group() -> None:
    with joined("cpu") as world:
        assert not torch.distributed.is_initialized()
        assert (world.rank, world.size, world.alone, world.is_main) == (0, 1, True, True)
        console, model = Console(), torch.nn.Linear(2, 2)
        assert world.console(console) is console
        assert wrap(model, world) is model
        rows = torch.arange(6.0).view(3, 2)
        assert world.gather_rows(rows).equal(rows)
        assert world.all_mean(rows).equal(rows)
        assert world.any_rank(True)
        assert world.exchange("x") == ["x"]
        assert world.broadcast_object(5) == 5
        assert world.share(7) == range(7)
        world.agree("configuration", {"lr": 1})
        with pytest.raises(OSError, match="gone"), world.together(), world.main_first():
            raise OSError("gone")


def test_everything_that_ranks_exchange(tmp_path: Path) -> None:
    """Three ranks with 3, 0 and 1 rows."""
    rows = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]], [[200, 201], [202, 203]]]
    statistics = []
    for rank, found in enumerate(values(run_ranks(cases.collectives, 3, tmp_path / "cache"))):
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
            "broadcast": {"folder": "runs/0"},
            "prepared": "the cache",
        }
    assert not np.allclose(statistics[0], statistics[1]), "each rank's own"


def test_the_trainer_on_two_ranks_is_the_trainer_on_one(image_folder: Path, tmp_path: Path) -> None:
    """Loss, norm of the gradient, learning rate and weights; rank 0 alone prints."""
    augment = AugmentConfig(size=12, local_views=2, local_size=8, blur_prob=0.0)
    settings = config(image_folder, epochs=2, log_every=1, lr=0.1, augment=augment)
    printed, expected = cases.real_run(World(), settings, tmp_path / "one")
    first, second = values(run_ranks(cases.real_run, 2, settings, tmp_path / "two"))
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


def test_differences_between_ranks_are_named() -> None:
    pairs = {
        "lr is 0.1 on rank 0 and 0.2 on": [{"lr": 0.1, "workers": 1}, {"lr": 0.2, "workers": 2}],
        "augment.crop.size is 32 on rank 0 and 28 on rank 1; it must be the same": [
            {"augment": {"crop": {"size": size}}} for size in (32, 28)
        ],
        "seed is 'nothing' on rank 0 and 3 on rank 1": [{"lr": 1}, {"lr": 1, "seed": 3}],
        "configuration is 100 on rank 0 and 99 on rank 1": [100, 99],
        "agreed": [{"lr": 1, "workers": 1}, {"lr": 1, "workers": 2}],
    }
    for rank in values(run_ranks(cases.agreeing, 2, list(pairs.values()))):
        for message, found in zip(pairs, rank, strict=True):
            assert message in found


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (cases.uneven_rows, "(2, 3) on rank 0 and torch.float32 (2, 4) on rank 1"),
        (cases.all_fail, "images is 10 on rank 0 and 11 on rank 1"),
    ],
)
def test_of_ranks_that_fail_alike_one_reports(case: cases.Case, message: str) -> None:
    outcomes = run_ranks(case, 2)
    assert sorted(str(outcome.error) for outcome in outcomes) == ["InputError", "PeerError"]
    assert any(message in outcome.message for outcome in outcomes)


@pytest.mark.parametrize(
    ("failing", "waits"), [(0, "end"), (1, "end"), (1, "agree"), (0, "main_first")]
)
def test_one_failing_rank_ends_all_at_once(failing: int, waits: str) -> None:
    """The rank that failed has the error, wherever the others wait; they only end."""
    outcomes = run_ranks(cases.fails_in_setup, 3, failing, waits)
    own = ("FileNotFoundError", "no such folder: /data\nand more")
    others = ("PeerError", f"rank {failing}: no such folder: /data")
    for rank, outcome in enumerate(outcomes):
        assert outcome.seconds < 15, "the others did not wait for the timeout"
        assert (outcome.error, outcome.message) == (own if rank == failing else others)


def test_a_rank_that_fails_in_training_releases_those_at_a_collective() -> None:
    first, second = run_ranks(cases.leaves_in_training, 2)
    assert (second.error, second.message) == ("ValueError", "the disk is full")
    assert first.error == "PeerError"
    assert first.seconds < 15


def test_a_rank_that_stalls_is_an_error_after_the_timeout() -> None:
    messages = {
        "collective": "ranks: contact with another rank was lost",
        "store": "ranks: no answer from [1] within 2 s",
    }
    with ThreadPoolExecutor() as pool:
        runs = pool.map(lambda where: run_ranks(cases.stalls, 2, where, timeout=2.0), messages)
        for (first, _), message in zip(runs, messages.values(), strict=True):
            assert first.error == "TrainingError"
            assert message in first.message
            assert 2 <= first.seconds < 15


def test_synchronised_batch_norm_is_refused_on_a_cpu() -> None:
    with pytest.raises(InputError, match="sync_batch_norm: SyncBatchNorm runs on GPUs only"):
        sync_batch_norm(torch.nn.BatchNorm1d(4), World())


def test_a_batch_is_divided_evenly_or_refused() -> None:
    assert World(size=2).local_batch(8) == 4
    for size in (7, 2, 0):
        message = f"batch_size: {size} cannot be divided among 2 ranks; .* multiple of 2"
        with pytest.raises(InputError, match=message):
            World(size=2).local_batch(size)


@pytest.mark.usefixtures("no_launcher")
def test_an_incomplete_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for environment, message in (
        ({}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT not; start the ranks with torchrun"),
        (ADDRESS | {"LOCAL_RANK": "x"}, "LOCAL_RANK=x.* must be integers"),
        (ADDRESS | {"RANK": "2", "LOCAL_RANK": "0"}, "RANK 2 must be .* below"),
    ):
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", **environment}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=message), joined("cpu"):
            pass
