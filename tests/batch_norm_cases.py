"""Cases of the fused BatchNorm's backends, each named by the fixture `fused` of the module that
imports them: values, gradients and running statistics.

Everything is held to the eager reference in float64, which `test_batch_norm.py` holds to separate
passes of `torch.nn.functional.batch_norm`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vi_simsiam.errors import InputError
from vi_simsiam.ops import batch_norm_fused as operation
from vi_simsiam.ops.batch_norm import batch_norm_act
from vi_simsiam.ops.batch_norm_fused import NormCall

DEVICE = torch.device("cuda" if os.environ.get("TRITON_INTERPRET") == "0" else "cpu")
"""In Triton's interpreter and of the CPU backend the CPU."""


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.to(dtype).to(DEVICE)
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def parameters_of(channels: int, affine: bool) -> list[Tensor | None]:
    """weight, bias, running mean and variance."""
    numbers = torch.linspace(-1, 2, channels, device=DEVICE)
    first: list[Tensor | None] = [numbers + 0.05, numbers.flip(0) * 0.5] if affine else [None, None]
    return [*first, numbers.clone(), numbers.abs() + 1]


def results(
    x: Tensor,
    residual: Tensor | None,
    parameters: list[Tensor | None],
    gradient: Tensor,
    *,
    backend: str,
    dtype: torch.dtype | None = None,
    layers: Callable[..., Tensor] = batch_norm_act,
    **options: Any,
) -> dict[str, Tensor]:
    """y, the running statistics and all gradients; in `dtype`, if one is given."""
    given = [
        None if t is None else t.detach().clone().to(dtype or t.dtype)
        for t in (x, residual, *parameters)
    ]
    for t in given[:4]:
        if t is not None:
            t.requires_grad_()
    x, residual, weight, bias, running_mean, running_var = given
    y = layers(
        x, weight, bias, running_mean, running_var, residual=residual, backend=backend, **options
    )
    y.backward(gradient.to(y.dtype))
    names = ("x", "residual", "weight", "bias")
    gradients = {name: t.grad for name, t in zip(names, given, strict=False) if t is not None}
    assert all(g is not None for g in gradients.values())
    return {"y": y.detach(), "running_mean": running_mean, "running_var": running_var, **gradients}


def exact(*given: Any, groups: int, relu: bool) -> dict[str, Tensor]:
    """The eager reference in float64."""
    options = {"groups": groups, "relu": relu, "momentum": 0.3, "eps": 1e-3}
    return results(*given, dtype=torch.float64, backend="eager", **options)


def close(
    got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """All that is wanted, compared in float64."""
    for name in want:
        torch.testing.assert_close(
            got[name].double(), want[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("shape", "groups", "add", "relu", "affine"),
    [
        ((6, 20, 3, 7), 3, True, True, True),
        ((6, 20, 3, 3), 3, False, True, True),
        ((6, 20, 3, 3), 3, True, False, True),
        ((6, 20, 3, 3), 3, False, False, False),
        ((4, 5, 3, 3), 2, True, True, True),
        ((6, 33), 2, False, True, True),
        ((4, 32, 4, 4), 2, True, True, True),  # no padding anywhere
        ((16, 64), 1, False, True, True),
    ],
    ids=str,
)
def test_values_gradients_and_running_statistics(
    fused: str, shape: tuple[int, ...], groups: int, add: bool, relu: bool, affine: bool
) -> None:
    x, gradient = draw(shape) * 2 + 1, draw(shape, seed=1)
    residual = draw(shape, seed=2) if add else None
    parameters = parameters_of(shape[1], affine)
    want = exact(x, residual, parameters, gradient, groups=groups, relu=relu)
    got = results(
        x,
        residual,
        parameters,
        gradient,
        groups=groups,
        relu=relu,
        momentum=0.3,
        eps=1e-3,
        backend=fused,
    )
    assert got.keys() == want.keys()
    close(got, want)
    assert all(value.dtype == torch.float32 for value in got.values())
    assert got["y"].stride() == got["x"].stride() == x.stride()


@pytest.mark.parametrize("add", [True, False], ids=["residual", "alone"])
def test_bfloat16_is_as_exact_as_torch(fused: str, add: bool) -> None:
    shape = (4, 24, 3, 7)
    x, gradient = draw(shape, torch.bfloat16), draw(shape, torch.bfloat16, seed=1)
    residual = draw(shape, torch.bfloat16, seed=2) if add else None
    parameters = parameters_of(shape[1], True)
    want = exact(x, residual, parameters, gradient, groups=2, relu=True)
    options = {"groups": 2, "momentum": 0.3, "eps": 1e-3}
    got, torchs = (
        results(x, residual, parameters, gradient, backend=backend, **options)
        for backend in (fused, "eager")
    )
    for name, wanted in want.items():
        assert got[name].dtype == torchs[name].dtype
        error, known = (
            (each[name].double() - wanted).square().mean().sqrt() for each in (got, torchs)
        )
        # The interpreter truncates to bfloat16 where a GPU rounds: the root mean square of its
        # errors is twice as large.
        assert (
            error <= (2.2 if os.environ.get("TRITON_INTERPRET") == "1" else 1.1) * known + 1e-6
        ), name


def test_a_mean_of_a_thousand_deviations(fused: str) -> None:
    shape = (4, 8, 5, 5)
    x, gradient = draw(shape) + 1000, draw(shape, seed=1)
    parameters = parameters_of(shape[1], True)
    want = exact(x, None, parameters, gradient, groups=2, relu=False)
    got = results(
        x, None, parameters, gradient, groups=2, relu=False, momentum=0.3, eps=1e-3, backend=fused
    )
    close(got, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got["running_var"].double(), want["running_var"], rtol=1e-5, atol=0)


def test_nan_and_infinity_pass_as_in_torch(fused: str) -> None:
    x = draw((4, 4, 3, 3))
    x[0, 0, 0, 0], x[3, 1, 2, 2] = torch.nan, torch.inf
    gradient, parameters = draw((4, 4, 3, 3), seed=1), parameters_of(4, True)
    got, want = (
        results(x, None, parameters, gradient, groups=2, backend=b) for b in (fused, "eager")
    )
    for name in ("y", "x", "running_mean", "running_var"):
        assert torch.equal(got[name].isfinite(), want[name].isfinite()), name
    assert torch.equal(got["y"].isnan(), want["y"].isnan())


def test_a_constant_channel(fused: str) -> None:
    x, gradient = torch.full((4, 3, 4, 4), 7.25, device=DEVICE), draw((4, 3, 4, 4), seed=1)
    x = x.to(memory_format=torch.channels_last)
    got = results(x, None, parameters_of(3, True), gradient, groups=2, relu=False, backend=fused)
    torch.testing.assert_close(
        got["y"], parameters_of(3, True)[1][None, :, None, None].expand_as(x)
    )
    assert all(value.isfinite().all() for value in got.values())


def test_without_running_statistics_and_other_gradients(fused: str) -> None:
    """Nothing to update; a gradient in another layout; a residual in another dtype and layout."""
    x, parameters = draw((4, 6, 4, 4)), parameters_of(6, True)
    residual = torch.randn(4, 6, 4, 4, dtype=torch.float64, device=DEVICE).to(torch.bfloat16)
    gradient = torch.randn(4, 6, 1, 1, device=DEVICE).expand(4, 6, 4, 4)
    want = exact(x, residual, parameters, gradient, groups=2, relu=True)
    got = results(
        x, residual, [*parameters[:2], None, None], gradient, groups=2, eps=1e-3, backend=fused
    )
    close(got, {name: want[name] for name in ("y", "x", "weight", "bias")})
    assert got["residual"].dtype == torch.bfloat16


def test_frozen_parameters_and_no_grad(fused: str) -> None:
    x, (weight, bias, mean, var) = draw((4, 6, 4, 4)).requires_grad_(), parameters_of(6, True)
    y = batch_norm_act(x, weight, bias, mean, var, groups=2, backend=fused)
    y.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        y = batch_norm_act(x, weight, bias, mean, var, groups=2, backend=fused)
    assert not y.requires_grad


@pytest.mark.parametrize("relu", [True, False])
def test_a_second_derivative_is_refused(fused: str, relu: bool) -> None:
    """create_graph gives the first one; also where the incoming gradient is a constant."""
    x = draw((4, 6, 4, 4)).requires_grad_()
    y = batch_norm_act(x, *[None] * 4, groups=2, residual=x, relu=relu, backend=fused)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    y = batch_norm_act(x, *[None] * 4, groups=2, residual=x, relu=relu, backend="eager")
    torch.testing.assert_close(gradient, torch.autograd.grad(y.sum(), x)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="batch_norm_act cannot be differentiated twice"):
        (x.square().sum() + gradient.square().sum()).backward()


def test_the_operator_refuses_a_second_derivative(fused: str) -> None:
    x, call = draw((4, 6, 3, 3)).requires_grad_(), NormCall(2, True, 0.3, 1e-3, fused)
    y = torch.ops.vi_simsiam.batch_norm_act(x, *[None] * 5, *call)[0]
    (gradient,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm_act cannot be differentiated twice"):
        torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(1, 6, 3, 3)}, "residual: shape"),
        ({"weight": torch.ones(12, device=DEVICE)[::2]}, "takes contiguous parameters"),
        ({"weight": torch.ones(5)}, r"weight: shape \(5,\) must be"),
        (
            {"running_mean": torch.zeros(6, dtype=torch.float64, device=DEVICE)},
            "takes parameters in float32",
        ),
        ({"groups": 3}, "groups: 3 must divide the batch of 4"),
    ],
)
def test_the_operator_checks_what_a_saved_program_is_given(
    fused: str, change: dict[str, Any], message: str
) -> None:
    parameters = dict(zip(("weight", "bias", *RUNNING), parameters_of(6, True), strict=True))
    given = {"x": draw((4, 6, 3, 3)), "residual": None} | parameters
    given |= NormCall(2, True, 0.3, 1e-3, fused)._asdict() | change
    with pytest.raises(InputError, match=message):
        torch.ops.vi_simsiam.batch_norm_act(**given)


@pytest.mark.parametrize("transform", [torch.func.jvp, torch.vmap])
def test_compiled_transforms_are_those_of_eager(fused: str, transform: Any) -> None:
    x, tangent = draw((4, 6, 3, 3)), draw((4, 6, 3, 3), seed=1)

    def derived(x: Tensor, backend: str) -> Tensor:
        def norm(x: Tensor) -> Tensor:
            return batch_norm_act(x, *[None] * 4, groups=2, relu=False, backend=backend)

        if transform is torch.vmap:
            return torch.vmap(norm)(torch.stack([x, tangent]))
        return torch.func.jvp(norm, (x,), (tangent,))[1]

    torch.compiler.reset()
    compiled = torch.compile(derived, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, "auto"), derived(x, "eager"))


RUNNING = {"running_mean": torch.zeros(6), "running_var": torch.ones(6)}
REFUSED: dict[str, dict[str, Any]] = {
    r"takes torch.channels_last, not strides": {"x": torch.ones(4, 6, 4, 4)},
    r"takes .*, not (float16|float64)": {},
    r"takes parameters in float32": {"weight": torch.ones(6, dtype=torch.float64)},
    r"takes contiguous parameters": {"weight": torch.ones(12)[::2]},
    r"takes training mode alone": {"training": False, **RUNNING},
    r"weight: shape \(5,\) must be \(6,\)": {"weight": torch.ones(5)},
    r"running_mean, running_var: both must be given or none": {"running_mean": torch.zeros(6)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_fused_backend_does_not_take(fused: str, message: str) -> None:
    """Refused where it was named; otherwise eager computes what PyTorch can."""
    given = dict.fromkeys(("x", "weight", "bias", "running_mean", "running_var"))
    given |= {"x": torch.randn(4, 6)} | REFUSED[message]
    if "float16" in message:  # each backend takes one of the two
        given["x"] = torch.ones(4, 6, dtype=torch.float16 if fused == "cpu" else torch.float64)
    for name, value in given.items():
        if isinstance(value, Tensor):  # `to` would make what it moves contiguous
            there = {"dtype": value.dtype, "device": DEVICE}
            given[name] = torch.empty_strided(value.shape, value.stride(), **there).copy_(value)
    with pytest.raises(InputError, match=message):
        batch_norm_act(**given, backend=fused)
    if "takes" in message and "parameters in" not in message:
        assert torch.equal(batch_norm_act(**given), batch_norm_act(**given, backend="eager"))


@pytest.mark.parametrize(
    ("dtype", "add", "relu", "affine", "running"),
    [
        (torch.float32, True, True, True, True),
        (torch.float32, True, False, True, False),
        (torch.bfloat16, False, True, False, True),
        (torch.bfloat16, True, True, False, False),
    ],
)
def test_opcheck(
    fused: str, dtype: torch.dtype, add: bool, relu: bool, affine: bool, running: bool
) -> None:
    """All four utilities: schema, autograd registration, fake tensors, ahead-of-time dispatch."""
    shape = (4, 6, 3, 3)
    x = draw(shape, dtype).requires_grad_()
    residual = draw(shape, dtype, seed=1).requires_grad_() if add else None
    parameters = parameters_of(6, affine)
    if affine:
        parameters[:2] = [t.requires_grad_() for t in parameters[:2] if t is not None]
    if not running:
        parameters[2:] = [None, None]
    call = NormCall(2, relu, 0.3, 1e-3, fused)
    operators = torch.ops.vi_simsiam
    found = torch.library.opcheck(operators.batch_norm_act, (x, residual, *parameters, *call))
    with torch.no_grad():
        y, statistics, *_ = operators.batch_norm_act(x, residual, *parameters, *call)
        given = (y, x, y if add and relu else None, *parameters[:2], statistics, *call)
    given = tuple(t.detach() if isinstance(t, Tensor) else t for t in given)
    backward = torch.library.opcheck(operators.batch_norm_act_backward, given)
    assert len(found) == len(backward) == 4
    assert {*found.values(), *backward.values()} == {"SUCCESS"}


@pytest.mark.parametrize("add", [True, False], ids=["residual", "alone"])
def test_fullgraph_compile(fused: str, add: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph with what is around the norm, and the same numbers and running statistics."""
    shape = (4, 6, 3, 3)
    x, gradient = draw(shape), draw(shape, seed=1)
    residual = draw(shape, seed=2) if add else None
    given = (x, residual, parameters_of(6, True), gradient)
    options: dict[str, Any] = {"groups": 2, "relu": add, "momentum": 0.3, "eps": 1e-3}
    want = results(*given, **options, backend=fused)
    launched = []
    torch.compiler.reset()

    def layers(x: Tensor, *others: Any, **options: Any) -> Tensor:
        return batch_norm_act(2 * x, *others, **options) / 2

    def doubled(x: Tensor, *others: Any, **options: Any) -> Tensor:
        return compiled(x / 2, *others, **options) * 2

    # The same tracing, fake tensors and joint graph as inductor's, without its code generation.
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    forward = operation._forward
    monkeypatch.setattr(operation, "_forward", lambda *a: launched.append(a) or forward(*a))
    got = results(*given, **options, backend=fused, layers=doubled)
    assert len(launched) == 1
    close(got, {name: value.double() for name, value in want.items()}, rtol=1e-6, atol=1e-6)
