"""The command line: one readable line and exit code 2 for what a user can mend, and a run from end to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vi_simsiam import info
from vi_simsiam.cli import main
from vi_simsiam.ops.backends import BACKENDS

SMALL = [
    "--epochs",
    "2",
    "--batch-size",
    "8",
    "--size",
    "16",
    "--dim",
    "32",
    "--projector-hidden",
    "32",
    "--predictor-hidden",
    "16",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--blur-prob",
    "0",
    "--log-every",
    "2",
    "--lr",
    "0.02",
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fly", "command: 'fly' is none of train"),
        ("train --preset fast", "preset: 'fast' is none of default"),
        ("train --method byol", "--method: 'byol' is none of vi-simsiam, simsiam"),
        ("train --data mnist --out OUT", "mnist"),
        ("train --data folder:/nowhere --out OUT", "/nowhere"),
        ("train --data folder:EMPTY --out OUT", "EMPTY"),
        ("train --epochs 0", "epochs: 0 is not accepted; it must be at least 1"),
        ("train --epochs -1", "epochs: -1"),
        ("train --batch-size 0", "batch_size: 0"),
        ("train --lr 0", "lr: 0"),
        ("train --lr -0.5", "lr: -0.5"),
        ("train --data folder:CORRUPT --out OUT", "broken.png"),
        ("bench loss --rounds 0", "rounds: 0 must be at least 3"),
        ("train --lr nan", "lr: nan"),
        ("train --lr fast", "--lr"),
        ("train --dim 1", "dim: 1"),
        ("train --batch-size 100000 --out OUT", "batch_size: 100000"),
        ("train --backend fast --out OUT", "backend: 'fast' is none of auto, eager"),
        ("train --backend cuda --device cpu --out OUT", "backend: 'cuda' cannot run on cpu"),
        ("train --backbone vgg11 --out OUT", "backbone: 'vgg11'"),
        ("train --device tpu --out OUT", "device: 'tpu'"),
        ("train --resume", "resume: say which run with --out"),
        ("train --resume --out OUT", "OUT"),
        ("train --speed 3", "--speed"),
        ("train --capture on --device cpu --out OUT", "capture: 'on' needs a CUDA device"),
        ("train --capture perhaps --out OUT", "--capture"),
        (
            "train --sync-batch-norm --device cpu --out OUT",
            "sync_batch_norm: SyncBatchNorm runs on GPUs only",
        ),
        (
            "train --offline --data imagenette --data-root EMPTY --out OUT",
            "imagenette: no copy found",
        ),
        ("train --data pack:EMPTY --out OUT", "EMPTY"),
        ("train --data pack:CORRUPT/broken.png --out OUT", "broken.png is no pack file"),
        ("train --policy wild --out OUT", "policy: 'wild' is none of simsiam, multicrop"),
        (
            "train --cache-dir CORRUPT/broken.png --data folder:IMAGES --size 8 --out OUT",
            "--cache-dir",
        ),
        ("train --seeds 2", "seeds: say where with --out"),
        ("train --seeds 0 --out OUT", "seeds: 0 is not accepted"),
        ("pack EMPTY --out OUT", "EMPTY"),
        ("pack /nowhere --out OUT", "/nowhere"),
        ("views --images 0", "images: 0"),
        ("views --out OUT.txt", "must end in .png"),
        ("bench train --epochs 1", "epochs: 1"),
        ("views --policy wild", "policy: 'wild'"),
        ("knn /nowhere", "run: /nowhere holds no run"),
        ("linear EMPTY", "holds no run"),
        ("linear EMPTY --preset fast", "fast"),
        ("knn EMPTY --k 0", "k: 0"),
        ("evaluate /nowhere", "holds no run"),
        ("figures /nowhere", "/nowhere"),
        ("bench speed", "bench: 'speed' is none of loss"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str,
    message: str,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "CORRUPT").mkdir()
    for name in ("broken.png", "empty.png"):
        (tmp_path / "CORRUPT" / name).write_bytes(b"\x89PNG and then nothing")
    arguments = arguments.replace("CORRUPT", str(tmp_path / "CORRUPT"))
    arguments = arguments.replace("IMAGES", str(image_folder))
    given = arguments.replace("EMPTY", str(tmp_path / "EMPTY")).replace(
        "OUT", str(tmp_path / "OUT")
    )
    assert main(given.split()) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert message in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "OUT").exists(), "bad input must leave no folder behind"


def test_info_names_every_backend_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in BACKENDS:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert re.fullmatch(rf"  {name} +(available|not available: \S.*)", line)
    assert "  eager      available" in lines
    built = any(
        line.startswith("extension    gcc") or line.startswith("extension    clang")
        for line in lines
    )
    assert ("  cpu        available" in lines) == built
    if not torch.cuda.is_available():
        assert "  triton     not available: no CUDA device found" in lines
    assert any("torch" in line and line.split()[1][0].isdigit() for line in lines)


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == info.facts()
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["backends"]["eager"] == {"available": True, "why": None}
    assert set(found["backends"]) == set(BACKENDS)


def test_info_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "extension", lambda: None)
    assert "extension    none: " in info.report()


def test_train_evaluate_and_resume(
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The main job on a small folder: train, the two summary lines last, all files, then resume with what was saved."""
    run, data = tmp_path / "run", shutil.copytree(image_folder, tmp_path / "data")
    for part in ("train", "val"):
        Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)).save(
            data / part / "dark" / "deep.png"
        )
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--data", "folder:data", "--out", str(run), *SMALL]
    assert main([*arguments, "--evaluate"]) == 0
    said = capsys.readouterr()
    warned = [
        line.split(": values of 1 image range from 0 to 255 only")[0]
        for line in said.err.splitlines()
    ]
    assert warned == [f"warning: {Path('data') / 'train'}", f"warning: {data / 'val'}"], "once each"
    lines = said.out.strip().splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["kNN top-1", "linear top-1"]
    for name in ("knn", "linear"):
        result = json.loads((run / f"{name}.json").read_text())
        assert set(result["top1"]) == {"trained", "untrained", "pixels"}
        assert all(share >= 0.9 for share in result["top1"].values()), (
            "bright and dark are told apart by anything"
        )
    assert any("kNN top-1" in line and "linear top-5" in line for line in lines), "the table"
    for name in ("curves.png", "kappa.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")

    assert main(arguments) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--out", str(run), "--resume", "--lr", "0.5"]) == 2
    assert "lr: 0.02 -> 0.5" in capsys.readouterr().err
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert main(["knn", str(run), "--k", "5", "--device", "cpu", "--workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("kNN top-1: ")


def test_evaluation_without_labels_says_what_it_needs(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = image_folder / "train" / "dark"
    monkeypatch.chdir(data.parent)
    arguments = ["train", "--data", "dark", "--out", str(tmp_path / "run"), *SMALL]
    assert main([*arguments, "--evaluate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (said,) = [
        i for i, line in enumerate(lines) if line.startswith("no accuracies at the end: data: ")
    ]
    assert said < min(i for i, line in enumerate(lines) if line.startswith("epoch 1/")), (
        "before training"
    )
    assert not any("not evaluated" in line for line in lines)
    assert any(line.startswith("figure ") for line in lines)
    assert main(["knn", str(tmp_path / "run"), "--device", "cpu", "--workers", "0"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "train/" in said
    assert "val/" in said


def test_packed_images_train_like_their_files(image_folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "set.pack"
    assert main(["pack", str(image_folder), "--out", str(packed), "--workers", "1"]) == 0
    assert (tmp_path / "set.val.pack").exists()
    for data in (f"folder:{image_folder}", f"pack:{packed}"):
        settings = (
            f"--data {data} --epochs 1 --batch-size 8 --size 16 --dim 16 --device cpu --workers 0"
        )
        assert main(["train", *settings.split(), "--out", str(tmp_path / data[:4])]) == 0
    files, pack = (
        json.loads((tmp_path / run / "metrics.jsonl").read_text()) for run in ("fold", "pack")
    )
    assert pack["loss"] == files["loss"]
    assert main(["knn", str(tmp_path / "pack"), "--device", "cpu", "--k", "5"]) == 0


def test_a_pack_is_not_replaced_by_mistake(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set.val.pack").write_text("mine")
    command = ["pack", str(image_folder), "--out", str(tmp_path / "set.pack"), "--workers", "1"]
    assert main(command) == 2
    assert f"out: {tmp_path / 'set.val.pack'} exists; say --overwrite" in capsys.readouterr().err
    assert not (tmp_path / "set.pack").exists()
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "set.val.pack").read_bytes() != b"mine"


def test_views_draws_a_row_for_each_image(image_folder: Path, tmp_path: Path) -> None:
    """A row of the image and of its views; options change the policy that is named."""
    out = tmp_path / "views.png"
    options = [
        "--policy",
        "multicrop",
        "--size",
        "24",
        "--local-size",
        "12",
        "--images",
        "3",
        "--out",
        str(out),
    ]
    assert main(["views", "--data", f"folder:{image_folder}", *options]) == 0
    with Image.open(out) as picture:  # small views are drawn four times as large
        assert 4 * 3 * 24 <= picture.height <= 4 * (3 * 24 + 16)
        assert picture.width >= 4 * (3 * 24 + 6 * 12)
    plain = tmp_path / "plain.png"
    assert (
        main(["views", "--policy", "none", "--size", "28", "--images", "1", "--out", str(plain)])
        == 0
    )
    with Image.open(plain) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] == 4 * 28
    np.testing.assert_array_equal(pixels, pixels[::4, ::4].repeat(4, axis=0).repeat(4, axis=1))
    pixels = pixels[::4, ::4]
    gap = (pixels.shape[1] - 3 * 28) // 2
    np.testing.assert_array_equal(pixels[:, -28:], pixels[:, 28 + gap : 56 + gap])
    assert pixels[:, -28:].std() > 10


def test_seeds_train_side_by_side(image_folder: Path, tmp_path: Path) -> None:
    settings = f"--data folder:{image_folder} --epochs 1 --batch-size 8 --size 16 --dim 16 --device cpu --workers 0"
    assert (
        main(
            [
                "train",
                *settings.split(),
                "--seeds",
                "2",
                "--seed",
                "5",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    content = json.loads((tmp_path / "out" / "seeds.json").read_text())
    assert [(run["seed"], run["state"]) for run in content["runs"]] == [(5, "done"), (6, "done")]
    losses = [run["metrics"]["loss"] for run in content["runs"]]
    assert losses[0] != losses[1]
    assert content["runs_per_hour"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_can_be_resumed(
    image_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """In a process of its own, with loader workers: exit code 130, one line that says how to go on, no traceback."""
    run = tmp_path / "run"
    settings = [*SMALL, "--epochs", "200", "--workers", "1"]
    command = [
        sys.executable,
        "-m",
        "vi_simsiam",
        "train",
        "--data",
        f"folder:{image_folder}",
        "--out",
        str(run),
    ]
    process = subprocess.Popen(
        [*command, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal or a batch system does: the workers get it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "go on with: vi-simsiam train --out" in err
    assert err.count("stopping after this step; the run can be resumed") == 1
    assert "Traceback" not in out + err
    assert (run / "checkpoint.pt").exists()
