"""A tensor that reaches beyond its storage is refused by every fused operator, in one line.

`test_triton_kernels.py` runs this file in the interpreter, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vi_simsiam.errors import InputError
from vi_simsiam.functional import power_spherical_loss
from vi_simsiam.ops.augment import augment
from vi_simsiam.ops.backends import check_storage, interpreting, why_unavailable
from vi_simsiam.ops.batch_norm import batch_norm_act
from vi_simsiam.ops.multiview_loss_fused import LossCall
from vi_simsiam.ops.small_map_convolution import small_map_convolution
from vi_simsiam.ops.stem_convolution import stem_convolution
from vi_simsiam.ops.stem_pool import batch_norm_relu_max_pool

BACKEND = "triton" if interpreting() else "cpu"
LAST = torch.channels_last
interpreted = pytest.mark.skipif(not interpreting(), reason="a kernel of Triton's alone")


@pytest.fixture(autouse=True)
def backend_here() -> None:
    if reason := why_unavailable(BACKEND, "cpu"):
        pytest.skip(reason)


@contextlib.contextmanager
def shrunk(x: Tensor, missing: int | None = None) -> Iterator[None]:
    """Take all of a tensor's storage, or the last `missing` bytes, and give it back.

    pytest prints the tensors of a test that fails, which would end the process.
    """
    storage = x.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0 if missing is None else size - missing)
    try:
        yield
    finally:
        storage.resize_(size)


def image(*shape: int) -> Tensor:
    return torch.randn(*shape).to(memory_format=LAST)


def loss(p: Tensor, targets: Tensor, concentration: Tensor) -> Tensor:
    """Predictions are one tensor, targets two."""
    z = [targets, targets]
    return power_spherical_loss(p, z, concentration=concentration, backend=BACKEND)


def loss_operator(p: Tensor, targets: Tensor, concentration: Tensor) -> Tensor:
    call = LossCall(
        BACKEND, "power_spherical", torch.float32, 1, 0, 1, "softplus", 1, 0, True, False
    )
    z = [targets, targets]
    return torch.ops.vi_simsiam.multiview_loss([p, p], z, concentration, *call)[0]


def norm(x: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
    return batch_norm_act(x, *parameters, residual=residual, backend=BACKEND)


def operator(x: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
    given = x, residual, *parameters, 1, True, 0.1, 1e-5, BACKEND
    return torch.ops.vi_simsiam.batch_norm_act(*given)[0]


def pool(x: Tensor, *parameters: Tensor) -> Tensor:
    return batch_norm_relu_max_pool(x, *parameters, backend=BACKEND)


def views(pixels: Tensor, table: Tensor) -> Tensor:
    return augment(pixels, table, 8, backend=BACKEND)


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    return small_map_convolution(x, weight, (1, 1), (1, 1))


PARAMETERS = [lambda: torch.ones(4)] * 4
NORM = [lambda: image(2, 4, 3, 3), lambda: image(2, 4, 3, 3), *PARAMETERS]
NAMES = ["weight", "bias", "running_mean", "running_var"]
LOSS = [lambda: torch.randn(2, 3, 8), lambda: torch.randn(3, 8), lambda: torch.rand(2, 3)]
LOSS_OPERATOR = [lambda: torch.randn(3, 8), *LOSS[1:]]
PIXELS = [lambda: torch.zeros(99, dtype=torch.uint8), lambda: torch.zeros(2, 1, 16).int()]
OPERATIONS: dict[str, tuple[Callable[..., Tensor], list[Callable[[], Tensor]], list[str]]] = {
    "loss": (loss, LOSS, ["predictions", "targets", "concentration"]),
    "loss operator": (loss_operator, LOSS_OPERATOR, ["predictions", "targets", "concentration"]),
    "norm": (norm, NORM, ["x", "residual", *NAMES]),
    "operator": (operator, NORM, ["x", "residual", *NAMES]),
    "pool": (pool, [lambda: image(2, 4, 4, 4), *PARAMETERS], ["x", *NAMES]),
    "views": (views, PIXELS, ["pixels", "table"]),
    "convolution": (
        convolution,
        [lambda: image(2, 4, 2, 2), lambda: image(3, 4, 3, 3)],
        ["x", "weight"],
    ),
}


@pytest.mark.parametrize("missing", [None, 1])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_argument_is_checked(operation: str, missing: int | None) -> None:
    function, given, names = OPERATIONS[operation]
    if operation == "views" and not interpreting():
        pytest.skip("a kernel of Triton's alone")
    function(*(make() for make in given))
    for i, name in enumerate(names):
        tensors = [make() for make in given]
        message = rf"^{name}: shape .* was resized or freed$"
        with pytest.raises(InputError, match=message), shrunk(tensors[i], missing):
            function(*tensors)


@interpreted
def test_the_images_of_the_first_convolution_are_checked() -> None:
    images, message = torch.randn(1, 3, 8, 8), r"^images: shape .* was resized or freed$"
    with pytest.raises(InputError, match=message), shrunk(images):
        stem_convolution(images, torch.randn(4, 3, 7, 7))


@pytest.mark.parametrize("freed", range(3))
def test_what_is_freed_before_backward_is_refused(freed: int) -> None:
    """As by wrappers that free parameters between their uses."""
    x, weight, bias = image(2, 4, 4, 4), torch.ones(4), torch.ones(4)
    given = [x, weight, bias]
    for each in given:
        each.requires_grad_()
    norm = batch_norm_act(x, weight, bias, None, None, backend=BACKEND)
    pooled = batch_norm_relu_max_pool(x, weight, bias, None, None, backend=BACKEND)
    for y in (norm, pooled):
        total = y.sum()
        with pytest.raises(InputError, match="saved for backward: shape"), shrunk(given[freed]):
            total.backward()


def test_gradients_are_checked() -> None:
    x, weight = image(2, 4, 4, 4), torch.ones(4, requires_grad=True)
    pool = [batch_norm_relu_max_pool] if interpreting() else []  # else torch pools
    for function in (batch_norm_act, *pool):
        y = function(x, weight, None, None, None, backend=BACKEND)
        gradient = torch.empty_like(y)
        with pytest.raises(InputError, match="gradient: shape"), shrunk(gradient):
            torch.autograd.backward(y, gradient)
    p = torch.randn(2, 3, 9, requires_grad=True)
    y = power_spherical_loss(p, torch.randn(2, 3, 8), reduction="none", backend=BACKEND)
    gradient = torch.ones(3)
    with pytest.raises(InputError, match="gradient of the loss: shape"), shrunk(gradient):
        torch.autograd.backward(y, gradient)


def test_views_of_a_storage() -> None:
    """The bytes that are needed end with the last element, wherever the first one is."""
    whole = torch.zeros(10, 6)
    parts = (whole[2:], whole[:, 3:], whole.t()[:4], whole[1:9:3], whole[0].expand(5, 6))
    for part, last in zip(parts, (59, 59, 57, 47, 5), strict=True):
        needed = 4 * last + 4
        with shrunk(whole, 240 - needed):
            check_storage("x", None, part)
        message = rf"x: shape .* needs {needed} bytes .* has {needed - 1};"
        with pytest.raises(InputError, match=message), shrunk(whole, 241 - needed):
            check_storage("x", part)
    with shrunk(whole):
        check_storage("x", whole[:0])
