"""The pages in docs/: Python runs, commands and messages are real, tables are the result files', the lightly example is exact."""

from __future__ import annotations

import difflib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from docs_cases import (
    ROOT,
    commands,
    inline_code,
    is_accepted,
    messages,
    shell_lines,
    stop_after_options,
)
from PIL import Image

from vi_simsiam.benchmarks.report import fill
from vi_simsiam.cli import main
from vi_simsiam.cli.commands import COMMANDS
from vi_simsiam.config import LossConfig, TrainConfig
from vi_simsiam.data.defaults import suited
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.engine import verdict
from vi_simsiam.functional import power_spherical_loss

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# Their tables are written by vi-simsiam bench report.
MEASURED = {"experiments.md", "input-pipeline.md", "loss-kernel.md", "training-step.md"}
GUIDES = [page for page in PAGES if page.name not in MEASURED]
BEFORE, AFTER = (DOCS / "examples" / f"lightly_simclr{suffix}.py" for suffix in ("", "_fast"))


def run_blocks(page: str) -> dict[str, object]:
    """All Python of a page, one block after the other; what it leaves behind."""
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        exec(code, names)
    return names


def changes() -> list[str]:
    """The example's difference, without the lines that name the files and places, and without the first docstring."""
    before, after = (path.read_text().split('"""', 2)[2].splitlines() for path in (BEFORE, AFTER))
    return [
        line
        for line in difflib.unified_diff(before, after, n=1, lineterm="")
        if not re.match(r"---|\+\+\+|@@", line)
    ]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_and_pictures_exist() -> None:
    for page in PAGES:
        links = [
            link
            for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
            if not link.startswith("http")
        ]
        assert [link for link in links if not (DOCS / link).exists()] == [], page.name


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(
        r"^#+ (.*)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_headings_that_exist() -> None:
    for page in [*PAGES, ROOT / "README.md"]:
        for link, heading in re.findall(r"\]\(([^)#:]*\.md|)#([^)]+)\)", page.read_text()):
            target = page.parent / link if link else page
            assert heading in anchors(target), f"{page.name}: {link}#{heading}"


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)", (DOCS / "index.md").read_text()))
    assert linked == {page.name for page in PAGES} - {"index.md"}
    assert "](docs/index.md)" in (ROOT / "README.md").read_text()


def test_commands_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command on every page, and what the guides name in a sentence, by the parsers of the commands themselves."""
    (settings,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "your-photos.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    stop_after_options(monkeypatch)
    for page in [*PAGES, ROOT / "README.md"]:
        text = page.read_text()
        named = inline_code(text) if page in GUIDES else []
        for command in commands(shell_lines(text) + named):
            assert is_accepted(command), f"{page.name}: {command}"


def test_a_command_that_is_not_accepted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after_options(monkeypatch)
    for command in (
        "vi-simsiam fly",
        "vi-simsiam train --sise 64",
        "vi-simsiam evaluate RUN --k 3",
    ):
        assert not is_accepted(command)


def test_options_named_in_sentences_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in set(COMMANDS) - {"bench", "train"}:
        assert main([command, "--help"]) == 0
    assert main(["train", "--help-all"]) == 0
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) | {
        "--help",
        "--help-all",
        "--version",
    }
    for page in GUIDES:
        named = {
            option
            for code in inline_code(page.read_text())
            for option in re.findall(r"(?<!\S)--[a-z-]+", code)
        }
        assert named - known - {"--only"} == set(), page.name


def test_messages_are_those_of_the_source() -> None:
    """The first column of the tables: what the program fills in may be anything, the rest is as printed."""
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 15
    patterns = list(messages())
    wanted = (ROOT / "Makefile").read_text()
    missing = [
        row
        for row in rows
        if row not in wanted and not any(pattern.fullmatch(row) for pattern in patterns)
    ]
    assert missing == []


def test_the_photo_page_has_the_settings_of_the_code() -> None:
    text = (DOCS / "your-photos.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert len(rows) == 6
    sides = {"up to 28 pixels": 28, "29 to 32 pixels": 29, "33 to 64 pixels": 64, "more": 65}
    for side, stem, dim in re.findall(
        r"^\| ([^|]+) \| [^|]+ \| (small|ImageNet's) \| (\d+) \|", text, re.MULTILINE
    ):
        model = suited(
            TrainConfig(), ArraySource(np.zeros((64, 8, 8), np.uint8)), size=sides.pop(side)
        ).model
        assert (model.stem, model.dim) == (
            {"small": "small", "ImageNet's": "imagenet"}[stem],
            int(dim),
        ), side
    assert not sides
    for images, size, epochs in rows:
        source = ArraySource(np.zeros((int(images.replace(",", "")), 8, 8), np.uint8))
        assert suited(TrainConfig(), source, size=int(size)).epochs == int(epochs), images
    numbers = (DOCS / "numbers.md").read_text()
    assert f"below {verdict.COLLAPSE_THRESHOLD:g}: collapse" in numbers
    assert (
        f"below {verdict.NO_COSINE:g} when the warm-up and one more epoch (or the training) are over, "
        f"and {verdict.STEPS} steps: not learning" in numbers
    )
    assert f"below {verdict.LEAST_COSINE:g} at the end: barely learned" in numbers
    assert f"below {verdict.LEAST_SPREAD:g}: collapse, which z-std need not show" in numbers
    assert (
        f"more than {1 / verdict.LEAST_RATIO:g} times kappa, "
        f"where a value above {verdict.LARGEST_BEST:g} counts as {verdict.LARGEST_BEST:g}: dead"
        in numbers
    )


def test_the_pages_have_the_gain_of_the_code() -> None:
    gain = LossConfig().concentration_gain
    assert f'"concentration_gain": {gain:g} / 64**0.5' in (DOCS / "your-script.md").read_text()
    assert f"times {gain:g}/√H" in (DOCS / "numbers.md").read_text()


def test_the_loss_in_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_blocks("your-script.md")
    assert names["kappa"].shape == (16,)  # type: ignore[attr-defined]
    assert names["trainer"].global_step == 2  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


def test_a_saved_program_needs_the_operator(tmp_path: Path) -> None:
    """As the page says: the import of the package alone is not enough, that of the module is."""

    class Loss(torch.nn.Module):
        def forward(self, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return power_spherical_loss(predictions, targets)

    program = torch.export.export(Loss(), (torch.randn(2, 4, 9), torch.randn(2, 4, 8)))
    torch.export.save(program, tmp_path / "loss.pt2")
    code = """
import torch, vi_simsiam
try:
    torch.export.load("loss.pt2")
except RuntimeError:
    import vi_simsiam.functional
    torch.export.load("loss.pt2")
    print("needed")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "needed\n", done.stderr


def test_tables_are_those_of_the_result_files() -> None:
    for page in PAGES:
        text = page.read_text()
        assert ("<!-- bench: " in text) == (page.name in MEASURED), page.name
        assert fill(text, DOCS) == text, page.name


def test_the_loader_example_gives_the_views_it_says() -> None:
    names = run_blocks("input-pipeline.md")
    assert names["shapes"] == [(16, 3, 32, 32)] * 2 + [(16, 3, 16, 16)] * 2
    assert names["which"].shape == (16,)  # type: ignore[attr-defined]


def test_the_capture_example_trains() -> None:
    names = run_blocks("training-step.md")
    assert 0.5 < names["loss"].item() < 10  # type: ignore[attr-defined]
    assert names["step"].reason == "no CUDA device" or names["step"].captured  # type: ignore[attr-defined]
    assert len(names["losses"]) == 4  # type: ignore[arg-type]
    assert all(-1 < loss.item() < 1 for loss in names["losses"])  # type: ignore[attr-defined]


def test_the_lightly_example_changes_few_lines() -> None:
    changed = changes()
    assert sum(line.startswith("+") for line in changed) == 7
    assert "in seven changed lines" in (DOCS.parent / "README.md").read_text()
    assert sum(line.startswith("-") for line in changed) <= 15
    (shown,) = re.findall(r"```diff\n(.*?)```", (DOCS / "input-pipeline.md").read_text(), re.DOTALL)
    assert shown.splitlines() == changed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", [BEFORE, AFTER], ids=["before", "after"])
def test_the_lightly_example_runs(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An epoch of two batches; NT-Xent of eight random pairs begins near log(15)."""
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    load(path).main(str(tmp_path), epochs=1, size=16, batch_size=8)
    (line,) = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"epoch 1: loss ([\d.]+), (\d+) views/s", line)
    assert found is not None
    assert 1.5 < float(found[1]) < 4
    assert int(found[2]) > 0
