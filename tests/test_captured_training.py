"""A GPU's training on a CPU: batches from the device's feed, and a stand-in for the graph."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from graph_cases import StandIn, Unrecordable
from rich.console import Console
from test_step import KernelFeed
from test_trainer import config, learned, metrics, same, weights

from vi_simsiam.engine import train as module
from vi_simsiam.engine.graph import Captured
from vi_simsiam.engine.train import Trainer
from vi_simsiam.evaluation.figures import read_metrics

pytestmark = pytest.mark.usefixtures("small_network")

Train = Callable[..., str]


@pytest.fixture
def train(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train in tmp_path/name as on a GPU, with `backend` for its graph; returns the output."""

    def run(name: str, backend: type[StandIn] | None, **changes: object) -> str:
        def capture(
            step: Callable[[], object], *, state: tuple[object, ...], mode: str
        ) -> Captured:
            return Captured(step, state=state, mode=mode, warmup=3, backend=backend)

        monkeypatch.setattr(module, "capture", capture)
        console = Console(file=io.StringIO(), width=300)
        trainer = Trainer(config(image_folder, **changes), tmp_path / name, console=console)
        trainer.loader.feed = KernelFeed(
            trainer.loader.source,
            trainer.config.augment,
            batch_size=8,
            seed=trainer.config.seed,
            device="cpu",
        )
        trainer.fit()
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    return run


def test_a_captured_training_is_the_training(
    train: Train, image_folder: Path, tmp_path: Path
) -> None:
    printed = train("captured", StandIn, epochs=12, lr=0.05)
    assert printed.splitlines()[-1] == "steps ran as one CUDA graph"
    lines = metrics(tmp_path / "captured")
    assert all(line["captured"] is True for line in lines[2:]), (
        "the first three steps are single launches"
    )
    assert "not_captured" not in lines[-1]
    assert learned(lines)
    Trainer(
        config(image_folder, epochs=12, lr=0.05), tmp_path / "plain", console=Console(quiet=True)
    ).fit()
    assert same(weights(tmp_path / "captured"), weights(tmp_path / "plain"))
    assert "captured" not in metrics(tmp_path / "plain")[-1]


def test_a_training_that_is_not_captured_says_why(train: Train, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="capture: the step runs without a CUDA graph"):
        printed = train("failed", Unrecordable)
    last = metrics(tmp_path / "failed")[-1]
    assert last["captured"] is False
    assert "operation not permitted when stream is capturing" in str(last["not_captured"])
    assert printed.splitlines()[-1] == f"steps ran without a CUDA graph: {last['not_captured']}"
    assert read_metrics(tmp_path / "failed" / "metrics.jsonl").keys() == last.keys() - {
        "state",
        "captured",
        "not_captured",
    }
    printed = train("off", StandIn, capture="off")
    assert printed.splitlines()[-1] == "steps ran without a CUDA graph: capture is off"
