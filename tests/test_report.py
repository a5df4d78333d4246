"""The report: one file with the numbers of the result files, which loads nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from evaluation_cases import feature_sets, gray_source, make_run, skip_rendering, uncertainty_result
from PIL import Image

from vi_simsiam.cli import main
from vi_simsiam.cli.evaluate import report
from vi_simsiam.config import TrainConfig, differing_fields, preset
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.engine.checkpoint import Checkpoint
from vi_simsiam.engine.knn import KnnConfig
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.comparisons import comparisons
from vi_simsiam.evaluation.corruptions import MAGNITUDES
from vi_simsiam.evaluation.figures import certainty
from vi_simsiam.evaluation.knn import evaluate_knn
from vi_simsiam.evaluation.report import (
    compared,
    gallery,
    settings,
    thumbnail_uri,
    train_arguments,
    write_report,
)
from vi_simsiam.evaluation.scores import DESCRIPTIONS


class Page(HTMLParser):
    """The content of a report: elements, text, tables as cells by row, and their numbers."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.values: dict[str, list[list[float]]] = {}
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text())
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = given.get("id") or ""
            self.tables[self.table], self.values[self.table] = [], []
        elif tag == "tr":
            self.tables[self.table].append([])
            self.values[self.table].append([])
        elif tag in ("th", "td"):
            self.tables[self.table][-1].append("")
        elif tag == "data" and "table" in self.open:
            self.values[self.table][-1].append(float(given["value"] or "nan"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"th", "td"} & set(self.open):
            self.tables[self.table][-1][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [given for name, given in self.tags if name == tag]


@pytest.fixture(scope="module", autouse=True)
def blank_figures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        skip_rendering(patch)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, blank_figures: None) -> Path:
    """The report of a run with metrics, an accuracy and an uncertainty."""
    folder = tmp_path_factory.mktemp("report") / "run"
    run = make_run(folder, val=gray_source(40))
    evaluate_knn(feature_sets(folder), KnnConfig(k=5))
    (folder / "uncertainty.json").write_text(json.dumps(uncertainty_result()))
    return write_report(folder, lambda: run)


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(written)


def test_the_page_needs_no_other_file_and_its_links_lead_somewhere(
    written: Path, page: Page
) -> None:
    images = page.attributes("img")
    assert len(images) == 7 + 2 * 20
    for image in images:
        assert re.match(r"data:image/(png|jpeg);base64,", image["src"] or "")
        assert image["alt"]
    assert not page.attributes("script")
    links = [link["href"] or "" for tag in ("a", "link") for link in page.attributes(tag)]
    assert all(link.startswith(("#", "data:")) for link in links)
    text = re.sub('base64,[^"]*', "", written.read_text())
    assert not re.search(r"https?:|url\(|@import|\bon\w+=", text)
    policy = next(meta["content"] for meta in page.attributes("meta") if meta.get("http-equiv"))
    assert "default-src 'none'" in str(policy)
    identifiers = [given["id"] for _, given in page.tags if given.get("id")]
    assert len(identifiers) == len(set(identifiers))
    assert {(link["href"] or "")[1:] for link in page.attributes("a")} <= set(identifiers)


def test_tables_hold_the_numbers_of_the_files(written: Path, page: Page) -> None:
    knn, result = (
        json.loads((written.parent / name).read_text()) for name in ("knn.json", "uncertainty.json")
    )

    def rows(table: str) -> list[list[float]]:
        return page.values[table][1:]

    def measures(scores: dict[str, Any], *keys: str) -> list[list[float]]:
        return [[scores[name][key] for key in keys] for name in DESCRIPTIONS]

    assert rows("accuracies") == [[share] for share in knn["top1"].values()]
    assert page.tables["accuracies"][1] == ["trained", f"{100 * knn['top1']['trained']:.1f} %"]
    bins = result["calibration"]["bins"]
    assert rows("calibration") == [[b["expected"], b["observed"], b["count"]] for b in bins]
    part = result["misclassification"]
    expected = measures(part["scores"], "auroc", "aurc", "augrc")
    limits = [[part[name]["aurc"], part[name]["augrc"]] for name in ("oracle", "random")]
    assert rows("misclassification") == expected + limits
    assert page.tables["misclassification"][1] == ["κ", *(f"{value:.3f}" for value in expected[0])]
    for number, each in enumerate(result["ood"].values(), start=1):
        assert rows(f"ood-{number}") == measures(each["scores"], "auroc", "aupr", "fpr95")
    sets = result["retrieval"].values()
    recalls = [each["recall_at_1"] for each in sets]
    aurocs = [[each["scores"][name] for each in sets] for name in DESCRIPTIONS]
    assert rows("retrieval") == [recalls, *aurocs]
    kinds = [result["corruptions"][kind] for kind in MAGNITUDES]
    assert rows("corruptions-1") == [kind["median_kappa"] for kind in kinds]
    for number, key in ((2, "spearman"), (3, "monotone")):
        expected = [[kind["scores"][name][key] for kind in kinds] for name in DESCRIPTIONS]
        assert rows(f"corruptions-{number}") == expected


def test_the_headline_counts_the_comparisons(page: Page) -> None:
    result = uncertainty_result()
    rows = comparisons(result)
    ahead = sum(row.kappa > row.value for row in rows)  # type: ignore[operator]
    assert f"ahead of the best trivial score in {ahead} of {len(rows)} comparisons" in page.text
    assert [values[:2] for values in page.values["compared"][1:]] == [
        [row.kappa, row.value] for row in rows
    ]
    for each in result["ood"].values():
        each["scores"]["kappa"]["auroc"] = None
    assert len((compared(result) or {})["table"]["rows"]) == len(rows) - 3


def test_settings_that_differ_or_are_inferred_are_marked(
    written: Path, page: Page, tmp_path: Path
) -> None:
    config = TrainConfig(epochs=7, augment=preset("demo").augment)
    rows = {row["name"]: row for row in settings(config)}
    differing = {"epochs", "size", "local_size", "crop_scale", "blur_prob"}
    assert {name for name, row in rows.items() if row["differs"]} == differing
    assert ["size", "8", "224", "augment"] in page.tables["training-settings"]
    assert ["k", "5", "knn", ""] in page.tables["evaluation-settings"]
    knn = json.loads((written.parent / "knn.json").read_text())
    assert ["torch", knn["versions"]["torch"], "2.14.1"] in page.tables["version-table"]
    make_run(tmp_path, method="simsiam")
    (tmp_path / "metrics.jsonl").unlink()
    knn["settings"] = {"epochs": 90, "lr": 1.6, "inferred": ["epochs"]}
    knn |= {"top5": {"trained": 1.0}, "held_out_top1": None}
    (tmp_path / "linear.json").write_text(json.dumps(knn))
    table = Page(write_report(tmp_path)).tables["evaluation-settings"]
    assert ["epochs", "90", "linear", "inferred"] in table
    assert ["lr", "1.6", "linear", ""] in table


@pytest.mark.parametrize("name", ["default", "demo", "paper"])
def test_the_command_gives_the_same_training(name: str) -> None:
    given = preset(name)
    parsed = tyro.cli(TrainConfig, args=train_arguments(given), config=(tyro.conf.OmitArgPrefixes,))
    assert differing_fields(parsed, given) == []


def test_the_gallery_shows_both_ends_as_small_images(tmp_path: Path) -> None:
    found = certainty(make_run(tmp_path, val=gray_source(40)))
    assert found is not None
    least, most = gallery(found)
    order = np.argsort(found.values, kind="stable")
    assert [image["index"] for image in least["images"]] == order[:20].tolist()
    assert [image["kappa"].value for image in most["images"]] == sorted(found.values)[::-1][:20]
    assert all(image["name"] == f"class {image['index'] // 20}" for image in least["images"])
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    for pixels, kind, small in ((noise, "jpeg", False), (noise[:28, :28], "png", True)):
        uri, found_small = thumbnail_uri(Image.fromarray(pixels))
        assert uri.startswith(f"data:image/{kind}")
        assert (len(uri) < 30_000, found_small) == (True, small)


def test_hostile_names_stay_text_and_what_is_not_defined_is_a_dash(tmp_path: Path) -> None:
    attack = '$^{"><script>alert(1)</script><img src="http://a.example/x.png" onerror=alert(1)>'
    gray = gray_source(6)
    run = make_run(tmp_path, val=ArraySource(gray.images, gray.labels, [attack, "b"], attack))
    result = uncertainty_result(data=attack)
    result["scores"] = {**DESCRIPTIONS, attack: attack}
    result["ood"] = {attack: result["ood"]["mine"]}
    result["ood"][attack]["scores"]["energy"]["auroc"] = None
    absent = {"misclassification": None, "retrieval": None, "corruptions": {}}
    (tmp_path / "uncertainty.json").write_text(json.dumps(result | absent))
    found = Page(write_report(tmp_path, lambda: run))
    assert not {"misclassification", "retrieval", "corruptions-1"} & set(found.tables)
    assert next(row for row in found.tables["ood-1"] if row[0] == "energy")[1] == "–"
    assert not found.attributes("script")
    assert all((image["src"] or "").startswith("data:") for image in found.attributes("img"))
    assert not any("onerror" in given for _, given in found.tags)
    assert attack in found.text


def test_absent_parts_have_the_command_that_makes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path)
    text = Page(write_report(tmp_path)).text
    assert f"vi-simsiam evaluate {tmp_path} for kNN and linear probe" in text
    assert f"vi-simsiam logistic {tmp_path} for logistic regression" in text
    (tmp_path / "metrics.jsonl").write_text("")
    evaluate_knn(feature_sets(tmp_path), KnnConfig(k=5))
    assert report([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"images left out: run: {tmp_path} has no checkpoint",
        str(tmp_path / "report.html"),
    ]
    found = Page(tmp_path / "report.html")
    # Every command is the one that writes that result: `evaluate` fits no logistic regression.
    commands = f"linear (vi-simsiam linear {tmp_path}), logistic (vi-simsiam logistic {tmp_path})"
    assert f"Not measured yet: accuracy by {commands}." in found.text
    assert f"vi-simsiam uncertainty {tmp_path}" in found.text
    assert f"The images are left out: run: {tmp_path} has no checkpoint" in found.text
    assert "Nothing was logged" in found.text
    assert len(found.attributes("img")) == 1


def test_simsiam_has_a_report_without_certainty(tmp_path: Path) -> None:
    run = make_run(tmp_path, method="simsiam")
    found = Page(write_report(tmp_path, lambda: run))
    assert "certainty" not in {given.get("id") for _, given in found.tags}
    assert len(found.attributes("img")) == 1
    # `uncertainty` refuses such a run, so the page must not send anybody there.
    assert "vi-simsiam uncertainty" not in found.text
    assert "SimSiam predicts no concentration" in found.text


def test_results_of_earlier_weights_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are named on the page and in one line each, with the command that makes them again."""
    make_run(tmp_path, val=gray_source(4))
    evaluate_knn(feature_sets(tmp_path), KnnConfig(k=5))
    (tmp_path / "uncertainty.json").write_text(json.dumps(uncertainty_result() | {"step": 20}))
    for last, earlier in ((40, {"uncertainty": 20}), (50, {"knn": 40, "uncertainty": 20})):
        Checkpoint(last, 0.0, 8, {}).save(tmp_path / f"checkpoint-{last:08d}.safetensors")
        assert main(["report", str(tmp_path)]) == 0
        err, found = capsys.readouterr().err.splitlines(), Page(tmp_path / "report.html")
        lines = [
            f"{tmp_path / name}.json is left out: it is of step {step}, the run is at step {last}; "
            f"vi-simsiam {name} {tmp_path} makes it again"
            for name, step in earlier.items()
        ]
        assert [line for line in err if "left out" in line] == [f"warning: {x}" for x in lines]
        assert "; ".join(lines) in found.text
        assert ("accuracies" in found.tables) == ("knn" not in earlier)
        assert "misclassification" not in found.tables
    assert not (tmp_path / "reliability.png").exists()


def test_nothing_to_report_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"no metrics.jsonl and no result yet.* evaluate /"):
        report([str(tmp_path)])
    with pytest.raises(InputError, match="holds no run"):
        report([str(tmp_path / "nowhere")])
    for content, message in (
        ('{"top1": ', "is damaged "),
        ('{"top5": {}}', "is damaged .*lacks the key 'top1'"),
        ('{"top1": 3}', "is damaged .*'top1' of dict is not a dict"),
    ):
        (tmp_path / "knn.json").write_text(content)
        again = f"vi-simsiam knn {tmp_path} makes it again"
        with pytest.raises(InputError, match=rf"knn.json {message}.*; {again}"):
            report([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()
