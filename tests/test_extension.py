"""The compiled extension: the scalar math that the CPU and CUDA backends share, the CPU backend,
and setup.py's choices."""

from __future__ import annotations

import importlib
import importlib.util
import math
import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from losses import POWER_SPHERICAL, draw, loss_and_gradient
from processes import environment
from test_power_spherical import COLUMN, exact

from vi_simsiam.functional import power_spherical_loss
from vi_simsiam.ops.multiview_loss_fused import LossCall, launch_loss

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    try:
        return importlib.import_module("vi_simsiam._C")
    except ImportError as error:
        pytest.skip(f"the C++ extension was not built ({error})")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """Columns of the golden table, and F = log PS - log uniform as "ratio".

    The tabulated log_c_minus_log_c0 and kappa log1p(cos) cancel: F is computed from its definition.
    """
    rows = zip(COLUMN["d"].astype(int).tolist(), COLUMN["kappa"], COLUMN["cos"], strict=True)
    ratio = [exact(kappa, cosine, dim)[0] for dim, kappa, cosine in rows]
    return COLUMN | {"ratio": np.array(ratio)}


def terms(
    extension: ModuleType, kappa: np.ndarray, cosine: np.ndarray, dim: float
) -> tuple[np.ndarray, ...]:
    return extension.power_spherical_terms(kappa, cosine, int(dim))  # type: ignore[no-any-return]


def test_scalar_math_in_float64_matches_the_golden_table(
    extension: ModuleType, golden: dict[str, np.ndarray]
) -> None:
    for dim in np.unique(golden["d"]):
        rows = {name: column[golden["d"] == dim] for name, column in golden.items()}
        value, d_kappa, d_cos = terms(extension, rows["kappa"], rows["cos"], dim)
        # A few roundings of the largest summand, which is at most a few times the value, and of a
        # logarithm below 7.
        limit = 1e-14 * np.maximum(1, np.abs(rows["ratio"]))
        assert np.all(np.abs(value - rows["ratio"]) <= limit), dim
        slope = rows["dlogp_dkappa"]
        assert np.all(np.abs(d_kappa - slope) <= 2e-15 * np.maximum(1, np.abs(slope))), dim
        np.testing.assert_allclose(d_cos, rows["dlogp_dcos"], rtol=5e-16, err_msg=f"dim {dim}")


def test_scalar_math_in_float32_keeps_its_digits(
    extension: ModuleType, golden: dict[str, np.ndarray]
) -> None:
    for dim in np.unique(golden["d"]):
        rows = {name: column[golden["d"] == dim] for name, column in golden.items()}
        kappa, cosine = rows["kappa"].astype(np.float32), rows["cos"].astype(np.float32)
        # Where the inputs are no float32 numbers the float64 form, tested above, gives the value at
        # the rounded ones.
        ratio, slope, to_cos = terms(
            extension, kappa.astype(np.float64), cosine.astype(np.float64), dim
        )
        exact = (kappa == rows["kappa"]) & (cosine == rows["cos"])
        ratio = np.where(exact, rows["ratio"], ratio)
        slope = np.where(exact, rows["dlogp_dkappa"], slope)
        value, d_kappa, d_cos = terms(extension, kappa, cosine, dim)
        # Below 17 the summands are smaller than the value or than 10, each rounded once (6e-8).
        # Above, two may nearly cancel: b log1p(k / 2b) or less, b = (D - 1)/2, of which the C
        # library's log1p and a product cost 1.5 eps.
        summands = 1.5 * 2**-23 * (dim - 1) * np.log1p(kappa / (dim - 1)) if dim >= 17 else 0
        tolerance = (4e-6 if dim >= 17 else 8e-7) * np.maximum(1, np.abs(ratio))
        assert np.all(np.abs(value - ratio) <= np.maximum(tolerance, summands)), dim
        # Three roundings of the logarithm, at every dim.
        assert np.all(np.abs(d_kappa - slope) <= 2.4e-7 * np.maximum(1, np.abs(slope))), dim
        np.testing.assert_allclose(d_cos, to_cos, rtol=1.2e-7, err_msg=f"dim {dim}")


def test_scalar_math_in_float32_does_not_cancel_at_the_optimum(extension: ModuleType) -> None:
    kappa, cosine = np.array([128961.0], np.float32), np.array([63 / 64], np.float32)
    value, d_kappa, _ = terms(extension, kappa, cosine, 2048)
    exact_value, exact_d_kappa, _ = terms(
        extension, kappa.astype(np.float64), cosine.astype(np.float64), 2048
    )
    assert exact_d_kappa[0] == pytest.approx(3.0e-8, rel=0.02)
    assert abs(d_kappa[0] - exact_d_kappa[0]) < 1e-12  # the textbook form is off by 3e-8
    assert abs(value[0] - exact_value[0]) < 4e-4  # the value is 4,270; textbook: 4e-2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scalar_math_at_the_edges(extension: ModuleType, dtype: type[np.floating[Any]]) -> None:
    kappa = np.array([5, 5, 5, 0, np.nan, np.inf, 5], dtype)
    cosine = np.array([-1, -1 + 5e-7, -2, 0.5, 0.5, 0.5, np.nan], dtype)
    value, d_kappa, d_cos = terms(extension, kappa, cosine, 20)
    at_clamp = terms(extension, np.array([5.0]), np.array([-1 + 1e-6]), 20)
    np.testing.assert_allclose(value[:3], at_clamp[0][0], rtol=1e-6)
    np.testing.assert_allclose(d_kappa[:3], at_clamp[1][0], rtol=1e-6)
    assert d_cos[:3].tolist() == [0, 0, 0]  # the clamped function does not depend on the cosine
    assert (value[3], d_cos[3]) == (0, 0)
    assert np.isnan(value[4:]).all()


def test_scalar_math_refuses_what_it_would_read_past(extension: ModuleType) -> None:
    with pytest.raises(ValueError, match="same number of elements"):
        extension.power_spherical_terms(np.zeros(3), np.zeros(2), 8)
    with pytest.raises(TypeError):
        extension.power_spherical_terms(np.zeros(3, np.float32), np.zeros(3), 8)


def test_cpu_writes_nothing_around_the_gradient(extension: ModuleType) -> None:
    views, batch, dim = 4, 3, 37
    p, z = (x.float() for x in draw(POWER_SPHERICAL, views, 2, batch, dim))
    numbers = (1.0, 0.0, 1.0, "softplus", 1.0, 0.0)
    call = LossCall("cpu", "power_spherical", p.dtype, *numbers, mean=False, wants_gradient=True)
    buffer = torch.full((views, batch + 1, dim + 9), math.nan)
    view = buffer[:, 1:, 4 : dim + 5]
    launch_loss(list(p), list(z), None, torch.empty(batch), None, view, None, call)
    assert torch.equal(view, loss_and_gradient(p, z, POWER_SPHERICAL, "cpu")[1])
    view.fill_(math.nan)
    assert buffer.isnan().all()


@pytest.mark.skipif(sys.platform != "linux", reason="loader processes are forked on Linux only")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_cpu_runs_in_a_forked_process_after_threads_ran_here(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    p, z = (x.float() for x in draw(POWER_SPHERICAL, 2, 2, 173, 2049))
    loss = power_spherical_loss(p, z, backend="cpu", reduction="none")

    def same_loss() -> None:
        again = power_spherical_loss(p, z, backend="cpu", reduction="none")
        sys.exit(0 if torch.equal(again, loss) else 3)

    child = multiprocessing.get_context("fork").Process(target=same_loss)
    child.start()
    child.join(timeout=30)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0


def test_cpu_rounds_bfloat16_as_torch_does(extension: ModuleType) -> None:
    """Those of float32 to the nearest, ties to even; NaN stays."""
    p, z = (x.bfloat16() for x in draw(POWER_SPHERICAL, 3, 3, 9, 83))
    loss, exact = loss_and_gradient(p.float(), z.float(), POWER_SPHERICAL, "cpu")
    for targets in (z, z.float()):
        found, gradient = loss_and_gradient(p, targets, POWER_SPHERICAL, "cpu")
        assert torch.equal(found, loss)
        assert torch.equal(gradient, exact.bfloat16())
    p[0, 0, 3] = math.nan
    assert loss_and_gradient(p, z, POWER_SPHERICAL, "cpu")[1][0, 0, :83].isnan().all()


def test_build_info_agrees_with_what_is_there(extension: ModuleType) -> None:
    info = extension.build_info()
    assert set(info) == {"compiler", "simd", "cuda", "architectures"}
    has_cuda = hasattr(extension, "multiview_loss_cuda")
    assert has_cuda == (info["cuda"] is not None) == bool(info["architectures"])


def with_simd(name: str, *command: str) -> subprocess.CompletedProcess[str]:
    given = environment(VI_SIMSIAM_SIMD=name)
    return subprocess.run([sys.executable, *command], env=given, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "simd"),
    [("baseline", ("128 bit", "plain loops")), ("avx2", ("avx2",)), ("avx512", ("avx512",))],
)
def test_vector_instructions_by_name(
    extension: ModuleType, name: str, simd: tuple[str, ...]
) -> None:
    """`make cpus` runs this file and the losses' with each of them."""
    script = "import vi_simsiam._C as c; print(c.build_info()['simd'])"
    chosen = with_simd(name, "-c", script)
    if "does not run here" in chosen.stderr:
        pytest.skip(f"this processor has no {name}")
    assert chosen.stdout.strip() in simd, chosen.stderr


def test_vector_instructions_that_do_not_run_here_are_named(extension: ModuleType) -> None:
    result = with_simd("avx9", "-m", "vi_simsiam", "info")
    assert result.returncode == 2
    message = "vi-simsiam: VI_SIMSIAM_SIMD: 'avx9' does not run here; accepted: baseline"
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    pytest.importorskip("setuptools", reason="setup.py is a setuptools script")
    if not (ROOT / "setup.py").is_file():
        pytest.skip("setup.py is not beside the tests")
    spec = importlib.util.spec_from_file_location("vi_simsiam_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CUDA_13 = "sm_75\nsm_80\nsm_86\nsm_89\nsm_90\nsm_100\nsm_103\nsm_120\n"
CUDA_11 = "sm_70\nsm_75\nsm_80\nsm_86\nsm_89\nsm_90\n"


def test_setup_builds_the_default_architectures_that_nvcc_knows(setup_py: ModuleType) -> None:
    known = ["8.0", "8.6", "8.9", "9.0+PTX"]
    assert list(setup_py.architectures(CUDA_11)) == known
    assert list(setup_py.architectures(CUDA_13)) == [*known, "10.0", "12.0+PTX"]


def test_setup_turns_architectures_into_flags(setup_py: ModuleType) -> None:
    flag = "-gencode=arch=compute_{},code={}"
    assert setup_py.architectures(CUDA_13, "8.0;12.0+PTX;9.0a") == {
        "8.0": [flag.format("80", "sm_80")],
        "12.0+PTX": [flag.format("120", "sm_120"), flag.format("120", "compute_120")],
        "9.0a": [flag.format("90a", "sm_90a")],
    }
    for wanted in ("8.0 9.0", "8.0,9.0", " 8.0; 9.0;", "7.0;8.0;9.0"):
        assert list(setup_py.architectures(CUDA_13, wanted)) == ["8.0", "9.0"]
    with pytest.raises(ValueError, match=r"none of 3\.5;5\.0, only sm_75 sm_80"):
        setup_py.architectures(CUDA_13, "3.5;5.0")
