"""SimSiam and VI-SimSiam: a backbone, a projector and a predictor.

The networks follow Chen and He (arXiv 2011.10566) and Nakamura et al. (arXiv 2203.11437): a torchvision ResNet, a
projector of three linear layers with BatchNorm (the last one without affine parameters), a predictor of two.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam.config import Concentration, Link, LossConfig, ModelConfig, Stem, TrainConfig
from vi_simsiam.distributions import PowerSpherical
from vi_simsiam.errors import InputError
from vi_simsiam.functional import cosine_loss
from vi_simsiam.heads import (
    ConcentrationHead,
    SplitHead,
    direction_detached,
    padded_linear,
    shuffled,
)
from vi_simsiam.normalisation import (
    Head,
    PerView,
    PerViewBatchNorm1d,
    PerViewBatchNorm2d,
    count_batches,
    make_fusible,
)
from vi_simsiam.ops.multiview_loss import LossForm, multiview_loss
from vi_simsiam.pretrained import check_backbone, fetch_weights


class Output(NamedTuple):
    """What a model makes of V views, of which the first G are targets."""

    predictions: tuple[Tensor, ...]
    """V tensors (B, W): D columns, for VI-SimSiam one more with the raw concentration, and zeros up to a multiple of 16."""
    targets: tuple[Tensor, ...]
    """G tensors (B, D), detached."""


class SimSiam(nn.Module):
    """SimSiam (Chen and He, arXiv 2011.10566): each view predicts the representation of the others.

    Args:
        backbone: a torchvision ResNet by name, or a module that maps images to features (B, features).
        features: width of an own backbone's features; known for a torchvision one.
        dim: D, the width of projections and predictions.
        projector_hidden: width of the projector's hidden layers.
        predictor_hidden: width of the predictor's hidden layer.
        stem: first layers of a torchvision backbone, see `build_backbone`.
        pretrained: whether a torchvision backbone starts from its ImageNet weights.
        local_predictor: whether views smaller than the first one have a predictor of their own, of the same shape (a
            shared one is reported to unsettle SimSiam, arXiv 2602.05845).
        head: makes a predictor's last layers for the width of its hidden one; None for a linear layer of D columns.

    Raises:
        InputError: an unknown backbone, or an own one without `features`.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        *,
        features: int | None = None,
        dim: int = 2048,
        projector_hidden: int = 512,
        predictor_hidden: int = 512,
        stem: Stem = "imagenet",
        pretrained: bool = False,
        local_predictor: bool = False,
        head: Callable[[int], Sequence[nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise InputError(f"dim: {dim} must be at least 2")
        if isinstance(backbone, str):
            backbone, features = build_backbone(backbone, stem=stem, pretrained=pretrained)
        elif features is None:
            raise InputError("features: the width of an own backbone's output must be given")
        self.dim = dim
        self.features = features
        self.joint_statistics = False
        """Whether BatchNorm normalises consecutive views of one size jointly instead of each by its own statistics."""
        self.shared_passes = False
        """Whether views of one size pass together also where each is normalised by its own statistics: the same function,
        on a CPU faster. For torchvision backbones; the BatchNorm of an own one would see the views as one batch."""
        self.fused = False
        """Whether in training mode views pass together as with `shared_passes`, and BatchNorm, the addition of a residual
        and the ReLU after it are one operation: the same function, on a GPU faster. For torchvision backbones, on a GPU
        in channels_last."""
        self.backbone = backbone
        self.projector = Head(
            nn.Linear(features, projector_hidden, bias=False),
            PerViewBatchNorm1d(projector_hidden),
            nn.ReLU(inplace=True),
            nn.Linear(projector_hidden, projector_hidden, bias=False),
            PerViewBatchNorm1d(projector_hidden),
            nn.ReLU(inplace=True),
            nn.Linear(projector_hidden, dim, bias=False),
            PerViewBatchNorm1d(dim, affine=False),
        )
        # The last layers draw their weights first, as ever: a seed stands for the same network in all versions.
        last = head or (lambda hidden: [padded_linear(hidden, dim)])
        self.predictor = self._new_predictor(dim, predictor_hidden, last(predictor_hidden))
        self.local_predictor = (
            self._new_predictor(dim, predictor_hidden, last(predictor_hidden))
            if local_predictor
            else None
        )
        self.target: nn.Sequential | None = None
        """The backbone and projector that make the targets; None for the model's own. See `add_target`."""
        self.frozen = False
        """Whether `train` leaves the model in eval mode. See `VISimSiam.freeze`."""
        self._collect_norms()

    @staticmethod
    def _new_predictor(dim: int, hidden: int, last: Sequence[nn.Module]) -> nn.Sequential:
        first = nn.Linear(dim, hidden, bias=False)
        return Head(first, PerViewBatchNorm1d(hidden), nn.ReLU(inplace=True), *last)

    def _collect_norms(self) -> None:
        self._norms = [module for module in self.modules() if isinstance(module, PerView)]

    def add_target(self) -> None:
        """Let a copy of the backbone and the projector make the targets, which only `update_target` changes.

        Its BatchNorm layers normalise by the batch in training mode, as BYOL's do, and keep running statistics of their own.
        """
        self.target = copy.deepcopy(nn.Sequential(self.backbone, self.projector)).requires_grad_(
            False
        )
        self._collect_norms()

    @torch.no_grad()
    def update_target(self, rate: Tensor) -> None:
        """Move the target's weights towards the model's: target + rate (model - target) (Grill et al., arXiv 2006.07733).

        Operations on the device only. Buffers are not averaged.

        Args:
            rate: 1 minus the momentum, a scalar on the model's device; 0 changes nothing.
        """
        assert self.target is not None
        moving: list[Tensor] = [*self.target.parameters()]
        leading: list[Tensor] = [*self.backbone.parameters(), *self.projector.parameters()]
        change: list[Tensor] = list(torch._foreach_sub(leading, moving))
        torch._foreach_mul_(change, rate)
        torch._foreach_add_(moving, change)

    def train(self, mode: bool = True) -> SimSiam:
        """As in torch; a frozen model stays in eval mode."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, views: Sequence[Tensor], targets: int = 2) -> Output:
        """Predictions of all views and projections of the first `targets` ones.

        BatchNorm normalises each view by its own statistics, and with `joint_statistics` all views of one size by common
        ones. Running statistics, which evaluation uses, are updated by each in the order of the views, and later ones
        count more: after two global and six local views 82 % of them are the local ones' (momentum 0.1), and 53 % with
        joint statistics.

        Args:
            views: V tensors (B, 3, height, width); sizes may differ between views.
            targets: G, how many views (from the first on) are targets.
        """
        projections: list[Tensor] = []
        predictions: list[Tensor] = []
        for together in self._passes(views):
            smaller = together[0].shape[-1] < views[0].shape[-1]
            predictor = (
                self.local_predictor
                if self.local_predictor is not None and smaller
                else self.predictor
            )
            images = together[0] if len(together) == 1 else torch.cat(together)
            with self._normalising(len(together), self.backbone, self.projector, predictor):
                projection = self.projector(self.backbone(images))
                prediction = predictor(projection)
            projections += projection.chunk(len(together))
            predictions += prediction.chunk(len(together))
        if self.target is not None:
            projections = self._targets(self.target, views[:targets])
        return Output(
            tuple(predictions), tuple(projection.detach() for projection in projections[:targets])
        )

    def _passes(self, views: Sequence[Tensor]) -> list[list[Tensor]]:
        """The views that go through the network together."""
        together = self.joint_statistics or self.shared_passes or (self.fused and self.training)
        return _by_shape(views) if together else [[view] for view in views]

    @torch.no_grad()
    def _targets(self, target: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
        """Projections of the views by another network than the one that is trained."""
        projections: list[Tensor] = []
        for together in self._passes(views):
            images = together[0] if len(together) == 1 else torch.cat(together)
            with self._normalising(len(together), target):
                projections += target(images).chunk(len(together))
        return projections

    @contextlib.contextmanager
    def _normalising(self, views: int, *parts: nn.Module) -> Iterator[None]:
        """Let BatchNorm take its batches for so many views, and count those that pass through the parts fused."""
        groups = 1 if self.joint_statistics else views
        for norm in self._norms:
            norm.views, norm.fused = groups, self.fused
        try:
            yield
        finally:
            for norm in self._norms:
                norm.views, norm.fused = 1, False
        if self.fused:
            count_batches(
                [
                    module
                    for part in parts
                    for module in part.modules()
                    if isinstance(module, PerView)
                ],
                groups,
            )

    def loss(self, output: Output, backend: str = "auto", loss_scale: float = 1.0) -> Tensor:
        """The method's loss of an `Output` times `loss_scale`, a scalar."""
        return cosine_loss(
            output.predictions, output.targets, backend=backend, loss_scale=loss_scale
        )


class VISimSiam(SimSiam):
    """VI-SimSiam (Nakamura et al., arXiv 2203.11437): predictions are Power Spherical distributions.

    A prediction has one column more, the raw concentration r; kappa = concentration_scale link(gain r) +
    concentration_min.

    Args:
        concentration: where the raw concentration comes from, see `LossConfig`.
        concentration_value: kappa/(D - 1) of "constant".
        concentration_scale: None for D - 1, which makes kappa/(D - 1) a number of order 1; it starts at about 0.05.
        concentration_min: lower bound of kappa.
        concentration_max: upper bound of kappa, approached smoothly; None for none.
        concentration_link, concentration_gain, cosine_weight: see `LossConfig`.
        frozen: whether only the concentration is trained, see `freeze`.
        others: as `SimSiam`.

    Raises:
        InputError: as `SimSiam`; numbers of the concentration that do not fit each other.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        *,
        concentration: Concentration = "sample",
        concentration_value: float | None = None,
        concentration_scale: float | None = None,
        concentration_min: float = 0.0,
        concentration_max: float | None = None,
        concentration_link: Link = "quadratic",
        concentration_gain: float = 4.0,
        cosine_weight: float = 1.0,
        frozen: bool = False,
        features: int | None = None,
        dim: int = 2048,
        projector_hidden: int = 512,
        predictor_hidden: int = 512,
        stem: Stem = "imagenet",
        pretrained: bool = False,
        local_predictor: bool = False,
    ) -> None:
        head = ConcentrationHead(
            concentration,
            dim,
            scale=concentration_scale,
            minimum=concentration_min,
            maximum=concentration_max,
            link=concentration_link,
            gain=concentration_gain,
            hidden=predictor_hidden,
            value=concentration_value,
            frozen=frozen,
        )
        super().__init__(
            backbone,
            features=features,
            dim=dim,
            projector_hidden=projector_hidden,
            predictor_hidden=predictor_hidden,
            stem=stem,
            pretrained=pretrained,
            local_predictor=local_predictor,
            head=head,
        )
        self.parametrisation = concentration
        """Where the raw concentration comes from."""
        self.form = LossForm(
            "power_spherical", head.scale, concentration_min, link=head.link, gain=head.gain
        )
        self.cosine_weight = cosine_weight
        if frozen:
            self.freeze()

    def freeze(self) -> None:
        """Keep all weights and running statistics but those of the concentration, in eval mode for good.

        Raises:
            InputError: the concentration shares a layer with the mean direction.
        """
        heads = [module for module in self.modules() if isinstance(module, SplitHead)]
        if not heads:
            raise InputError(
                "frozen: the concentration has no layer of its own; make the model with frozen=True"
            )
        self.requires_grad_(False)
        for head in heads:
            head.concentration.requires_grad_(True)
        self.frozen = True
        self.eval()

    def loss(self, output: Output, backend: str = "auto", loss_scale: float = 1.0) -> Tensor:
        """`loss_scale` times the likelihood's loss, in nats, plus `cosine_weight` times SimSiam's: a scalar.

        With a "detached" concentration it is SimSiam's loss, which trains the network, plus `loss_scale` times the
        likelihood's, which trains the concentration; a frozen model has the likelihood's alone. "shuffled"
        concentrations are exchanged in training mode. It is to be minimised: with the link "quadratic" do not negate it.
        """
        predictions, direct = output.predictions, None
        if self.parametrisation == "detached":
            direct = cosine_loss(
                [x[:, : self.dim] for x in predictions], output.targets, backend=backend
            )
            predictions = tuple(direction_detached(x, self.dim) for x in predictions)
        elif self.parametrisation == "shuffled" and self.training:
            predictions = tuple(shuffled(x, self.dim) for x in predictions)
        weight = 0.0 if direct is not None or self.frozen else self.cosine_weight
        form = dataclasses.replace(self.form, factor=loss_scale, cosine=weight)
        loss = multiview_loss(predictions, output.targets, form, backend=backend)
        return loss if direct is None else direct + loss

    def concentration(self, prediction: Tensor) -> Tensor:
        """kappa of predictions (..., W), shape (...), in at least float32."""
        raw = prediction[..., self.dim]
        raw = raw if raw.dtype == torch.float64 else raw.float()
        return self.form.concentration(raw)

    def distribution(self, images: Tensor) -> PowerSpherical:
        """The Power Spherical distribution of every image (B, 3, height, width). Call it in eval mode."""
        prediction = self.predictor(self.projector(self.backbone(images)))
        concentration = self.concentration(prediction)
        loc = F.normalize(prediction[..., : self.dim].to(concentration.dtype), dim=-1)
        return PowerSpherical(loc, concentration)


def _by_shape(views: Sequence[Tensor]) -> list[list[Tensor]]:
    """Consecutive views of one shape together."""
    return [list(group) for _, group in itertools.groupby(views, key=lambda view: view.shape)]


def build_backbone(
    name: str, *, stem: Stem = "imagenet", pretrained: bool = False, zero_init_residual: bool = True
) -> tuple[nn.Module, int]:
    """A torchvision ResNet without its classifier, and the width of its pooled features.

    Args:
        name: a torchvision ResNet, ResNeXt or Wide ResNet.
        stem: "imagenet" as torchvision builds it; "small" replaces it by a 3x3 convolution of stride 1 without max-pool.
        pretrained: whether to load torchvision's default ImageNet weights.
        zero_init_residual: whether every residual branch starts at zero (Goyal et al., arXiv 1706.02677).

    Raises:
        InputError: no torchvision ResNet of that name.
    """
    check_backbone(name)
    weights = "DEFAULT" if pretrained else None
    network = torchvision.models.get_model(
        name, weights=weights, zero_init_residual=zero_init_residual, norm_layer=PerViewBatchNorm2d
    )
    features: int = network.fc.in_features
    network.fc = nn.Identity()
    make_fusible(network)
    if stem == "small":
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network, features


def build_model(config: TrainConfig) -> SimSiam:
    """The model that a configuration describes, with weights drawn from torch's generator."""
    model: ModelConfig = config.model
    loss: LossConfig = config.loss
    if model.pretrained:
        fetch_weights(model.backbone, download=not config.offline)
    common = {
        "dim": model.dim,
        "projector_hidden": model.projector_hidden,
        "predictor_hidden": model.predictor_hidden,
        "stem": model.stem,
        "pretrained": model.pretrained,
        "local_predictor": model.local_predictor,
    }
    network: SimSiam
    if config.method == "simsiam":
        network = SimSiam(model.backbone, **common)  # type: ignore[arg-type]
    else:
        network = VISimSiam(
            model.backbone,
            concentration=loss.concentration,
            concentration_value=loss.concentration_value,
            concentration_scale=loss.concentration_scale,
            concentration_min=loss.concentration_min,
            concentration_max=loss.concentration_max,
            concentration_link=loss.concentration_link,
            concentration_gain=loss.concentration_gain,
            cosine_weight=loss.cosine_weight,
            frozen=config.frozen_run is not None,
            **common,  # type: ignore[arg-type]
        )
    network.joint_statistics = config.batch_norm == "joint"
    if config.ema is not None:
        network.add_target()
    return network
