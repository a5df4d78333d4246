"""Training with --compile: the same run, whoever goes on with it, and one line where nothing can be
compiled."""

from __future__ import annotations

import dataclasses
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from test_commands import refused, run
from test_trainer import QUIET, config, metrics, train, weights

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.train import Trainer

# Compiled code sums in another order, which steps at a high learning rate amplify; the compiler's
# are at a low one.
_TOLERANCE = 1e-3


def _interrupted(config: TrainConfig, folder: Path) -> None:
    trainer = Trainer(config, folder, console=QUIET)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(epoch_done=lambda: os.kill(os.getpid(), signal.SIGINT))


def _same_training(folder: Path, *, steps: int) -> None:
    found, expected = (
        torch.tensor([[line["loss"], line["grad_norm"]] for line in metrics(folder / name)])
        for name in ("run", "plain")
    )
    assert len(expected) == steps
    torch.testing.assert_close(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


def test_a_compiled_run_is_the_same_and_goes_on_without(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is traced here, but not compiled, which takes most of a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = config(image_folder, log_every=1)
    train(plain, tmp_path / "plain")
    _interrupted(dataclasses.replace(plain, compile=True), tmp_path / "run")
    assert weights(tmp_path / "run").keys() == weights(tmp_path / "plain").keys()
    train(plain, tmp_path / "run", resume=True)
    _same_training(tmp_path, steps=10)


def test_no_compiler_is_one_line(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
    "options",
    ["--method simsiam", "--ema 0.9", "--local-views 1 --local-size 8", "--frozen-run FROZEN"],
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
    if "FROZEN" in options:
        assert run(f"{small} --method simsiam --out {tmp_path / 'frozen'}", capsys)[0] == 0
        options = options.replace("FROZEN", str(tmp_path / "frozen"))
    assert run(f"{small} {options} --out {tmp_path / 'plain'}", capsys)[0] == 0
    assert run(f"{small} {options} --out {tmp_path / 'run'} --compile", capsys)[0] == 0
    _same_training(tmp_path, steps=5)
    assert run(f"evaluate {tmp_path / 'run'} --device cpu --workers 0", capsys)[0] == 0
