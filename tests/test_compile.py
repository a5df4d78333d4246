"""Training with a compiled network, and on a CPU with the batches and the graph of a GPU: the same
run, and one line where something cannot be compiled or captured."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from graph_cases import StandIn, Unrecordable
from rich.console import Console
from test_commands import refused, run
from test_step import KernelFeed
from test_trainer import QUIET, config, metrics, same, train, weights

from vi_simsiam.engine import graph as module
from vi_simsiam.engine.graph import Captured
from vi_simsiam.engine.train import Trainer
from vi_simsiam.evaluation.figures import read_metrics

# Compiled code sums in another order, which steps at a high learning rate amplify; the compiler's
# are at a low one.
_TOLERANCE = 1e-3


def _same_training(folder: Path, *, steps: int) -> None:
    found, expected = (
        torch.tensor([[line["loss"], line["grad_norm"]] for line in metrics(folder / name)])
        for name in ("run", "plain")
    )
    assert len(expected) == steps
    torch.testing.assert_close(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


@pytest.mark.usefixtures("small_network")
def test_a_compiled_run_is_the_same_and_goes_on_without(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is traced here, but not compiled, which takes most of a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = config(image_folder, log_every=1, kernels="off")
    train(plain, tmp_path / "plain")
    trainer = Trainer(dataclasses.replace(plain, compile=True), tmp_path / "run", console=QUIET)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(epoch_done=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert weights(tmp_path / "run").keys() == weights(tmp_path / "plain").keys()
    train(plain, tmp_path / "run", resume=True)
    _same_training(tmp_path, steps=10)


def test_no_compiler_is_one_line(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the run folder is touched."""
    inductor = pytest.importorskip("torch._inductor.config")
    out = tmp_path / "run"
    with inductor.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        message = refused(
            f"train --data {image_folder} --compile --device cpu --workers 0 --out {out}", capsys
        )
    assert "compile: torch.compile does not work here (InvalidCxxCompiler: " in message
    assert "leave --compile out" in message
    assert not out.exists()


@pytest.mark.soak
@pytest.mark.parametrize(
    "options", ["--method simsiam", "--ema 0.9", "--local-views 1 --local-size 8"]
)
def test_the_compiler_itself(
    options: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The losses of a network that is compiled to C++, forward and backward, are those of the
    network as it is."""
    small = (
        f"train --data {image_folder} --size 16 --epochs 1 --batch-size 8 --dim 16 "
        "--projector-hidden 16 "
        "--predictor-hidden 16 --device cpu --workers 0 --log-every 1 --quiet --lr 0.0001"
    )
    assert run(f"{small} {options} --out {tmp_path / 'plain'}", capsys)[0] == 0
    assert run(f"{small} {options} --out {tmp_path / 'run'} --compile", capsys)[0] == 0
    _same_training(tmp_path, steps=5)
    assert run(f"evaluate {tmp_path / 'run'} --device cpu --workers 0", capsys)[0] == 0


Train = Callable[..., str]


@pytest.fixture
def train_as_on_a_gpu(
    small_network: None, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Train:
    """Train in tmp_path/name with `backend` for the graph; returns what is printed."""

    def run(name: str, backend: type[StandIn], **changes: object) -> str:
        monkeypatch.setattr(module, "capture", partial(Captured, warmup=3, backend=backend))
        console = Console(file=io.StringIO(), width=300)
        trainer = Trainer(config(image_folder, **changes), tmp_path / name, console=console)
        trainer.loader.feed = KernelFeed(trainer.loader._schedule, torch.device("cpu"))
        trainer.fit()
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    return run


def test_a_captured_training_is_the_training(
    train_as_on_a_gpu: Train, image_folder: Path, tmp_path: Path
) -> None:
    printed = train_as_on_a_gpu("captured", StandIn)
    assert printed.splitlines()[-1] == "steps ran as one CUDA graph"
    lines = metrics(tmp_path / "captured")
    # The first three steps are single launches.
    assert [line["captured"] for line in lines] == [False] + 5 * [True]
    assert "not_captured" not in lines[-1]
    train(config(image_folder), tmp_path / "plain")
    assert same(weights(tmp_path / "captured"), weights(tmp_path / "plain"))
    assert "captured" not in metrics(tmp_path / "plain")[-1]


def test_a_training_that_is_not_captured_says_why(train_as_on_a_gpu: Train, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="capture: the step runs without a CUDA graph"):
        printed = train_as_on_a_gpu("failed", Unrecordable, epochs=1)
    last = metrics(tmp_path / "failed")[-1]
    assert last["captured"] is False
    assert "operation not permitted when stream is capturing" in str(last["not_captured"])
    assert printed.splitlines()[-1] == f"steps ran without a CUDA graph: {last['not_captured']}"
    left_out = {"state", "captured", "not_captured"}
    assert read_metrics(tmp_path / "failed").keys() == last.keys() - left_out
    printed = train_as_on_a_gpu("off", StandIn, capture="off", epochs=1)
    assert printed.splitlines()[-1] == "steps ran without a CUDA graph: capture is off"
