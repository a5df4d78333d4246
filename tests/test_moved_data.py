"""Runs whose images have moved: the same images go on elsewhere, others do not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing_cases import noise
from PIL import Image

from vi_simsiam.cli import main
from vi_simsiam.config import TrainConfig
from vi_simsiam.data import cache, pack_file, packed
from vi_simsiam.data.cache import in_memory, pack
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.packed import open_pack
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.subsets import content, difference, select, subset
from vi_simsiam.engine.checkpoint import Checkpoint, checkpoints, load_last
from vi_simsiam.engine.origin import mark, places
from vi_simsiam.engine.run import check_images, load_run
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError

OPTIONS = "--epochs 2 --batch-size 8 --size 8 --workers 0 --device cpu --quiet"
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture
def photos(image_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image_folder, tmp_path / "photos"))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that the first test trains, with the small network of that test."""
    return tmp_path_factory.mktemp("interrupted") / "run"


@pytest.fixture
def run(image_folder: Path, interrupted: Path, photos: Path, tmp_path: Path) -> Path:
    """A run of two epochs on `photos` that was interrupted after the first."""
    if not interrupted.exists():
        _train_one_epoch("--data", image_folder, "--out", interrupted)
    out = Path(shutil.copytree(interrupted, tmp_path / "run"))
    settings = dataclasses.replace(config(out), data=f"folder:{photos}")
    (out / "config.json").write_text(json.dumps(settings.to_dict()))
    mark(out, places(settings))
    return out


def _train_one_epoch(*arguments: object) -> None:
    fit = Trainer.fit

    def fit_one_epoch(trainer: Trainer) -> None:
        def interrupt() -> None:
            trainer._save()
            raise KeyboardInterrupt

        fit(trainer, epoch_done=interrupt)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", fit_one_epoch)
        assert main(["train", *map(str, arguments), *OPTIONS.split()]) == 130


def resume(run: Path, *arguments: str) -> int:
    return main(["train", "--out", str(run), "--resume", "--quiet", *arguments])


def config(run: Path) -> TrainConfig:
    return TrainConfig.from_dict(json.loads((run / "config.json").read_text()))


def copied(photos: Path, place: Path) -> str:
    """A copy with other dates."""
    shutil.copytree(photos, place, copy_function=shutil.copyfile)
    return f"folder:{place}"


def packed_copy(photos: Path, place: Path) -> str:
    pack = place.with_suffix(".pack")
    assert main(["pack", str(photos), "--out", str(pack), "--workers", "0"]) == 0
    return f"pack:{pack}"


def test_a_run_goes_on_with_a_copy_of_its_images(
    run: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends with the weights of the run that stayed; a pack has no unreadable images."""
    monkeypatch.setattr(cache, "_TOLERATED_SHARE", 0.1)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    assert resume(other) == 0
    (photos / "val" / "dark" / "00.png").write_bytes(b"")
    place = packed_copy(photos, tmp_path / "scratch")
    shutil.rmtree(photos)
    assert resume(run) == main(["knn", str(run), "--device", "cpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"vi-simsiam: {photos}: no such folder")
        assert f"images of {run} have moved, name their new place with --data" in line
    assert resume(run, "--data", place, "--cache-dir", str(tmp_path / "cache")) == 0
    assert (config(run).data, config(run).cache_dir) == (place, tmp_path / "cache")
    stayed, moved = (load_last(each) for each in (other, run))
    assert stayed.step == moved.step == 10
    assert all(torch.equal(stayed.model[name], moved.model[name]) for name in stayed.model)
    assert len(load_run(run, device="cpu").splits.train) == 40


def test_the_held_out_images_move_with_the_others(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _train_one_epoch("--data", photos, "--out", run, "--held-out", 0.2, "--images", 24)
    assert resume(run, "--data", packed_copy(photos, tmp_path / "scratch")) == 0
    (photos / "train" / "dark" / "02.png").unlink()
    assert resume(run, "--data", str(photos)) == 2


def repaint(image: Path) -> None:
    values = np.asarray(Image.open(image)).copy()
    values[0, 0, 0] ^= 1
    Image.fromarray(values).save(image)


@pytest.mark.parametrize(
    ("part", "change", "difference", "moved"),
    [
        ("train", Path.unlink, "39 readable training images", True),
        ("train", repaint, "other pixels", False),
        ("val", Path.unlink, "other validation images", False),
    ],
)
def test_other_images_are_refused(
    part: str,
    change: Callable[[Path], object],
    difference: str,
    moved: bool,
    run: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = copied(photos, tmp_path / "scratch") if moved else f"folder:{photos}"
    change(Path(place.removeprefix("folder:"), part, "dark", "00.png"))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert resume(run, "--data", place) == 2
    problem = f"is no copy of folder:{photos}" if moved else "has changed since"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vi-simsiam: resume: {place} {problem}")
    assert f": {difference}" in line
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_run_of_an_older_version_stays_where_its_images_are(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = dataclasses.replace(load_last(run), content={})
    checkpoint.save(checkpoints(run)[0])
    place = copied(photos, tmp_path / "scratch")
    assert resume(run, "--data", place) == 2
    assert f"{place} cannot be compared with folder:{photos}" in capsys.readouterr().err
    assert resume(run) == 0
    assert resume(run, "--data", place) == 0, "from then on it can be compared"


def test_named_data_sets_move_with_their_root(tmp_path: Path) -> None:
    saved = TrainConfig(data="imagenette", data_root=tmp_path / "before")
    moved = dataclasses.replace(saved, data_root=tmp_path / "now")
    checkpoint = Checkpoint(1, 0.0, 3, {}, content={"images": 3, "classes": None, "pixels": "a"})
    check_images(saved, moved, checkpoint, {"images": 3, "classes": None, "pixels": "a"})
    places = [f"imagenette under {folder}" for folder in (moved.data_root, saved.data_root)]
    with pytest.raises(InputError, match=f"{' is no copy of '.join(places)}, .*: other pixels"):
        check_images(saved, moved, checkpoint, {"images": 3, "classes": None, "pixels": "b"})


@pytest.mark.parametrize("piece", [693, 1000, 5000])
def test_content_is_that_of_the_pixels_however_they_are_kept(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, in a file, or a choice from either; whole pieces of a file are not read again."""
    for module in (pack_file, packed):
        monkeypatch.setattr(module, "CHECKED_BYTES", piece)
    arrays = np.stack([noise(9, 7, seed) for seed in range(11)])
    source = ArraySource(arrays, np.arange(11, dtype=np.int64) % 3, "abc")
    splits = Splits("x", source, None)
    pack(source, tmp_path / "x.pack", workers=0)
    file, whole = open_pack(tmp_path / "x.pack"), content(splits, in_memory(source))
    assert len(file.pixels) == 2079
    assert content(splits, file) == whole
    known = 2079 // piece * piece
    file._pixels = np.concatenate([np.zeros(known, np.uint8), file.pixels[known:]])
    assert content(splits, file) == whole

    both = (Splits("x", each, None) for each in (source, in_memory(source)))
    chosen = [select(each, images=6, seed=1) for each in both]
    first, second = (content(each, in_memory(each.train)) for each in chosen)
    assert first == second
    other = subset(in_memory(source), np.array([0, 1, 2, 3, 4, 5]))
    assert first["pixels"] != content(splits, in_memory(other))["pixels"]


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ((16, "a", 0), (15, "b", 1), True),
        ((15, "b", 1), (15, "c", 1), False),
        ((16, "a", 0), (14, "b", 1), False),
        ((16, "a", 0), None, False),
        (None, None, True),
    ],
)
def test_validation_images_that_a_pack_leaves_out(
    before: tuple[int, str, int] | None, now: tuple[int, str, int] | None, same: bool
) -> None:
    names = ("images", "labels", "left_out")
    parts = [each and dict(zip(names, each, strict=True)) for each in (before, now)]
    both = [{"images": 1, "validation": part} for part in parts]
    expected = None if same else "other validation images"
    assert difference(*both) == difference(*both[::-1]) == expected


def test_the_first_difference_is_named() -> None:
    images, labels = np.stack([noise(9, 7, seed) for seed in range(4)]), np.array([0, 1, 0, 1])

    def contents(images: np.ndarray, labels: np.ndarray, classes: str = "ab") -> dict[str, Any]:
        source = ArraySource(images, labels, classes)
        return content(Splits("x", source, None), in_memory(source))

    before, more = contents(images, labels), [0, 1, 2, 3, 3]
    assert difference(before, before) is None
    for now, words in (
        (contents(images[:3], labels[:3]), "3 readable training images, not 4"),
        (contents(images[more], labels[more]), "5 readable training images, not 4"),
        (contents(images, labels, "ba"), "other classes (in another order)"),
        (contents(images, labels, "ac"), "other classes (without b and with c)"),
        (before | {"classes": None}, "other classes (without a, b)"),
        (contents(images, 1 - labels), "other labels"),
        (contents(images.reshape(4, 7, 9, 3), labels), "other sizes of images"),
        (contents(images ^ 1, labels), "other pixels"),
    ):
        assert difference(before, now) == words
