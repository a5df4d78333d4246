"""Every command: bare, with --help, with a wrong option, with a path that is not there. No traceback, never more than a line."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vi_simsiam.cli import main
from vi_simsiam.cli.commands import BENCHMARKS
from vi_simsiam.cli.commands import COMMANDS as BY_NAME
from vi_simsiam.config import POLICIES, PRESETS, AugmentConfig, TrainConfig
from vi_simsiam.data import contact_sheet
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.defaults import suited
from vi_simsiam.engine.run import read_config
from vi_simsiam.engine.trainer import Trainer

COMMANDS = [[name] for name in BY_NAME if name != "bench"] + [
    ["bench", name] for name in BENCHMARKS
]
# What each needs that cannot be left out; the others run bare.
NEEDS = {
    **dict.fromkeys(["evaluate", "knn", "linear", "logistic", "figures", "uncertainty", "report"], "RUN"),
    **dict.fromkeys(["embed", "rank"], "RUN IMAGES"),
    "export": "RUN --format timm", "experiment": "NAME", "pack": "IMAGES --out FILE",
    "bench compare": "BEFORE AFTER",
}  # fmt: skip
BARE = [command for command in COMMANDS if " ".join(command) not in NEEDS]
# A path that is not there, wherever a command takes one.
WRONG_PATHS = [
    "train --data /nowhere/photos", "train --data folder:/nowhere", "train --data pack:/nowhere.pack",
    "train --config /nowhere.yaml", "train --resume --out /nowhere/run", "train --frozen-run /nowhere --out OUT",
    "evaluate /nowhere", "knn /nowhere", "linear /nowhere", "logistic /nowhere", "figures /nowhere", "report /nowhere",
    "uncertainty /nowhere", "embed /nowhere photos", "rank /nowhere photos", "export /nowhere --format timm",
    "experiment controls --data folder:/nowhere --out OUT", "pack /nowhere --out OUT.pack", "views --data /nowhere",
    "views --out /nowhere/views.png", "bench compare /nowhere/a.json /nowhere/b.json", "bench report /nowhere.md",
    "bench train --data folder:/nowhere --out OUT", "bench loss --out /proc/nowhere",
]  # fmt: skip


def run(arguments: str | list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(arguments.split() if isinstance(arguments, str) else arguments)
    found = capsys.readouterr()
    assert "Traceback" not in found.out + found.err
    return code, found.out, found.err


def refused(arguments: str | list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must be refused."""
    code, _, err = run(arguments, capsys)
    assert code == 2, arguments
    assert err.count("\n") == 1, err
    assert err.startswith("vi-simsiam: ")
    return err


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run([*command, "--help"], capsys)
    assert code == 0
    assert shown.startswith(f"usage: vi-simsiam {' '.join(command)}")
    assert run(["help", *command], capsys)[:2] == (0, shown)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_wrong_option(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(
        [*command, *NEEDS.get(" ".join(command), "").split(), "--no-such-thing", "3"], capsys
    )
    assert "Unrecognized options: --no-such-thing, 3" in err
    assert f"see vi-simsiam {' '.join(command)} --help" in err


@pytest.mark.parametrize("command", NEEDS)
def test_what_is_missing_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(command, capsys)
    for word in NEEDS[command].split():
        if word.startswith("--") or (word.isupper() and word != "FILE"):
            assert re.search(rf"{word}( [A-Z]+)? \([a-z]", err)


@pytest.mark.parametrize("command", BARE, ids=" ".join)
def test_bare(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What runs without arguments does: long work is left out, everything before it is not."""
    monkeypatch.chdir(tmp_path)
    began: list[Any] = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer: began.append(trainer.config))
    if command[0] == "bench":
        module = importlib.import_module(f"vi_simsiam.benchmarks.{BENCHMARKS[command[1]][0]}")
        monkeypatch.setattr(module, "run", lambda options: began.append(options))
    code, out, err = run(command, capsys)
    assert (code, err) == (0, "")
    if command == ["bench", "report"]:
        return
    if command == ["train"]:
        assert began == [PRESETS["demo"].located()]
        assert (
            "settings that suit fashion-mini, the embedded images (8,000 images of 28 pixels): --size 28"
            in out
        )
    elif command == ["views"]:
        assert (tmp_path / "views.png").is_file()
    else:
        assert out.startswith("vi-simsiam ") if command == ["info"] else len(began) == 1


@pytest.mark.parametrize("arguments", WRONG_PATHS)
def test_a_wrong_path(arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(arguments.replace("OUT", str(tmp_path / "OUT")), capsys)
    assert "nowhere" in err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        ("trian", "'train'"),
        ("bench los", "'loss'"),
        ("help trian", "'train'"),
        ("train --bach-size 3", "--batch-size"),
        ("train --methd simsiam", "--method"),
        ("train --method simsam", "'simsiam'"),
        ("train --preset dem", "'demo'"),
        ("train --policy multi-crop", "'multicrop'"),
        ("train --data imagenet", "'imagenette'"),
        ("train --backbone resnet81", "'resnet18'"),
        ("train --backend tritn", "'triton'"),
        ("export runs/x --format tim", "'timm'"),
        ("experiment control", "'controls'"),
        ("linear /nowhere --preset papr", "'paper'"),
    ],
)
def test_a_typing_error_gets_the_nearest_word(
    arguments: str,
    nearest: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"did you mean {nearest}?" in refused(arguments, capsys)


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    usage = run("--help", capsys)
    assert usage[0] == 0
    assert all(f"  {name} " in usage[1] for name in BY_NAME)
    assert run("help", capsys) == run("-h", capsys) == usage
    assert run([], capsys) == (2, *usage[1:])
    assert re.fullmatch(r"vi-simsiam \d\S+\n", run("--version", capsys)[1])


def test_the_essentials_of_train_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    """`train --help` is short and lists only what there is; `--help-all` lists everything."""
    short = run("train --help", capsys)[1]
    everything = run("train --help-all", capsys)[1]
    assert len(short.splitlines()) < 40
    assert all(len(line) <= 100 for line in short.splitlines())
    named = re.findall(r"^  (--[\w-]+)", short, re.MULTILINE)
    assert 12 <= len(named) <= 18
    options = set(re.findall(r"--[\w-]+", everything))
    assert set(named) <= options
    assert {"--momentum", "--concentration-scale", "--capture"} <= options


def test_defaults_suit_the_images_and_are_saved(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A path is enough; what is said stays, a file of settings goes before what suits, and options before the file."""
    (tmp_path / "mine.yaml").write_text(
        "epochs: 2\nlr: 0.3\nprojector-hidden: 16\npredictor_hidden: 16\ndim: 16\n"
    )
    out = tmp_path / "run"
    command = f"train --data {image_folder} --config {tmp_path / 'mine.yaml'} --lr 0.02 --device cpu --workers 0 --out {out}"
    code, said, _ = run(command, capsys)
    assert code == 0
    assert (
        "(40 images of 16 pixels): --size 16 --crop-scale 0.3 1 --blur-prob 0 --stem imagenet --batch-size 40"
        in said
    )
    assert "learned" in said.splitlines()[-1] or said.splitlines()[-1].startswith("dead")
    saved = read_config(out)
    assert (saved.data, saved.augment.size, saved.epochs, saved.lr) == (
        f"folder:{image_folder}",
        16,
        2,
        0.02,
    )
    assert (saved.model.dim, saved.batch_size, saved.warmup_epochs) == (16, 40, 0.25)
    other = tmp_path / "other"
    assert (
        run(
            f"train --config {out / 'config.json'} --seed 1 --epochs 1 --out {other} --quiet",
            capsys,
        )[0]
        == 0
    )
    assert (read_config(other).seed, read_config(other).lr, read_config(other).augment) == (
        1,
        0.02,
        saved.augment,
    )


def test_quiet_leaves_the_result(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = (
        "--epochs 1 --dim 16 --projector-hidden 16 --predictor-hidden 16 --device cpu --workers 0"
    )
    command = f"train --data {image_folder} --quiet --evaluate --out {tmp_path / 'run'} {small}"
    code, out, err = run(command, capsys)
    assert (code, err) == (0, "")
    assert [line.split()[0].rstrip(":") for line in out.splitlines()][1:] == ["kNN", "linear"], out


def test_a_preset_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    began: list[TrainConfig] = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer: began.append(trainer.config))
    assert run("train --preset default --backend eager --device cpu", capsys)[0] == 0
    assert (began[0].augment.size, began[0].epochs, began[0].model.dim) == (224, 100, 2048)


def test_the_package_loads_what_is_used() -> None:
    """Help and the bare package need no PyTorch; every public name is there all the same."""
    code = (
        "import sys, vi_simsiam; from vi_simsiam.cli import main; assert main(['--help']) == main(['--version']) == 0; "
        "assert main(['train', '--help']) == 0; assert 'torch' not in sys.modules; "
        "assert set(vi_simsiam.__all__) <= set(dir(vi_simsiam)); assert len(dir(vi_simsiam)) < 20; "
        "assert all(getattr(vi_simsiam, name) is not None for name in dir(vi_simsiam)); "
        "assert vi_simsiam.functional.power_spherical_loss and not hasattr(vi_simsiam, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_what_was_asked_for_is_not_refused_for_a_default(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Options are checked against the settings that suit the images, not against those that they take the place of."""
    began: list[TrainConfig] = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer: began.append(trainer.config))
    monkeypatch.chdir(tmp_path)
    data = f"train --data {image_folder} --device cpu --workers 0"
    assert run(f"{data} --local-views 2 --local-predictor --size 96", capsys)[0] == 0
    assert (began[0].augment.local_views, began[0].augment.local_size) == (2, 41)
    assert run(f"{data} --size 64 --warmup-epochs 300", capsys)[0] == 0
    assert (began[1].epochs, began[1].warmup_epochs) == (400, 300)
    assert "warmup_epochs: 500" in refused(f"{data} --size 64 --warmup-epochs 500", capsys)


def test_a_policy_goes_before_a_file(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    began: list[TrainConfig] = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer: began.append(trainer.config))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("crop_scale: [0.9, 1]\nlocal_views: 1\nsize: 24\ndim: 64\n")
    assert (
        run(
            f"train --data {image_folder} --device cpu --config mine.yaml --policy multicrop",
            capsys,
        )[0]
        == 0
    )
    augment = began[0].augment
    assert (augment.size, augment.local_views, augment.crop_scale) == (
        24,
        6,
        POLICIES["multicrop"].crop_scale,
    )
    assert began[0].model.dim == 64


def test_a_frozen_run_gives_its_model(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    small = f"train --data {image_folder} --epochs 1 --device cpu --workers 0 --quiet"
    model = "--dim 24 --projector-hidden 16 --predictor-hidden 16 --size 20"
    assert run(f"{small} --method simsiam --out simsiam {model}", capsys)[0] == 0
    code, out, _ = run(f"{small} --frozen-run simsiam --out fitted", capsys)
    assert code == 0
    assert out.startswith("kappa fitted: ")
    fitted, simsiam = read_config(tmp_path / "fitted"), read_config(tmp_path / "simsiam")
    assert (fitted.model, fitted.augment.size) == (simsiam.model, 20)


def test_one_image_is_too_few(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    shutil.copy(image_folder / "train" / "dark" / "00.png", tmp_path / "photos")
    assert "photos has 1 image; training needs at least 2" in refused(
        f"train --data {tmp_path / 'photos'}", capsys
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --epochs one", "--epochs: 'one' is not accepted; it must be an integer"),
        ("train --lr fast", "--lr: 'fast' is not accepted; it must be a number"),
        ("train --data", "--data: a value is missing"),
        ("train --crop-scale 0.2", "--crop-scale: it takes 2 values"),
        ("knn --nothing 3", "run: a value is missing"),
        ("train IMAGES", "did you mean --data IMAGES?"),
        ("train --data IMAGE", "is an image; give the folder that it lies in"),
        (
            "views --out /nowhere/views.png",
            "vi-simsiam: /nowhere/views.png: No such file or directory",
        ),
    ],
)
def test_messages_in_our_own_words(
    arguments: str, message: str, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = image_folder / "train" / "dark" / "00.png"
    placed = [
        text.replace("IMAGES", str(image_folder)).replace("IMAGE", str(image))
        for text in (message, arguments)
    ]
    assert placed[0] in refused(placed[1], capsys)


def test_views_are_those_that_train_makes(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn: list[AugmentConfig] = []
    sheet = contact_sheet.contact_sheet
    monkeypatch.setattr(
        contact_sheet,
        "contact_sheet",
        lambda source, views, **more: (drawn.append(views), sheet(source, views, **more))[1],
    )
    monkeypatch.chdir(tmp_path)
    for options in ("", " --size 96", " --policy simsiam", " --flip-prob 0"):
        assert run(f"views --data {image_folder}{options}", capsys)[0] == 0
    fitted, large, policy, still = drawn
    assert fitted == suited(TrainConfig(), open_dataset(str(image_folder)).train).augment
    assert (large.size, large.blur_prob) == (96, 0.5)
    assert (policy.size, policy.blur_prob, policy.crop_scale) == (16, 0.5, (0.2, 1.0))
    assert still == dataclasses.replace(fitted, flip_prob=0.0)


@pytest.mark.parametrize(
    "arguments",
    ["--help", "train --data IMAGES --dim 16 --epochs 1 --device cpu --workers 0 --out OUT"],
)
def test_output_that_nobody_reads_is_no_error(
    arguments: str, image_folder: Path, tmp_path: Path
) -> None:
    """As after `| head -1`: no message, the exit code of a program that SIGPIPE ends, whoever notices it first."""
    reader, writer = os.pipe()
    os.close(reader)
    words = (
        arguments.replace("IMAGES", str(image_folder)).replace("OUT", str(tmp_path / "run")).split()
    )
    command = [sys.executable, "-m", "vi_simsiam", *words]
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, b"")


def test_a_closed_standard_output_is_no_error() -> None:
    command = f"{sys.executable} -m vi_simsiam --version >&-"
    process = subprocess.run(command, shell=True, capture_output=True, check=False)
    assert (process.returncode, process.stderr) == (0, b"")


def test_names_that_the_terminal_cannot_print_are_escaped(
    image_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "f\u00fcnf"
    shutil.copytree(image_folder / "train" / "dark", data)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [
        sys.executable,
        "-m",
        "vi_simsiam",
        "views",
        "--data",
        str(data),
        "--out",
        str(data / "views.png"),
    ]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    assert "f\\xfcnf" in process.stdout
