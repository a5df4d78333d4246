"""The compiled extension: the scalar math that the CPU and CUDA backends share, the CPU backend, and setup.py's choices."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import multiprocessing
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [  # views, target views, batch, dim
    (2, 2, 1, 2),
    (2, 1, 3, 3),
    (3, 3, 3, 17),
    (8, 2, 1, 33),
    (8, 8, 3, 17),
    (4, 3, 3, 257),
    (2, 2, 3, 2049),
]
REALS = {"float32": torch.float32, "float64": torch.float64}


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    try:
        return importlib.import_module("vi_simsiam._C")
    except ImportError as error:
        pytest.skip(f"the C++ extension was not built ({error})")


def run(
    extension: ModuleType,
    p: torch.Tensor,
    z: torch.Tensor,
    *,
    power_spherical: bool = True,
    scale: float = 1.0,
    minimum: float = 0.0,
    link: str = "softplus",
    gain: float = 1.0,
    cosine: float = 0.0,
    gradient: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """Loss (B,) by the CPU backend; `gradient` and `mean` are written where given. Strides are taken from the tensors."""
    loss = torch.full(
        (p.shape[1],), float("nan"), dtype=torch.promote_types(p.dtype, torch.float32)
    )
    weight = 2 / (len(z) * (len(p) - 1))
    extension.multiview_loss_cpu(
        predictions=[view.data_ptr() for view in p],
        targets=[view.data_ptr() for view in z],
        concentration=0,
        loss=loss.data_ptr(),
        mean=0 if mean is None else mean.data_ptr(),
        gradient=0 if gradient is None else gradient.data_ptr(),
        concentration_gradient=0,
        batch=p.shape[1],
        dim=z.shape[2],
        width=p.shape[2],
        prediction_stride=p.stride(1),
        target_stride=z.stride(1),
        gradient_strides=(0, 0) if gradient is None else gradient.stride()[:2],
        form="raw_concentration" if power_spherical else "cosine",
        scale=scale,
        minimum=minimum,
        link=link,
        gain=gain,
        cosine=cosine,
        weight=weight,
        gradient_weight=weight if mean is None else weight / p.shape[1],
        prediction_dtype=str(p.dtype).removeprefix("torch."),
        target_dtype=str(z.dtype).removeprefix("torch."),
        threads=threads,
    )
    return loss


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, extra: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and targets that point in similar directions, with lengths far from 1."""
    views, target_views, batch, dim = shape
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    p = torch.randn(views, batch, dim + extra, generator=generator, dtype=torch.float64)
    z = torch.randn(target_views, batch, dim, generator=generator, dtype=torch.float64) + common
    p[..., :dim] = 3 * (p[..., :dim] + common)
    return p.to(dtype), z.to(dtype)


def textbook(
    p: torch.Tensor, z: torch.Tensor, power_spherical: bool, scale: float, minimum: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (B,) and gradient from the definition: lgammas, float64, one pair at a time, autograd."""
    p, z = p.double().detach().requires_grad_(), z.double()
    dim, loss, pairs = z.shape[2], torch.zeros(p.shape[1], dtype=torch.float64), 0
    b = torch.tensor((dim - 1) / 2, dtype=torch.float64)
    for v in range(p.shape[0]):
        for g in range(z.shape[0]):
            if v == g:
                continue
            pairs += 1
            gain = torch.nn.functional.cosine_similarity(p[v, :, :dim], z[g], dim=-1, eps=0)
            if power_spherical:
                kappa = scale * torch.nn.functional.softplus(p[v, :, dim], threshold=100) + minimum
                gain = kappa * torch.log1p(gain) - kappa * np.log(2)
                gain = (
                    gain
                    + torch.lgamma(2 * b + kappa)
                    - torch.lgamma(b + kappa)
                    - torch.lgamma(2 * b)
                    + torch.lgamma(b)
                )
            loss = loss - gain
    loss = 2 / pairs * loss
    (gradient,) = torch.autograd.grad(loss.sum(), p)
    return loss.detach(), gradient


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    table = json.loads((ROOT / "tests" / "golden" / "power_spherical.json").read_text())
    columns = np.array(table["rows"], dtype=np.float64).T
    named = dict(zip(table["columns"], columns, strict=True))
    # The tabulated log_c_minus_log_c0 and kappa log1p(cos) are exact but cancel: add them with more digits.
    mpmath = pytest.importorskip(
        "mpmath", reason="mpmath forms the golden values of F without cancellation"
    )
    rows = zip(named["d"], named["kappa"], named["cos"], strict=True)
    named["ratio"] = np.array([exact_ratio(mpmath, *row) for row in rows])
    return named


def exact_ratio(mpmath: Any, dim: float, kappa: float, cosine: float) -> float:
    with mpmath.workdps(40):
        b, k = mpmath.mpf(dim - 1) / 2, mpmath.mpf(kappa)
        at_kappa = mpmath.loggamma(2 * b + k) - mpmath.loggamma(b + k) - k * mpmath.log(2)
        return float(
            at_kappa
            - mpmath.loggamma(2 * b)
            + mpmath.loggamma(b)
            + k * mpmath.log1p(mpmath.mpf(cosine))
        )


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
        # A few roundings of the largest summand, which is at most a few times the value, and of a logarithm below 7.
        assert np.all(
            np.abs(value - rows["ratio"]) <= 1e-14 * np.maximum(1, np.abs(rows["ratio"]))
        ), dim
        slope = rows["dlogp_dkappa"]
        assert np.all(np.abs(d_kappa - slope) <= 2e-15 * np.maximum(1, np.abs(slope))), dim
        np.testing.assert_allclose(d_cos, rows["dlogp_dcos"], rtol=5e-16, err_msg=f"dim {dim}")


def test_scalar_math_in_float32_keeps_its_digits(
    extension: ModuleType, golden: dict[str, np.ndarray]
) -> None:
    for dim in np.unique(golden["d"]):
        rows = {name: column[golden["d"] == dim] for name, column in golden.items()}
        kappa, cosine = rows["kappa"].astype(np.float32), rows["cos"].astype(np.float32)
        # Where the inputs are no float32 numbers the float64 form, tested above, gives the value at the rounded ones.
        ratio, slope, to_cos = terms(
            extension, kappa.astype(np.float64), cosine.astype(np.float64), dim
        )
        exact = (kappa == rows["kappa"]) & (cosine == rows["cos"])
        ratio, slope = (
            np.where(exact, rows["ratio"], ratio),
            np.where(exact, rows["dlogp_dkappa"], slope),
        )
        value, d_kappa, d_cos = terms(extension, kappa, cosine, dim)
        # Below 17 the summands are smaller than the value or than 10, each rounded once (6e-8). Above, two may nearly cancel:
        # b log1p(k / 2b) or less, b = (D - 1)/2, of which the C library's log1p and a product cost 1.5 eps.
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


@pytest.mark.parametrize("scale_by_dim", [False, True], ids=["scale 1", "scale D-1"])
@pytest.mark.parametrize("power_spherical", [True, False], ids=["power_spherical", "cosine"])
@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_matches_the_definition(
    extension: ModuleType,
    shape: tuple[int, int, int, int],
    name: str,
    power_spherical: bool,
    scale_by_dim: bool,
) -> None:
    scale, minimum = (shape[3] - 1.0 if scale_by_dim else 1.0), 0.25
    p, z = inputs(shape, REALS[name], extra=int(power_spherical))
    gradient = torch.full_like(p, float("nan"))
    loss = run(
        extension,
        p,
        z,
        power_spherical=power_spherical,
        scale=scale,
        minimum=minimum,
        gradient=gradient,
    )
    expected_loss, expected = textbook(p, z, power_spherical, scale, minimum)

    # One rounding of the cosine costs kappa/(1+c) of it in the value; the lgammas and digammas of the textbook are rounded too.
    dim, epsilon = shape[3], torch.finfo(p.dtype).eps
    kappa = scale * 4 + minimum if power_spherical else 1.0
    lgamma, digamma = math.lgamma(dim + kappa), max(1.0, math.log(dim + kappa))
    tolerance = 4 * epsilon * max(1.0, kappa) + 1e-15 * lgamma
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2 * epsilon, atol=tolerance)
    error, size = (
        (gradient.double() - expected).abs(),
        expected[..., :dim].abs().amax(dim=-1, keepdim=True),
    )
    assert (error[..., :dim] <= 16 * epsilon * size).all()
    assert (
        error[..., dim:] <= 8 * epsilon * scale * digamma
    ).all()  # the concentration has a unit of its own


@pytest.mark.parametrize("name", REALS)
def test_cpu_follows_strides_and_writes_nothing_else(extension: ModuleType, name: str) -> None:
    shape = views, _, batch, dim = (4, 2, 3, 37)
    p, z = inputs(shape, REALS[name])
    dense = torch.empty_like(p)
    loss = run(extension, p, z, gradient=dense)

    padded = torch.full((batch, views, dim + 6), float("nan"), dtype=p.dtype).transpose(0, 1)
    padded[..., 2 : dim + 3] = p
    spaced = torch.full((2, 2 * batch, dim), float("nan"), dtype=p.dtype)
    spaced[:, ::2] = z
    buffer = torch.full((views, batch + 1, dim + 9), float("nan"), dtype=p.dtype)
    view = buffer[:, 1:, 4 : dim + 5]
    assert torch.equal(
        run(extension, padded[..., 2 : dim + 3], spaced[:, ::2], gradient=view), loss
    )
    assert torch.equal(view, dense)
    view.fill_(float("nan"))
    assert buffer.isnan().all()


def test_cpu_accepts_an_empty_batch(extension: ModuleType) -> None:
    p, z = torch.empty(2, 0, 9), torch.empty(2, 0, 8)
    assert run(extension, p, z, gradient=torch.empty(2, 0, 9), threads=4).shape == (0,)


@pytest.mark.parametrize("power_spherical", [True, False], ids=["power_spherical", "cosine"])
def test_cpu_without_gradient_gives_the_same_loss(
    extension: ModuleType, power_spherical: bool
) -> None:
    p, z = inputs((3, 2, 5, 70), torch.float32, extra=int(power_spherical))
    with_gradient = run(
        extension, p, z, power_spherical=power_spherical, gradient=torch.empty_like(p)
    )
    assert torch.equal(run(extension, p, z, power_spherical=power_spherical), with_gradient)


@pytest.mark.parametrize("name", REALS)
def test_cpu_takes_a_zero_vector_as_cosine_zero(extension: ModuleType, name: str) -> None:
    dim = 24
    p, z = inputs((2, 2, 3, dim), REALS[name])
    p[0, 0, :dim] = 0
    z[0, 1] = 1e-13  # squared norm 2.4e-25: below the limit of a direction
    gradient = torch.full_like(p, float("nan"))
    loss = run(extension, p, z, scale=23.0, gradient=gradient)

    kappa = 23.0 * torch.nn.functional.softplus(p[..., dim].double()).numpy()
    cosine = torch.nn.functional.cosine_similarity(
        p[..., :dim].double(), z.flip(0).double(), dim=-1
    ).numpy()
    cosine[0, 0] = cosine[1, 1] = 0
    value, d_kappa, _ = (
        x.reshape(2, 3) for x in terms(extension, kappa.ravel(), cosine.ravel(), dim)
    )
    tolerance = 3e-6 if name == "float32" else 1e-13
    np.testing.assert_allclose(loss.numpy(), -value.sum(0), rtol=tolerance, atol=tolerance)
    assert not gradient[0, 0, :dim].any()
    assert not gradient[1, 1, :dim].any()
    to_raw = -23.0 * torch.sigmoid(p[..., dim].double()).numpy() * d_kappa
    np.testing.assert_allclose(
        gradient[..., dim].numpy(), to_raw, rtol=tolerance, atol=23 * tolerance
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["direction", "concentration", "target"])
def test_cpu_keeps_a_bad_number_in_its_sample(
    extension: ModuleType, where: str, bad: float
) -> None:
    dim = 40
    p, z = inputs((3, 2, 4, dim), torch.float32)
    clean_gradient = torch.empty_like(p)
    clean = run(extension, p, z, gradient=clean_gradient)
    (z if where == "target" else p)[0, 2, dim if where == "concentration" else 5] = bad
    gradient = torch.empty_like(p)
    loss = run(extension, p, z, gradient=gradient)
    others = [0, 1, 3]
    assert torch.equal(loss[others], clean[others])
    assert torch.equal(gradient[:, others], clean_gradient[:, others])
    if where == "concentration" and bad == -float("inf"):  # softplus(-inf) = 0 is a concentration
        assert loss[2].isfinite()
    else:
        assert loss[2].isnan()
        touched = [1, 2] if where == "target" else [0]
        assert gradient[touched, 2].isnan().any(dim=-1).all()


def test_cpu_treats_an_overflowing_length_as_bad(extension: ModuleType) -> None:
    p, z = inputs((2, 2, 2, 8), torch.float32)
    p[0, 0, :8] = 1e20
    assert run(extension, p, z).isnan().tolist() == [True, False]


def test_cpu_writes_zeros_for_a_view_without_a_pair(extension: ModuleType) -> None:
    p, z = inputs((2, 1, 3, 19), torch.float32)
    p[0] = float("nan")  # view 0 has only itself as target: it takes no part
    gradient = torch.full_like(p, float("nan"))
    loss = run(extension, p, z, gradient=gradient)
    assert loss.isfinite().all()
    assert torch.equal(gradient[0], torch.zeros(3, 20))
    assert gradient[1].isfinite().all()


@pytest.mark.parametrize("name", REALS)
def test_cpu_gives_the_same_bits_for_any_number_of_threads(
    extension: ModuleType, name: str
) -> None:
    p, z = inputs(
        (2, 2, 173, 2049), REALS[name]
    )  # 2.1 million columns: enough work for six threads
    one = torch.full_like(p, float("nan"))
    loss = run(extension, p, z, scale=2048.0, gradient=one, threads=1)
    for threads in (2, 3, 16):
        gradient = torch.full_like(p, float("nan"))
        assert torch.equal(
            run(extension, p, z, scale=2048.0, gradient=gradient, threads=threads), loss
        )
        assert torch.equal(gradient, one)


@pytest.mark.skipif(sys.platform != "linux", reason="loader processes are forked on Linux only")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_cpu_runs_in_a_forked_process_after_threads_ran_here(extension: ModuleType) -> None:
    p, z = inputs((2, 2, 173, 2049), torch.float32)
    loss = run(extension, p, z, threads=3)

    def same_loss() -> None:
        sys.exit(0 if torch.equal(run(extension, p, z, threads=3), loss) else 3)

    child = multiprocessing.get_context("fork").Process(target=same_loss)
    child.start()
    child.join(timeout=30)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0


def test_cpu_divides_a_mean_s_gradient_by_the_batch(extension: ModuleType) -> None:
    p, z = inputs((2, 2, 8, 70), torch.float64)
    gradient, of_mean, mean = (
        torch.empty_like(p),
        torch.empty_like(p),
        torch.empty((), dtype=p.dtype),
    )
    loss = run(extension, p, z, gradient=gradient)
    assert torch.equal(run(extension, p, z, gradient=of_mean, mean=mean), loss)
    # Seven additions and a division round by eps / 2 of no more than the sum of the absolute values.
    assert (
        abs(mean.item() - math.fsum(loss.tolist()) / 8)
        <= 4 * torch.finfo(torch.float64).eps * loss.abs().mean()
    )
    assert torch.equal(of_mean, gradient / 8), "an eighth is exact"


def test_cpu_refuses_what_it_would_read_past(extension: ModuleType) -> None:
    with pytest.raises(ValueError, match="predictions: 1 to 16 views"):
        run(extension, torch.zeros(17, 1, 9), torch.zeros(2, 1, 8))


def test_cpu_names_the_dtypes_it_takes(extension: ModuleType) -> None:
    for dtypes in (
        (torch.float16, torch.float16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
    ):
        p, z = torch.zeros(2, 1, 9, dtype=dtypes[0]), torch.zeros(2, 1, 8, dtype=dtypes[1])
        with pytest.raises(ValueError, match="float64 for both, or float32 or bfloat16"):
            run(extension, p, z)


def test_cpu_rounds_bfloat16_as_torch_does(extension: ModuleType) -> None:
    """Gradients in bfloat16 are those of float32 rounded to the nearest, ties to even; NaN and infinity stay."""
    p, z = (x.bfloat16() for x in inputs((3, 3, 9, 83), torch.float32))
    exact = torch.empty(p.shape)
    loss = run(extension, p.float(), z.float(), gradient=exact)
    for targets in (z, z.float()):
        gradient = torch.full_like(p, float("nan"))
        assert torch.equal(run(extension, p, targets, gradient=gradient), loss)
        assert torch.equal(gradient, exact.bfloat16())
    p[0, 0, 3] = float("nan")
    run(extension, p, z, gradient=gradient)
    assert gradient[0, 0, :83].isnan().all()


def test_build_info_agrees_with_what_is_there(extension: ModuleType) -> None:
    info = extension.build_info()
    assert set(info) == {"compiler", "simd", "cuda", "architectures"}
    assert info["simd"] in ("avx512", "avx2", "128 bit", "plain loops")
    assert (
        hasattr(extension, "multiview_loss_cuda")
        == (info["cuda"] is not None)
        == bool(info["architectures"])
    )


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
    assert list(setup_py.architectures(CUDA_13)) == [
        "8.0",
        "8.6",
        "8.9",
        "9.0+PTX",
        "10.0",
        "12.0+PTX",
    ]
    assert list(setup_py.architectures(CUDA_11)) == ["8.0", "8.6", "8.9", "9.0+PTX"]


def test_setup_turns_architectures_into_flags(setup_py: ModuleType) -> None:
    assert setup_py.architectures(CUDA_13, "8.0;12.0+PTX") == {
        "8.0": ["-gencode=arch=compute_80,code=sm_80"],
        "12.0+PTX": [
            "-gencode=arch=compute_120,code=sm_120",
            "-gencode=arch=compute_120,code=compute_120",
        ],
    }
    assert setup_py.architectures(CUDA_13, "9.0a") == {
        "9.0a": ["-gencode=arch=compute_90a,code=sm_90a"]
    }


@pytest.mark.parametrize("wanted", ["8.0 9.0", "8.0,9.0", " 8.0; 9.0;", "7.0;8.0;9.0"])
def test_setup_reads_any_separator_and_drops_the_unknown(setup_py: ModuleType, wanted: str) -> None:
    assert list(setup_py.architectures(CUDA_13, wanted)) == ["8.0", "9.0"]


def test_setup_refuses_a_list_without_a_known_architecture(setup_py: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"none of 3\.5;5\.0, only sm_75 sm_80"):
        setup_py.architectures(CUDA_13, "3.5;5.0")
