"""Paths with ~, with a home folder and without, and names whose bytes are not UTF-8."""

from __future__ import annotations

import csv
import io
import json
import os
import pwd
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from evaluation_cases import skip_rendering
from inference_cases import save_run
from pyarrow import parquet
from rich.console import Console

import vi_simsiam
from vi_simsiam.cli import main
from vi_simsiam.data.cache import cache_folder, cached
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.packed import open_pack
from vi_simsiam.engine.run import read_config
from vi_simsiam.engine.train import Trainer
from vi_simsiam.evaluation import style
from vi_simsiam.evaluation.foreign import _free_name
from vi_simsiam.evaluation.style import shown
from vi_simsiam.inference.images import open_images
from vi_simsiam.paths import printable, user_path

SMALL = "--dim 8 --size 8 --epochs 1 --device cpu --workers 0 --quiet"
CAFE = os.fsdecode(b"caf\xe9")


def succeed(*words: object) -> None:
    assert main([str(word) for word in words]) == 0, words


@pytest.fixture
def home(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that holds photos/, seen from a working folder of its own."""
    (tmp_path / "here").mkdir()
    shutil.copytree(image_folder, tmp_path / "home" / "photos")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with an arbitrary user number, as in a container."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)


def test_the_home_folder_takes_the_place_of_a_tilde(home: Path) -> None:
    assert user_path("out", "~/run") == home / "run"
    assert user_path("out", Path("~")) == home
    root = pwd.getpwuid(0)
    assert user_path("out", f"~{root.pw_name}/run") == Path(root.pw_dir, "run")
    for literal in ("run", "/run", "a/~/b", "~lock.png", "~nosuch/run", "~nosuch\udce9/run", ""):
        assert user_path("out", literal) == Path(literal)


def test_without_a_home_folder(
    homeless: None, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert user_path("out", "~nosuch/run") == Path("~nosuch/run")
    commands = {"out": "train --out ~/run", "data": "views --data ~/x", "run": "report ~/run"}
    for name, command in commands.items():
        assert main(command.split()) == 2
        message = f"vi-simsiam: {name}: ~/.*: this user has no home folder; set HOME"
        assert re.match(message, capsys.readouterr().err)
    Path("~/run").mkdir(parents=True)
    assert user_path("out", "~/run") == Path("~/run")
    shutil.copytree(image_folder, "~photos")
    succeed("views", "--data", "~photos", "--images", 2, "--out", "~views.png")
    assert Path("~views.png").is_file()


def test_the_cache_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    own, temporary = home / ".cache" / "vi-simsiam", Path(tempfile.gettempdir())
    monkeypatch.setenv("VI_SIMSIAM_CACHE", "~/own")
    assert cache_folder() == home / "own"
    monkeypatch.delenv("VI_SIMSIAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/vi-simsiam")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == own
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert cache_folder() == temporary / f"vi-simsiam-{os.getuid()}"
        own.mkdir(parents=True)  # what is decoded there can be read
        assert cache_folder() == own
    request.getfixturevalue("homeless")
    assert cache_folder() == temporary / f"vi-simsiam-{os.getuid()}"


@pytest.mark.usefixtures("small_network")
def test_a_run_in_the_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In commands and in Python."""
    skip_rendering(monkeypatch)
    (home / "mine.yaml").write_text("cache_dir: ~/cache\n")
    for command in (
        f"train --data ~/photos --config=~/mine.yaml --out=~/run {SMALL}",
        "figures ~/run",
        "knn ~/run --data ~/photos",
        "embed ~/run ~/photos/val/dark --out ~/f.parquet --reference ~/photos/val/dark",
        "rank ~/run ~/photos/val --out ~/rank",
        "pack ~/photos --out ~/x.pack",
        "views --data pack:~/x.pack --out ~/views.png --images 2",
        "export ~/run --format safetensors --out ~/weights --data ~/photos",
    ):
        succeed(*command.split())
    assert list(Path.cwd().iterdir()) == []
    config = read_config(home / "run")
    assert (config.data, config.cache_dir) == (f"folder:{home / 'photos'}", home / "cache")
    written = "run/kappa.png run/knn.json f.parquet rank.csv rank.png views.png x.val.pack"
    for name in (*written.split(), "weights/model.safetensors"):
        assert (home / name).is_file(), name
    assert vi_simsiam.load("~/run").run.path == home / "run"
    assert Trainer(config, "~/run", resume=True).folder == home / "run"
    assert len(open_images(["~/photos/val/dark/00.png"])) == 1


@pytest.fixture
def folder(image_folder: Path, tmp_path: Path) -> Path:
    """A folder that holds images; its name and those of a class and its files are not UTF-8."""
    images = tmp_path / "names" / CAFE / CAFE
    try:
        shutil.copytree(image_folder, images)
        for part in ("train", "val"):
            (images / part / "dark").rename(images / part / CAFE)
            for path in (images / part / CAFE).iterdir():
                path.rename(path.with_name(f"{path.stem}{CAFE}.png"))
    except OSError:
        pytest.skip("this file system takes no such names: training, results and exports with them")
    return images.parent


@pytest.mark.usefixtures("small_network")
def test_names_that_are_not_utf8(
    small_network: None,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From training to results: files hold the bytes, pages and pictures show them escaped."""
    monkeypatch.setattr(style, "_DPI", 40)
    run, pack, data = folder / "run", folder / f"{CAFE}.pack", folder / CAFE
    images = {os.fsencode(path) for path in data.rglob("*.png")}
    succeed("train", "--data", data, "--out", run, *SMALL.split())
    assert read_config(run).data == f"folder:{data}"
    assert list(run.glob("events.out.tfevents.*"))
    capsys.readouterr()
    succeed("pack", data, "--out", pack)
    assert f"written: {printable(str(pack))} (40 images" in capsys.readouterr().out
    packed = open_pack(pack)
    assert packed.classes == ("bright", CAFE)
    assert {os.fsencode(packed.describe(index)) for index in range(40)} <= images

    out = tmp_path / "results"
    out.mkdir()
    succeed("embed", run, data, "--out", out / f"{CAFE}.parquet", "--neighbours", 1)
    table = (out / f"{CAFE}.parquet").read_bytes()
    columns = parquet.read_table(io.BytesIO(table)).to_pydict()
    assert set(columns["path_bytes"]) == images
    assert columns["path"] == [printable(os.fsdecode(path)) for path in columns["path_bytes"]]
    assert {path for paths in columns["neighbours"] for path in paths} <= set(columns["path"])
    succeed("rank", run, data, "--out", out / CAFE, "-k", 2)
    with (out / f"{CAFE}.csv").open(errors="surrogateescape", newline="") as file:
        assert {os.fsencode(row["path"]) for row in csv.DictReader(file)} == images
    names = {b"caf\xe9.parquet", b"caf\xe9.csv", b"caf\xe9.png"}
    assert {os.fsencode(path.name) for path in out.iterdir()} == names

    succeed("report", run)
    assert "VI-SimSiam on caf\\udce9" in (run / "report.html").read_text(encoding="utf-8")
    assert shown(f"folder:/a/{CAFE}") == _free_name(f"pack:/a/{CAFE}.pack", set()) == "caf\\udce9"
    succeed("views", "--data", data, "--out", folder / f"{CAFE}.png", "--images", 2)
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    source = open_dataset(str(data)).train
    cached(source, cache_dir=tmp_path, workers=0, console=Console(file=printed))


def test_exports_and_refusals_with_such_names(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """timm reads its folder by a path, and a message stays one line."""
    run = save_run(folder / "run")
    config = read_config(run).to_dict() | {"data": f"folder:{folder / CAFE}"}
    (run / "config.json").write_text(json.dumps(config))
    for name in ("safetensors", "timm"):
        succeed("export", run, "--format", name)
        assert (run / "export" / name / "model.safetensors").is_file()
    readme = (run / "export" / "safetensors" / "README.md").read_text(encoding="utf-8")
    assert "caf\\udce9" in readme

    (folder / "two\nlines\x1b[31m.png").write_bytes(b"no image")
    capsys.readouterr()
    assert main(["pack", str(folder), "--out", str(tmp_path / "pack")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"two\nlines\x1b[31m.png" in line
