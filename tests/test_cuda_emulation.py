"""The CUDA kernels' source, run thread by thread on the CPU (tests/cuda_emulation) and compared
with float64.

What a GPU adds to this, its machine code and its memory, is in test_cuda_kernels.py and
test_gpu.py.
"""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_cases import BF16, F16, F32, F64, FORMS, Case, Scaling
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = (2, 2, 1 << 20, 0)
"""Multiprocessors, blocks of each, bytes of L2, and the seed of the order of threads."""


@pytest.fixture(autouse=True)
def _tensors_on_the_cpu() -> Iterator[None]:
    with torch.device("cpu"):
        yield


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
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
    loaded = ctypes.CDLL(str(library))
    loaded.loss.restype = loaded.scale.restype = ctypes.c_char_p
    loaded.launches.restype = ctypes.c_int64
    loaded.configure(*DEFAULTS, 0)
    return loaded


def check(kernels: Any, case: Case) -> dict[str, Tensor]:
    got, want = case.run(kernels), case.reference()
    epsilon = torch.finfo(case.real).eps
    kappa = 1.0 if case.form == "cosine" else float(case.concentrations().max())
    tolerance = 4 * epsilon * max(1.0, kappa)
    torch.testing.assert_close(got["loss"].double(), want["loss"], rtol=4 * epsilon, atol=tolerance)
    if case.mean:
        mean = got["loss"].double().mean()
        atol = epsilon * max(1.0, kappa)
        torch.testing.assert_close(got["mean"].double(), mean, rtol=2 * epsilon, atol=atol)
    else:
        assert got["mean"].isnan()
    if not case.wants_gradient:
        assert got["gradient"].isnan().all()
        return got
    assert case.gradient_dtype is not None
    assert got["between"].isnan().all()  # nothing outside the rows is written
    direction, exact = got["gradient"][..., : case.dim].double(), want["gradient"][..., : case.dim]
    error, size = (direction - exact).abs(), exact.abs().amax(dim=-1, keepdim=True)
    kept = torch.finfo(case.gradient_dtype)
    rounding = kept.eps / 2 * exact.abs() + kept.tiny
    assert (error <= 24 * epsilon * size + rounding).all()
    slope = case.scale * 8 * epsilon * 10
    if case.form == "raw":
        exact = want["gradient"][..., case.dim]
        rounding = kept.eps / 2 * exact.abs()
        assert ((got["gradient"][..., case.dim].double() - exact).abs() <= slope + rounding).all()
    elif case.form == "given":
        error = got["concentration_gradient"].double() - want["concentration_gradient"]
        assert (error.abs() <= slope).all()
    assert (got["gradient"][..., case.used :] == 0).all()
    return got


# Views, targets, batch, dim.
SHAPES = [
    (2, 2, 1, 2),
    (2, 1, 3, 3),
    (2, 2, 40, 32),
    (2, 2, 3, 516),
    (2, 2, 5, 1024),
    (3, 2, 3, 64),
]
SHAPES += [(5, 1, 2, 40), (8, 2, 2, 520), (3, 3, 5, 17), (16, 16, 1, 24)]
TRAINED: dict[str, Any] = {"link": "quadratic", "gain": 0.3, "cosine": 1.5}
TRAINED |= {"scale": 7.0, "opposed": True}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_matches_float64(
    kernels: Any, shape: tuple[int, int, int, int], form: str
) -> None:
    for aligned in (True, False):
        check(kernels, Case(*shape, form=form, aligned=aligned, padding=3))
        if form == "raw":
            check(kernels, Case(*shape, **TRAINED, aligned=aligned, padding=3))


@pytest.mark.parametrize("shape", [(2, 2, 40, 32), (3, 2, 40, 516), (2, 1, 40, 2048)], ids=str)
def test_at_the_bound_of_the_quadratic_link_only_what_raises_kappa_counts(
    kernels: Any, shape: tuple[int, int, int, int]
) -> None:
    for aligned in (True, False):
        case = Case(*shape, **TRAINED, aligned=aligned)
        column = check(kernels, case)["gradient"][1, :, case.dim]
        below = case.predictions[1][:, case.dim] < 0.02 / case.gain
        assert (column[below] == 0).sum() > 3
        assert (column[below] < 0).sum() > 3


@pytest.mark.parametrize(
    "dtypes",
    [
        *((F64, F64, F64), (BF16, BF16, BF16), (BF16, F32, BF16)),
        *((BF16, BF16, F32), (F16, F16, F32), (F16, F32, F16)),
    ],
    ids=lambda d: "-".join(str(x).removeprefix("torch.") for x in d),
)
@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 80), (2, 1, 2, 19), (8, 2, 2, 144), (4, 4, 2, 48)], ids=str
)
def test_every_dtype_matches_float64(
    kernels: Any,
    shape: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
) -> None:
    names = ("dtype", "target_dtype", "gradient_dtype")
    for aligned in (True, False):
        check(kernels, Case(*shape, **dict(zip(names, dtypes, strict=True)), aligned=aligned))


@pytest.mark.parametrize(
    ("views", "dim", "options"),
    [
        (2, 2048, {"padding": 15}),
        (2, 2048, {"aligned": False}),
        (2, 2048, {"padding": 15, "dtype": BF16}),
        (2, 8192, {}),
        (2, 8196, {}),  # streamed
        (8, 2048, {"padding": 15}),
        (3, 4100, {}),  # streamed
        (2, 2052, {"dtype": F64}),  # streamed
    ],
    ids=str,
)
def test_long_rows_match_float64(
    kernels: Any, views: int, dim: int, options: dict[str, Any]
) -> None:
    check(kernels, Case(views, 2, 1, dim, scale=dim - 1.0, **options))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_an_address_that_is_not_aligned_is_seen(kernels: Any, offset: int) -> None:
    check(kernels, Case(2, 2, 3, 64, offset=offset))
    check(kernels, Case(2, 2, 3, 64, target_offset=offset))
    check(kernels, Case(2, 2, 3, 64, dtype=BF16, offset=2 * offset))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "shape", [(2, 2, 67, 64), (2, 2, 9, 1024), (6, 2, 5, 160), (3, 3, 5, 320)], ids=str
)
def test_no_order_of_threads_and_blocks_changes_a_bit(
    kernels: Any, shape: Sequence[int], seed: int
) -> None:
    case = Case(*shape, form="given", padding=1)
    want = check(kernels, case)
    kernels.configure(2, 2, 1 << 20, 1 + seed, 0)
    got = case.run(kernels)
    kernels.configure(*DEFAULTS, 0)
    assert all(torch.equal(want[name], got[name]) for name in want if name != "between")


@pytest.mark.parametrize("multiprocessors", [1, 3, 64])
def test_any_grid_gives_the_same_samples(kernels: Any, multiprocessors: int) -> None:
    """Few blocks that take many samples, teams that share a block, and one block per sample."""
    case = Case(2, 2, 50, 32)
    kernels.configure(multiprocessors, 1, 1 << 20, 0, 0)
    got = check(kernels, case)
    kernels.configure(*DEFAULTS, 0)
    assert torch.equal(got["gradient"], case.run(kernels)["gradient"])


def test_without_gradient_or_mean(kernels: Any) -> None:
    for shape in ((2, 2, 5, 64), (4, 2, 5, 64), (3, 3, 5, 20)):
        want = check(kernels, Case(*shape))
        got = check(kernels, Case(*shape, wants_gradient=False, mean=False))
        assert torch.equal(got["loss"], want["loss"])


@pytest.mark.parametrize("shape", [(2, 2, 4, 40), (5, 2, 4, 40), (3, 3, 4, 40)], ids=str)
def test_a_zero_vector_has_cosine_zero_and_no_gradient(
    kernels: Any, shape: tuple[int, int, int, int]
) -> None:
    case = Case(*shape, form="cosine")
    case.predictions[0][1] = 0
    case.predictions[1][2, : case.dim] = 1e-13
    case.targets_[0][3] = 0
    got = case.run(kernels)
    assert got["loss"].isfinite().all()
    assert not got["gradient"][0, 1].any()
    assert not got["gradient"][1, 2].any()
    if case.targets == 2:
        assert not got["gradient"][1, 3].any()


@pytest.mark.parametrize("shape", [(2, 2, 40, 40), (5, 2, 4, 40), (3, 3, 4, 40)], ids=str)
@pytest.mark.parametrize(
    ("where", "bad"),
    [
        *(("prediction", float("nan")), ("prediction", 1e20), ("target", float("inf"))),
        *(("concentration", float("nan")), ("concentration", -1.0)),
    ],
)
def test_a_bad_number_stays_in_its_sample(
    kernels: Any, where: str, shape: tuple[int, int, int, int], bad: float
) -> None:
    case = Case(*shape, form="given")
    clean = case.run(kernels)
    assert case.concentration is not None
    if where == "prediction":
        case.predictions[1][2, 7] = bad
    elif where == "target":
        case.targets_[0][2, 7] = bad
    else:
        case.concentration[1, 2] = bad
    got = case.run(kernels)
    others = [b for b in range(case.batch) if b != 2]
    assert torch.equal(got["loss"][others], clean["loss"][others])
    assert torch.equal(got["gradient"][:, others], clean["gradient"][:, others])
    assert got["loss"][2].isnan()
    assert got["mean"].isnan()
    assert got["gradient"][1, 2].isnan().any()
    if where == "concentration":
        assert got["concentration_gradient"][1, 2].isnan()


@pytest.mark.parametrize("form", FORMS)
def test_the_only_target_view_has_no_gradient(kernels: Any, form: str) -> None:
    for views, dim in ((2, 40), (5, 40), (2, 8200)):
        case = Case(views, 1, 3, dim, form=form, padding=2)
        case.predictions[0].fill_(float("nan"))  # it takes no part
        got = case.run(kernels)
        assert got["loss"].isfinite().all()
        assert (got["gradient"][0] == 0).all()
        if form == "given":
            assert (got["concentration_gradient"][0] == 0).all()
        assert got["gradient"][1:].isfinite().all()


def test_extreme_concentrations(kernels: Any) -> None:
    case = Case(2, 2, 6, 2048, form="given")
    assert case.concentration is not None
    case.concentration[:] = torch.tensor([0.0, 1e-3, 1.0, 1e4, 1e5, 1e6])
    case.predictions[0][0, : case.dim] = case.targets_[1][0]
    case.predictions[1][5, : case.dim] = -case.targets_[0][5]
    got, want = case.run(kernels), case.reference()
    error = (got["loss"][:5].double() - want["loss"][:5]).abs()
    assert (error <= 4e-7 * (1 + case.concentration[0, :5])).all()
    assert got["loss"].isfinite().all()
    assert got["gradient"].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("stride", [80, 71], ids=["vectors", "elements"])
def test_scaling_in_place(kernels: Any, dtype: torch.dtype, stride: int) -> None:
    for width in (70, 64, 3, 1):
        Scaling(dtype=dtype, stride=stride, width=width).run(kernels)
    Scaling(dtype=dtype, stride=1040, width=1033, views=2, batch=3).run(kernels)
    factors = [i % 3 for i in range(25)]
    Scaling(dtype=dtype, stride=stride, factor=factors, expanded=False).run(kernels)
    Scaling(dtype=dtype, stride=stride, factor=[1.0]).run(kernels)


@pytest.mark.parametrize("stride", [80, 71], ids=["vectors", "elements"])
def test_scaling_into_float16(kernels: Any, stride: int) -> None:
    for factor in (1.0, 1e-3):
        Scaling(out_dtype=F16, stride=stride, factor=[factor]).run(kernels)


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
def test_errors_give_advice(kernels: Any, code: int, words: str) -> None:
    kernels.configure(*DEFAULTS, code)
    try:
        with pytest.raises(RuntimeError, match=re.escape(words)):
            Case(2, 2, 2, 8).run(kernels)
    finally:
        kernels.configure(*DEFAULTS, 0)


def test_one_launch(kernels: Any) -> None:
    kernels.configure(*DEFAULTS, 0)
    Case(8, 2, 9, 64).run(kernels)
    assert kernels.launches() == 1
    Scaling().run(kernels)
    assert kernels.launches() == 2
