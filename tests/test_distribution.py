"""The sdist and the wheel: built in isolation, complete, and usable without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[1]
CODE = {"vi_simsiam": "vi_simsiam", "kernels": "vi_simsiam/kernels",
        "benchmarks": "vi_simsiam/benchmarks"}  # fmt: skip
TRAIN = ["train", "--images", "64", "--epochs", "1", "--batch-size", "32", "--size", "16",
         "--dim", "16", "--workers", "0", "--device", "cpu", "--out", "run"]  # fmt: skip
BENCH = ["bench", "loss", "--device", "cpu", "--only", "64x512", "--rounds", "3"]


def output(*command: str | Path, cwd: Path, **options: Any) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git has or would add, with products of builds among them."""
    folder = tmp_path_factory.mktemp("tree")
    listed = output("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for stray in ("vi_simsiam/_C.other.so", "benchmarks/results/new.json", "runs/1/config.json"):
        (folder / stray).parent.mkdir(parents=True, exist_ok=True)
        (folder / stray).write_text("of this machine")
    return folder


@pytest.fixture(scope="module")
def built(tree: Path) -> Path:
    """The folder with both files; the wheel is built from the sdist."""
    environment = {**os.environ, "VI_SIMSIAM_NO_CUDA": "1"}  # nvcc would take minutes
    output(sys.executable, "-m", "build", cwd=tree, env=environment)
    return tree / "dist"


def test_files(tree: Path, built: Path) -> None:
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    output(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=built)

    code = {
        f"{place}/{file.relative_to(tree / folder)}": str(file.relative_to(tree))
        for folder, place in CODE.items()
        for pattern in ("**/*.py", "py.typed", "assets/*")
        for file in (tree / folder).glob(pattern)
    }
    with zipfile.ZipFile(wheel) as content:
        found = {name for name in content.namelist() if not name.endswith("/")}
    notes = {name for name in found if ".dist-info/" in name}
    assert {name.rpartition("/")[2] for name in notes} >= {"LICENSE", "FASHION_MNIST_LICENSE"}
    extensions = {name for name in found if name.endswith(sysconfig.get_config_var("EXT_SUFFIX"))}
    assert len(extensions) <= 1  # none without a compiler
    assert found - notes - extensions == code.keys()

    with tarfile.open(sdist) as archive:
        members = {each.name.partition("/")[2] for each in archive.getmembers() if each.isfile()}
    made = {name for name in members if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    own = {"LICENSE", "README.md", "MANIFEST.in", "pyproject.toml", "setup.py"}
    own |= {f"csrc/{file.name}" for file in (tree / "csrc").iterdir()}
    assert members - made == own | set(code.values())


@pytest.mark.parametrize("kind", ["tar.gz", "whl"])
def test_it_works_where_there_is_no_compiler(kind: str, built: Path, tmp_path: Path) -> None:
    (file,) = built.glob(f"*.{kind}")
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    environment = {**os.environ, "PATH": str(programs), "CUDA_HOME": "/nowhere"}
    environment.pop("PYTHONPATH", None)

    def call(*words: str | Path) -> str:
        return output(programs / words[0], *words[1:], cwd=tmp_path, env=environment)

    call("pip", "install", "--no-deps", file)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    # The other packages are those of the present environment.
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    assert str(site) in call("python", "-c", "import vi_simsiam; print(vi_simsiam.__file__)")
    info = call("vi-simsiam", "info")
    compiled = any(site.glob("vi_simsiam/_C*"))
    assert compiled or "extension    none: " in info
    assert not compiled or kind == "whl"
    call("vi-simsiam", *TRAIN)
    assert any((tmp_path / "run").glob("checkpoint*"))
    assert "eager" in call("vi-simsiam", *BENCH)
