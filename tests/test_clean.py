"""`vi-simsiam clean`: each kind of problem is found, none in a clean folder; files stay."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_cases import ON_CPU, SIZE, save_run
from PIL import Image, ImageFilter
from test_escaping import NAME, assert_inert, assert_lines

from vi_simsiam.cleaning import find
from vi_simsiam.cleaning.anchors import anchors
from vi_simsiam.cleaning.duplicates import find_copies
from vi_simsiam.cleaning.facts import FACTS, SIDE, facts_of
from vi_simsiam.cleaning.find import KINDS, _robust
from vi_simsiam.cleaning.labels import doubt
from vi_simsiam.cli import main
from vi_simsiam.data.sources import ArraySource

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("clean") / "run")


def scene(seed: int, side: int = 48) -> Image.Image:
    """A picture of coarse and fine structure, like no other."""
    generator = np.random.default_rng(seed)
    drawn = np.zeros((side, side, 3))
    for cells in (3, 6, 12, 24):
        coarse = generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        layer = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        drawn += np.asarray(layer) / 4
    return Image.fromarray(drawn.astype(np.uint8))


def save_scenes(folder: Path, seeds: range) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed:03d}.png" for seed in seeds]
    for seed, path in zip(seeds, paths, strict=True):
        scene(seed).save(path)
    return paths


def cleaned(run: Path, images: Path, out: Path, *options: str) -> list[dict[str, str]]:
    """The issues that the command finds."""
    command = ["clean", str(images), "--encoder", str(run), "--out", str(out), *options]
    assert main([*command, *ON_CPU]) == 0
    return rows(out / "issues.csv")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def found(issues: list[dict[str, str]]) -> set[tuple[str, str]]:
    return {(issue["kind"], Path(issue["path"]).name) for issue in issues}


def test_a_clean_folder_has_no_issue(run: Path, tmp_path: Path) -> None:
    save_scenes(tmp_path / "images", range(24))
    assert cleaned(run, tmp_path / "images", tmp_path / "out") == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "index.html",
        "issues.csv",
        "scores.csv",
    }
    assert len(rows(tmp_path / "out" / "scores.csv")) == 24


def test_every_kind_is_found(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    paths = save_scenes(images, range(24))
    with Image.open(paths[3]) as image:
        image.save(images / "exact.bmp")
        image.save(images / "near.jpg", quality=60)
        image.crop((0, 2, 46, 48)).resize((48, 48)).save(images / "cropped.png")
        image.filter(ImageFilter.GaussianBlur(12)).save(images / "blur.png")
    Image.new("RGB", (48, 48), "green").save(images / "flat.png")
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "noise.png")
    (images / "broken.png").write_bytes(b"no image")
    before = contents(images)
    issues = cleaned(run, images, tmp_path / "out")
    assert found([issue for issue in issues if issue["kind"] != "off_topic"]) == {
        ("unreadable", "broken.png"),
        ("exact_duplicate", "exact.bmp"),
        ("near_duplicate", "near.jpg"),
        ("near_duplicate", "cropped.png"),
        ("blank", "blur.png"),
        ("blank", "flat.png"),
        ("blank", "noise.png"),
    }
    assert {issue["other"] for issue in issues if "duplicate" in issue["kind"]} == {str(paths[3])}
    assert contents(images) == before
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {
        issue["kind"] for issue in issues
    } - {"unreadable"}
    shown = capsys.readouterr().out
    assert all(f"\n{kind} " in shown for kind in KINDS)
    again = cleaned(run, images, tmp_path / "again")
    assert again == issues


def test_copies_across_parts_are_leakage(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number, name in enumerate(("a", "b")):
        save_scenes(images / "train" / name, range(10 * number, 10 * number + 10))
        save_scenes(images / "val" / name, range(100 + 4 * number, 104 + 4 * number))
    scene(13).save(images / "val" / "b" / "exact.png")
    scene(4).save(images / "val" / "a" / "near.jpg", quality=70)
    scene(100).save(images / "val" / "a" / "within.png")
    issues = [issue for issue in cleaned(run, images, tmp_path / "out") if issue["other"]]
    assert found(issues) == {
        ("leakage", "exact.png"),
        ("leakage", "near.jpg"),
        ("exact_duplicate", "within.png"),
    }
    others = {Path(issue["path"]).name: Path(issue["other"]) for issue in issues}
    assert others["exact.png"] == images / "train" / "b" / "013.png"
    assert others["near.jpg"] == images / "train" / "a" / "004.png"
    scores = rows(tmp_path / "out" / "scores.csv")
    assert [row["part"] for row in scores] == ["train"] * 20 + ["val"] * 11
    assert {row["class"] for row in scores} == {"a", "b"}


def test_similarity_is_the_least_correlation(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    save_scenes(images, range(4))
    scene(2).save(images / "near.jpg", quality=60)
    (issue,) = cleaned(run, images, tmp_path / "out")
    assert issue["kind"] == "near_duplicate"
    stricter = ["--similarity", f"{float(issue['score']) + 0.001}"]
    assert cleaned(run, images, tmp_path / "strict", *stricter) == []


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_sets(run: Path, tmp_path: Path, count: int) -> None:
    save_scenes(tmp_path / "images", range(count))
    assert cleaned(run, tmp_path / "images", tmp_path / "out") == []
    assert len(rows(tmp_path / "out" / "scores.csv")) == count


def test_few_images_have_blank_ones_among_them(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    save_scenes(images, range(2))
    Image.new("RGB", (48, 48), "green").save(images / "flat.png")
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "noise.png")
    issues = cleaned(run, images, tmp_path / "out")
    assert found(issues) == {("blank", "flat.png"), ("blank", "noise.png")}


def test_one_class_has_no_label_errors(run: Path, tmp_path: Path) -> None:
    save_scenes(tmp_path / "images" / "train" / "a", range(6))
    assert cleaned(run, tmp_path / "images", tmp_path / "out") == []
    assert "label_error" not in rows(tmp_path / "out" / "scores.csv")[0]


def test_simsiam_has_no_kappa(run: Path, tmp_path: Path) -> None:
    save_scenes(tmp_path / "images", range(3))
    simsiam = save_run(tmp_path / "simsiam", "simsiam")
    cleaned(simsiam, tmp_path / "images", tmp_path / "a")
    cleaned(run, tmp_path / "images", tmp_path / "b")
    assert "kappa" not in rows(tmp_path / "a" / "scores.csv")[0]
    assert float(rows(tmp_path / "b" / "scores.csv")[0]["kappa"]) > 0


def test_out_is_replaced_on_demand_only(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    paths = save_scenes(images, range(3))
    scene(1).save(images / "copy.png")
    assert found(cleaned(run, images, out)) == {("exact_duplicate", "copy.png")}
    before = contents(out)
    command = ["clean", str(images), "--encoder", str(run), "--out", str(out), *ON_CPU]
    assert main(command) == 2
    assert "exists; say --overwrite" in capsys.readouterr().err
    (images / "copy.png").unlink()
    assert contents(out) == before
    assert cleaned(run, images, out, "--overwrite") == []
    assert not (out / "exact_duplicate.png").exists()
    (out / "mine.txt").write_text("kept")
    before = contents(out)
    assert main([*command, "--overwrite"]) == 2
    assert "holds other files" in capsys.readouterr().err
    for place, reason in ((paths[0], "is a file"), (tmp_path / "no" / "out", "is no folder")):
        assert main([*command, "--out", str(place)]) == 2
        assert reason in capsys.readouterr().err
    for value in ("0", "1.5", "nan"):
        place = str(tmp_path / "new")
        assert main([*command, "--out", place, "--similarity", value]) == 2
        assert "similarity" in capsys.readouterr().err
    assert contents(out) == before
    assert not (tmp_path / "new").exists()


def test_hostile_names(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / f"i{NAME}"
    save_scenes(images / "train" / f"=a{NAME}", range(6))
    save_scenes(images / "train" / "b", range(10, 16))
    scene(1).save(images / "train" / "b" / f"{NAME}.png")
    (images / "train" / "b" / f"x{NAME}.png").write_text("no image")
    issues = cleaned(run, images, tmp_path / "out")
    assert {issue["kind"] for issue in issues} >= {"unreadable", "exact_duplicate"}
    assert all(Path(issue["path"]).exists() for issue in issues)
    assert all(row["class"].startswith(("./=", "b")) for row in rows(tmp_path / "out/scores.csv"))
    printed = capsys.readouterr()
    assert_lines(printed.out)
    assert_lines(printed.err)
    page = (tmp_path / "out" / "index.html").read_text()
    assert_inert(page)
    assert r"\u202e" in page


def test_nothing_readable_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    command = ["clean", str(images), "--encoder", str(run), "--out", str(tmp_path / "x"), *ON_CPU]
    assert main(command) == 2
    (images / "a.png").write_text("no image")
    assert main(command) == 2
    assert main(["clean", str(tmp_path / "gone"), *command[2:]]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(("vi-simsiam: ", "skipped: ")) for line in lines] == [True] * len(lines)
    assert not (tmp_path / "x").exists()


def test_groups_keep_their_first_image() -> None:
    """An exact copy and two near ones, of which the last was compared with the third alone."""
    generator = np.random.default_rng(0)
    facts = np.zeros(5, FACTS)
    noise = generator.normal(size=(SIDE, SIDE))
    for row, share in enumerate((0, 0, 0.3, 0.6, 5)):
        values = np.random.default_rng(9).normal(size=(SIDE, SIDE)) + share * noise
        facts["thumbnail"][row] = np.clip(128 + 20 * values, 0, 255)
        facts["digest"][row] = bytes([max(row, 1)] * 16)
    embedding = np.eye(5, dtype=np.float32)
    copies = find_copies(embedding, facts, device=CPU, threshold=0.94)
    assert copies.other.tolist() == [-1, 0, 0, 2, -1]
    assert copies.pair[1] == copies.similarity[0] == copies.similarity[1] == 1
    assert ((copies.pair[2:4] >= 0.94) & (copies.pair[2:4] < 1)).all()


def test_facts() -> None:
    def facts(image: Image.Image) -> np.void:
        return facts_of(image).view(FACTS)[0]

    picture = scene(0)
    assert facts(picture)["digest"] == facts(picture.copy())["digest"]
    assert facts(picture)["digest"] != facts(picture.rotate(180))["digest"]
    assert facts(Image.new("RGB", (8, 2)))["digest"] != facts(Image.new("RGB", (2, 8)))["digest"]
    values = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    noise = facts(Image.fromarray(values).convert("RGB"))
    assert noise["roughness"] == pytest.approx(1, abs=0.05)
    assert noise["contrast"] == pytest.approx(12**-0.5, abs=0.01)
    assert facts(picture)["roughness"] < 0.7
    assert facts(Image.new("RGB", (1, 1)))["roughness"] == 0


@pytest.mark.parametrize("pixels", [(24, 9, 9, 3), (24, 9, 9), (24, 9, 9, 5)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_anchors_are_of_the_sources_kind(pixels: tuple[int, ...], kind: type) -> None:
    source = ArraySource(np.random.default_rng(0).integers(0, 200, pixels).astype(kind))
    drawn = anchors(source, np.arange(24), SIZE)
    assert drawn.dtype == kind
    assert drawn.shape == (48, SIZE, SIZE, source.decode.channels)
    assert np.ptp(drawn[:16], axis=(1, 2)).max() == 0
    assert drawn.max() == np.iinfo(kind).max
    np.testing.assert_array_equal(drawn, anchors(source, np.arange(24), SIZE))


def test_swapped_labels_are_found() -> None:
    generator = np.random.default_rng(0)
    truth = np.arange(200) % 4
    embedding = (4 * np.eye(4)[truth] + generator.normal(size=(200, 4))).astype(np.float32)
    labels = truth.copy()
    swapped = np.arange(0, 200, 20)
    labels[swapped] = (labels[swapped] + 1) % 4
    labels[7] = 4  # a class of one image
    doubts = doubt(embedding, labels, 5)
    assert doubts is not None
    assert np.isnan(doubts.score).nonzero()[0].tolist() == [7]
    worst = np.argsort(-np.nan_to_num(doubts.score, nan=-2))[:10]
    assert np.isin(worst, swapped).mean() >= 0.9
    np.testing.assert_array_equal(doubts.suggested[swapped], truth[swapped])
    assert doubts.confident[swapped].mean() >= 0.6
    assert doubts.confident.sum() <= 14
    assert doubt(embedding, np.zeros(200, np.int64), 5) is None


def test_likely_label_errors_are_issues(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name, low in (("dark", 0), ("bright", 128)):
        (images / "train" / name).mkdir(parents=True)
        for number in range(12):
            pixels = np.asarray(scene(number + low)) // 2 + np.uint8(low)
            Image.fromarray(pixels).save(images / "train" / name / f"{number + low}.png")
    (images / "train" / "dark" / "3.png").rename(images / "train" / "bright" / "3.png")
    issues = cleaned(run, images, tmp_path / "out")
    (issue,) = [issue for issue in issues if issue["kind"] == "label_error"]
    assert Path(issue["path"]).name == "3.png"
    assert issue["reason"] == "labelled bright, looks like dark"


def test_an_image_far_from_all_others_is_off_topic(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = save_scenes(tmp_path / "images", range(30))
    Image.new("RGB", (48, 48)).save(paths[5])

    def distances(name: str, embedding: np.ndarray, device: torch.device) -> np.ndarray:
        assert embedding.shape[0] == 30
        return np.where(np.isin(np.arange(30), [5, 11]), 9.0, np.linspace(0.9, 1.1, 30))

    monkeypatch.setattr(find, "measured", distances)
    issues = cleaned(run, tmp_path / "images", tmp_path / "out")
    assert found(issues) == {("off_topic", "011.png"), ("blank", "005.png")}


def test_robust_scores() -> None:
    values = np.random.default_rng(0).normal(5, 3, 10001)
    values[0] = 1e6
    scores = _robust(values)
    assert scores[1:].std() == pytest.approx(1, abs=0.05)
    assert scores[0] > 1e5
    assert not _robust(np.ones(30)).any()
    assert not _robust(values[:19]).any()
