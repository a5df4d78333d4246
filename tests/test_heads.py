"""The raw concentration: its value, its bounds, and its gradients, in float64 by plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam import SimSiam, VISimSiam
from vi_simsiam.errors import InputError
from vi_simsiam.heads import SplitHead, UpperBound, inverse_link

DIM = 20


def model(**options: object) -> VISimSiam:
    torch.manual_seed(0)
    sizes = {"features": 48, "dim": DIM, "projector_hidden": 24, "predictor_hidden": 8}
    return VISimSiam(nn.Flatten(), **sizes, **options).double()  # type: ignore[arg-type]


def views(count: int = 2, batch: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, batch, 3, 4, 4, generator=generator).double())


def cosines(mu: list[Tensor], z: list[Tensor]) -> list[Tensor]:
    """cos(mu_1, z_2) and cos(mu_2, z_1)."""
    return [F.cosine_similarity(mu[v], z[1 - v].detach(), dim=1) for v in range(2)]


def linked(x: Tensor) -> Tensor:
    """The link "quadratic", by its definition."""
    r = x.clamp(min=0.02)
    return r + r * r / 2


def gain(kappa: Tensor, cosine: Tensor) -> Tensor:
    """log PS - log uniform by the textbook formula (De Cao and Aziz, arXiv 2006.04437, eq. 8)."""
    b = torch.tensor((DIM - 1) / 2, dtype=torch.float64)

    def log_c(k: Tensor) -> Tensor:
        return -((2 * b + k) * math.log(2) + torch.lgamma(b + k) - torch.lgamma(2 * b + k))

    return log_c(kappa) - log_c(torch.zeros_like(kappa)) + kappa * torch.log1p(cosine)


def plain_loss(kappa: list[Tensor], mu: list[Tensor], z: list[Tensor]) -> Tensor:
    terms = [gain(k, c) for k, c in zip(kappa, cosines(mu, z), strict=True)]
    return -(terms[0] + terms[1]).mean() - sum(c.mean() for c in cosines(mu, z))


def hidden(network: VISimSiam, images: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The predictor's hidden features and the projections of every view."""
    z = [network.projector(network.backbone(x)) for x in images]
    return [network.predictor[:3](x) for x in z], z


def gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward(retain_graph=True)
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def assert_gradients(network: nn.Module, found: Tensor, expected: Tensor) -> dict[str, Tensor]:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    first = gradients(network, found)
    second = gradients(network, expected)
    for name, gradient in first.items():
        expected = second.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
    assert second.keys() <= first.keys()
    return first


@pytest.mark.parametrize(("value", "scale"), [(1e-9, None), (0.01, 1.0), (1e3, None)])
def test_a_constant_concentration(value: float, scale: float | None) -> None:
    """The loss of a fixed kappa, with a gradient on mu of kappa/(1 + c) times the cosine's."""
    network = model(concentration="constant", concentration_value=value, concentration_scale=scale)
    output = network(views())
    kappa = torch.full((6,), 19 * value, dtype=torch.float64)
    for prediction in output.predictions:
        assert prediction.shape == (6, 32)
        torch.testing.assert_close(network.concentration(prediction), kappa, rtol=1e-12, atol=0)
        assert (prediction[:, 21:] == 0).all()
    mu = [p[:, :DIM] for p in output.predictions]
    found = assert_gradients(
        network, network.loss(output, "eager"), plain_loss([kappa] * 2, mu, list(output.targets))
    )
    assert found.keys() == {name for name, _ in network.named_parameters()}
    assert not any("concentration" in name for name in network.state_dict())


def test_a_global_concentration_sums_the_gradients_of_all_samples() -> None:
    network = model(concentration="global")
    head = network.predictor[3]
    assert isinstance(head, SplitHead)
    raw = head.concentration.raw
    output = network(views())
    expected = torch.full((6,), 0.95).double()
    found = network.concentration(output.predictions[0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    mu = [p[:, :DIM] for p in output.predictions]
    kappa = [19 * linked(raw).expand(6)] * 2
    expected = plain_loss(kappa, mu, list(output.targets))
    found = assert_gradients(network, network.loss(output, "eager", 1.0), expected)
    assert found["predictor.3.concentration.raw"].shape == ()
    assert found["predictor.3.concentration.raw"].abs() > 1e-3


@pytest.mark.parametrize("batch", [5, 6])
def test_shuffled_concentrations_are_other_samples(batch: int) -> None:
    """In training sample i has another's concentration, which gets the gradient; then its own."""
    network = model(concentration="shuffled")
    images = views(batch=batch)
    output = network(images)
    mu = [p[:, :DIM] for p in output.predictions]
    other = [(i - batch // 2) % batch for i in range(batch)]
    assert sorted(other) == list(range(batch))
    assert all(i != j for i, j in enumerate(other))
    kappa = [network.concentration(p)[other] for p in output.predictions]
    targets = list(output.targets)
    assert_gradients(network, network.loss(output, "eager"), plain_loss(kappa, mu, targets))
    own = plain_loss([network.concentration(p) for p in output.predictions], mu, targets)
    assert not torch.allclose(network.loss(output, "eager"), own)
    network.eval()
    torch.testing.assert_close(network.loss(output, "eager"), own)


def test_a_detached_concentration_leaves_the_network_to_simsiam() -> None:
    """mu has the cosine's gradient with factor 1, the column the likelihood's with its own."""
    network = model(concentration="detached")
    features, z = hidden(network, views())
    head = network.predictor[3]
    mu = [head.mean(h)[:, :DIM] for h in features]
    raw = [head.concentration(h.detach())[:, 0] for h in features]
    kappa = [19 * linked(network.form.gain * x) for x in raw]
    cosine = sum(c.mean() for c in cosines(mu, z))
    likelihood = plain_loss(kappa, [m.detach() for m in mu], z) + cosine.detach()
    expected = -cosine + 0.125 * likelihood
    found = assert_gradients(network, network.loss(network(views()), "eager", 0.125), expected)
    assert found["predictor.3.concentration.weight"].abs().sum() > 0
    sizes = {"features": 48, "dim": DIM, "projector_hidden": 24, "predictor_hidden": 8}
    simsiam = SimSiam(nn.Flatten(), **sizes).double()  # type: ignore[arg-type]
    state = {name.replace("3.mean", "3"): value for name, value in network.state_dict().items()}
    simsiam.load_state_dict({name: state[name] for name in simsiam.state_dict()})
    alone = gradients(simsiam, simsiam.loss(simsiam(views()), "eager"))
    for name, gradient in alone.items():
        ours = found[name.replace("predictor.3", "predictor.3.mean")]
        torch.testing.assert_close(ours, gradient, msg=name)


@pytest.mark.parametrize(
    ("kind", "link"),
    [("sample", "softplus"), *((k, "quadratic") for k in ("sample", "global", "detached"))],
)
def test_the_upper_bound_holds_and_is_smooth(kind: str, link: str) -> None:
    """kappa stays below the bound for any raw, nearly reaches it, and is itself far below it."""
    network = model(
        concentration=kind, concentration_max=40.0, concentration_min=2.0, concentration_link=link
    )
    bound = network.predictor[4]
    assert isinstance(bound, UpperBound)
    prediction = torch.zeros(5, 32, dtype=torch.float64)
    prediction[:, DIM] = torch.tensor([-30.0, -3.0 if link == "softplus" else 0.5, 1.5, 4.0, 1e6])
    raw = prediction.requires_grad_()
    kappa = network.concentration(bound(raw))
    assert kappa.max() <= 40 * (1 + 1e-12)
    assert kappa[4].item() == pytest.approx(40, rel=1e-9)
    free = network.concentration(raw)
    torch.testing.assert_close(kappa[:1], free[:1])
    assert (kappa[1:] < free[1:]).all()
    (slope,) = torch.autograd.grad(kappa.sum(), raw)
    gain = 4 / math.sqrt(8)
    level = inverse_link(38 / 19, link) / (1 if link == "softplus" else gain)
    x = raw.detach()[:, DIM]
    bounded = level - F.softplus(level - x)
    by_link = gain * (1 + gain * bounded) * (bounded > 0)
    if link == "softplus":
        by_link = torch.sigmoid(bounded)
    torch.testing.assert_close(slope[:, DIM], 19 * by_link * torch.sigmoid(level - x))
    assert (slope[:, :DIM] == 0).all()
    trained = network(views()).predictions[0]
    assert (trained[:, 21:] == 0).all()
    assert (network.concentration(trained) < 40).all()


def test_bfloat16_does_not_round_what_is_meant_for_all_samples() -> None:
    network = model(concentration="constant", concentration_value=0.7).float()
    with torch.autocast("cpu", torch.bfloat16):
        output = network([x.float() for x in views()])
        loss = network.loss(output, "eager")
    assert output.predictions[0].dtype == torch.float32
    kappa = network.concentration(output.predictions[0])
    torch.testing.assert_close(kappa, torch.full((6,), 19 * 0.7))
    loss.backward()
    assert torch.isfinite(loss)


def test_predictors_share_what_is_one_for_all() -> None:
    network = model(concentration="global", local_predictor=True)
    assert network.local_predictor is not None
    assert network.local_predictor[3].concentration is network.predictor[3].concentration
    assert sum("concentration" in name for name, _ in network.named_parameters()) == 1
    apart = model(concentration="detached", local_predictor=True)
    assert apart.local_predictor is not None
    assert apart.local_predictor[3].concentration is not apart.predictor[3].concentration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"": "constant", "_value": 0.1, "_min": 2.0},
            "value: 0.1 .* 19 times it must be above concentration_min, 2",
        ),
        ({"": "constant"}, "value: None"),
        ({"_max": 1.0, "_min": 2.0}, "max: 1.0 .* above 2.384, .* concentration_min 2"),
        ({"_max": 1.0, "_min": 2.0, "_link": "softplus"}, "max: 1.0 .* above 2, the least kappa"),
        ({"_max": 0.2}, "max: 0.2 .* above 0.3838, the least kappa .* link quadratic"),
    ],
)
def test_numbers_that_do_not_fit_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"concentration_{message}"):
        model(**{f"concentration{name}": value for name, value in options.items()})
