"""Pages: their Python and commands run, tables are current; and rules of the repository."""

from __future__ import annotations

import ast
import difflib
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference_cases import save_images, save_run
from PIL import Image

from vi_simsiam.benchmarks.report import fill
from vi_simsiam.cli import COMMANDS, main
from vi_simsiam.cli.parsing import parse
from vi_simsiam.config import LossConfig, TrainConfig
from vi_simsiam.data.defaults import suited
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.engine import verdict
from vi_simsiam.functional import power_spherical_loss

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
TEXTS = {page.stem: page.read_text() for page in PAGES}
# Pages for users; the others hold tables written by vi-simsiam bench report.
GUIDES = {
    "finished-encoder", "image-forms", "index", "numbers", "public-encoder", "troubleshooting",
    "tutorial", "your-photos", "your-script",
}  # fmt: skip
# Fewer fixed characters than these would fit nearly any message.
_LEAST_FIXED = 15
BEFORE, AFTER = (DOCS / "examples" / f"lightly_simclr{suffix}.py" for suffix in ("", "_fast"))


class Accepted(Exception):
    """The options of a command were accepted; nothing else of it runs."""


def without_code(text: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def inline_code(text: str) -> list[str]:
    """Return the code in sentences and tables, each piece on one line."""
    found: list[str] = re.findall(r"`([^`]+)`", without_code(text))
    return [" ".join(code.split()) for code in found]


def commands(page: str) -> list[str]:
    """Calls of vi-simsiam in a page's blocks, and in the sentences of a guide."""
    lines = "".join(re.findall(r"```sh\n(.*?)```", TEXTS[page], re.DOTALL)).splitlines()
    lines += inline_code(TEXTS[page]) if page in GUIDES else []
    calls = [line.split(" # ")[0].strip() for line in lines]
    return [call for call in calls if re.match(r"vi-simsiam( |$)", call)]


def is_accepted(command: str) -> bool:
    """Return True if the parser takes the command's options, or the command is a bare name."""
    words = shlex.split(command)[1:]
    if len(words) == 1 and words[0] in COMMANDS:
        return True
    try:
        return main(words) == 0  # help, which parses nothing
    except Accepted:
        return True


def messages() -> Iterator[re.Pattern[str]]:
    """Yield patterns for texts of the package with enough fixed characters, with any values."""
    for path in (ROOT / "vi_simsiam").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if sum(len(text) for text in texts if isinstance(text, str)) >= _LEAST_FIXED:
                pattern = "".join(".*" if text is None else re.escape(str(text)) for text in texts)
                yield re.compile(pattern, re.DOTALL)


def run_blocks(page: str) -> dict[str, Any]:
    """Run all Python of a page, one block after the other; return its names."""
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL):
        exec(code, names)
    return names


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_pictures_exist_and_the_index_has_every_page() -> None:
    for page in PAGES:
        links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", without_code(TEXTS[page.stem]))
        for link, heading in links:
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not heading or heading in anchors(target), f"{page.name}: {link}#{heading}"
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", TEXTS["index"]))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"index.md"}


def test_commands_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings,) = re.findall(r"```yaml\n(.*?)```", TEXTS["your-photos"], re.DOTALL)
    (tmp_path / "mine.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)

    def accept(*arguments: Any, **named: Any) -> None:
        parse(*arguments, **named)
        raise Accepted

    for module in {module for module, _ in COMMANDS.values()}:
        monkeypatch.setattr(importlib.import_module(f"vi_simsiam.cli.{module}"), "parse", accept)
    found = {command: page for page in TEXTS for command in commands(page)}
    assert len(found) > 50
    for command, page in found.items():
        assert is_accepted(command), f"{page}: {command}"
    for wrong in ("fly", "train --sise 64", "evaluate RUN --k 3"):
        assert not is_accepted(f"vi-simsiam {wrong}")


def test_options_named_in_sentences_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in set(COMMANDS) - {"bench", "train"}:
        assert main([command, "--help"]) == 0
    assert main(["train", "--help-all"]) == 0
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    known |= {"--help", "--help-all", "--version", "--only"}
    for page in GUIDES:
        named = re.findall(r"(?<!\S)--[a-z-]+", "\n".join(inline_code(TEXTS[page])))
        assert set(named) <= known, page


def test_messages_are_those_of_the_source() -> None:
    """First column of the tables: the text that the source prints, with any inserted values."""
    rows = re.findall(r"^\| `([^`]+)` \|", TEXTS["troubleshooting"], re.MULTILINE)
    assert len(rows) > 15
    patterns, makefile = list(messages()), (ROOT / "Makefile").read_text()
    for row in rows:
        assert row in makefile or any(pattern.fullmatch(row) for pattern in patterns), row


def test_the_photo_page_has_the_settings_of_the_code() -> None:
    def settings(images: int, size: int) -> TrainConfig:
        return suited(TrainConfig(), ArraySource(np.zeros((images, 8, 8), np.uint8)), size=size)

    text = TEXTS["your-photos"]
    rows = re.findall(r"^\| ([\d,]+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert len(rows) == 6
    for images, size, epochs in rows:
        assert settings(int(images.replace(",", "")), int(size)).epochs == int(epochs), images
    sides = {"up to 28 pixels": 28, "29 to 32 pixels": 29, "33 to 64 pixels": 64, "more": 65}
    rows = re.findall(
        r"^\| ([^|]+) \| [^|]+ \| (small|medium|ImageNet's) \| (\d+) \|", text, re.MULTILINE
    )
    assert [side for side, *_ in rows] == list(sides)
    for side, stem, dim in rows:
        model = settings(64, sides[side]).model
        assert (model.stem, model.dim) == (stem.lower().removesuffix("'s"), int(dim)), side


def test_the_pages_have_the_limits_of_the_code() -> None:
    gain, largest = LossConfig().concentration_gain, verdict.LARGEST_BEST
    assert f'"concentration_gain": {gain:g} / 64**0.5' in TEXTS["your-script"]
    for text in (
        f"times {gain:g}/√H",
        f"below {verdict.COLLAPSE_THRESHOLD:g}: collapse",
        f"below {verdict.NO_COSINE:g} when the warm-up",
        f"and {verdict.STEPS} steps: not learning",
        f"below {verdict.LEAST_COSINE:g} at the end: barely learned",
        f"below {verdict.LEAST_SPREAD:g}: collapse",
        f"more than {1 / verdict.LEAST_RATIO:g} times kappa",
        f"above {largest:g} counts as {largest:g}: dead",
    ):
        assert text in TEXTS["numbers"]


def test_tables_are_those_of_the_result_files() -> None:
    for page in PAGES:
        text = TEXTS[page.stem]
        assert fill(text, page.parent) == text, page.name
        assert not ("<!-- bench: " in text and page.stem in GUIDES), page.name
    assert "<!-- bench: vi-simsiam-layers benchmarks/results/" in TEXTS["README"]
    for path in ROOT.glob("benchmarks/results/*/multiview_loss.json"):
        for case in json.loads(path.read_text())["cases"]:
            failures = {name: found["failure"] for name, found in case["providers"].items()}
            assert failures["eager"] is None, case["name"]
            inaccurate = {name for name, why in failures.items() if "inaccurate" in (why or "")}
            assert inaccurate <= {"textbook"}, case["name"]


def test_the_readme_trains_and_encodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "runs" / "mine")
    save_images(tmp_path / "photos", 3)
    names = run_blocks("README")
    gradients = [parameter.grad for parameter in names["model"].parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assert names["kappa"].shape == (8,)
    assert (names["kappa"] > 0).all()
    encoding = names["encoding"]
    assert encoding.embedding.shape == (3, 512)
    expected = (encoding.dim - 1) / (encoding.concentration + encoding.dim - 1)
    assert torch.equal(encoding.uncertainty, expected)


def test_the_loss_in_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_blocks("your-script")
    assert names["kappa"].shape == (16,)
    assert names["trainer"].global_step == 2
    assert list(tmp_path.iterdir()) == []


def test_a_saved_program_needs_the_operator(tmp_path: Path) -> None:
    """The import of the package alone does not register it, that of the module does."""

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
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "needed\n", done.stderr


def test_the_loader_example_gives_the_views_of_its_comments() -> None:
    names = run_blocks("input-pipeline")
    assert names["shapes"] == [(16, 3, 32, 32)] * 2 + [(16, 3, 16, 16)] * 2
    assert names["which"].shape == (16,)


def test_the_capture_example_trains() -> None:
    names = run_blocks("training-step")
    assert 0.5 < names["loss"].item() < 10
    assert names["step"].reason == "no CUDA device" or names["step"].captured
    assert len(names["losses"]) == 4
    assert all(-1 < loss.item() < 1 for loss in names["losses"])


def test_the_lightly_example_changes_few_lines() -> None:
    before, after = (path.read_text().split('"""', 2)[2].splitlines() for path in (BEFORE, AFTER))
    lines = difflib.unified_diff(before, after, n=1, lineterm="")
    changed = [line for line in lines if not re.match(r"---|\+\+\+|@@", line)]
    assert sum(line.startswith("+") for line in changed) == 7
    assert "in seven changed lines" in TEXTS["index"]
    assert sum(line.startswith("-") for line in changed) <= 15
    (shown,) = re.findall(r"```diff\n(.*?)```", TEXTS["input-pipeline"], re.DOTALL)
    assert shown.splitlines() == changed


@pytest.mark.filterwarnings("ignore")
def test_the_lightly_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch of two batches; NT-Xent of eight random pairs begins near log(15)."""
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    example = runpy.run_path(str(AFTER))
    example["main"](str(tmp_path), epochs=1, size=16, batch_size=8)
    (line,) = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"epoch 1: loss ([\d.]+), (\d+) views/s", line)
    assert found is not None
    assert 1.5 < float(found[1]) < 4
    assert int(found[2]) > 0


# From high to low: a folder imports from its own layer and from those below.
LAYERS = (
    ("vi_simsiam/cli",),
    ("vi_simsiam/experiments", "benchmarks"),
    ("vi_simsiam/evaluation", "vi_simsiam/export"),
    ("vi_simsiam/inference",),
    ("vi_simsiam/engine",),
    ("vi_simsiam/data",),
    ("vi_simsiam/ops",),
    ("kernels",),
)


def test_imports_go_down() -> None:
    folders = [(layer, folder) for layer, names in enumerate(LAYERS) for folder in names]
    layer_of = {folder.split("/")[-1]: layer for layer, folder in folders}
    for layer, folder in folders:
        files = list((ROOT / folder).rglob("*.py"))
        assert files, folder
        for path in files:
            pattern = r"^\s*(?:from|import) vi_simsiam\.(\w+)"
            for module in re.findall(pattern, path.read_text(), re.MULTILINE):
                assert layer_of.get(module, layer) >= layer, f"{path} imports {module}"


def test_files_are_short_and_docstrings_plain() -> None:
    """No file has more than 400 lines; no docstring begins like a question or with "Of"."""
    assert len(TEXTS["README"].splitlines()) <= 160
    folders = ("vi_simsiam", "kernels", "csrc", "benchmarks", "scripts", "tests")
    suffixes = (".py", ".cpp", ".h", ".cu", ".cuh")
    files = (path for name in folders for path in (ROOT / name).rglob("*"))
    for path in sorted(path for path in files if path.suffix in suffixes):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                assert not re.match(r"(Of|What|Whether|How|Why)\b", first), f"{path}: {first}"


def test_guarantees_name_existing_tests() -> None:
    """Each row of the tables has a test, and a long one is marked."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if "::" in line]
    assert len(rows) > 30
    for file, name, long in re.findall(r"`(test_\w+\.py)::(test_\w+)`( \(soak\))?", text):
        source = (ROOT / "tests" / file).read_text()
        found = re.search(rf"((?:^@.*\n(?:[ )\]].*\n)*)*)^def {name}\(", source, re.MULTILINE)
        assert found is not None, f"{file}::{name}"
        assert ("@pytest.mark.soak" in found[1]) == bool(long), f"{file}::{name}"
    assert all(re.search(r"`test_\w+\.py::test_\w+`", row) for row in rows)


def test_make_cpus_names_existing_tests() -> None:
    (names,) = re.findall(r"test_%\.py,(.*?)\)", (ROOT / "Makefile").read_text(), re.DOTALL)
    for name in names.replace("\\", " ").split():
        assert (ROOT / "tests" / f"test_{name}.py").exists(), name
