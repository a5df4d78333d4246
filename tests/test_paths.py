"""Paths with ~, on the command line and in Python, with a home folder and without."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from pathlib import Path

import pytest
from PIL import Image

import vi_simsiam
from vi_simsiam.cli import main
from vi_simsiam.config import data_spec
from vi_simsiam.data.cache import cache_folder
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.engine.run import load_run, read_config
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError
from vi_simsiam.inference.images import open_images
from vi_simsiam.paths import user_path

PACKAGE = Path(vi_simsiam.__file__).parent
SMALL = "--dim 16 --projector-hidden 16 --predictor-hidden 16 --epochs 1 --device cpu --workers 0"


@pytest.fixture
def home(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that holds photos/, seen from a working folder of its own."""
    (tmp_path / "home").mkdir()
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
    for name in ("VI_SIMSIAM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
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
    homeless: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert user_path("out", "~nosuch/run") == Path("~nosuch/run")
    with pytest.raises(InputError, match="^out: ~/run: this user has no home folder; set HOME"):
        user_path("out", "~/run")
    commands = {"out": "train --out ~/run", "data": "views --data ~/x", "run": "report ~/run"}
    for name, command in commands.items():
        assert main(command.split()) == 2
        assert capsys.readouterr().err.startswith(f"vi-simsiam: {name}: ~/")
    (tmp_path / "~" / "run").mkdir(parents=True)
    assert user_path("out", "~/run") == Path("~/run")
    assert cache_folder() == Path(tempfile.gettempdir(), f"vi-simsiam-{os.getuid()}")


def test_a_home_that_cannot_be_written_holds_no_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VI_SIMSIAM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == home / ".cache" / "vi-simsiam"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cache_folder() == Path(tempfile.gettempdir(), f"vi-simsiam-{os.getuid()}")
    (home / ".cache" / "vi-simsiam").mkdir(parents=True)  # what is decoded there can be read
    assert cache_folder() == home / ".cache" / "vi-simsiam"


def test_names_that_begin_with_a_tilde(homeless: None, image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "~photos")
    shutil.copy(image_folder / "val" / "dark" / "00.png", tmp_path / "~lock.png")
    assert len(open_dataset("~photos").train) == 40
    assert len(open_images("~lock.png")) == len(open_images(["~lock.png"])) == 1
    assert main(["views", "--data", "~photos", "--images", "2", "--out", "~views.png"]) == 0
    assert (tmp_path / "~views.png").is_file()


def test_commands_take_a_run_in_the_home_folder(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "mine.yaml").write_text("cache_dir: ~/cache\n")
    for command in (
        f"train --data ~/photos --config=~/mine.yaml --out=~/run {SMALL}",
        "train --out=~/run --resume",
        "figures ~/run",
        "knn ~/run --data ~/photos",
        "embed ~/run ~/photos/val/dark --out ~/f.parquet --reference ~/photos/val/dark",
        "rank ~/run ~/photos/val --out ~/rank",
        "views --data ~/photos --out ~/views.png --images 2",
        "pack ~/photos --out ~/x.pack",
        "views --data pack:~/x.pack --out ~/packed.png --images 2",
        "export ~/run --format torchvision --out ~/weights --data ~/photos",
    ):
        assert main(command.split()) == 0, (command, capsys.readouterr())
    assert list(Path.cwd().iterdir()) == []
    config = read_config(home / "run")
    assert (config.data, config.cache_dir) == (f"folder:{home / 'photos'}", home / "cache")
    written = "run/kappa.png run/knn.json f.parquet rank.csv rank.png views.png x.val.pack"
    for name in (*written.split(), "packed.png", "weights/model.pth"):
        assert (home / name).is_file(), name
    assert any((home / "cache").iterdir())


def test_python_takes_a_run_in_the_home_folder(home: Path) -> None:
    assert main(f"train --data ~/photos --out ~/run {SMALL} --quiet".split()) == 0
    assert vi_simsiam.load("~/run").run.path == home / "run"
    assert load_run("~/run", data="~/photos").path == home / "run"
    assert Trainer(read_config(home / "run"), "~/run", resume=True).folder == home / "run"
    assert data_spec("~/photos") == data_spec("folder:~/photos") == f"folder:{home / 'photos'}"
    with Image.open(home / "photos" / "val" / "dark" / "00.png") as image:
        assert len(open_images(["~/photos/val/dark/00.png", image])) == 2
        assert open_images(["~/photos/val/dark/00.png"]).image(0).tobytes() == image.tobytes()


def test_one_function_expands_paths() -> None:
    # The latter two may be links, which rglob does not follow.
    folders = (PACKAGE, PACKAGE / "kernels", PACKAGE / "benchmarks")
    files = {file for folder in folders for file in folder.rglob("*.py")}
    assert [file for file in files if "expanduser" in file.read_text()] == [PACKAGE / "paths.py"]
