"""Cases of the fused BatchNorm in Triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from batch_norm_cases import *  # noqa: F403
from batch_norm_cases import (
    draw,
    parameters_of,
    results,
    test_compiled_transforms_are_those_of_eager,
    test_fullgraph_compile,
    test_opcheck,
)
from torch import Tensor
from triton_tools import INTERPRETED, captured

from vi_simsiam.kernels import batch_norm as kernel
from vi_simsiam.ops import batch_norm_fused as operation

SINGLE, MANY = "one launch", "two launches"
# They are about the operator, which is the same for every number of launches.
for each in (test_opcheck, test_fullgraph_compile, test_compiled_transforms_are_those_of_eager):
    pytest.mark.parametrize("fused", [SINGLE], indirect=True)(each)


@pytest.fixture(params=[SINGLE, MANY])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same in one launch, and in two with several programs, turns and tiles to each strip."""
    if request.param == MANY:
        constants = {"SINGLE_ELEMENTS": 0, "COLUMNS": 16, "REDUCE_WARPS": 1, "REDUCE_LOADS": 2}
        for name, value in (constants | {"APPLY_WARPS": 1, "APPLY_LOADS": 1}).items():
            monkeypatch.setattr(kernel, name, value)
        monkeypatch.setattr(operation, "multiprocessors", lambda device: 6)
    kernel.plan.cache_clear()
    yield "triton"
    kernel.plan.cache_clear()


def test_the_same_twice_and_tickets_left_at_zero(
    fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tickets = []

    def one_ticket(device: torch.device, count: int) -> Tensor:
        tickets.append(torch.zeros(count, dtype=torch.int32, device=device))
        return tickets[-1]

    monkeypatch.setattr(operation, "new_tickets", one_ticket)
    shape = (4, 20, 3, 3)
    x, gradient, parameters = draw(shape), draw(shape, seed=1), parameters_of(20, True)
    first, second = (
        results(x, None, parameters, gradient, groups=2, backend=fused) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all((t == 0).all() for t in tickets)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_in_a_cuda_graph() -> None:
    x, residual, gradient = (draw((8, 64, 16, 16), torch.bfloat16, seed) for seed in range(3))
    step = partial(
        results, x, residual, parameters_of(64, True), gradient, groups=2, backend="triton"
    )
    want = step()
    graph, got = captured(step)
    for _ in range(3):
        graph.replay()
    assert all(torch.equal(got[name], want[name]) for name in want)
