"""The choice between the project's kernels and torch's layers; durations are made up."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_trainer import QUIET, config, metrics, same, train, weights
from torch import nn

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine import kernels as module
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.kernels import KernelChoice, choose_kernels, device_name, kernels_of
from vi_simsiam.engine.step import TrainStep, configured_step
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError
from vi_simsiam.models import SimSiam

pytestmark = pytest.mark.usefixtures("small_network")

CPU = torch.device("cpu")
Durations = Callable[[Iterable[float | Exception]], list[bool]]


@pytest.fixture
def durations(monkeypatch: pytest.MonkeyPatch) -> Durations:
    """Let every run measure: steps are really made, and take the seconds that are given in turn.

    Returns a list that gets, for every step, whether it has the kernels.
    """
    monkeypatch.setitem(module._EFFORT, "cpu", module._EFFORT["cpu"]._replace(fewest_steps=1))
    monkeypatch.setattr(module, "why_unavailable", lambda backend, device_type: None)

    def given(seconds: Iterable[float | Exception]) -> list[bool]:
        coming, fused = iter(seconds), list[bool]()

        def taken(call: Callable[[], object], device: torch.device) -> float:
            call()
            fused.append(call.func._step.model.fused)  # type: ignore[attr-defined]
            duration = next(coming)
            if isinstance(duration, Exception):
                raise duration
            return duration

        monkeypatch.setattr(module, "_seconds", taken)
        return fused

    return given


def trained(config: TrainConfig, folder: Path, **options: bool) -> tuple[Trainer, list[str]]:
    console = Console(file=io.StringIO(), width=300)
    trainer = Trainer(config, folder, console=console, **options)
    trainer.fit()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return trainer, [line for line in lines if line.startswith("kernels")]


WARM = (9.0, 9.0)


@pytest.mark.parametrize(
    ("timed", "fused", "line"),
    [
        # Fused and torch's layers in turn; the faster of two.
        ((0.18, 0.23, 0.184, 0.21), True, "on (fused 180 ms, torch's layers 210 ms a step)"),
        ((0.003, 0.002, 0.004, 0.003), False, "off (fused 3 ms, torch's layers 2 ms a step)"),
        ((0.1019, 0.1, 0.1019, 0.1), True, "on (fused 102 ms, torch's layers 100 ms a step)"),
        ((0.1021, 0.1, 0.1021, 0.1), False, "off (fused 102 ms, torch's layers 100 ms a step)"),
        # A round longer than the budget is the last one.
        ((2.5, 3.0), True, "on (fused 2,500 ms, torch's layers 3,000 ms a step)"),
    ],
)
def test_the_faster_layers_are_taken(
    durations: Durations,
    image_folder: Path,
    tmp_path: Path,
    timed: tuple[float, ...],
    fused: bool,
    line: str,
) -> None:
    steps = durations((*WARM, *timed))
    trainer, printed = trained(config(image_folder, epochs=1), tmp_path / "run")
    assert steps == [True, False] * (1 + len(timed) // 2)
    assert trainer.model.fused is trainer.kernels.kernels is fused
    assert printed == [f"kernels: {line}"]
    assert kernels_of(tmp_path / "run", trainer.config) == line


def test_layers_that_fail_are_not_taken(
    durations: Durations, image_folder: Path, tmp_path: Path
) -> None:
    """Both are tried again, each alone: together they may need too much memory."""
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
    settings = config(image_folder, epochs=1)
    for name, seconds, steps, line in (
        # Once both are there, then fused alone, then torch's layers alone.
        ("fused", (9.0, memory, memory, 9.0, 0.2, 0.2), [True, False, True, False, False, False],
         "off (torch's layers 200 ms a step; fused failed: CUDA out of memory)"),
        ("torch", (memory, 9.0, 0.3, 0.3, memory), [True, True, True, True, False],
         "on (fused 300 ms a step; torch's layers failed: CUDA out of memory)"),
        ("space", (9.0, memory, 9.0, 0.3, 0.3, 9.0, 0.2, 0.2),
         [True, False, True, True, True, False, False, False],
         "off (fused 300 ms, torch's layers 200 ms a step)"),
        ("both", (memory, memory, RuntimeError()), [True, True, False],
         "on: fused failed: CUDA out of memory; torch's layers failed: RuntimeError"),
    ):  # fmt: skip
        found = durations(seconds)
        trainer, printed = trained(settings, tmp_path / name)
        assert found == steps
        assert printed == [f"kernels: {line}"]
        assert trainer.model.fused == line.startswith("on")


def test_measuring_changes_nothing_else(
    durations: Durations, image_folder: Path, tmp_path: Path
) -> None:
    settings = config(image_folder, log_every=1, ema=0.9)
    torch.manual_seed(7)
    train(replace(settings, kernels="on"), tmp_path / "on")
    random = torch.get_rng_state()
    durations(itertools.repeat(0.1))
    torch.manual_seed(7)
    assert train(settings, tmp_path / "auto").kernels.fused_ms == 100
    assert torch.equal(torch.get_rng_state(), random)
    assert same(weights(tmp_path / "auto"), weights(tmp_path / "on"))
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("on", "auto")]
    assert losses[0] == losses[1]
    assert not (tmp_path / "on" / "kernels.json").exists()


def test_a_short_run_is_not_measured(
    durations: Durations, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It uses the kernels; what counts is the number of steps that are left."""
    steps = durations(itertools.repeat(0.1))
    effort = module._EFFORT["cpu"]
    monkeypatch.setitem(module._EFFORT, "cpu", effort._replace(fewest_steps=11))
    trainer, printed = trained(config(image_folder), tmp_path / "run")  # of ten steps
    assert (trainer.model.fused, printed, steps) == (True, [], [])
    assert str(trainer.kernels) == kernels_of(tmp_path / "run", trainer.config) == "on"
    monkeypatch.setitem(module._EFFORT, "cpu", effort._replace(fewest_steps=10))
    trained(config(image_folder), tmp_path / "long")
    assert steps == [True, False] * 3
    (tmp_path / "long" / "kernels.json").unlink()
    trained(config(image_folder), tmp_path / "long", resume=True)
    assert steps == [True, False] * 3, "nothing is left to train"


def test_a_resumed_run_keeps_its_choice(
    durations: Durations, image_folder: Path, tmp_path: Path
) -> None:
    run, settings = tmp_path / "run", config(image_folder)
    durations((*WARM, 0.3, 0.2, 0.3, 0.2))
    trained(settings, run)
    steps = durations(itertools.repeat(0.1))
    line = "kernels: off (fused 300 ms, torch's layers 200 ms a step)"
    trainer, printed = trained(settings, run, resume=True)
    assert (trainer.model.fused, printed, steps) == (False, [line], [])
    for kernels in ("on", "off"):
        trainer, printed = trained(replace(settings, kernels=kernels), run, resume=True)  # type: ignore[arg-type]
        assert (trainer.model.fused, printed, steps) == (kernels == "on", [], [])
    KernelChoice(device_name(CPU), False, reason="compile replaces them").save(run)
    assert str(KernelChoice.load(run)) in line, "another session's layers are not kept"


def test_another_choice_is_made_on_another_device_and_where_there_was_none(
    durations: Durations, image_folder: Path, tmp_path: Path
) -> None:
    here, measured = device_name(CPU), KernelChoice(device_name(CPU), True, 100.0, 100.0)
    elsewhere = KernelChoice("NVIDIA H200", False, 3.0, 2.0)
    durations(itertools.repeat(0.1))
    for saved in (
        KernelChoice(here, False, 3.0, 2.0),
        KernelChoice(here, True),
        KernelChoice(here, False, torch_ms=2.0, reason="fused failed: memory"),
    ):
        (tmp_path / "kernels.json").unlink(missing_ok=True)
        saved.save(tmp_path)
        assert chosen(config(image_folder), resumed=tmp_path) == saved
    for saved in (elsewhere, KernelChoice(here, False, reason="compile replaces them")):
        (tmp_path / "kernels.json").unlink(missing_ok=True)
        saved.save(tmp_path)
        assert chosen(config(image_folder), resumed=tmp_path) == measured
    (tmp_path / "kernels.json").unlink()
    elsewhere.save(tmp_path)
    assert chosen(config(image_folder), resumed=tmp_path, steps=0) == elsewhere
    (tmp_path / "kernels.json").write_text("{}")
    assert kernels_of(tmp_path, config(image_folder)) == "not readable"
    (tmp_path / "kernels.json").unlink()
    assert chosen(config(image_folder), resumed=tmp_path, steps=0) == KernelChoice(here, True)


def chosen(
    settings: TrainConfig,
    model: SimSiam | None = None,
    *,
    resumed: Path | None = None,
    steps: int = 100,
) -> KernelChoice:
    model = model or SimSiam(settings.model.backbone, dim=32)

    def make_step(model: SimSiam, rates: torch.Tensor, kernels: bool) -> TrainStep:
        return configured_step(
            settings, model, rates, kernels, loss_scale=1.0, backend="eager", bf16=False
        )

    return choose_kernels(
        settings, World(), model, make_step, dtype=torch.float32, steps=steps, resumed=resumed
    )


def test_damaged_choices_are_named(image_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(image_folder, epochs=1), run)
    for text, problem in (
        ("{", "Expecting property name"),
        ("[1]", "not a dict"),
        ('{"kernels": true}', "device"),
        ('{"device": "cpu", "kernels": 1}', "kernels: 1 is not accepted"),
        ('{"device": "cpu", "kernels": true, "fused_ms": -1}', "fused_ms: -1 is not accepted"),
    ):
        (run / "kernels.json").write_text(text)
        message = rf"^run: .*kernels.json is damaged \(.*{problem}.*without this file .* anew$"
        with pytest.raises(InputError, match=message):
            Trainer(config(image_folder, epochs=1), run, resume=True, console=QUIET)
    train(config(image_folder, epochs=1), run, overwrite=True)
    assert json.loads((run / "kernels.json").read_text())["device"] == device_name(CPU)
    train(config(image_folder, epochs=1, kernels="off"), run, overwrite=True)
    assert not (run / "kernels.json").exists()


def test_kernels_that_cannot_be_used(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "on" is refused before the folder is touched; "auto" gives the reason."""
    monkeypatch.setattr(module, "why_unavailable", lambda *given: "the extension was not built")
    message = "kernels: 'on' cannot be used: the extension was not built; auto and off run here"
    with pytest.raises(InputError, match=message):
        Trainer(config(image_folder, kernels="on"), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
    trainer, printed = trained(config(image_folder, epochs=1), tmp_path / "run")
    assert printed == ["kernels: off: the extension was not built"]
    assert not trainer.model.fused
    monkeypatch.setattr(module, "why_unavailable", lambda *given: None)
    assert chosen(config(image_folder, kernels="on")).kernels
    own = SimSiam(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(768)), features=768, dim=32)
    odd = SimSiam(dim=32)
    odd.projector[4] = nn.BatchNorm1d(512)
    for changes, model, reason in (
        ({"compile": True}, None, "compile replaces them"),
        ({"sync_batch_norm": True}, None, "they do not take statistics over several GPUs"),
        ({}, own, "the backbone has BatchNorm layers of its own (backbone.1)"),
        ({}, odd, "the projector has BatchNorm layers of its own (projector.4)"),
    ):
        settings = config(image_folder, **changes)
        found = chosen(settings, model)
        assert str(found).startswith(f"off: {reason}")
        with pytest.raises(InputError, match="'on' cannot be used: .*; auto and off run here"):
            chosen(replace(settings, kernels="on"), model)
        assert str(chosen(replace(settings, kernels="off"), model)) == "off"
