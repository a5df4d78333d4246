"""Several ranks: what they exchange, that they train as one process does, and that none waits for one that failed."""

from __future__ import annotations

import json
from pathlib import Path

import distributed_cases as cases
import numpy as np
import pytest
import torch
from distributed_cases import run_ranks
from rich.console import Console

from vi_simsiam.config import AugmentConfig, ModelConfig, TrainConfig
from vi_simsiam.engine.checkpoint import Checkpoint
from vi_simsiam.engine.distributed import World, joined
from vi_simsiam.engine.network import sync_batch_norm, wrap
from vi_simsiam.errors import InputError

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="needs torch built with gloo"
)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.delenv(name, raising=False)


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
        assert world.any_rank(torch.tensor(True))
        assert world.exchange("x") == ["x"]
        assert world.broadcast_object(5) == 5
        assert world.share(7) == range(7)
        world.agree("configuration", {"lr": 1})
        with pytest.raises(OSError, match="gone"), world.together(), world.main_first():
            raise OSError("gone")


def test_everything_that_ranks_exchange() -> None:
    """Three ranks with 3, 0 and 1 rows."""
    outcomes = run_ranks(cases.collectives, 3)
    assert [outcome.message for outcome in outcomes] == [""] * 3
    rows = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]], [[200, 201], [202, 203]]]
    for rank, (found, *_) in enumerate(outcomes):
        assert found.pop("place") == (rank, 3, rank == 0, rank > 0, "cpu")
        assert found.pop("warned") == (rank == 0)
        assert found.pop("shares") == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]][rank]
        assert found == {
            "rows": rows,
            "half": True,
            "labels": [0, 0, 0, 2],
            "nothing": [0, 5],
            "mean": [1.0, 10.0],
            "infected": True,
            "any": [True, False, [0.0, 1.0]],
            "said": {"folder": "runs/0"},
        }


def test_two_ranks_train_as_one_process_does() -> None:
    """Also from different weights at first: all ranks get rank 0's."""
    curve, weights = cases.trained(World(), 8, 8)
    first, second = run_ranks(cases.trained, 2, 8, 8)
    assert (first.message, second.message) == ("", "")
    assert first.value[0] == second.value[0]
    assert first.value[0] == pytest.approx(curve, rel=1e-5)
    assert curve[-1] < curve[0]
    for name, value in weights.items():
        np.testing.assert_array_equal(first.value[1][name], second.value[1][name], err_msg=name)
        np.testing.assert_allclose(first.value[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_trainer_on_two_ranks_is_the_trainer_on_one(image_folder: Path, tmp_path: Path) -> None:
    """Loss, norm of the gradient, learning rate and weights; rank 0 alone prints."""
    config = TrainConfig(
        data=f"folder:{image_folder}",
        epochs=1,
        batch_size=8,
        lr=0.02,
        workers=0,
        device="cpu",
        log_every=1,
        augment=AugmentConfig(size=16, blur_prob=0.0),
        model=ModelConfig(dim=32, projector_hidden=32, predictor_hidden=16),
    )
    said = cases.real_run(World(), config, tmp_path / "one")
    first, second = run_ranks(cases.real_run, 2, config, tmp_path / "two")
    assert (first.message, second.message) == ("", "")
    assert first.value.count("epoch 1/1 ") == said.count("epoch 1/1 ") == 1
    assert second.value == ""
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == 5
    for name in ("step", "loss", "grad_norm", "lr"):
        assert [line[name] for line in two] == pytest.approx(
            [line[name] for line in one], rel=1e-4
        ), name
    expected, found = (
        Checkpoint.load(tmp_path / name / "checkpoint.pt", torch.device("cpu")).model
        for name in ("one", "two")
    )
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_running_statistics_are_each_ranks_own() -> None:
    first, second = run_ranks(cases.running_statistics, 2)
    assert (first.message, second.message) == ("", "")
    assert not np.allclose(first.value, second.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [{"lr": 0.1, "workers": 1}, {"lr": 0.2, "workers": 2}],
            "ranks: lr is 0.1 on rank 0 and 0.2 on rank 1; it must be the same",
        ),
        (
            [
                {"lr": 1, "augment": {"crop": {"size": 32}}},
                {"lr": 1, "augment": {"crop": {"size": 28}}},
            ],
            "augment.crop.size is 32 on rank 0 and 28 on rank 1",
        ),
        ([{"lr": 1}, {"lr": 1, "seed": 3}], "seed is 'nothing' on rank 0 and 3 on rank 1"),
        ([100, 99], "configuration is 100 on rank 0 and 99 on rank 1"),
        ([{"lr": 1, "workers": 1}, {"lr": 1, "workers": 2}], ""),
    ],
)
def test_ranks_that_differ_say_in_what(values: list[object], message: str) -> None:
    for outcome in run_ranks(cases.agreeing, 2, values, ("workers",)):
        assert outcome.message == ""
        assert message in outcome.value if message else outcome.value == "agreed"


def test_rows_of_other_shapes_are_refused() -> None:
    outcomes = run_ranks(cases.uneven_rows, 2)
    assert sorted(outcome.error for outcome in outcomes) == ["InputError", "PeerError"]
    assert any(
        "(2, 3) on rank 0 and torch.float32 (2, 4) on rank 1" in outcome.message
        for outcome in outcomes
    )


@pytest.mark.parametrize(
    ("failing", "waits"), [(0, "end"), (1, "end"), (1, "agree"), (0, "main_first")]
)
def test_one_failing_rank_ends_all_at_once(failing: int, waits: str) -> None:
    """However the others wait; the one that failed has the error, the others only know that they are to end."""
    outcomes = run_ranks(cases.fails_in_setup, 3, failing, waits)
    for rank, outcome in enumerate(outcomes):
        assert outcome.seconds < 15, "the others did not wait for the timeout"
        if rank == failing:
            assert (outcome.error, outcome.message) == (
                "FileNotFoundError",
                "no such folder: /data\nand more",
            )
        else:
            assert (outcome.error, outcome.message) == (
                "PeerError",
                f"rank {failing}: no such folder: /data",
            )


def test_of_ranks_that_fail_alike_one_reports() -> None:
    outcomes = run_ranks(cases.all_fail, 3)
    assert sorted(outcome.error for outcome in outcomes) == ["InputError", "PeerError", "PeerError"]


def test_the_others_wait_for_what_rank_0_prepares(tmp_path: Path) -> None:
    outcomes = run_ranks(cases.rank_0_prepares, 2, tmp_path / "cache")
    assert [outcome.value for outcome in outcomes] == ["the cache"] * 2


def test_a_rank_that_fails_in_training_releases_those_at_a_collective() -> None:
    first, second = run_ranks(cases.leaves_in_training, 2)
    assert (second.error, second.message) == ("ValueError", "the disk is full")
    assert first.error == "PeerError"
    assert first.seconds < 15


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("collective", "ranks: contact with another rank was lost"),
        ("store", r"ranks: no answer from [1] within 2 s"),
    ],
)
def test_a_rank_that_stalls_is_an_error_after_the_timeout(where: str, message: str) -> None:
    first, _ = run_ranks(cases.stalls, 2, where, timeout=2.0)
    assert first.error == "TrainingError"
    assert message in first.message
    assert 2 <= first.seconds < 15


def test_synchronised_batch_norm_is_refused_on_a_cpu() -> None:
    with pytest.raises(InputError, match="sync_batch_norm: SyncBatchNorm runs on GPUs only"):
        sync_batch_norm(torch.nn.BatchNorm1d(4), World())


@pytest.mark.parametrize("batch_size", [7, 2, 0])
def test_a_batch_is_divided_evenly_or_refused(batch_size: int) -> None:
    assert World(size=2).local_batch(8) == 4
    with pytest.raises(
        InputError,
        match=f"batch_size: {batch_size} cannot be divided among 2 ranks; .* multiple of 2",
    ):
        World(size=2).local_batch(batch_size)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT not; start the ranks with torchrun"),
        (
            {"LOCAL_RANK": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "LOCAL_RANK=x.* must be integers",
        ),
        (
            {"RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK 2 must be .* below",
        ),
    ],
)
@pytest.mark.usefixtures("no_launcher")
def test_an_incomplete_environment_is_named(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message), joined("cpu"):
        pass
