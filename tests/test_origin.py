"""Runs from elsewhere: what their configuration names is not read, written or downloaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from vi_simsiam.cli import main
from vi_simsiam.config import TrainConfig
from vi_simsiam.data import datasets
from vi_simsiam.engine import origin
from vi_simsiam.engine.checkpoint import checkpoints, load_last
from vi_simsiam.engine.origin import is_own, mark, placed, places
from vi_simsiam.engine.run import load_run, read_config
from vi_simsiam.errors import InputError
from vi_simsiam.experiments import seeds

ON_CPU = ["--device", "cpu", "--workers", "0"]
OPTIONS = ["--epochs", "1", "--batch-size", "8", "--size", "8", *ON_CPU, "--quiet"]
NOT_OWN = "but this user has not trained it here, or its configuration was changed since"
pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture(scope="module")
def trained(small_runs: None, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos beside it, with its decoded images beside it, too."""
    place = tmp_path_factory.mktemp("elsewhere")
    photos = shutil.copytree(image_folder, place / "photos")
    given = ["--data", photos, "--out", place / "run", "--cache-dir", place / "cache"]
    assert main(["train", *map(str, given), *OPTIONS]) == 0
    assert list((place / "cache").iterdir())
    return place


@pytest.fixture
def own(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run on the machine and by the user that trained it."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


@pytest.fixture
def foreign(
    own: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A copy of the run for a user with another cache folder, and that folder.

    What the run names is there, but must not be touched.
    """
    shutil.rmtree(trained / "cache", ignore_errors=True)
    monkeypatch.setenv("VI_SIMSIAM_CACHE", str(tmp_path / "other"))
    return own, tmp_path / "other"


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_run_finds_its_images_where_this_user_trained_it(own: Path, trained: Path) -> None:
    run = load_run(own, device="cpu", workers=0)
    assert len(run.splits.train) == 40
    assert run.config.cache_dir == trained / "cache"
    assert main(["knn", str(own), *ON_CPU]) == 0


@pytest.mark.parametrize("command", ["evaluate", "knn", "linear", "logistic", "uncertainty"])
def test_a_foreign_run_needs_the_place_of_its_images(
    command: str,
    foreign: tuple[Path, Path],
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = foreign
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "_folder", lambda *given: pytest.fail("a folder was opened"))
        assert main([command, str(run), *ON_CPU]) == 2
    line = refusal(capsys)
    assert line == (
        f"vi-simsiam: run: {run} names the images folder:{trained / 'photos'}, {NOT_OWN}; name the "
        "place of the images with --data"
    )


def test_a_foreign_run_leaves_its_decoded_images_in_the_users_place(
    foreign: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    run, cache = foreign
    assert main(["knn", str(run), "--data", str(trained / "photos"), *ON_CPU]) == 0
    assert list(cache.glob("*.pack"))
    named = ["--data", str(trained / "photos"), "--cache-dir", str(tmp_path / "named")]
    assert main(["knn", str(run), *named, *ON_CPU]) == 0
    assert list((tmp_path / "named").glob("*.pack"))
    assert not (trained / "cache").exists()


def test_commands_without_its_images_take_a_foreign_run(
    foreign: tuple[Path, Path],
    trained: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = foreign
    folder = datasets._folder

    def opened(path: Path, *given: Any) -> Any:
        assert trained not in path.parents
        return folder(path, *given)

    monkeypatch.setattr(datasets, "_folder", opened)
    images = str(image_folder / "val" / "dark")
    for command, out in (("embed", "features.parquet"), ("rank", "ranking")):
        given = [command, str(run), images, "--out", str(tmp_path / out), *ON_CPU]
        assert main(given) == 0
    capsys.readouterr()
    assert main(["export", str(run), "--format", "safetensors"]) == 0
    stand_in = f"checked on fashion-mini, not on the run's own images (run: {run} names the images"
    assert stand_in in capsys.readouterr().out
    assert main(["report", str(run), *ON_CPU]) == 0
    assert f"images left out: run: {run} names the images" in capsys.readouterr().out
    assert "name the place of the images with --data" in (run / "report.html").read_text()
    assert not (trained / "cache").exists()


@pytest.mark.parametrize("name", ["data", "data_root", "cache_dir", "init"])
def test_an_edited_place_makes_a_run_foreign(name: str, own: Path) -> None:
    config = read_config(own)
    assert is_own(own, places(config))
    value: Any = "folder:/etc" if name == "data" else Path("/etc")
    assert not is_own(own, places(dataclasses.replace(config, **{name: value})))
    other = dataclasses.replace(config, epochs=7, device="cuda")
    assert is_own(own, places(other)), "other settings are no places"


def test_a_mark_of_an_earlier_version_is_one(own: Path) -> None:
    plain = json.loads((own / "config.json").read_text())
    mark(own, {name: plain[name] for name in ("data", "data_root", "cache_dir")})
    assert not is_own(own, places(read_config(own)))
    mark(own, {n: plain.get(n) for n in ("data", "data_root", "cache_dir", "frozen_run")})
    assert is_own(own, places(read_config(own)))


def test_the_embedded_images_are_no_place(tmp_path: Path) -> None:
    config = TrainConfig(data_root=tmp_path / "a", cache_dir=tmp_path / "b")
    opened = placed(tmp_path, config)
    assert (opened.data, opened.data_root, opened.cache_dir) == ("fashion-mini", Path("data"), None)


def test_a_published_data_set_needs_its_root(tmp_path: Path) -> None:
    config = TrainConfig(data="imagenette", data_root=tmp_path / "theirs")
    with pytest.raises(InputError, match=f"{NOT_OWN}; name the place of the .* with --data-root"):
        placed(tmp_path, config)
    assert placed(tmp_path, config, data_root=tmp_path / "mine").data_root == tmp_path / "mine"
    assert placed(tmp_path, config, data="imagenette").data_root == Path("data")
    folder = dataclasses.replace(config, data="folder:/theirs")
    with pytest.raises(InputError, match="with --data$"):
        placed(tmp_path, folder, data_root=tmp_path / "mine")


def test_opening_a_run_downloads_only_what_is_named(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(read_config(own), data="imagenette", data_root=tmp_path / "data")
    (own / "config.json").write_text(json.dumps(config.to_dict()))
    mark(own, places(config))
    downloads = []

    def download(url: str, *given: Any, **options: Any) -> None:
        downloads.append(url)
        raise OSError("stopped here")

    monkeypatch.setattr(datasets, "download_and_extract_archive", download)
    with pytest.raises(InputError, match="downloading is off"):
        load_run(own, device="cpu")
    assert not downloads
    with pytest.raises(InputError, match="stopped here"):
        load_run(own, device="cpu", data="imagenette")
    assert len(downloads) == 1


def test_a_foreign_run_goes_on_with_images_that_are_named(
    foreign: tuple[Path, Path], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = foreign
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    resume = ["train", "--out", str(run), "--resume", "--quiet"]
    assert main(resume) == 2
    assert f"{NOT_OWN}; name the place of the images with --data" in refusal(capsys)
    assert main(["train", "--out", str(run), "--resume", "auto", "--quiet"]) == 2
    assert f"{NOT_OWN}; name the place of the images with --data" in refusal(capsys)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert main([*resume, "--data", str(trained / "photos")]) == 0
    assert list(cache.glob("*.pack"))
    assert not (trained / "cache").exists()
    assert read_config(run).cache_dir is None
    assert main(["knn", str(run), *ON_CPU]) == 0, "now the run is this user's"


def test_a_job_that_names_its_images_in_a_file_goes_on_with_another_cache_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose home folder is new at every start; the policy counts at the start."""
    settings = f"data: {trained / 'photos'}\nblur_prob: 0.25\n"
    (tmp_path / "job.yaml").write_text(settings)
    given = ["--config", str(tmp_path / "job.yaml"), "--policy", "simsiam"]
    command = ["train", *given, "--out", str(tmp_path / "run"), "--resume", "auto", *OPTIONS]
    for number in range(2):
        monkeypatch.setenv("VI_SIMSIAM_CACHE", str(tmp_path / f"cache-{number}"))
        assert main(command) == 0
        assert read_config(tmp_path / "run").augment.blur_prob == 0.5


def test_resuming_needs_no_weights_of_torchvision(own: Path, monkeypatch: Any) -> None:
    """The checkpoint has all weights, and fetching others may be a download."""
    plain = json.loads((own / "config.json").read_text())
    plain["model"] |= {"pretrained": True, "stem": "imagenet"}
    (own / "config.json").write_text(json.dumps(plain))
    dataclasses.replace(load_last(own), config=plain).save(checkpoints(own)[0])
    monkeypatch.setattr("vi_simsiam.models.fetch_weights", lambda *a, **b: pytest.fail("fetched"))
    assert main(["train", "--out", str(own), "--resume", "--quiet"]) == 0


def test_settings_of_a_foreign_run_name_no_places(
    foreign: tuple[Path, Path],
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = foreign
    new = ["train", "--config", str(run / "config.json"), "--out", str(tmp_path / "new"), "--quiet"]
    assert main(new) == 2
    assert f"{NOT_OWN}; name the place of the images with --data" in refusal(capsys)
    named = [*new, "--data", str(trained / "photos")]
    assert main(named) == 0
    assert not (trained / "cache").exists()
    assert read_config(tmp_path / "new").cache_dir is None
    config = dataclasses.replace(read_config(run), init=trained / "run")
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    assert main([*named, "--overwrite"]) == 2
    assert refusal(capsys).endswith(f"{NOT_OWN}; name them with --init")


def test_a_foreign_run_that_begins_anew_names_no_weights(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was ended before its first checkpoint, so that resuming it would load the weights."""
    images = read_config(own).data
    config = dataclasses.replace(read_config(own), init=tmp_path / "theirs")
    (own / "config.json").write_text(json.dumps(config.to_dict()))
    for file in [*checkpoints(own), *own.glob("metrics.jsonl")]:
        file.unlink()
    assert main(["train", "--out", str(own), "--resume", "--data", images]) == 2
    assert refusal(capsys).endswith(f"{NOT_OWN}; name them with --init")


def test_seeds_go_on_only_with_options_that_were_given_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"arguments": ["--data", "a"], "runs": [{"seed": 0, "exit": None}]}
    mark(tmp_path, seeds._named(given["arguments"], given["runs"]))
    (tmp_path / "seeds.json").write_text(json.dumps(given))
    assert seeds._resumed(tmp_path, None, [])["arguments"] == ["--data", "a"]
    for name, value in (("arguments", ["--data", "b"]), ("runs", [{"seed": 7, "exit": None}])):
        (tmp_path / "seeds.json").write_text(json.dumps(given | {name: value}))
        with pytest.raises(InputError, match="this user has not started the runs in .* here"):
            seeds._resumed(tmp_path, None, [])


def test_the_secret_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VI_SIMSIAM_CACHE", str(tmp_path / "cache"))
    assert not is_own(tmp_path, "a")
    assert not (tmp_path / "cache").exists(), "opening a run makes none"
    mark(tmp_path, "a")
    assert is_own(tmp_path, "a")
    (key,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_bytes().hex() not in (tmp_path / origin.ORIGIN).read_text()
    key.chmod(0o644)
    assert not is_own(tmp_path, "a"), "others have read it"
    key.chmod(0o600)
    assert is_own(tmp_path, "a")
    moved = key.rename(tmp_path / "moved")
    key.symlink_to(moved)
    assert not is_own(tmp_path, "a"), "a link may lead to a file of anybody"
    key.unlink()
    key.write_bytes(b"")
    key.chmod(0o600)
    assert not is_own(tmp_path, "a"), "an empty secret is none"


def test_a_secret_of_another_user_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of temporary files somebody may make one before."""
    monkeypatch.setenv("VI_SIMSIAM_CACHE", str(tmp_path / "cache"))
    mark(tmp_path, "a")
    (key,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(origin.os, "getuid", lambda: 12345)
    key.rename(key.with_name("origin-12345.key"))
    assert not is_own(tmp_path, "a")
    mark(tmp_path, "a")
    assert not (tmp_path / origin.ORIGIN).exists(), "without a secret there is no mark"


def test_processes_that_start_at_once_have_one_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VI_SIMSIAM_CACHE", str(tmp_path / "cache"))
    gate, folders = threading.Barrier(8), [tmp_path / str(number) for number in range(8)]

    def start(folder: Path) -> None:
        folder.mkdir()
        gate.wait()
        mark(folder, "a")

    threads = [threading.Thread(target=start, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(is_own(folder, "a") for folder in folders)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_training_needs_no_place_for_the_secret(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VI_SIMSIAM_CACHE", str(tmp_path / "file" / "cache"))
    places = ["--data", str(image_folder), "--cache-dir", str(tmp_path / "cache")]
    out = str(tmp_path / "run")
    assert main(["train", *places, "--out", out, "--evaluate", *OPTIONS]) == 0
    assert (tmp_path / "run" / "knn.json").is_file(), (
        "the command that trains has the places itself"
    )
    capsys.readouterr()
    assert main(["knn", out, *ON_CPU]) == 2
    assert "with --data" in refusal(capsys)
    assert main(["knn", out, *places, *ON_CPU]) == 0
