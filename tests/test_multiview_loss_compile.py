"""The fused losses under torch.compile, torch.export and tracing: the operator
`vi_simsiam::multiview_loss`."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config
from losses import POWER_SPHERICAL, QUADRATIC, draw, every, fused, on_cpu_only
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from vi_simsiam.functional import power_spherical_loss
from vi_simsiam.nn import PowerSphericalLoss
from vi_simsiam.ops.multiview_loss import multiview_loss
from vi_simsiam.ops.multiview_loss_fused import LossCall


@fused
def test_tensors_without_memory_of_their_own(backend: str) -> None:
    """Fake tensors, wrapper subclasses and traced functions go through the operator: they have no
    address."""
    p, z = (x.float() for x in draw(POWER_SPHERICAL, 2, 2, 4, 8))
    expected = power_spherical_loss(p, z, backend=backend)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(p).requires_grad_()
        loss = power_spherical_loss(fake, mode.from_tensor(z), backend=backend)
        loss.backward()
        assert loss.shape == ()
        assert fake.grad is not None
        assert fake.grad.shape == p.shape
    traced = make_fx(lambda x: power_spherical_loss(x, z, backend=backend))(p)
    assert torch.equal(traced(p), expected)
    assert torch.equal(traced(p + 1), power_spherical_loss(p + 1, z, backend=backend))


@every
def test_transforms_of_torch_func_are_refused(backend: str) -> None:
    p, z = draw(POWER_SPHERICAL, 2, 2, 3, 8)
    for transformed, given in ((torch.vmap, torch.stack([p, 2 * p])), (torch.func.grad, p)):
        with pytest.raises(
            RuntimeError, match=r"does not run under torch\.vmap, .* reduction='none' gives"
        ):
            transformed(lambda x: power_spherical_loss(x, z, backend=backend))(given)


@fused
@pytest.mark.parametrize(
    ("dtype", "requires_grad", "given", "mean"),
    [
        (torch.float32, True, False, False),
        (torch.bfloat16, True, True, True),
        (torch.float64, True, True, False),
        (torch.bfloat16, False, False, True),
        (torch.float64, False, True, False),
    ],
)
def test_opcheck(
    backend: str, dtype: torch.dtype, requires_grad: bool, given: bool, mean: bool
) -> None:
    """All four utilities: schema, autograd registration, fake tensors, ahead-of-time dispatch."""
    p, z = (x.to(dtype) for x in draw(POWER_SPHERICAL, 3, 2, 4, 17))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    kappa = p[..., 17].to(real).abs().requires_grad_(requires_grad) if given else None
    views = [x.clone().requires_grad_(requires_grad) for x in (p[..., :17] if given else p)]
    form = (1.0 if given else 2.0, 0.0, 0.5, "quadratic", 0.5, 3.0)
    call = LossCall(backend, "power_spherical", real, *form, mean, requires_grad)
    arguments = (views, list(z), kappa, *call)
    found = torch.library.opcheck(torch.ops.vi_simsiam.multiview_loss, arguments)
    assert len(found) == 4
    assert set(found.values()) == {"SUCCESS"}


@every
def test_fullgraph_compile(backend: str) -> None:
    """One graph with what is around the loss, and the same numbers, for a given concentration and
    for the trainer's form."""
    p, z = draw(POWER_SPHERICAL, 2, 2, 5, 33)
    torch.compiler.reset()

    def loss(x: Tensor, z: Tensor) -> Tensor:
        given = power_spherical_loss(
            [2 * view[:, :33] for view in x],
            list(z),
            concentration=x[..., 33].exp(),
            backend=backend,
            reduction="none",
        )
        return (given.sin() + multiview_loss(x, z, QUADRATIC, backend=backend)).sum()

    leaf, compiled_leaf = p.clone().requires_grad_(), p.clone().requires_grad_()
    # The same tracing, fake tensors and joint graph as inductor's, without its code generation.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss(leaf, z), compiled(compiled_leaf, z)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    expected.backward()
    found.backward()
    torch.testing.assert_close(compiled_leaf.grad, leaf.grad, rtol=1e-12, atol=1e-13)
    if backend != "eager":
        with torch.no_grad():
            torch.testing.assert_close(compiled(p, z), expected.detach(), rtol=1e-13, atol=1e-13)


@fused
@torch._inductor.config.patch(
    {
        # Kept graphs may be of other instructions: their key leaves out ATEN_CPU_CAPABILITY.
        "force_disable_caches": True,
        # One small kernel is generated: what is made for more of them would take most of the time.
        "cpp_cache_precompile_headers": False,
        "compile_threads": 1,
    }
)
def test_inductor_compiles_the_fused_loss(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full compiler on layers and the loss after them: the weights' gradients as without it."""
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)  # scalar code
    _, z = (x.float() for x in draw(POWER_SPHERICAL, 2, 2, 6, 15))
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    weights = [torch.randn(8, 16, requires_grad=True) for _ in x]

    def loss(x: Tensor) -> Tensor:
        predictions = [view @ weight for view, weight in zip(x, weights, strict=True)]
        return power_spherical_loss(predictions, list(z), backend=backend)

    expected = torch.autograd.grad(loss(x), weights)
    torch.compiler.reset()
    try:
        found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), weights)
    except torch._inductor.exc.InductorError:
        try:
            torch.compile(lambda x: x.sin() + 1)(x)
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"torch.compile compiles nothing here ({str(error).splitlines()[0]})")
        raise
    torch.testing.assert_close(found, expected)


@every
def test_dynamic_shapes_compile_once(backend: str) -> None:
    """A batch that changes from call to call needs at most one static and one dynamic graph."""
    _, z = (x.float() for x in draw(POWER_SPHERICAL, 2, 2, 13, 31))
    p = torch.randn(2, 13, 32)
    # Eager is PyTorch's own operations: what counts is the tracing of the code around them.
    counter = CompileCounterWithBackend("eager" if backend == "eager" else "aot_eager")
    torch.compiler.reset()

    def loss(x: Tensor, z: Tensor) -> Tensor:
        return power_spherical_loss(x, z, backend=backend, loss_scale=0.5)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for batch in (3, 5, 11):
        x = p[:, :batch].clone().requires_grad_()
        found, expected = compiled(x, z[:, :batch]), loss(x, z[:, :batch])
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))
    assert counter.frame_count <= 2


@fused
def test_export(backend: str) -> None:
    """With a batch that may change; the program has the operator, and its numbers."""
    p, z = (x.float() for x in draw(POWER_SPHERICAL, 2, 2, 5, 17))
    for reduction in ("mean", "none"):
        module = PowerSphericalLoss(backend=backend, reduction=reduction)
        batch = {1: torch.export.Dim("batch", min=2, max=100)}
        exported = torch.export.export(module, (p, z), dynamic_shapes=(batch, batch))
        operators = [
            str(node.target) for node in exported.graph.nodes if node.op == "call_function"
        ]
        assert "vi_simsiam.multiview_loss.default" in operators
        for rows in (5, 3):
            assert torch.equal(
                exported.module()(p[:, :rows], z[:, :rows]), module(p[:, :rows], z[:, :rows])
            )


@on_cpu_only
def test_an_unavailable_backend_is_named_under_compile_too() -> None:
    p, z = (x.float() for x in draw(POWER_SPHERICAL, 2, 2, 5, 17))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: power_spherical_loss(x, z, backend="cuda"), backend="eager")
    with pytest.raises(Exception, match="'cuda' cannot run on cpu tensors: it takes CUDA tensors"):
        compiled(p)
