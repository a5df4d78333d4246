"""Names with brackets are printed as they are, not as styles."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from experiment_cases import small_plan, tiny_config
from inference_cases import save_images
from report_cases import uncertainty_result
from rich.console import Console

from vi_simsiam.cli import evaluate as command
from vi_simsiam.errors import InputError
from vi_simsiam.experiments.plan import Arm, Place
from vi_simsiam.experiments.runner import Run, _decode, _table


class Terminal(Console):
    """80 columns wide, and written to memory."""

    def __init__(self) -> None:
        self.written = io.StringIO()
        super().__init__(file=self.written, width=80)


def test_names_of_data_are_no_styles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = uncertainty_result()
    result["ood"] = {"[/x] [red]": result["ood"]["mine"]}
    result["settings"]["notes"] = []
    command.print_result(result, terminal := Terminal())
    assert "[/x] [red] (" in terminal.written.getvalue()

    def evaluate(run: object, *, report: object, **options: object) -> dict[str, object]:
        report("images of [/x]")  # type: ignore[operator]
        return result

    monkeypatch.setattr("vi_simsiam.evaluation.uncertainty.evaluate_uncertainty", evaluate)
    monkeypatch.setattr(command, "open_run", lambda options: SimpleNamespace(path=tmp_path))
    assert command.uncertainty([str(tmp_path)]) == 0


def test_experiments_show_logs_and_data_as_they_are(tmp_path: Path) -> None:
    images = tmp_path / "images" / "a [b]" / "[" / "c]"
    save_images(images, 4)
    plan = small_plan({"a": 0.1})
    arm = Arm("a", tiny_config(f"folder:{images}"), "")
    terminal = Terminal()
    with pytest.raises(InputError, match="has no labels"):  # before anything is trained
        _decode([arm], plan, Place(cache_dir=tmp_path / "cache"), terminal)

    run = Run(plan, arm, 0, tmp_path)
    run.log.parent.mkdir()
    run.log.write_text("reading [/x] [red]\n")
    run.start(["sleep", "60"], threads=1, append=True)
    try:
        terminal.print(_table([run], terminal.width))
    finally:
        run.kill()
    assert "reading [/x] [red]" in terminal.written.getvalue()
