"""The losses as modules, options and backends that are refused, and the tickets of launches."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from losses import POWER_SPHERICAL, draw, every, on_cpu_only
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vi_simsiam.errors import BackendUnavailableError, InputError
from vi_simsiam.functional import cosine_loss, power_spherical_loss
from vi_simsiam.nn import CosineLoss, PowerSphericalLoss
from vi_simsiam.ops import backends
from vi_simsiam.ops import tickets as tickets_module
from vi_simsiam.ops.tickets import _Tickets


@every
def test_modules_keep_their_options(backend: str) -> None:
    p, z = draw(POWER_SPHERICAL, 2, 2, 5, 17)
    options = {"concentration_scale": 4.0, "concentration_min": 0.5, "reduction": "none"}
    options |= {"concentration_link": "quadratic", "concentration_gain": 0.5, "cosine_weight": 2.0}
    options |= {"loss_scale": 0.1}
    module = PowerSphericalLoss(backend=backend, **options)
    assert torch.equal(module(p, z), power_spherical_loss(p, z, backend=backend, **options))
    assert repr(module) == (
        f"PowerSphericalLoss(reduction='none', backend='{backend}', concentration_scale=4.0, "
        "concentration_min=0.5, concentration_link='quadratic', concentration_gain=0.5, "
        "cosine_weight=2.0, loss_scale=0.1)"
    )
    kappa = p[..., 17].abs()
    given = PowerSphericalLoss(backend=backend)(p[..., :17], z, kappa)
    assert torch.equal(
        given, power_spherical_loss(p[..., :17], z, concentration=kappa, backend=backend)
    )
    cosine = CosineLoss(backend=backend, loss_scale=2.0)
    assert torch.equal(
        cosine(p[..., :17], z), cosine_loss(p[..., :17], z, backend=backend, loss_scale=2.0)
    )
    assert repr(cosine) == f"CosineLoss(reduction='mean', backend='{backend}', loss_scale=2.0)"


POSITIVE, AT_LEAST_0 = "is not a positive number", "is not a number of at least 0"


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        (PowerSphericalLoss, "backend", "fast", "'fast' is none of auto, eager"),
        (PowerSphericalLoss, "reduction", "sum", "'sum'"),
        (PowerSphericalLoss, "concentration_scale", 0.0, f"0.0 {POSITIVE}"),
        (PowerSphericalLoss, "concentration_scale", "2", f"'2' {POSITIVE}"),
        (PowerSphericalLoss, "concentration_min", -1.0, f"-1.0 {AT_LEAST_0}"),
        (PowerSphericalLoss, "concentration_gain", 0.0, f"0.0 {POSITIVE}"),
        (PowerSphericalLoss, "concentration_link", "exp", "'exp' is none of"),
        (PowerSphericalLoss, "cosine_weight", -1.0, f"-1.0 {AT_LEAST_0}"),
        (PowerSphericalLoss, "loss_scale", math.inf, f"inf {POSITIVE}"),
        (CosineLoss, "loss_scale", 0.0, f"0.0 {POSITIVE}"),
        (CosineLoss, "loss_scale", torch.ones(()), rf"tensor\(1\..*\) {POSITIVE}"),
        (CosineLoss, "backend", "gpu", "'gpu'"),
    ],
)
def test_modules_refuse_wrong_options_at_once(
    module: type, name: str, value: object, message: str
) -> None:
    with pytest.raises(InputError, match=f"{name}: {message}"):
        module(**{name: value})


def test_a_cosine_weight_that_overflows_beside_the_loss_scale_is_refused() -> None:
    with pytest.raises(InputError, match="cosine_weight: 1.0 is too large for the loss_scale"):
        PowerSphericalLoss(cosine_weight=1.0, loss_scale=1e-309)


P, LOC, Z, KAPPA = torch.zeros(2, 3, 9), torch.rand(2, 3, 8), torch.zeros(2, 3, 8), torch.ones(2, 3)
PADDED = "predictions: last dimension 9 must be targets' 8, or that padded to 16 columns$"
NO_OPTIONS = "takes no concentration_scale, _min, _gain or _link"


@pytest.mark.parametrize(
    ("predictions", "targets", "options", "message"),
    [
        (P[..., :8], Z, {}, r"predictions: last dimension 8 must be targets' 8 \+ 1"),
        (P, Z[:, :2], {}, "targets: batch of 2 must be predictions' 3"),
        (P[:1], Z[:1], {}, "predictions: 1 views given, 2 to 16"),
        (P.repeat(9, 1, 1), Z, {}, "predictions: 18 views given"),
        (P, Z.repeat(2, 1, 1), {}, "targets: 4 views given, 1 to predictions' 2"),
        (P[0], Z, {}, r"predictions: shape \(3, 9\) must be \(views, batch, features\)"),
        (P[..., :2], Z[..., :1], {}, "targets: last dimension 1 must be at least 2"),
        (P, Z.to("meta"), {}, "targets: on meta"),
        ([P[0], P[1, :2]], Z, {}, r"predictions: .*view 1 has \(2, 9\)"),
        ([], Z, {}, "predictions: .* empty"),
        (P.long(), Z, {}, r"predictions: dtype torch\.int64"),
        ("views", Z, {}, "predictions: must be a tensor or a sequence"),
        (LOC, Z, {"concentration": torch.ones(2, 4)}, r"\(2, 4\) must be .* = \(2, 3\)"),
        (LOC, Z, {"concentration": torch.ones(2, 3, 1)}, r"\(2, 3, 1\) must be \(views, batch\)"),
        (LOC, Z, {"concentration": [torch.ones(3)] * 3}, r"concentration: shape \(3, 3\)"),
        (LOC, Z, {"concentration": torch.ones(2, 3, device="meta")}, "concentration: on meta"),
        (LOC, Z, {"concentration": KAPPA.int()}, r"concentration: dtype torch\.int32"),
        (LOC, Z, {"concentration": 5.0}, "concentration: must be a tensor or a sequence"),
        (P, Z, {"concentration": KAPPA}, PADDED),
        (LOC, Z, {"concentration": KAPPA, "concentration_scale": 2.0}, NO_OPTIONS),
        (LOC, Z, {"concentration": KAPPA, "concentration_min": 2.0}, NO_OPTIONS),
        (LOC, Z, {"concentration": KAPPA, "concentration_link": "quadratic"}, NO_OPTIONS),
        (LOC, Z, {"concentration": KAPPA, "concentration_gain": 0.5}, NO_OPTIONS),
        (P, Z, {"reduction": "sum"}, "reduction: 'sum'"),
        (P, Z, {"concentration_scale": math.nan}, "concentration_scale: nan"),
    ],
)
def test_what_does_not_fit_is_named(
    predictions: Any, targets: Tensor, options: dict[str, Any], message: str
) -> None:
    typed = "dtype" in message or "must be a tensor" in message
    with pytest.raises(TypeError if typed else InputError, match=message):
        power_spherical_loss(predictions, targets, **options)


@on_cpu_only
def test_the_cosine_has_no_concentration_and_cuda_no_cpu_tensors() -> None:
    with pytest.raises(InputError, match=PADDED):
        cosine_loss(P, Z)
    with pytest.raises(
        BackendUnavailableError, match="'cuda' cannot run .*: it takes CUDA tensors"
    ):
        power_spherical_loss(P, Z, backend="cuda")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["sparse", "nested"])
def test_tensors_that_are_not_dense_are_named(kind: str) -> None:
    p, z = (x.float() for x in draw(POWER_SPHERICAL, 2, 2, 5, 17))
    given = p.to_sparse() if kind == "sparse" else torch.nested.nested_tensor(list(p))
    with pytest.raises(TypeError, match=f"predictions: must be dense, not .*{kind}"):
        power_spherical_loss(given, z)


@on_cpu_only
def test_a_package_without_its_extension_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto goes on with what there is; the backend by name explains what is missing."""
    monkeypatch.setattr(backends, "extension", lambda: None)
    monkeypatch.setattr(
        backends, "extension_problem", lambda: "the C++ extension does not load (no such file)"
    )
    p, z = draw(POWER_SPHERICAL, 2, 2, 5, 17)
    assert torch.equal(power_spherical_loss(p, z), power_spherical_loss(p, z, backend="eager"))
    with pytest.raises(BackendUnavailableError, match=r"'cpu' .* does not load \(no such file\)"):
        power_spherical_loss(p, z, backend="cpu")


def test_tickets_reserved_while_tracing_are_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export runs under modes that make new tensors fake, which no later launch could use."""
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tickets_module, "new_tickets", lambda device: made.append(torch.zeros(3)))
    with FakeTensorMode():
        tickets_module.reserve_tickets("cuda", None)
    assert [type(x) for x in made] == [Tensor]
    tickets_module.reserve_tickets("cpu", None)
    assert len(made) == 1


def test_launches_that_may_overlap_have_their_own_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each stream and number, one for each captured launch, and always zeros."""
    stream = SimpleNamespace(cuda_stream=1, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(tickets_module, "_TICKETS", 20)
    tickets = _Tickets(torch.device("cpu"))
    taken = [tickets.take(capturing, count) for capturing in (False, True) for count in (1, 2, 3)]
    assert [len(x) for x in taken] == [1, 2, 3] * 2
    assert tickets.take(False, 2) is taken[1]
    captured = [tickets.take(True) for _ in range(30)]
    stream.cuda_stream = 2
    every = [*taken, *captured, tickets.take(False)]
    assert all((x == 0).all() for x in every)
    addresses = [x[i].data_ptr() for x in every for i in range(len(x))]
    assert len(set(addresses)) == len(addresses) == 12 + 30 + 1


@on_cpu_only
def test_an_extension_that_does_not_fit_the_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked before the first launch, once for each GPU; auto then takes another backend."""
    said = "the extension holds no code for this GPU (compute capability 7.5)"
    module = SimpleNamespace(multiview_loss_cuda=None, cuda_problem=lambda: said)
    monkeypatch.setattr(backends, "extension", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(backends, "_triton_problem", lambda: "Triton does not start")
    backends._cuda_problem.cache_clear()
    assert backends.why_unavailable("cuda", "cuda") == said
    assert backends.choose_backend("auto", "cuda") == "eager"
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run .* holds no code"):
        backends.choose_backend("cuda", "cuda")
    module.cuda_problem = lambda: None
    backends._cuda_problem.cache_clear()
    assert backends.choose_backend("auto", "cuda") == "cuda"
    backends._cuda_problem.cache_clear()
