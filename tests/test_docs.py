"""The pages in docs/: their Python runs, their tables are the result files', and the lightly example is what it says."""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from vi_simsiam.benchmarks.report import fill

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
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
        line for line in difflib.unified_diff(before, after, n=1, lineterm="") if not re.match(r"---|\+\+\+|@@", line)
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
        links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()) if not link.startswith("http")]
        assert [link for link in links if not (DOCS / link).exists()] == [], page.name


def test_tables_are_those_of_the_result_files() -> None:
    for page in PAGES:
        text = page.read_text()
        assert ("<!-- bench: " in text) == (page.name != "tutorial.md"), page.name
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
def test_the_lightly_example_runs(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
