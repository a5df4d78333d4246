"""`vi-simsiam bench clean`: problems are put in as described, and what is found is counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiment_cases import tiny_config
from inference_cases import save_run
from PIL import Image

from vi_simsiam.benchmarks import clean, clean_scores, contamination, report
from vi_simsiam.benchmarks.contamination import (
    BLANK,
    COPIES,
    CROPPED,
    ENCODED,
    EXACT,
    FOREIGN,
    KINDS,
    LABEL,
    contaminate,
)
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.errors import InputError

IMAGES = 60
EACH = IMAGES // 20


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("bench") / "run")


def test_problems_are_those_described(tmp_path: Path) -> None:
    source = open_dataset("fashion-mini").train
    foreign = ArraySource(np.full((8, 12, 12), 7, np.uint8))
    (tmp_path / "again").mkdir()
    made, again = (
        contaminate(source, foreign, folder, images=IMAGES, seed=3)
        for folder in (tmp_path, tmp_path / "again")
    )
    kinds, counts = np.unique(made.kind, return_counts=True)
    expected = {"": IMAGES - EACH, **dict.fromkeys(KINDS, EACH)}
    assert dict(zip(kinds.tolist(), counts.tolist(), strict=True)) == expected
    assert (made.kind[made.origin[made.origin >= 0]] == "").all()
    assert set(made.kind[made.origin >= 0]) == set(COPIES)
    for row in np.flatnonzero(made.kind == EXACT).tolist():
        assert np.array_equal(made.source.array(row), made.source.array(int(made.origin[row])))
    sides = {made.source.dimensions(row) for row in np.flatnonzero(made.kind == CROPPED).tolist()}
    assert (28, 28) in sides, "enlarged again"
    assert 0.78 * 28 <= min(map(min, sides)) < 28
    for row in np.flatnonzero(made.kind == FOREIGN).tolist():
        assert (made.source.array(row) == 7).all()
    blanks = [made.source.array(row) for row in np.flatnonzero(made.kind == BLANK).tolist()]
    assert min(np.ptp(pixels, (0, 1)).max() for pixels in blanks) == 0, "one colour"
    suffixes = {Path(made.source.paths[row]).suffix for row in np.flatnonzero(made.kind == ENCODED)}
    assert suffixes == {".jpg"}
    rows = np.random.default_rng(3).permutation(len(source))[:IMAGES]
    assert made.source.labels is not None
    assert source.labels is not None
    wrong = made.source.labels[:IMAGES] != source.labels[rows]
    assert (wrong == (made.kind[:IMAGES] == LABEL)).all()
    assert (made.source.labels == again.source.labels).all()
    for row in range(len(made.kind)):
        assert np.array_equal(made.source.array(row), again.source.array(row))


def test_what_is_found_is_counted_and_written(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"{name} is not installed")

    monkeypatch.setattr(clean_scores, "installed", missing)
    options = clean.Options(encoder=encoder, images=IMAGES, seeds=2, device="cpu", out=tmp_path)
    exact = clean.run(options)["cases"][0]["kinds"][EXACT]
    assert exact["found"] == [1, 1]
    assert exact["false_alarms"] == [0, 0]
    assert exact["clean"] == [IMAGES - 4 * EACH] * 2
    assert exact["scores"]["clean"] == [1, 1]
    path = tmp_path / "cpu" / "clean.json"
    content = json.loads(path.read_text())
    content["cases"][0]["name"] = "another"
    path.write_text(json.dumps(content))
    again = dataclasses.replace(options, seeds=1)
    assert [case["name"] for case in clean.run(again)["cases"]] == ["another", "fashion-mini"]
    section = "<!-- bench: clean cpu/clean.json -->\n<!-- /bench -->"
    text = report.fill(section, tmp_path)
    assert "| exact copy | clean | 1.00 | 100% | 0 |" in text
    assert "|  | perceptual hash | ImportError: imagehash is not installed |" in text
    assert "| another, 60 images |" in text


def test_a_score_of_images_at_random_finds_few(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels in the wrong order: the figures come from the rows of the problems."""
    made = contamination.contaminate

    def shuffled(*args: Any, **options: Any) -> contamination.Contaminated:
        found = made(*args, **options)
        return found._replace(kind=np.roll(found.kind, 7))

    monkeypatch.setattr(clean, "contaminate", shuffled)
    options = clean.Options(encoder=encoder, images=IMAGES, seeds=1, device="cpu")
    kinds = clean.run(options)["cases"][0]["kinds"]
    assert max(kinds[kind]["found"][0] for kind in (EXACT, CROPPED)) < 1
    assert kinds[EXACT]["scores"]["clean"][0] < 0.9


def test_an_encoder_is_trained_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(tiny_config("fashion-mini"), images=16)
    monkeypatch.setattr(clean, "preset", {"demo": small}.__getitem__)
    case = clean.run(clean.Options(images=40, seeds=1, device="cpu"))["cases"][0]
    assert case["encoder"] == "resnet18, fashion-mini"
    assert case["kinds"][EXACT]["found"] == [1]


def test_unusable_options(encoder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    given = {"encoder": encoder, "device": "cpu"}
    for options, reason in (
        (clean.Options(data=f"folder:{tmp_path}", **given), "has no labels"),
        (clean.Options(images=39, **given), "images: 39 .*between 40 and the 8,000"),
        (clean.Options(seeds=0, **given), "seeds: 0"),
        (clean.Options(foreign=f"folder:{tmp_path}", **given), "foreign: .*50 images or more"),
    ):
        with pytest.raises(InputError, match=reason):
            clean.run(options)
