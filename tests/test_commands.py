"""Every command: help, missing and wrong arguments, settings; errors take one line."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluation_cases import uncertainty_result
from PIL import Image

import vi_simsiam
from vi_simsiam.cli import BENCHMARKS, main
from vi_simsiam.cli import COMMANDS as BY_NAME
from vi_simsiam.config import POLICIES, PRESETS, AugmentConfig, TrainConfig
from vi_simsiam.data import contact_sheet
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.defaults import suited
from vi_simsiam.engine import kernels
from vi_simsiam.engine.run import read_config
from vi_simsiam.engine.train import Trainer

COMMANDS = [[name] for name in BY_NAME if name != "bench"] + [
    ["bench", name] for name in BENCHMARKS
]
# Required arguments; the other commands run bare.
NEEDS = {
    **dict.fromkeys(
        ["evaluate", "knn", "linear", "logistic", "figures", "uncertainty", "report"], "RUN"
    ),
    "doctor": "RUN",
    **dict.fromkeys(["embed", "rank"], "RUN IMAGES"),
    "clean": "IMAGES --encoder FILE",
    "export": "RUN --format timm",
    "push-to-hub": "RUN REPO_ID",
    "fit-kappa": "ENCODER --data FILE --out FILE",
    "experiment": "NAME",
    "pack": "IMAGES --out FILE",
    "bench compare": "BEFORE AFTER",
}
BARE = [command for command in COMMANDS if " ".join(command) not in NEEDS]
# Arguments, and a part of the one line that refuses them.
REFUSED = """
fly => command: 'fly' is none of train
trian => did you mean 'train'?
bench speed => bench: 'speed' is none of loss
bench loss --rounds 0 => rounds: 0 must be at least 3
bench loss --device cuda:99 => device: 'cuda:99' is not here
bench train --epochs 1 => epochs: 1
bench train --data folder:/nowhere --out OUT => nowhere
bench compare /nowhere/a.json /nowhere/b.json => nowhere
bench report /nowhere.md => nowhere
train IMAGES => did you mean --data IMAGES?
train --bach-size 3 => did you mean --batch-size?
train --speed 3 => --speed
train --preset fast => preset: 'fast' is none of default
train --method simsam => did you mean 'simsiam'?
train --policy multi-crop => did you mean 'multicrop'?
train --data => --data: a value is missing
train --data imagenet => did you mean 'imagenette'?
train --data IMAGE => is an image; give the folder that it lies in
train --data /nowhere/photos => nowhere
train --data folder:EMPTY --out OUT => EMPTY
train --data folder:CORRUPT --out OUT => broken.png
train --data pack:/nowhere.pack => nowhere
train --data pack:CORRUPT/broken.png --out OUT => broken.png is no pack file
train --data ONE => ONE has 1 image; training needs at least 2
train --offline --data imagenette --data-root EMPTY --out OUT => imagenette: no copy found
train --cache-dir CORRUPT/broken.png --data folder:IMAGES --size 8 --out OUT => --cache-dir
train --config /nowhere.yaml => nowhere
train --epochs 0 => epochs: 0 is not accepted; it must be at least 1
train --epochs one => --epochs: 'one' is not accepted; it must be an integer
train --batch-size 100000 --out OUT => batch_size: 100000
train --lr nan => lr: nan
train --data IMAGES --size 64 --warmup-epochs 500 --out OUT => warmup_epochs: 500
train --lr fast => --lr: 'fast' is not accepted; it must be a number
train --crop-scale 0.2 => --crop-scale: it takes 2 values
train --backend tritn => did you mean 'triton'?
train --backbone resnet81 => did you mean 'resnet18'?
train --device tpu --out OUT => device: 'tpu'
train --device meta --out OUT => device: 'meta'
train --capture perhaps --out OUT => --capture
train --device cuda:99 --out OUT => device: 'cuda:99' is not here
train --backend triton --device cpu --out OUT => backend: 'triton' cannot run on cpu tensors
train --capture on --device cpu --out OUT => capture: 'on' needs a CUDA device
train --kernels fast --out OUT => --kernels
train --sync-batch-norm --device cpu --out OUT => sync_batch_norm: SyncBatchNorm runs on GPUs only
train --pretrained --offline --device cpu --out OUT => pretrained: no copy of the weights found
train --data cifar10 --offline --data-root EMPTY --out OUT => cifar10: no complete copy
train --resume => resume: say which run with --out
train --resume --out OUT => OUT
train --seeds 2 => seeds: say where with --out
train --seeds 0 --out OUT => seeds: 0 is not accepted
train --knn-every 0 => knn_every: 0 is not accepted
train --knn-every 1 --data IMAGES/train/dark --out OUT => knn_every: folder:
train --stop-on death => --stop-on
train --epochs 100000000000 --out OUT => epochs: 100000000000 is not accepted; it must be at most
train --size 1000000 --batch-size 64 --epochs 1 --workers 0 --out OUT => not enough memory (
doctor EMPTY => holds no run
pack EMPTY --out OUT => EMPTY
views --images 0 => images: 0
views --data /nowhere => nowhere
views --out OUT.txt => must end in .png
views --out /nowhere/views.png => vi-simsiam: /nowhere/views.png: No such file or directory
knn --nothing 3 => run: a value is missing
knn /nowhere => run: /nowhere holds no run
knn EMPTY --k 0 => k: 0
linear /nowhere --preset papr => did you mean 'paper'?
evaluate /nowhere => holds no run
evaluate EMPTY --device cuda:99 => device: 'cuda:99' is not here
figures /nowhere => /nowhere
report /nowhere => nowhere
export /nowhere --format timm => nowhere
fit-kappa resnet1 --data IMAGES --out OUT => backbone: 'resnet1' is none of
fit-kappa --data IMAGES EMPTY --out OUT => EMPTY holds no run
push-to-hub /nowhere somebody/photos => nowhere
push-to-hub /nowhere => missing: REPO_ID (the repository on the Hugging Face Hub
experiment further --init /nowhere.pth --data IMAGES --out OUT => init: /nowhere.pth is not there
experiment control => did you mean 'controls'?
experiment controls --data folder:/nowhere --out OUT => nowhere
experiment table1 --data IMAGES/train/dark --out OUT => has no labels
experiment controls --data IMAGES --devices cuda:99 --out OUT => 'cuda:99' is not here
experiment tuned --data IMAGES --trials 99 --out OUT => trials: 99 is not accepted
"""


def run(arguments: str | list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command; return its exit code, output and errors, which hold no traceback."""
    code = main(arguments.split() if isinstance(arguments, str) else arguments)
    found = capsys.readouterr()
    assert "Traceback" not in found.out + found.err
    return code, found.out, found.err


def refused(arguments: str | list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of a command that must be refused."""
    code, _, err = run(arguments, capsys)
    assert code == 2, arguments
    assert err.count("\n") == 1, err
    assert err.startswith("vi-simsiam: ")
    return err


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Configurations of trainings that were started; nothing is trained, in an empty folder."""
    configs: list[Any] = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer: configs.append(trainer.config))
    monkeypatch.chdir(tmp_path)
    return configs


@pytest.mark.parametrize("case", REFUSED.strip().splitlines())
def test_bad_input_is_one_line(
    case: str,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    for name in ("EMPTY", "CORRUPT", "ONE"):
        (tmp_path / name).mkdir()
        case = case.replace(name, str(tmp_path / name))
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TORCH_HOME", str(work))
    for name in ("broken.png", "empty.png"):
        (tmp_path / "CORRUPT" / name).write_bytes(b"\x89PNG and then nothing")
    image = image_folder / "train" / "dark" / "00.png"
    (tmp_path / "ONE" / "00.png").write_bytes(image.read_bytes())
    case = case.replace("IMAGES", str(image_folder)).replace("IMAGE", str(image))
    arguments, message = case.replace("OUT", str(work / "OUT")).split(" => ")
    assert message in refused(arguments, capsys)
    benchmark = arguments.startswith("bench ")  # which may leave its empty folder
    assert [path for path in work.rglob("*") if path.is_file() or not benchmark] == []


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_wrong_options_and_missing_arguments(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run([*command, "--help"], capsys)
    name = " ".join(command)
    assert code == 0
    assert shown.startswith(f"usage: vi-simsiam {name}")
    assert run(["help", *command], capsys)[:2] == (0, shown)
    err = refused([*command, *NEEDS.get(name, "").split(), "--no-such-thing", "3"], capsys)
    assert "Unrecognized options: --no-such-thing, 3" in err
    assert f"see vi-simsiam {name} --help" in err
    needed = [word for word in NEEDS.get(name, "").split() if word not in ("FILE", "timm")]
    missing = refused(command, capsys) if needed else ""
    assert all(re.search(rf"{word}( [A-Z]+)? \([a-z]", missing) for word in needed), missing


@pytest.mark.parametrize("command", BARE, ids=" ".join)
def test_commands_without_arguments(
    command: list[str],
    began: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Everything before the long work runs, and nothing of it."""
    if command[0] == "bench":
        module = importlib.import_module(f"vi_simsiam.benchmarks.{BENCHMARKS[command[1]][0]}")
        monkeypatch.setattr(module, "run", began.append)
    # Steps of the whole size are not timed to choose between kernels.
    effort = kernels._EFFORT["cpu"]._replace(fewest_steps=10**9)
    monkeypatch.setitem(kernels._EFFORT, "cpu", effort)
    code, out, err = run(command, capsys)
    assert (code, err) == (0, "")
    if command == ["train"]:
        assert began == [PRESETS["demo"].located()]
        assert "fashion-mini, the embedded images (8,000 images of 28 pixels): --size 28" in out
    elif command == ["views"]:
        assert (tmp_path / "views.png").is_file()
    else:
        assert out.startswith("vi-simsiam ") if command == ["info"] else len(began) == 1


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    usage = run("--help", capsys)
    assert usage[0] == 0
    assert all(f"  {name} " in usage[1] for name in BY_NAME)
    assert run("help", capsys) == run("-h", capsys) == usage
    assert run([], capsys) == (2, *usage[1:])
    assert re.fullmatch(r"vi-simsiam \d\S+\n", run("--version", capsys)[1])


def test_help_of_train_lists_essential_options(capsys: pytest.CaptureFixture[str]) -> None:
    short, whole = (run(f"train {option}", capsys)[1] for option in ("--help", "--help-all"))
    assert len(short.splitlines()) < 40
    named = re.findall(r"^  (--[\w-]+)", short, re.MULTILINE)
    assert 12 <= len(named) <= 18
    assert {*named, "--momentum", "--capture"} <= set(re.findall(r"--[\w-]+", whole))


def test_the_package_loads_on_first_use() -> None:
    """Help and the bare package need no PyTorch; every public name exists all the same."""
    code = """
import sys, vi_simsiam
from vi_simsiam.cli import BENCHMARKS, COMMANDS as BY_NAME, main
assert main(["--help"]) == main(["--version"]) == main(["train", "--help"]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert set(vi_simsiam.__all__) <= set(dir(vi_simsiam))
    assert len(dir(vi_simsiam)) < 20
    # All modules may be loaded here, and their names be attributes already.
    assert all(vi_simsiam.__getattr__(name) for name in dir(vi_simsiam))
    assert not hasattr(vi_simsiam, "nothing")


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--preset default", {"size": 224, "epochs": 100, "dim": 2048}),
        ("--local-views 2 --local-predictor --size 96", {"local_views": 2, "local_size": 41}),
        ("--size 64 --warmup-epochs 300", {"epochs": 400, "warmup_epochs": 300}),
        (
            "--config mine.yaml --lr 0.02",
            {"crop_scale": (0.9, 1.0), "lr": 0.02, "local_views": 1, "size": 24, "dim": 64},
        ),
        (
            "--config mine.yaml --policy multicrop",
            {"crop_scale": POLICIES["multicrop"].crop_scale, "local_views": 6, "lr": 0.3}
            | {"size": 24, "dim": 64},
        ),
    ],
)
def test_options_go_before_a_policy_a_file_and_fitted_settings(
    options: str,
    expected: dict[str, object],
    began: list[TrainConfig],
    image_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine.yaml").write_text(
        "crop_scale: [0.9, 1]\nlocal_views: 1\nsize: 24\ndim: 64\nlr: 0.3\n"
    )
    command = f"train --data {image_folder} --batch-size 8 --device cpu {options}"
    assert run(command, capsys)[0] == 0
    found = vars(began[0]) | vars(began[0].augment) | vars(began[0].model)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.usefixtures("small_network")
def test_a_saved_configuration_starts_another_run(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    small = "--epochs 2 --dim 16 --projector-hidden 16 --predictor-hidden 16 --lr 0.02"
    command = f"train --data {image_folder} --device cpu --workers 0 --out run {small}"
    code, out, _ = run(command, capsys)
    assert code == 0
    fitted = "--size 16 --crop-scale 0.5 1 --blur-prob 0 --stem medium --batch-size 40"
    assert f"(40 images of 16 pixels): {fitted}" in out
    saved = read_config(tmp_path / "run")
    assert (saved.data, saved.augment.size) == (f"folder:{image_folder}", 16)
    assert (saved.model.dim, saved.batch_size, saved.warmup_epochs) == (16, 40, 0.25)
    again = "train --config run/config.json --seed 1 --epochs 1 --out other --quiet"
    assert run(again, capsys)[0] == 0
    other = read_config(tmp_path / "other")
    assert (other.seed, other.lr, other.augment) == (1, 0.02, saved.augment)
    for option in ("--config run/config.json", "--policy simsiam"):
        err = refused(f"train --resume --out run {option}", capsys)
        assert "resume: only one of them can be given" in err


def test_views_are_those_of_train(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn: list[AugmentConfig] = []

    def recorded(source: Any, views: AugmentConfig, **more: Any) -> Image.Image:
        drawn.append(views)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(contact_sheet, "contact_sheet", recorded)
    monkeypatch.chdir(tmp_path)
    for options in ("", " --size 96", " --policy simsiam", " --flip-prob 0"):
        assert run(f"views --data {image_folder}{options}", capsys)[0] == 0
    fitted, large, policy, still = drawn
    assert fitted == suited(TrainConfig(), open_dataset(str(image_folder)).train).augment
    assert (large.size, large.blur_prob) == (96, 0.5)
    assert (policy.size, policy.blur_prob, policy.crop_scale) == (16, 0.5, (0.2, 1.0))
    assert still == dataclasses.replace(fitted, flip_prob=0.0)


def test_names_with_brackets_are_no_styles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = uncertainty_result()
    result["ood"] = {"[/x] [red]": result["ood"]["mine"]}
    result["settings"]["notes"] = []

    def evaluate(run: object, *, report: Callable[[str], object], **options: object) -> Any:
        report("images of [/x]")
        return result

    monkeypatch.setattr("vi_simsiam.evaluation.uncertainty.evaluate_uncertainty", evaluate)
    opened = SimpleNamespace(path=tmp_path, unfinished="")
    monkeypatch.setattr("vi_simsiam.cli.evaluate.open_run", lambda options: opened)
    code, out, _ = run(["uncertainty", str(tmp_path)], capsys)
    assert code == 0
    assert "[/x] [red] (" in out
