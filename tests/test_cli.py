"""Commands from end to end: train, evaluate, resume, pack, views, info, output streams."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
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
from test_commands import refused, run

from vi_simsiam import info
from vi_simsiam.cli import main
from vi_simsiam.engine.checkpoint import checkpoints
from vi_simsiam.ops.backends import BACKENDS

pytestmark = pytest.mark.usefixtures("small_runs")

TINY = (
    "--epochs 1 --batch-size 8 --size 16 --dim 16 --projector-hidden 16 --predictor-hidden 16"
    " --device cpu --workers 0 --blur-prob 0"
)
PROGRAM = [sys.executable, "-m", "vi_simsiam"]


def test_info_names_every_backend_and_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run("info", capsys)[1]
    found = json.loads(run("info --json", capsys)[1])
    assert found == info.facts()
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["backends"]["eager"] == {"available": True, "why": None}
    for name in BACKENDS:
        state = found["backends"][name]
        shown = "available" if state["available"] else f"not available: {state['why']}"
        assert re.search(rf"^  {name} +{re.escape(shown)}$", text, re.MULTILINE)
    built = re.search(r"^extension    (gcc|clang)", text, re.MULTILINE) is not None
    assert found["backends"]["cpu"]["available"] == built
    monkeypatch.setattr(info, "extension", lambda: None)
    assert "extension    none: " in info.report(info.facts())


def test_train_evaluate_and_resume(
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = shutil.copytree(image_folder, tmp_path / "data")
    for part in ("train", "val"):
        Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)).save(
            data / part / "dark" / "deep.png"
        )
    monkeypatch.chdir(tmp_path)
    command = f"train --data folder:data --out run {TINY} --epochs 2 --lr 0.02"
    code, out, err = run(f"{command} --evaluate --quiet", capsys)
    assert code == 0
    warned = [line.split(": values of 1 image range from 0 to 255")[0] for line in err.splitlines()]
    assert warned == [f"warning: {Path('data', 'train')}", f"warning: {data / 'val'}"], "once each"
    lines = [line.split(": ")[0] for line in out.splitlines()]
    classifiers = ["kNN top-1", "linear top-1"]
    moved = [f"{name} of moved images" for name in classifiers]
    few = ["kNN top-1 from 10 labels a class"]
    assert lines[1:] == classifiers + few + moved, "after the verdict"
    run_folder = tmp_path / "run"
    for name in ("knn", "linear"):
        top1 = json.loads((run_folder / f"{name}.json").read_text())["top1"]
        assert set(top1) == {"trained", "untrained", "pixels"}
        assert all(share >= 0.9 for share in top1.values()), f"{name}: {top1}"
    for name in ("curves.png", "kappa.png"):
        assert (run_folder / name).read_bytes().startswith(b"\x89PNG")

    assert "already holds a run" in refused(command, capsys)
    assert "lr: 0.02 -> 0.5" in refused("train --out run --resume --lr 0.5", capsys)
    code, out, _ = run("train --out run --resume", capsys)
    assert code == 0
    assert "already at its last step" in out
    for command, added in (("knn run --k 5", few), ("logistic run", [])):
        code, out, _ = run(f"{command} --device cpu --workers 0", capsys)
        assert code == 0
        (title, *others) = re.findall(r"^\w+ top-1[^:\n]*(?=: )", out, re.M)
        assert others == [*added, f"{title} of moved images"]


def test_training_without_labels(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = image_folder / "train" / "dark", tmp_path / "run"
    code, printed, _ = run(f"train --data {data} --out {out} {TINY} --evaluate", capsys)
    assert code == 0
    lines = printed.splitlines()
    (needed,) = [i for i, line in enumerate(lines) if line.startswith("no accuracies at the end: ")]
    assert needed < min(i for i, line in enumerate(lines) if line.startswith("epoch 1/"))
    assert not any("not evaluated" in line for line in lines)
    assert any(line.startswith("figure ") for line in lines)
    err = refused(f"knn {out} --device cpu --workers 0", capsys)
    assert "train/" in err
    assert "val/" in err


def test_packed_images_train_like_their_files(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack, taken = tmp_path / "set.pack", tmp_path / "set.val.pack"
    command = f"pack {image_folder} --out {pack} --workers 0"
    taken.write_text("mine")
    assert f"out: {taken} exists; say --overwrite" in refused(command, capsys)
    assert not pack.exists()
    assert run(f"{command} --overwrite", capsys)[0] == 0
    assert taken.read_bytes() != b"mine"
    losses = []
    for data, out in ((f"folder:{image_folder}", "files"), (f"pack:{pack}", "pack")):
        assert run(f"train --data {data} {TINY} --out {tmp_path / out}", capsys)[0] == 0
        losses.append(json.loads((tmp_path / out / "metrics.jsonl").read_text())["loss"])
    assert losses[0] == losses[1]
    assert run(f"knn {tmp_path / 'pack'} --device cpu --k 5 --workers 0", capsys)[0] == 0


def test_views_draws_a_row_for_each_image(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row has the image and its views, small ones enlarged; options change the named policy."""
    options = "--policy multicrop --size 24 --local-size 12 --images 3"
    out, plain = tmp_path / "views.png", tmp_path / "plain.png"
    assert run(f"views --data folder:{image_folder} {options} --out {out}", capsys)[0] == 0
    with Image.open(out) as picture:
        assert 4 * 3 * 24 <= picture.height <= 4 * (3 * 24 + 16)
        assert picture.width >= 4 * (3 * 24 + 6 * 12)
    assert run(f"views --policy none --size 28 --images 1 --out {plain}", capsys)[0] == 0
    with Image.open(plain) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] == 4 * 28
    np.testing.assert_array_equal(pixels, pixels[::4, ::4].repeat(4, axis=0).repeat(4, axis=1))


def test_a_stopped_run_can_be_resumed(image_folder: Path, tmp_path: Path) -> None:
    """With loader workers: exit code 130, one line that names the next command, no traceback."""
    run_folder = tmp_path / "run"
    words = f"train --data folder:{image_folder} --out {run_folder} {TINY} --epochs 200 --workers 1"
    process = subprocess.Popen(
        [*PROGRAM, *words.split(), "--log-every", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = run_folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it, too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "go on with: vi-simsiam train --out" in err
    assert err.count("stopping after this step; the run can be resumed") == 1
    assert "Traceback" not in out + err
    assert checkpoints(run_folder)


def test_output_without_a_reader_is_no_error(image_folder: Path, tmp_path: Path) -> None:
    """As after `| head -1`: no message, and the exit code of a program that SIGPIPE ends."""
    reader, writer = os.pipe()
    os.close(reader)
    pack = f"pack {image_folder} --out {tmp_path}/a.pack --workers 0"  # Rich prints here
    for words in (["--help"], pack.split()):
        process = subprocess.run([*PROGRAM, *words], stdout=writer, stderr=subprocess.PIPE)
        assert (process.returncode, process.stderr) == (141, b"")
    os.close(writer)


def test_a_closed_standard_output_is_no_error() -> None:
    command = f"{shlex.join(PROGRAM)} --version >&-"
    process = subprocess.run(command, shell=True, capture_output=True, check=False)
    assert (process.returncode, process.stderr) == (0, b"")


def test_names_that_the_terminal_cannot_print_are_escaped(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(image_folder / "train" / "dark", tmp_path / "f\u00fcnf")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["views", "--data", str(data), "--out", str(data / "views.png")]) == 0
    assert b"f\\xfcnf" in written.getvalue()
