"""Rules of the repository: layers of imports, short files, plain docstrings, narrow pages."""

from __future__ import annotations

import ast
import re

from docs_cases import ROOT, without_code

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
    folders = ("vi_simsiam", "kernels", "benchmarks", "scripts", "tests")
    for path in sorted(path for name in folders for path in (ROOT / name).rglob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                assert not re.match(r"(Of|What|Whether|How|Why)\b", first), f"{path}: {first}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_prose_fits_100_columns() -> None:
    """Tables, pictures, code and generated sections may be wider."""
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = re.sub(r"<!-- bench: .*?<!-- /bench -->", "", path.read_text(), flags=re.DOTALL)
        for line in without_code(text).splitlines():
            prose = not line.startswith(("|", "!", "    "))
            assert len(line) <= 100 or not prose, f"{path.name}: {line}"


def test_make_cpus_names_existing_tests() -> None:
    (names,) = re.findall(r"test_%\.py,(.*?)\)", (ROOT / "Makefile").read_text(), re.DOTALL)
    for name in names.replace("\\", " ").split():
        assert (ROOT / "tests" / f"test_{name}.py").exists(), name
