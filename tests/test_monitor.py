"""Statistics of the representations, and the lines and bar of a training."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_trainer import config

from vi_simsiam.config import TrainConfig
from vi_simsiam.distributions import PowerSpherical
from vi_simsiam.engine import monitor as module
from vi_simsiam.engine.log import read_log
from vi_simsiam.engine.monitor import Monitor, effective_rank, representation_statistics
from vi_simsiam.engine.train import Trainer
from vi_simsiam.models import Output, SimSiam, VISimSiam

METRICS = {
    "step": 20, "epoch": 0.2, "loss": -391.123456, "cosine": 0.71234, "kappa": 2.34567,
    "z_std": 0.95, "effective_rank": 21.4, "grad_norm": 0.1, "lr": 0.01, "views_per_s": 12345.6,
    "data_wait": 0.02, "seconds": 3.0,
}  # fmt: skip


def opened(folder: Path, console: Console, *, epochs: int = 200, **options: object) -> Monitor:
    values = {"step": 0, "steps_per_epoch": 147} | options
    return Monitor(folder, TrainConfig(epochs=epochs), console=console, **values)  # type: ignore[arg-type]


def terminal(width: int = 80) -> Console:
    options = {"force_terminal": True, "legacy_windows": False, "color_system": None}
    return Console(file=io.StringIO(), width=width, **options)  # type: ignore[arg-type]


def printed(console: Console) -> list[str]:
    """The printed lines and states of the bar, without escape codes."""
    text = re.sub(r"(\x1b\[[0-9;?]*[A-Za-z]|\r)+", "\n", console.file.getvalue())  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def logged(folder: Path) -> list[dict[str, Any]]:
    return read_log(folder)[0]


def test_statistics_of_spread_and_collapsed_representations() -> None:
    spread = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    model = SimSiam(torch.nn.Flatten(), features=64, dim=64)
    found = representation_statistics(model, Output((spread, spread), (spread, spread)))
    assert found["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert found["z_std"] == pytest.approx(1.0, abs=0.05)
    assert 50 < found["effective_rank"] <= 64
    point = spread[:1].expand(256, 64)
    found = representation_statistics(model, Output((point, point), (point, point)))
    assert found["z_std"] < 1e-5
    assert found["effective_rank"] == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(torch.eye(5)) == pytest.approx(5.0)
    spread[3, 5] = math.nan  # the bar may show a batch before its loss is checked
    found = representation_statistics(model, Output((spread, spread), (spread, spread)))
    assert math.isnan(found["effective_rank"])
    spread[3, 5] = 0.0

    options = {"concentration_scale": 2.0, "concentration_link": "softplus"}
    vi = VISimSiam(torch.nn.Flatten(), features=64, dim=64, **options)  # type: ignore[arg-type]
    raw, away = (torch.cat([sign * spread, torch.zeros(256, 1)], 1) for sign in (1, -1))
    found = representation_statistics(vi, Output((raw, raw), (spread, spread)))
    assert found["kappa"] == pytest.approx(2 * 0.693147 / 63, rel=1e-5)
    assert 1e4 < found["kappa_best"] < 1e7, "cosines of 1: large, and finite"
    found = representation_statistics(vi, Output((away, away), (spread, spread)))
    assert found["kappa_best"] == 0


def test_the_best_kappa_and_the_spread_of_the_projections() -> None:
    """Cosines 0.8 and 0.28: c = sqrt(1.8 x 1.28) - 1, and kappa*/(D - 1) = c/(1 - c)."""
    model = VISimSiam(torch.nn.Flatten(), features=4, dim=3)
    target = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    predicted = torch.tensor([[0.8, 0.6, 0, 0], [0, 0.28, 0.96, 0]])
    norm = model.projector[-1]
    norm.running_mean.copy_(torch.tensor([1.0, 2, 0]))
    norm.running_var.copy_(torch.tensor([0.5, 0.25, 0.5]))
    output = Output((predicted, predicted), (target, target))
    found = representation_statistics(model, output)
    best = math.sqrt(1.8 * 1.28) - 1
    assert found["kappa_best"] == pytest.approx(best / (1 - best), rel=1e-5)
    assert found["projection_spread"] == pytest.approx(1.25 / 6.25, rel=1e-6)
    model.projector[-1] = torch.nn.Identity()
    assert "projection_spread" not in representation_statistics(model, output)


@pytest.mark.parametrize("cosine", [0.3, 0.9])
def test_the_best_kappa_maximises_the_density(cosine: float) -> None:
    """The formula is that of a large D."""
    dim = 2048
    sizes = {"projector_hidden": 8, "predictor_hidden": 8}
    model = VISimSiam(torch.nn.Flatten(), features=8, dim=dim, **sizes)
    target = torch.zeros(2, dim, dtype=torch.float64)
    target[:, 0] = 1
    predicted = torch.zeros(2, dim + 1, dtype=torch.float64)
    predicted[:, 0], predicted[:, 1] = cosine, (1 - cosine**2) ** 0.5
    found = representation_statistics(model, Output((predicted, predicted), (target, target)))
    factors = torch.linspace(0.9, 1.1, 401, dtype=torch.float64)
    mu = predicted[:1, :dim].expand(401, dim)
    density = PowerSpherical(mu, found["kappa_best"] * factors * (dim - 1)).log_prob(target[0])
    assert float(factors[density.argmax()]) == pytest.approx(1, abs=2e-3)


def shown(folder: Path, console: Console) -> None:
    """The bar after a step."""
    with opened(folder, console) as monitor:
        monitor.advance(20)
        monitor.show(METRICS)
        monitor._progress.refresh()
        monitor.epoch_done(147, METRICS)


@pytest.mark.parametrize(
    ("width", "figures"),
    [
        (50, ""),
        (60, "loss -391 cos 0.71"),
        (80, "loss -391 cos 0.71 κ/(D-1) 2.3"),
        (120, "loss -391 cos 0.71 κ/(D-1) 2.3 12346 views/s"),
    ],
)
def test_the_bar_keeps_epoch_count_and_time_on_any_terminal(
    tmp_path: Path, width: int, figures: str
) -> None:
    shown(tmp_path, console := terminal(width))
    bar = rf"epoch 1/200 [━╸╺ ]+ +20/29400 --:--(?: {re.escape(figures)})?"
    (last,) = {line for line in printed(console) if re.fullmatch(bar, line)}
    assert last.endswith(figures)
    assert len(last) <= width


def test_the_bar_has_ascii_forms(tmp_path: Path) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    shown(tmp_path, Console(file=file, force_terminal=True, width=100, color_system=None))
    file.flush()
    assert b"kappa/(D-1) 2.3" in file.buffer.getvalue()  # type: ignore[attr-defined]


def test_the_time_is_printed_once_from_steps_after_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step takes longer and does not count; three seconds and steps are waited for."""

    def line(config: TrainConfig, images: int, seconds: float, *, resumed: bool) -> str:
        return f"rest of {images}: {seconds:.1f} {'x' * 60}"

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "duration_line", line)
    console = Console(file=io.StringIO(), width=40)
    with opened(tmp_path, console, epochs=1, steps_per_epoch=103, images=40) as monitor:
        for step, at in enumerate([50.0, 51.0, 52.0, 53.5, 60.0], 1):
            now[0] = at
            monitor.advance(step)
    # Three steps from second 50.0 to 53.5, 99 more to go.
    assert console.file.getvalue().splitlines() == [f"rest of 40: {3.5 / 3 * 99:.1f} {'x' * 60}"]  # type: ignore[attr-defined]


def test_quiet_leaves_warnings(tmp_path: Path) -> None:
    console = terminal()
    with opened(tmp_path, console, quiet=True, images=40) as monitor:
        assert not monitor.due
        for step in range(1, 5):
            monitor.advance(step)
        # The collapse comes back, and is named once.
        for step, z_std in enumerate([0.1] * 3 + [0.9] * 3 + [0.1] * 3, 1):
            monitor.log(METRICS | {"step": step, "z_std": z_std})
        monitor.epoch_done(147, METRICS)
    (line,) = printed(console)
    assert line.startswith("warning: step 1: collapsed since step 1: z-std 0.10")


def test_a_problem_is_on_the_bar_in_the_log_and_in_the_line_of_the_epoch(tmp_path: Path) -> None:
    console = terminal()
    dead = METRICS | {"epoch": 1.0, "kappa": 0.01, "kappa_best": 2.4}
    with opened(tmp_path, console) as monitor:
        for step in (80, 90):
            monitor.log(METRICS | {"step": step})
        for step in (100, 110, 120):
            monitor.log(dead | {"step": step})
        monitor._progress.refresh()
        monitor.epoch_done(147, dead)
    lines = printed(console)
    assert any(re.fullmatch(r"epoch 1/200 .*--:-- dead since step 100 cos 0.71", x) for x in lines)
    warning = "warning: step 120: dead since step 100: kappa/(D-1) 0.01, where 2.4 would fit"
    assert sum(line.startswith(warning) for line in lines) == 1
    assert any(line.endswith("waiting for data 2%  dead since step 100") for line in lines)
    states = [(line["state"], line.get("since")) for line in logged(tmp_path)]
    assert states == [("learning", None)] * 4 + [("dead", 100)]
    with opened(tmp_path, Console(quiet=True), step=120) as monitor:
        assert monitor.health.short == "dead since step 100", "resumed"


def test_the_launch_of_steps_is_logged_and_printed_last(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=20)
    with opened(tmp_path, console) as monitor:
        monitor.log(METRICS, {"captured": False})
        monitor.finish()
    reason = "steps ran without a CUDA graph: there were too few steps"
    assert printed(console) == [monitor.health.line, reason]
    assert logged(tmp_path) == [METRICS | {"state": "learning", "captured": False}]


@pytest.mark.usefixtures("small_network")
def test_figures_are_shown_from_the_first_step_and_the_verdict_last(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal before the first line is logged; in a file where it is."""
    shown: list[dict[str, float]] = []
    show = Monitor.show

    def recorded(monitor: Monitor, metrics: dict[str, float]) -> None:
        shown.append(metrics)
        show(monitor, metrics)

    monkeypatch.setattr(module, "_SECONDS_SHOWN", 0.0)
    monkeypatch.setattr(Monitor, "show", recorded)
    settings = config(image_folder, epochs=1, log_every=100)
    consoles = {"terminal": terminal(200), "file": Console(file=io.StringIO(), width=200)}
    states = ("learned: ", "barely learned: ", "not learning", "dead", "collapsed")
    for name, console in consoles.items():
        Trainer(settings, tmp_path / name, console=console).fit()
        lines = printed(console)
        (verdict,) = [i for i, line in enumerate(lines) if line.startswith(states)]
        assert verdict > max(i for i, line in enumerate(lines) if "epoch 1/1  loss" in line)
    steps = [metrics["step"] for metrics in shown]
    assert steps == [1, 2, 3, 4, 5, 5], "every step on the terminal, the end in a file"
    assert {"loss", "cosine", "kappa", "views_per_s"} <= shown[0].keys()
