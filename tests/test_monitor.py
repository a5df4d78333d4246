"""What is shown while a run trains."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import rich.progress
import torch
from rich.console import Console

from vi_simsiam.config import AugmentConfig, ModelConfig, TrainConfig
from vi_simsiam.distributions import PowerSpherical
from vi_simsiam.engine import monitor as module
from vi_simsiam.engine.monitor import Monitor, representation_statistics
from vi_simsiam.engine.trainer import Trainer
from vi_simsiam.engine.verdict import Health
from vi_simsiam.models import Output, VISimSiam

METRICS = {
    "step": 20, "epoch": 0.2, "loss": -391.123456, "cosine": 0.71234, "kappa": 2.34567, "z_std": 0.95,
    "effective_rank": 21.4, "grad_norm": 0.1, "lr": 0.01, "views_per_s": 12345.6, "data_wait": 0.02, "seconds": 3.0,
}  # fmt: skip


def opened(folder: Path, console: Console, **options: object) -> Monitor:
    values = {"step": 0, "total": 29_400, "steps_per_epoch": 147} | options
    return Monitor(folder, console=console, health=Health(TrainConfig()), **values)  # type: ignore[arg-type]


def terminal(width: int = 80) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        legacy_windows=False,
        color_system=None,
    )


def last_shown(console: Console) -> str:
    """The last state of the bar."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    return plain.replace("\r", "\n").rstrip("\n").splitlines()[-1].rstrip()


@pytest.mark.parametrize("cosine", [0.3, 0.9])
def test_the_best_kappa_maximises_the_density(cosine: float) -> None:
    """The formula is that of a large D."""
    dim = 2048
    model = VISimSiam(
        torch.nn.Flatten(), features=8, dim=dim, projector_hidden=8, predictor_hidden=8
    )
    target = torch.zeros(2, dim, dtype=torch.float64)
    target[:, 0] = 1
    predicted = torch.zeros(2, dim + 1, dtype=torch.float64)
    predicted[:, 0], predicted[:, 1] = cosine, (1 - cosine**2) ** 0.5
    best = representation_statistics(model, Output((predicted, predicted), (target, target)))[
        "kappa_best"
    ]
    factors = torch.linspace(0.9, 1.1, 401, dtype=torch.float64)
    mu = predicted[:1, :dim].expand(401, dim)
    density = PowerSpherical(mu, best * factors * (dim - 1)).log_prob(target[0])
    assert float(factors[density.argmax()]) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("width", "figures"),
    [
        (50, ""),
        (60, "loss -391 cos 0.71"),
        (80, "loss -391 cos 0.71 κ/(D-1) 2.3"),
        (100, "loss -391 cos 0.71 κ/(D-1) 2.3 12346 views/s"),
        (120, "loss -391 cos 0.71 κ/(D-1) 2.3 12346 views/s"),
    ],
)
def test_the_bar_keeps_epoch_count_and_time_on_any_terminal(
    tmp_path: Path, width: int, figures: str
) -> None:
    console = terminal(width)
    with opened(tmp_path, console) as monitor:
        monitor.advance(20)
        monitor.show(METRICS)
        monitor._progress.refresh()
    last = last_shown(console)
    assert re.fullmatch(rf"epoch 1/200 [━╸╺ ]+ +20/29400 --:--(?: {re.escape(figures)})?", last), (
        last
    )
    assert len(last) <= width


def test_the_longest_counts_and_times_leave_room_for_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rich.progress.Task, "time_remaining", property(lambda task: 100 * 3600.0))
    console = terminal()
    with opened(tmp_path, console, step=123_455, total=1_234_567, steps_per_epoch=1_234) as monitor:
        monitor.advance(123_456)
        monitor.show(METRICS)
        monitor._progress.refresh()
    last = last_shown(console)
    assert re.fullmatch(
        r"epoch 101/1001 .* 123456/1234567 100:00:00 loss -391 cos 0.71 κ.*", last
    ), last


def test_the_bar_has_ascii_forms(tmp_path: Path) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, force_terminal=True, width=100, color_system=None)
    with opened(tmp_path, console) as monitor:
        monitor.advance(20)
        monitor.show(METRICS)
        monitor._progress.refresh()
        monitor.epoch_done(147, METRICS)
    file.flush()
    assert b"kappa/(D-1) 2.3" in file.buffer.getvalue()  # type: ignore[attr-defined]


def test_the_time_is_printed_once_from_steps_after_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step takes longer and does not count; three seconds and steps are waited for."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=40)
    with opened(
        tmp_path, console, total=103, estimate=lambda seconds: f"rest: {seconds:.1f} {'x' * 60}"
    ) as monitor:
        for step, at in enumerate([50.0, 51.0, 52.0, 53.5, 60.0], 1):
            now[0] = at
            monitor.advance(step)
    # Three steps from second 50.0 to 53.5, 99 more to go.
    assert console.file.getvalue().splitlines() == [f"rest: {3.5 / 3 * 99:.1f} {'x' * 60}"]  # type: ignore[attr-defined]


def test_quiet_leaves_warnings(tmp_path: Path) -> None:
    console = terminal()
    with opened(tmp_path, console, quiet=True, estimate=lambda seconds: "time") as monitor:
        assert not monitor.due
        for step in range(1, 5):
            monitor.advance(step)
        for step, z_std in enumerate(
            (0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1), 1
        ):  # it comes back, and is named once
            monitor.log(METRICS | {"step": step, "z_std": z_std})
        monitor.epoch_done(147, METRICS)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 1
    assert "warning: step 1: collapsed since step 1: z-std 0.10" in lines[0]


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
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(
        r"epoch 1/200 .*--:-- dead since step 100 cos 0.71 *\n", shown.replace("\r", "\n")
    )
    assert (
        shown.count("warning: step 120: dead since step 100: kappa/(D-1) 0.01, where 2.4 would fit")
        == 1
    )
    assert "waiting for data 2%  dead since step 100\n" in re.sub(
        r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", shown
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [(line["state"], line.get("since")) for line in lines] == [("learning", None)] * 4 + [
        ("dead", 100)
    ]
    with opened(tmp_path, Console(quiet=True), step=120) as monitor:
        assert monitor.health.short == "dead since step 100", "resumed"


@pytest.mark.parametrize(
    ("launched", "line"),
    [
        ({}, None),
        ({"captured": True}, "steps ran as one CUDA graph"),
        ({"captured": False}, "steps ran without a CUDA graph: there were too few steps"),
        ({"captured": False, "not_captured": "step: it reads a value"}, "steps ran without a CUDA graph: step: it reads a value"),
    ],
)  # fmt: skip
def test_how_steps_were_launched_is_logged_and_said_last(
    launched: dict[str, bool | str], line: str | None, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), width=20)
    with opened(tmp_path, console) as monitor:
        monitor.log(METRICS, launched)
        monitor.finish()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == [monitor.health.line, *([line] if line else [])]
    logged = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert {key: value for key, value in logged.items() if "captured" in key} == launched


def test_the_last_metrics_of_an_earlier_session_are_known(tmp_path: Path) -> None:
    """Lines after the step that training goes on from are dropped, and one that was cut off."""
    with opened(tmp_path, Console(quiet=True)) as monitor:
        assert monitor.last is None
        for step in (10, 20, 30):
            monitor.log(METRICS | {"step": step})
        assert monitor.last == METRICS | {"step": 30, "state": "learning"}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    with opened(tmp_path, Console(quiet=True), step=20) as monitor:
        assert monitor.last == METRICS | {"step": 20, "state": "learning"}
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [10, 20]


def test_figures_are_shown_from_the_first_step_and_the_verdict_last(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal: long before the first line is logged. metrics.jsonl is the same with and without a terminal."""
    shown: list[dict[str, float]] = []
    monkeypatch.setattr(module, "_SECONDS_SHOWN", 0.0)
    show = Monitor.show
    monkeypatch.setattr(
        Monitor, "show", lambda monitor, metrics: (shown.append(metrics), show(monitor, metrics))
    )
    config = TrainConfig(
        data=f"folder:{image_folder}", epochs=1, batch_size=8, lr=0.02, workers=0, device="cpu", log_every=100,
        augment=AugmentConfig(size=16, blur_prob=0.0), model=ModelConfig(dim=32, projector_hidden=32, predictor_hidden=16),
    )  # fmt: skip
    consoles = {"terminal": terminal(200), "file": Console(file=io.StringIO(), width=200)}
    for name, console in consoles.items():
        Trainer(config, tmp_path / name, console=console).fit()
        text = re.sub(r"(\x1b\[[0-9;?]*[A-Za-z]|\r)+", "\n", console.file.getvalue())  # type: ignore[attr-defined]
        lines = text.splitlines()
        verdicts = [
            line
            for line in lines
            if line.startswith(
                ("learned: ", "barely learned: ", "not learning", "dead", "collapsed")
            )
        ]
        assert len(verdicts) == 1
        assert lines.index(verdicts[0]) > max(
            i for i, line in enumerate(lines) if line.startswith("epoch 1/1  loss")
        )
    assert [metrics["step"] for metrics in shown] == [1, 2, 3, 4, 5, 5], (
        "every step on the terminal, the end in a file"
    )
    assert {"loss", "cosine", "kappa", "views_per_s"} <= shown[0].keys()
    kept = [json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in consoles]
    for timed in ("seconds", "views_per_s", "data_wait"):
        assert kept[0].pop(timed) is not None
        kept[1].pop(timed)
    assert kept[0] == kept[1]
