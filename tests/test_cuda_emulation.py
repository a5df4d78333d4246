"""The CUDA kernels' source, run thread by thread on the CPU (tests/cuda_emulation): the tests of
the public losses, and what a grid of threads adds to them.

What a GPU adds to this, its machine code and its memory, is in test_cuda_kernels.py and
test_gpu.py.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated_cuda import Emulation, emulate
from losses import COSINE, POWER_SPHERICAL, QUADRATIC, check_error, draw, loss_and_gradient
from processes import run_tests

from vi_simsiam.functional import power_spherical_loss
from vi_simsiam.ops.multiview_loss import LossForm, multiview_loss

ROOT = Path(__file__).resolve().parent.parent
FORMS = pytest.mark.parametrize("form", [POWER_SPHERICAL, QUADRATIC, COSINE], ids=str)
LEFT_OUT = ("golden", "gradcheck", "padded", "alias", "repeats")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip(
            "the emulation needs Linux on x86-64 or 64-bit Arm: "
            "the CUDA kernels' numbers are not checked"
        )
    compiler = shutil.which("g++")
    version = subprocess.run(
        [compiler or "false", "-dumpversion"], capture_output=True, text=True, check=False
    ).stdout
    if int((re.match(r"\d+", version) or ["0"])[0]) < 12:
        pytest.skip("no g++ of version 12 or later: the CUDA kernels' numbers are not checked")
    library = tmp_path_factory.mktemp("cuda_emulation") / "kernels.so"
    folder = ROOT / "tests" / "cuda_emulation"
    # Unoptimised: the compiler takes longer than all tests.
    flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas"]
    includes = ("-DVI_SIMSIAM_CUDA", f"-I{folder}", f"-I{ROOT / 'csrc'}")
    command = [compiler, *flags, *includes, folder / "kernels.cpp", "-o", library]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    return str(library)


@pytest.fixture
def emulation(library: str, monkeypatch: pytest.MonkeyPatch) -> Emulation:
    return emulate(library, monkeypatch)


def test_public_functions(library: str) -> None:
    """Without those of equal bits at other addresses, which are added in another order, and
    long ones."""
    run_tests(
        *("tests/test_multiview_loss.py", "tests/test_multiview_loss_autograd.py"),
        *("-k", f"cuda and not {' and not '.join(LEFT_OUT)}"),
        VI_SIMSIAM_EMULATION=library,
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )


@pytest.mark.parametrize(
    ("views", "dim", "dtype"),
    [
        (2, 8192, torch.float32),
        (2, 8196, torch.float32),  # streamed
        (3, 4100, torch.float32),  # streamed
        (8, 2048, torch.float32),
        (2, 2052, torch.float64),  # streamed
    ],
    ids=str,
)
def test_long_rows(emulation: Emulation, views: int, dim: int, dtype: torch.dtype) -> None:
    p, z = (x.to(dtype) for x in draw(POWER_SPHERICAL, views, 2, 1, dim))
    check_error(p, z, POWER_SPHERICAL, "cuda")


@FORMS
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", [(2, 2, 67, 64), (2, 2, 9, 1024), (6, 2, 5, 160), (3, 3, 5, 320)])
def test_no_order_of_threads_and_blocks_changes_a_bit(
    emulation: Emulation, form: LossForm, shape: tuple[int, int, int, int], seed: int
) -> None:
    p, z = (x.float() for x in draw(form, *shape))
    want = loss_and_gradient(p, z, form, "cuda")
    mean = multiview_loss(p, z, form, backend="cuda")
    emulation.configure(seed=seed)
    assert all(map(torch.equal, loss_and_gradient(p, z, form, "cuda"), want))
    assert torch.equal(multiview_loss(p, z, form, backend="cuda"), mean)


@FORMS
@pytest.mark.parametrize("multiprocessors", [1, 3, 64])
def test_any_grid_gives_the_same_samples(
    emulation: Emulation, form: LossForm, multiprocessors: int
) -> None:
    """Few blocks that take many samples, teams that share a block, and one block per sample."""
    p, z = (x.float() for x in draw(form, 2, 2, 50, 32))
    want = loss_and_gradient(p, z, form, "cuda")
    emulation.configure(multiprocessors, blocks=1)
    assert all(map(torch.equal, loss_and_gradient(p, z, form, "cuda"), want))


BUILT, DRIVER = "with CUDA 13.0", "built with CUDA 13.0, the driver supports CUDA up to 12.4"
UNBUILT = "holds no code for this GPU (compute capability 7.5): it was built for 8.0, 9.0"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (209, f"{UNBUILT} {BUILT}"),
        (222, f"driver cannot compile its PTX: {DRIVER}"),
        (35, f"driver is too old for the extension: {DRIVER}"),
        (719, "cudaErrorLaunchFailure: unspecified launch failure"),
    ],
)
def test_errors_give_advice(emulation: Emulation, code: int, words: str) -> None:
    emulation.configure(error=code)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        power_spherical_loss(*draw(POWER_SPHERICAL, 2, 2, 2, 8), backend="cuda")


def test_one_launch_for_the_loss_and_one_for_backward(emulation: Emulation) -> None:
    p, z = draw(POWER_SPHERICAL, 8, 2, 9, 64)
    loss = power_spherical_loss(p.requires_grad_(), z, backend="cuda")
    assert emulation.library.launches() == 1
    loss.backward()
    assert emulation.library.launches() == 2
