"""Cases of the kernels that end a stem, in Triton's interpreter or on a GPU (see
`triton_cases.py`).

Rule for errors: the largest one against float64 is at most twice that of the eager reference in the
same dtype, or what rounding may do to the largest value: that of the result, and 32 ulp of float32
for what comes before. Most of these are the variance's, of differences to the first row whose
squares the interpreter adds up one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from triton_tools import DEVICE, INTERPRETED, captured

from vi_simsiam.errors import InputError
from vi_simsiam.kernels import batch_norm
from vi_simsiam.kernels import stem_pool as kernel
from vi_simsiam.ops import stem_pool as operation
from vi_simsiam.ops.stem_pool import batch_norm_relu_max_pool

SMALL = (2, 8, 6, 6)
NAMES = ("y", "x", "weight", "bias", "running_mean", "running_var")


class Problem(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    gradient: Tensor


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several programs even for tiny images: in each direction, and with a last one that is not
    full."""
    constants = {"POOL_WARPS": 1, "GRADIENT_WARPS": 1, "POOL_ROWS": 2, "GRADIENT_ROWS": 2}
    for name, value in constants.items():
        monkeypatch.setattr(kernel, name, value)
    for name, value in {"SINGLE_ELEMENTS": 0, "REDUCE_WARPS": 1, "REDUCE_LOADS": 2}.items():
        monkeypatch.setattr(batch_norm, name, value)
    monkeypatch.setattr(operation, "multiprocessors", lambda device: 6)
    _forget()
    yield
    _forget()


def _forget() -> None:
    for plan in (kernel.plan, batch_norm.plan):
        plan.cache_clear()


def _problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, offset: float = 0.5
) -> Problem:
    """Channels of different size and offset, with positive and negative weights; for few of them
    the ReLU passes all."""
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    images, channels, height, width = shape
    size = torch.logspace(-1, 1, channels, dtype=torch.float64)[:, None, None]
    x = ((random(*shape) + offset) * size).to(dtype)
    weight, bias, mean, deviation = (random(channels) for _ in range(4))
    gradient = random(images, channels, (height + 1) // 2, (width + 1) // 2).to(dtype)
    parameters = (p.float().to(DEVICE) for p in (weight, bias, mean, deviation.square()))
    layout = torch.channels_last
    return Problem(
        x.to(DEVICE, memory_format=layout), *parameters, gradient.to(DEVICE, memory_format=layout)
    )


def _run(problem: Problem, groups: int, backend: str, **options: float) -> dict[str, Tensor]:
    """y, the gradients and the running statistics, by a backend."""
    x, weight, bias, running_mean, running_var, gradient = (
        part.detach().clone() for part in problem
    )
    given = [p.requires_grad_() for p in (x, weight, bias)]
    running = running_mean, running_var
    y = batch_norm_relu_max_pool(*given, *running, groups=groups, backend=backend, **options)
    by_given = torch.autograd.grad(y, given, gradient)
    return dict(zip(NAMES, (y.detach(), *by_given, *running), strict=True))


def _exact(problem: Problem, groups: int, **options: float) -> dict[str, Tensor]:
    return _run(Problem(*(part.double() for part in problem)), groups, "eager", **options)


def _check(problem: Problem, groups: int, **options: float) -> dict[str, Tensor]:
    ours, theirs = (_run(problem, groups, backend, **options) for backend in ("triton", "eager"))
    exact = _exact(problem, groups, **options)
    for name in NAMES:
        assert ours[name].shape == theirs[name].shape
        assert ours[name].dtype == theirs[name].dtype, name
        # The interpreter truncates to bfloat16 where a GPU rounds.
        last = torch.finfo(ours[name].dtype).eps / (1 if INTERPRETED else 2)
        rounding = (last + 32 * torch.finfo(torch.float32).eps) * exact[name].abs().max()
        allowed = torch.maximum(2 * (theirs[name] - exact[name]).abs().max(), rounding)
        assert (ours[name] - exact[name]).abs().max() <= allowed, name
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    assert ours["x"].is_contiguous(memory_format=torch.channels_last)
    return ours


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [
        ((4, 32, 4, 8), 2, torch.float32),  # whole tiles
        ((2, 32, 4, 16), 1, torch.bfloat16),
        ((3, 8, 5, 9), 3, torch.bfloat16),  # odd sides, tiles that are not full
        ((2, 3, 5, 35), 2, torch.float32),  # several stretches of a row
        ((2, 72, 4, 5), 1, torch.float32),  # two strips of channels
        ((4, 4, 1, 7), 2, torch.bfloat16),
        ((4, 4, 6, 1), 2, torch.float32),
    ],
    ids=str,
)
def test_values_gradients_and_running_statistics(
    shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype
) -> None:
    _check(_problem(shape, dtype), groups)


@pytest.mark.parametrize("shape", [(2, 32, 4, 16), (2, 8, 5, 5)], ids=["whole tiles", "odd"])
def test_the_shape_of_a_launch_changes_no_bit(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = _problem(shape, torch.bfloat16)
    want = _run(problem, 2, "triton")
    for warps, rows, last_first in ((1, 3, False), (4, 8, True)):
        for name in ("POOL", "GRADIENT"):
            monkeypatch.setattr(kernel, f"{name}_WARPS", warps)
            monkeypatch.setattr(kernel, f"{name}_ROWS", rows)
        monkeypatch.setattr(kernel, "LAST_FIRST", last_first)
        _forget()
        for name, value in _run(problem, 2, "triton").items():
            assert torch.equal(value, want[name]), name


def test_few_rows_of_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "SINGLE_ELEMENTS", 1 << 14)
    _forget()
    chosen = kernel.plan(*SMALL, 2, 4, 6)
    assert chosen.statistics.parts == chosen.sums.parts == 1
    _check(_problem(SMALL), 2)


def test_float16_other_numbers_and_a_large_mean() -> None:
    _check(_problem(SMALL, torch.float16), 2, momentum=0.3, eps=0.1)
    _check(_problem(SMALL, offset=3000.0), 2)


@pytest.mark.parametrize("size", [(6, 6), (5, 7)], ids=str)
def test_of_equal_values_the_first_one_is_taken(size: tuple[int, int]) -> None:
    """Few values: every window has ties, which PyTorch decides alike in float32 and float64."""
    problem = _problem((2, 8, *size))
    ties = problem._replace(x=problem.x.sign())
    ours, exact = _check(ties, 2), _exact(ties, 2)
    torch.testing.assert_close(ours["x"].double(), exact["x"], rtol=1e-4, atol=1e-5)
    flat = problem._replace(x=torch.ones_like(problem.x), bias=problem.bias.abs())
    ours, exact = _run(flat, 2, "triton"), _exact(flat, 2)
    torch.testing.assert_close(ours["y"].double(), exact["y"])
    torch.testing.assert_close(ours["x"].double(), exact["x"], rtol=1e-4, atol=1e-3)


def test_windows_without_a_positive_value_pass_nothing() -> None:
    problem = _problem(SMALL)
    # Far below 0, and exactly 0 before the ReLU, which is not positive.
    zeros = torch.zeros_like(problem.bias)
    for weight, bias in ((problem.weight, zeros - 100.0), (zeros, zeros)):
        ours = _run(problem._replace(weight=weight, bias=bias), 2, "triton")
        assert all((ours[name] == 0).all() for name in NAMES[:4])
    half = problem._replace(bias=torch.full_like(problem.bias, -1.0))
    y = _check(half, 2)["y"]
    assert 0.2 < (y == 0).double().mean() < 0.8


def test_a_weight_of_zero() -> None:
    """Every x of a window is as good as another; the largest one is taken."""
    problem = _problem(SMALL)
    level = problem._replace(weight=torch.zeros_like(problem.weight), bias=problem.bias.abs())
    ours = _run(level, 2, "triton")
    exact = _exact(level._replace(weight=problem.weight.abs() * 1e-9), 2)
    torch.testing.assert_close(ours["weight"].double(), exact["weight"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours["bias"].double(), exact["bias"], rtol=1e-4, atol=1e-4)
    assert (ours["x"] == 0).all()


def test_without_parameters_and_running_statistics() -> None:
    problem = _problem(SMALL)
    results = []
    for backend in ("triton", "eager"):
        x = problem.x.clone().requires_grad_()
        y = batch_norm_relu_max_pool(x, None, None, None, None, groups=2, backend=backend)
        results.append((y, *torch.autograd.grad(y, x, problem.gradient)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_in_another_layout() -> None:
    problem = _problem(SMALL)
    other = problem._replace(gradient=problem.gradient.contiguous())
    want = _run(problem, 2, "triton")
    for name, value in _run(other, 2, "triton").items():
        assert torch.equal(value, want[name])


def test_a_second_derivative_is_refused() -> None:
    x = _problem(SMALL).x.requires_grad_()
    y = batch_norm_relu_max_pool(x, *[None] * 4, groups=2, backend="triton")
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="max_pool cannot be differentiated twice"):
        (x.square().sum() + gradient.square().sum()).backward()


def test_under_compile_the_norm_and_the_pool_are_apart() -> None:
    x = _problem(SMALL).x
    compiled = torch.compile(batch_norm_relu_max_pool, fullgraph=True, backend="aot_eager")
    want = batch_norm_relu_max_pool(x, *[None] * 4, groups=2, backend="eager")
    torch.testing.assert_close(compiled(x, *[None] * 4, groups=2, backend="triton"), want)


def test_nan_stays_in_its_channel_and_group() -> None:
    problem = _problem(SMALL)
    problem.x[0, 3, 2, 2] = torch.nan
    y = _run(problem, 2, "triton")["y"]
    assert y[:1, 3].isnan().all()
    y[:1, 3] = 0
    assert not y.isnan().any()


@pytest.mark.skipif(INTERPRETED, reason="a CUDA graph needs a GPU")
def test_in_a_graph() -> None:
    """Replays update the running statistics and read what its input holds by then."""
    problem = _problem((8, 64, 16, 16), torch.bfloat16)
    x, weight, bias, mean, var, gradient = (part.clone() for part in problem)
    given = [part.requires_grad_() for part in (x, weight, bias)]

    def step() -> tuple[Tensor, ...]:
        y = batch_norm_relu_max_pool(*given, mean, var, groups=2, backend="triton")
        return y, *torch.autograd.grad(y, given, gradient)

    graph, results = captured(step)
    other = problem._replace(x=(problem.x * 2 + 1).to(problem.x.dtype))
    with torch.no_grad():
        x.copy_(other.x)
    for _ in range(2):
        mean.copy_(other.running_mean)
        var.copy_(other.running_var)
        graph.replay()
        for name, value in zip(NAMES, (*results, mean, var), strict=True):
            assert torch.equal(value, _run(other, 2, "triton")[name]), name


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"x: shape \(4, 8\)", {"x": torch.ones(4, 8)}),
        (r"x: shape \(0, 8, 6, 6\)", {"x": torch.ones(0, 8, 6, 6)}),
        (r"groups: 3 must divide the batch of 2", {"groups": 3}),
        (r"both must be given", {"running_var": None}),
        (r"channels_last", {"x": torch.ones(4, 8, 6, 6)}),
        (r"backend: 'tritn'.*did you mean 'triton'", {"backend": "tritn"}),
    ],
)
def test_errors(message: str, changes: dict[str, object]) -> None:
    problem = _problem(SMALL)
    arguments = problem._asdict() | {"groups": 2, "backend": "triton"} | changes
    del arguments["gradient"]
    given = [arguments.pop(name) for name in ("x", "weight", "bias", "running_mean", "running_var")]
    given = [part.to(DEVICE) if isinstance(part, Tensor) else part for part in given]
    with pytest.raises(InputError, match=message):
        batch_norm_relu_max_pool(*given, **arguments)
