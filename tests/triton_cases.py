"""Numerical cases of the Triton loss kernel, on CPU tensors in Triton's interpreter or on a GPU.

Triton decides at import whether it interprets, so `test_triton_kernels.py` runs this file in a
process of its own; its name keeps pytest from collecting it anywhere else. The rule for errors is
in `triton_loss_tools.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_loss_tools import COSINE, GIVEN, QUADRATIC, SPHERICAL, check, eager, inputs, launch
from triton_tools import DEVICE, INTERPRETED

from vi_simsiam.kernels import multiview_loss as kernel
from vi_simsiam.kernels.multiview_loss_parts import store_mean
from vi_simsiam.ops.multiview_loss import LossForm

# The interpreter evaluates 0/0 in lanes that the kernel discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
_FORMS = {"raw": SPHERICAL, "quadratic": QUADRATIC, "cosine": COSINE, "given": GIVEN}


def shapes(names: str, *cases: tuple[object, ...]) -> pytest.MarkDecorator:
    """Cases that begin with the name of a form: the forms differ in scalars alone."""
    values = [
        pytest.param(_FORMS[str(form)], *rest, id="-".join(map(str, (form, *rest))))
        for form, *rest in cases
    ]
    return pytest.mark.parametrize(("form", *names.split()), values)


@shapes(
    "views globals_ dim dtype",
    *(
        (form, *shape)
        for form in _FORMS
        for shape in ((2, 2, 2, torch.float32), (5, 3, 33, torch.float64))
    ),
    *(
        (form, *shape)
        for form in ("raw", "cosine")
        for shape in ((8, 2, 32, torch.float32), (2, 2, 100, torch.bfloat16))
    ),
    ("quadratic", 2, 1, 3, torch.float32),
    ("given", 4, 4, 37, torch.float32),
    ("raw", 2, 2, 256 if INTERPRETED else 2048, torch.float32),  # a GPU takes four warps
    ("given", 6, 5, 12, torch.float32),  # views in blocks, the last one not full
    ("quadratic", 16, 3, 9, torch.float32),
    ("cosine", 3, 2, 48, torch.float16),
)
def test_loss_and_gradient(
    form: LossForm, views: int, globals_: int, dim: int, dtype: torch.dtype
) -> None:
    predictions, targets = inputs(form, views, globals_, dim, dtype, samples=4 if dim < 200 else 1)
    loss, grad = launch(predictions, targets, form)
    check(predictions, targets, form, loss, grad)
    if globals_ == 1:
        assert (grad[0] == 0).all()  # the first view has no target of another view


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets limits of the launch for one test."""

    def change(**values: int) -> None:
        for name, value in values.items():
            monkeypatch.setattr(kernel, name, value)
        kernel.launch_arguments.cache_clear()

    yield change
    kernel.launch_arguments.cache_clear()


def _arguments(dim: int, views: int, globals_: int) -> dict[str, int | bool]:
    return kernel.launch_arguments(dim, views, globals_, 4, width=dim, spherical=True, double=False)


@shapes("views globals_ dim", ("quadratic", 2, 2, 40), ("cosine", 3, 1, 37), ("given", 5, 3, 32))
def test_rows_in_chunks(
    form: LossForm, views: int, globals_: int, dim: int, limits: Callable[..., None]
) -> None:
    limits(_MOST_PAIRS=0, _WARPS=1, _STREAMED=triton.next_power_of_2(views) // 2)
    arguments = _arguments(dim, views, globals_)
    assert (arguments["RESIDENT"], arguments["BLOCK_D"]) == (False, 16)
    predictions, targets = inputs(form, views, globals_, dim, torch.float32)
    check(predictions, targets, form, *launch(predictions, targets, form))


def test_views_one_by_one(limits: Callable[..., None]) -> None:
    limits(_MOST_PAIRS=2)
    assert _arguments(12, 3, 2)["BLOCK_V"] == 1
    predictions, targets = inputs(SPHERICAL, 3, 2, 12, torch.float32)
    check(predictions, targets, SPHERICAL, *launch(predictions, targets, SPHERICAL))


@shapes("programs", ("quadratic", 1), ("given", 2))
def test_several_samples_to_a_program_change_nothing(
    form: LossForm, programs: int, limits: Callable[..., None]
) -> None:
    given = inputs(form, 3, 2, 12, torch.float32, samples=3)
    want = launch(*given, form)
    limits(_MOST_WARPS_IN_ALL=programs)
    assert all(map(torch.equal, launch(*given, form), want))


@triton.jit(do_not_specialize=["samples"])
def _mean_kernel(loss_ptr, mean_ptr, ticket_ptr, samples, WIDTH: tl.constexpr):
    store_mean(mean_ptr, ticket_ptr, loss_ptr, samples.to(tl.int64), WIDTH)


@pytest.mark.parametrize(
    ("samples", "bad"),
    [
        *((1, None), (300, torch.nan), (512, None), (513, torch.inf)),
        *((1536, torch.nan), (1950, None), (1950, torch.inf)),
    ],
)
def test_mean_of_many_losses(samples: int, bad: float | None) -> None:
    loss = torch.rand(samples + 1, generator=torch.Generator().manual_seed(samples)).to(DEVICE)
    loss[-1] = torch.nan  # behind the end
    if bad is not None:
        loss[samples // 2] = bad
    mean = torch.empty((), device=DEVICE)
    ticket = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    means = []
    for programs in (1, 3, 3):
        mean.fill_(-7)
        _mean_kernel[(programs,)](loss, mean, ticket, samples, 32)
        assert ticket.item() == 0
        means.append(mean.item())
    want = loss[:samples].double().mean().item()
    np.testing.assert_allclose(means, [want] * 3, rtol=2e-7)
    assert len(set(map(str, means))) == 1


@shapes("padding offset", ("quadratic", 0, 1), ("given", 13, 5), ("cosine", 70, 16))
def test_views_anywhere_in_rows_of_any_width(form: LossForm, padding: int, offset: int) -> None:
    given = inputs(form, 5, 3, 16, torch.float32, samples=2)
    want_loss, want_grad = launch(*given, form)
    loss, grad = launch(*given, form, padding=padding, offset=offset)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6)


@shapes("", ("quadratic",), ("given",))
def test_weights_of_loss_and_gradient(form: LossForm) -> None:
    # The side of the link's bound is that of a loss to be minimised.
    weight = 1 / 7 if form is QUADRATIC else -1 / 7
    given = inputs(form, 3, 2, 21, torch.float64, samples=2)
    want_loss, want_grad = launch(*given, form)
    loss, grad = launch(*given, form, weights=(3.0, weight))
    torch.testing.assert_close(loss, 3 * want_loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(grad, want_grad * weight, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("predictions_dtype", "targets_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes(predictions_dtype: torch.dtype, targets_dtype: torch.dtype) -> None:
    predictions, targets = inputs(SPHERICAL, 3, 2, 24, torch.float64)
    predictions, targets = predictions.to(predictions_dtype), targets.to(targets_dtype)
    check(predictions, targets, SPHERICAL, *launch(predictions, targets, SPHERICAL))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_in_the_dtype_of_the_buffer(dtype: torch.dtype) -> None:
    predictions, targets = inputs(SPHERICAL, 2, 2, 20, dtype, samples=2)
    _, grad = launch(predictions, targets, SPHERICAL)
    _, rounded = launch(predictions, targets, SPHERICAL, dtype)
    # The interpreter truncates where a GPU rounds.
    torch.testing.assert_close(rounded.float(), grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_what_lies_around_the_outputs_is_left_alone() -> None:
    predictions, targets = inputs(SPHERICAL, 3, 2, 13, torch.float32, samples=2)
    loss = torch.full((6,), -7.0, device=DEVICE)
    grad = torch.full((5, 2, 19), -7.0, device=DEVICE)
    _call(predictions.unbind(), targets.unbind(), loss[1:3], grad[1:4, :, 3:18], SPHERICAL)
    want_loss, want_grad = launch(predictions, targets, SPHERICAL)
    torch.testing.assert_close(loss[1:3], want_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[1:4, :, 3:17], want_grad, rtol=1e-5, atol=1e-6)
    assert (grad[1:4, :, 17] == 0).all()
    loss[1:3], grad[1:4, :, 3:18] = -7.0, -7.0
    assert (loss == -7).all()
    assert (grad == -7).all()


def _call(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    loss: Tensor,
    grad: Tensor | None,
    form: LossForm,
) -> None:
    """A launch without mean and without anything around it."""
    weight = 2 / (len(targets) * (len(predictions) - 1))
    kernel.multiview_loss(
        *(predictions, targets, None, loss, None, None, grad, None),
        distribution=form.distribution,
        scale=form.scale,
        minimum=form.minimum,
        link=form.link,
        gain=form.gain,
        cosine=form.cosine,
        weight=weight,
        gradient_weight=weight,
    )


def test_rows_and_views_further_apart_than_int32(tmp_path: Path) -> None:
    """The third row, and the third view of the gradient, start 2^31 elements on; the file behind
    them is sparse."""
    stride, dim = 1 << 30, 5
    if INTERPRETED:
        memory = torch.from_file(
            str(tmp_path / "rows"), shared=True, size=2 * stride + 64, dtype=torch.float16
        )
    else:
        memory = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    predictions, targets = inputs(COSINE, 3, 3, dim, torch.float16, samples=3)
    loss = torch.full((3,), torch.nan, device=DEVICE)
    grad = torch.full((3, 3, dim), torch.nan, device=DEVICE)
    _call(predictions.unbind(), targets.unbind(), loss, grad, COSINE)
    got_loss, got_grad = torch.full_like(loss, torch.nan), torch.full_like(grad, torch.nan)
    apart = [
        memory.as_strided((3, dim), (stride, 1), 8 * v).copy_(predictions[v]) for v in range(3)
    ]
    _call(apart, targets.unbind(), got_loss, got_grad, COSINE)
    assert torch.equal(got_loss, loss)
    assert torch.equal(got_grad, grad)
    apart = [memory.as_strided((3, dim), (stride, 1), 8 * v).copy_(targets[v]) for v in range(3)]
    wide = memory.as_strided((3, 3, dim), (stride, 8, 1), 32)
    _call(predictions.unbind(), apart, got_loss.fill_(torch.nan), wide, COSINE)
    assert torch.equal(got_loss, loss)
    torch.testing.assert_close(wide.float(), grad, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("form", [SPHERICAL, COSINE], ids=lambda form: form.distribution)
def test_zero_and_opposite_vectors(form: LossForm) -> None:
    predictions, targets = inputs(form, 2, 2, 6, torch.float32)
    predictions[0, 0, :6] = 0
    targets[0, 1] = 0
    predictions[0, 2, :6] = torch.tensor([3.0, 0, 0, 0, 0, 0])
    targets[1, 2] = torch.tensor([-2.0, 0, 0, 0, 0, 0])
    predictions[0, 3, :6] = targets[1, 3] = torch.tensor([0, 2.0, 0, 0, 0, 0])
    loss, grad = launch(predictions, targets, form)
    check(predictions, targets, form, loss, grad)
    # No direction of the prediction, none of the target, two poles.
    for v, b in ((0, 0), (1, 1), (0, 2), (0, 3)):
        assert (grad[v, b, :6] == 0).all()


@shapes("", ("quadratic",), ("given",))
def test_bad_numbers_stay_in_their_sample(form: LossForm) -> None:
    predictions, targets = inputs(form, 3, 2, 11, torch.float32, samples=6)
    want_loss, want_grad = launch(predictions, targets, form)
    predictions[1, 0, 4] = torch.nan
    targets[0, 2, 3] = torch.inf
    predictions[2, 4, 0] = -torch.inf
    targets[1, 5] *= 1e25  # finite, its squared length is not
    loss, grad = launch(predictions, targets, form)
    bad, good = [0, 2, 4, 5], [1, 3]
    assert loss[bad].isnan().all()
    assert grad[1, 0, :11].isnan().all()
    assert grad[1:, 2, :11].isnan().all()
    assert grad[2, 4, :11].isnan().all()
    assert torch.equal(loss[good], want_loss[good])
    assert torch.equal(grad[:, good], want_grad[:, good])
    assert torch.equal(grad[0, 0], want_grad[0, 0])  # another view of a bad sample


@pytest.mark.parametrize("form", [SPHERICAL, GIVEN], ids=["raw", "given"])
def test_extreme_concentrations(form: LossForm) -> None:
    predictions, targets = inputs(form, 2, 2, 7, torch.float32, samples=4)
    given = form is GIVEN
    predictions[0, :, 7] = torch.tensor(
        [0.0 if given else -torch.inf, 1e6, torch.inf, -1e-30 if given else torch.nan]
    )
    loss, grad = launch(predictions, targets, form)
    check(predictions[:, 1:2], targets[:, 1:2], form, loss[1:2], grad[:, 1:2])
    want, want_grad = eager(predictions, targets, form, torch.float32)
    torch.testing.assert_close(loss[0], want[0])  # kappa is the minimum
    torch.testing.assert_close(grad[0, 0, :7], want_grad[0, 0, :7])
    assert given or grad[0, 0, 7] == 0
    assert loss[2:].isnan().all()


@shapes("views globals_ dim", ("quadratic", 2, 2, 19), ("given", 5, 3, 19), ("cosine", 5, 3, 19))
def test_loss_without_gradient(form: LossForm, views: int, globals_: int, dim: int) -> None:
    predictions, targets = inputs(form, views, globals_, dim, torch.float32, samples=2)
    want, _ = launch(predictions, targets, form)
    loss, _ = launch(predictions, targets, form, with_grad=False)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)


def test_empty_batch() -> None:
    loss, grad = launch(*inputs(GIVEN, 2, 2, 5, torch.float32, samples=0), GIVEN)
    assert (loss.shape, grad.shape[:2]) == ((0,), (2, 0))
