"""Names from files are text wherever they are shown: no markup, control, formula or link."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import shutil
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import small_backbone
from evaluation_cases import make_run, skip_rendering, uncertainty_result
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_cases import ON_CPU, network_run, save_images, save_run
from markdown_it import MarkdownIt
from matplotlib import rc_context
from matplotlib.text import Text
from rich.console import Console
from rich.table import Table

from vi_simsiam.cli import main
from vi_simsiam.cli.evaluate import print_result
from vi_simsiam.evaluation import style
from vi_simsiam.evaluation.report import write_report
from vi_simsiam.experiments.tables import _runs
from vi_simsiam.export.folder import model_card
from vi_simsiam.files import write_json
from vi_simsiam.text import cell, each_text, markdown, one_line, print_line

# Colours of a terminal, in 7 and 8 bits; an override and an isolate; a line of its own; then marks
# of HTML, Markdown, Rich and formulas.
NAME = (
    "\x1b[31m\x9b2J\u202e\u2067\n\r\t\u2028<script>alert(1)<"
    "\\script>\"'><img src=x onerror=alert(1)>|`*a*_b_ [c](javascript:d)[red]$x$&amp;"
)
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
MARKS = st.text(st.sampled_from(list("\\`*_[](){}<>|~$&!#:;\"' ab\n\t\x1b\u202e")), max_size=20)


def acts(text: str) -> bool:
    """True if a terminal or a page would not show text as a line of text."""
    bidi = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return any(
        unicodedata.category(c) in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(c) in bidi
        for c in text
    )


def assert_lines(text: str) -> None:
    assert not acts(text.replace("\n", "")), repr(text)


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_inert(content: str) -> None:
    """A page without scripts, handlers and links to elsewhere, whose names are lines of text."""
    page = Page(content)
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src"):
                assert str(value).startswith(("#", "data:")), value
            assert_lines(str(value))
    assert_lines(page.text)


def test_one_line() -> None:
    assert one_line("a\tb\x1b[0m\x9b\x7f") == r"a\tb\x1b[0m\x9b\x7f"
    assert one_line("a\u2028b\u202ec\u2069") == r"a\u2028b\u202ec\u2069"
    kept = "Größe \u200d \N{FAMILY} שלום 日本 κ/κ* [x] \\ \udce9"
    assert one_line(kept) == kept
    assert not acts(one_line(NAME))


@settings(derandomize=True, max_examples=400, deadline=None)
@given(MARKS)
def test_markdown_shows_the_text_itself(name: str) -> None:
    expected = html.escape(one_line(name), quote=False).replace('"', "&quot;")
    assert MARKDOWN.render(f"x{markdown(name)}x") == f"<p>x{expected}x</p>\n"
    table = MARKDOWN.render(f"| a | b |\n|---|---|\n| x{markdown(name)}x | y |")
    assert table.count("<td>") == 2
    assert f"<td>x{expected}x</td>" in table


def test_names_on_a_terminal() -> None:
    for width in (40, 400):
        console = Console(file=io.StringIO(), width=width, force_terminal=False)
        print_line(console, NAME)
        table = Table(cell(NAME))
        table.add_row(cell(NAME))
        console.print(table)
        written = console.file.getvalue()  # type: ignore[attr-defined]
        assert_lines(written)
    assert written.count("[red]") == 3


@pytest.fixture
def photos(image_folder: Path, tmp_path: Path) -> Path:
    """Classes and files with hostile names in a folder with such a name; one cannot be read."""
    names = {"dark": f"dark{NAME}", "bright": "=bright"}
    for part in ("train", "val"):
        for name, other in names.items():
            place = tmp_path / f"p{NAME}" / part / other
            shutil.copytree(image_folder / part / name, place)
            (place / "00.png").rename(place / f"{NAME}.png")
    (tmp_path / f"p{NAME}" / "train" / NAME).write_text("not read")
    return tmp_path / f"p{NAME}"


@pytest.mark.usefixtures("small_runs")
def test_names_of_folders_classes_and_images(
    photos: Path,
    tmp_path: Path,
    small_network: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr("vi_simsiam.evaluation.features.build_backbone", small_backbone)
    monkeypatch.setattr("vi_simsiam.data.cache._TOLERATED_SHARE", 0.1)
    run = tmp_path / f"run{NAME}"
    options = ["--epochs", "1", "--batch-size", "8", "--size", "8", *ON_CPU]
    assert main(["train", "--data", str(photos), "--out", str(run), *options]) == 0
    assert main(["knn", str(run), *ON_CPU]) == 0
    (photos / "val" / "=bright" / f"{NAME}.png").write_bytes(b"")
    assert main(["report", str(run), *ON_CPU]) == 0
    assert main(["figures", str(run), *ON_CPU]) == 0
    for command, out in (("embed", "x.parquet"), ("rank", f"x{NAME}.csv")):
        place = ["--out", str(tmp_path / out), *ON_CPU]
        assert main([command, str(run), str(photos / "val"), *place]) == 0
    assert main(["export", str(run), "--format", "safetensors"]) == 0
    assert (
        main(["pack", str(photos), "--workers", "0", "--out", str(tmp_path / f"x{NAME}.pack")]) == 0
    )
    assert main(["views", "--data", str(photos), "--out", str(tmp_path / f"v{NAME}.png")]) == 0
    assert main(["knn", str(tmp_path / f"none{NAME}")]) == 2
    assert main(["knn", str(run), f"--{NAME}"]) == 2
    out, err = capsys.readouterr()
    assert_lines(out)
    assert_lines(err)
    assert err.count("vi-simsiam: ") == 2
    assert_inert((run / "report.html").read_text())
    card = (run / "export" / "safetensors" / "README.md").read_text()
    assert_lines(card)
    assert_inert(MARKDOWN.render(card.partition("\n---\n")[2]))


def hostile(result: dict[str, Any]) -> dict[str, Any]:
    """A result whose names of data sets and notes are hostile."""
    for part in ("ood", "retrieval"):
        result[part] = {f"{NAME}{name}": value for name, value in result[part].items()}
    for value in result["ood"].values():
        value["kind"] = NAME
    result["data"] = result["misclassification"]["classifier"] = NAME
    result["settings"]["notes"] = [NAME]
    result["scores"] = {name: NAME for name in result["scores"]}
    result["versions"] = {NAME: NAME}
    return result


def test_names_in_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_rendering(monkeypatch)
    run = make_run(tmp_path / "run")
    config = dataclasses.replace(run.config, data=f"folder:/x/{NAME}", backend=NAME, device=NAME)
    write_json(run.path / "config.json", config.to_dict())
    write_json(run.path / "uncertainty.json", hostile(uncertainty_result()))
    write_json(run.path / "kernels.json", {"kernels": NAME, "reason": NAME})
    log = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    log[-1] |= {"state": NAME, "not_captured": NAME}
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    page = write_report(run.path).read_text()
    assert_inert(page)
    assert r"\u202e" in Page(page).text
    print_result(hostile(uncertainty_result()), Console(width=400))
    assert_lines(capsys.readouterr().out)


def test_names_in_a_model_card(tmp_path: Path) -> None:
    run = network_run(tmp_path / "run")
    config = dataclasses.replace(run.config, data=f"folder:/x/{NAME}", backend=NAME, device=NAME)
    run = dataclasses.replace(run, config=config)
    write_json(run.path / "uncertainty.json", hostile(uncertainty_result()))
    check = {"images": 8, "source": NAME, "differences": {"embedding": 1e-7}}
    card = model_card(run, "safetensors", check=check, versions={"torch": "2"})
    assert_lines(card)
    page = MARKDOWN.render(card.partition("\n---\n")[2])
    assert_inert(page)
    assert "<em>" not in page
    counts = {line.count("</td>") for line in page.replace("\n", "").split("<tr>")}
    assert counts <= {0, 2, 4, 6}, "a name adds no cell"


def test_names_in_the_summary_of_an_experiment() -> None:
    row = {"short": NAME, "seeds": [1], "seconds": None, "diverged": []}
    summary: dict[str, Any] = {"data": {NAME: {"arms": {NAME: row}}}, "missing": [NAME]}
    summary |= {"devices": [NAME], "versions": [], "commits": [], "dates": []}
    page = MARKDOWN.render(_runs(each_text(summary, markdown)))
    assert_inert(page)
    assert page.count("<li>") == 3
    assert "<em>" not in page


def test_names_in_figures(tmp_path: Path) -> None:
    with rc_context(style.STYLE):
        drawn = style.figure(style.shown(rf"folder:/x/$\frac{{$ {NAME} $\nothing$"))
        drawn.subplots().plot([1, 2], label=NAME)
        style.save(drawn, tmp_path / "x.png")
    (title,) = [text.get_text() for text in drawn.findobj(Text) if "nothing" in text.get_text()]
    assert r"$\frac{$" in title
    assert not acts(title.replace("\n", ""))


def test_cells_are_no_formulas_and_still_name_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = save_run(tmp_path / "run"), tmp_path / "images"
    (image,) = save_images(folder, 1)
    monkeypatch.chdir(folder)
    for start in ("=1+1", "+1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", "plain", "a,\n=1"):
        image = image.rename(f"{start}.png")
        out = ["--out", str(tmp_path / "ranking"), "--overwrite", *ON_CPU]
        assert main(["rank", *out, str(run), str(image)]) == 0
        with (tmp_path / "ranking.csv").open(newline="") as file:
            _, (_, path, _, _) = csv.reader(file)
        assert Path(path) == image, "the same file"
        assert path.startswith("./") == (start not in ("plain", "a,\n=1"))


def test_settings_of_others_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run")
    plain = json.loads((run / "config.json").read_text())
    for name in ("backend", "device", "data"):
        write_json(run / "config.json", plain | {name: NAME})
        assert main(["train", "--resume", "--out", str(run), "--data", str(tmp_path)]) == 2
        assert main(["evaluate", str(run), *ON_CPU]) == 2
    write_json(run / "config.json", plain | {NAME: 1})
    assert main(["evaluate", str(run), *ON_CPU]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_lines(err)
    assert len(err.splitlines()) == 7
