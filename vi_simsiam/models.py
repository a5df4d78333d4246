"""SimSiam and VI-SimSiam: a backbone, a projector and a predictor.

The networks follow Chen and He (arXiv 2011.10566) and Nakamura et al. (arXiv 2203.11437): a ResNet,
a projector of three linear layers with BatchNorm (the last without affine parameters), a predictor.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam.backbones import build_backbone, fetch_weights, input_options
from vi_simsiam.checks import require
from vi_simsiam.config import Concentration, Link, Projector, Stem, TrainConfig
from vi_simsiam.distributions import PowerSpherical, widen
from vi_simsiam.errors import InputError
from vi_simsiam.functional import cosine_loss
from vi_simsiam.heads import concentration_head, new_projector, padded_linear
from vi_simsiam.normalisation import Head, PerView, PerViewBatchNorm1d, count_batches
from vi_simsiam.ops.multiview_loss import LossForm, multiview_loss


class Output(NamedTuple):
    """Outputs of a model for V views, of which the first G are targets."""

    predictions: tuple[Tensor, ...]
    """V tensors (B, W): D columns, for VI-SimSiam one more with the raw concentration, and zeros up
    to a multiple of 16."""
    targets: tuple[Tensor, ...]
    """G tensors (B, D), detached."""


class SimSiam(nn.Module):
    """SimSiam (Chen and He, arXiv 2011.10566): each view predicts the representation of the others.

    Args:
        backbone: a name for `build_backbone`, or a module from images to features (B, features).
        features: width of a custom backbone's features; one by name needs none.
        dim: D, the width of projections and predictions.
        projector: see `ModelConfig`; "standardised" needs the width of the features as `dim`.
        projector_hidden, predictor_hidden: width of their hidden layers.
        stem, channels: of a torchvision backbone, see `build_backbone`.
        pretrained: start a backbone of torchvision or timm from its ImageNet weights.
        local_predictor: give views smaller than the first one a predictor of their own, of the same
            shape (a shared one is reported to destabilise SimSiam, arXiv 2602.05845).
        head: builds a predictor's last layers from the width of its hidden one; None for a linear
            layer of D columns.

    Raises:
        InputError: an unknown backbone, a custom one without `features`, or a `dim` that does not
            fit.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        *,
        features: int | None = None,
        dim: int = 2048,
        projector: Projector = "mlp",
        projector_hidden: int = 512,
        predictor_hidden: int = 512,
        stem: Stem = "imagenet",
        pretrained: bool = False,
        channels: int = 3,
        local_predictor: bool = False,
        head: Callable[[int], Sequence[nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        if dim < 2:
            raise InputError(f"dim: {dim} must be at least 2")
        if isinstance(backbone, str):
            options: Any = {"stem": stem, "pretrained": pretrained, "channels": channels}
            backbone, features = build_backbone(backbone, **options)
        elif features is None:
            raise InputError("features: the width of an own backbone's output must be given")
        self.dim = dim
        self.features = features
        self.joint_statistics = False
        """Normalise consecutive views of one size jointly instead of each by its own statistics."""
        self.shared_passes = False
        """Pass views of one size together also where each is normalised by its own statistics: the
        same function, on a CPU faster. For torchvision backbones; the BatchNorm of a custom one
        would see the views as one batch."""
        self.fused = False
        """In training mode, pass views together as with `shared_passes`, and fuse BatchNorm, the
        addition of a residual and the ReLU after it: the same function, on a GPU faster. For
        torchvision backbones, on a GPU in channels_last."""
        self.backbone = backbone
        self.projector = new_projector(projector, features, projector_hidden, dim)
        last = head or (lambda hidden: [padded_linear(hidden, dim)])

        def new_predictor() -> Head:
            # The last layers draw their weights first, so that a seed gives the same network in
            # all versions.
            layers = last(predictor_hidden)
            first = nn.Linear(dim, predictor_hidden, bias=False)
            return Head(first, PerViewBatchNorm1d(predictor_hidden), nn.ReLU(inplace=True), *layers)

        self.predictor = new_predictor()
        self.local_predictor = new_predictor() if local_predictor else None
        self.target: nn.Sequential | None = None
        """Backbone and projector for the targets; None for the model's own. See `add_target`."""
        self._collect_norms()

    def _collect_norms(self) -> None:
        self._norms = [module for module in self.modules() if isinstance(module, PerView)]

    def add_target(self) -> None:
        """Compute the targets by a copy of the backbone and projector, see `update_target`.

        Its BatchNorm layers normalise by the batch in training mode, as BYOL's do, and keep running
        statistics of their own.
        """
        self.target = copy.deepcopy(nn.Sequential(self.backbone, self.projector))
        self.target.requires_grad_(False)
        self._collect_norms()

    @torch.no_grad()
    def update_target(self, rate: Tensor) -> None:
        """Move the target's weights towards the model's: target + rate (model - target).

        Follows Grill et al. (arXiv 2006.07733), by operations on the device only. Buffers are not
        averaged.

        Args:
            rate: 1 minus the momentum, a scalar on the model's device; 0 changes nothing.
        """
        assert self.target is not None
        moving: list[Tensor] = [*self.target.parameters()]
        leading: list[Tensor] = [*self.backbone.parameters(), *self.projector.parameters()]
        change = list(torch._foreach_sub(leading, moving))
        torch._foreach_mul_(change, rate)
        torch._foreach_add_(moving, change)

    def forward(self, views: Sequence[Tensor], targets: int = 2) -> Output:
        """Predictions of all views and projections of the first `targets` ones.

        BatchNorm normalises each view by its own statistics, and with `joint_statistics` all views
        of one size by common ones. Running statistics, which evaluation uses, are updated by each
        in the order of the views, and later ones count more: after two global and six local views
        82 % of them are the local ones' (momentum 0.1), and 53 % with joint statistics.

        Args:
            views: V tensors (B, 3, height, width); sizes may differ between views.
            targets: G, how many views (from the first on) are targets.
        """
        projections: list[Tensor] = []
        predictions: list[Tensor] = []
        for images, count in self._passes(views):
            predictor = self.predictor
            if self.local_predictor is not None and images.shape[-1] < views[0].shape[-1]:
                predictor = self.local_predictor
            with self._normalising(count, self.backbone, self.projector, predictor):
                projection = self.projector(self.backbone(images))
                prediction = predictor(projection)
            projections += projection.chunk(count)
            predictions += prediction.chunk(count)
        if self.target is not None:
            projections = self._targets(self.target, views[:targets])
        return Output(tuple(predictions), tuple(each.detach() for each in projections[:targets]))

    def _passes(self, views: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """Batches of views that pass through the network together, and how many each holds."""
        groups = [[view] for view in views]
        if self.joint_statistics or self.shared_passes or (self.fused and self.training):
            by_shape = itertools.groupby(views, key=lambda view: view.shape)
            groups = [list(group) for _, group in by_shape]
        return [(_batch_of(group), len(group)) for group in groups]

    @torch.no_grad()
    def _targets(self, target: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
        """Projections of the views by another network than the one that is trained."""
        projections: list[Tensor] = []
        for images, count in self._passes(views):
            with self._normalising(count, target):
                projections += target(images).chunk(count)
        return projections

    @contextlib.contextmanager
    def _normalising(self, views: int, *parts: nn.Module) -> Iterator[None]:
        """Set the number of views in BatchNorm's batches, and count those of the fused parts."""
        groups = 1 if self.joint_statistics else views
        for norm in self._norms:
            norm.views, norm.fused = groups, self.fused
        try:
            yield
        finally:
            for norm in self._norms:
                norm.views, norm.fused = 1, False
        if self.fused:
            modules = itertools.chain(*(part.modules() for part in parts))
            count_batches([each for each in modules if isinstance(each, PerView)], groups)

    def concentration(self, prediction: Tensor) -> Tensor | None:
        """None: SimSiam predicts no concentration."""
        return None

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Outputs for normalised images (B, 3, height, width). Call it in eval mode.

        `inference.encoder.Encoder` reads and normalises images of any kind.

        Returns:
            Features of the backbone (B, F), projections z (B, D), mean directions mu (B, D) of unit
            length, their lengths (B,) before normalisation, and kappa (B,), which is None for
            SimSiam. Of the last three, each is in at least float32.
        """
        embedding = self.backbone(images)
        projection = self.projector(embedding)
        prediction = self.predictor(projection)
        mean = widen(prediction[..., : self.dim])
        norm = torch.linalg.vector_norm(mean, dim=-1)
        direction = F.normalize(mean, dim=-1)
        return embedding, projection, direction, norm, self.concentration(prediction)

    def loss(self, output: Output, backend: str = "auto", loss_scale: float = 1.0) -> Tensor:
        """The method's loss of an `Output` times `loss_scale`, a scalar."""
        views, targets = output.predictions, output.targets
        return cosine_loss(views, targets, backend=backend, loss_scale=loss_scale)


def _batch_of(views: list[Tensor]) -> Tensor:
    """The views as one batch: their memory itself if they adjoin, as those of our loader do."""
    first, *rest = views
    if not rest:
        return first
    if torch.compiler.is_compiling() or any(view.requires_grad for view in views):
        return torch.cat(views)
    memory, size = first.untyped_storage().data_ptr(), len(first) * first.stride(0)
    adjacent = (
        view.untyped_storage().data_ptr() == memory
        and (view.stride(), view.dtype) == (first.stride(), first.dtype)
        and view.is_neg() == first.is_neg()
        and view.storage_offset() == first.storage_offset() + i * size
        for i, view in enumerate(rest, 1)
    )
    if not all(adjacent):
        return torch.cat(views)
    return first.as_strided((len(views) * len(first), *first.shape[1:]), first.stride())


class VISimSiam(SimSiam):
    """VI-SimSiam (Nakamura et al., arXiv 2203.11437), which predicts Power Spherical distributions.

    A prediction has one more column, the raw concentration r; kappa = concentration_scale
    link(gain r) + concentration_min.

    Args:
        concentration: where the raw concentration comes from, see `LossConfig`.
        concentration_value: kappa/(D - 1) of "constant".
        concentration_scale: None for D - 1, which makes kappa/(D - 1) a number of order 1; it
            starts at about 0.05.
        concentration_min: lower bound of kappa.
        concentration_max: upper bound of kappa, approached smoothly; None for none.
        concentration_link, concentration_gain, cosine_weight: see `LossConfig`.
        dim, predictor_hidden, others: as `SimSiam`.

    Raises:
        InputError: as `SimSiam`; inconsistent numbers of the concentration.
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
        dim: int = 2048,
        predictor_hidden: int = 512,
        **others: Any,
    ) -> None:
        require("dim", dim, dim >= 2, "at least 2")
        # A constant needs no gradient, but may be small.
        link: Link = "softplus" if concentration == "constant" else concentration_link
        # Of H features after BatchNorm and ReLU two samples share H/6 of a squared length of H/2,
        # so that a step of SGD moves the column H/6 times as far as a parameter, and with momentum
        # kappa oscillates about its best value. With a gain of 4 / sqrt(H) the raw concentration
        # moves 16/6 times as far; with 2 it is as steady, but separates samples so slowly that
        # kappa is less well calibrated after a short training.
        gain = concentration_gain / math.sqrt(predictor_hidden) if link == "quadratic" else 1.0
        scale = dim - 1.0 if concentration_scale is None else concentration_scale
        form = LossForm("power_spherical", scale, concentration_min, link=link, gain=gain)
        head = concentration_head(
            concentration,
            dim,
            form,
            start=concentration_scale is None,
            maximum=concentration_max,
            value=concentration_value,
        )
        super().__init__(backbone, dim=dim, predictor_hidden=predictor_hidden, head=head, **others)
        self.parametrisation = concentration
        """Where the raw concentration comes from."""
        self.form = form
        self.cosine_weight = cosine_weight

    def loss(self, output: Output, backend: str = "auto", loss_scale: float = 1.0) -> Tensor:
        """`loss_scale` times the likelihood's loss, in nats, plus `cosine_weight` times SimSiam's.

        With a "detached" concentration it is SimSiam's loss, which trains the network, plus
        `loss_scale` times the likelihood's, which trains the concentration. "shuffled"
        concentrations are exchanged in training mode. Minimise this scalar: with the link
        "quadratic" do not negate it.
        """
        predictions, direct, dim = output.predictions, None, self.dim
        if self.parametrisation == "detached":
            direct = cosine_loss([x[:, :dim] for x in predictions], output.targets, backend=backend)
            predictions = tuple(
                torch.cat((x[:, :dim].detach(), x[:, dim:]), 1) for x in predictions
            )
        elif self.parametrisation == "shuffled" and self.training:
            # A fixed shift can be replayed by a CUDA graph and repeated by a resumed run; the order
            # of the samples in a batch is random.
            predictions = tuple(
                torch.cat((x[:, :dim], x[:, dim:].roll(len(x) // 2, 0)), 1) for x in predictions
            )
        weight = 0.0 if direct is not None else self.cosine_weight
        form = dataclasses.replace(self.form, factor=loss_scale, cosine=weight)
        loss = multiview_loss(predictions, output.targets, form, backend=backend)
        return loss if direct is None else direct + loss

    def concentration(self, prediction: Tensor) -> Tensor:
        """kappa of predictions (..., W), shape (...), in at least float32."""
        return self.form.concentration(widen(prediction[..., self.dim]))

    def distribution(self, images: Tensor) -> PowerSpherical:
        """Power Spherical distributions of images (B, 3, height, width). Call it in eval mode."""
        _, _, loc, _, concentration = self.encode(images)
        assert concentration is not None
        return PowerSpherical(loc, concentration)


def build_model(config: TrainConfig) -> SimSiam:
    """The model that a configuration describes, with weights drawn from torch's generator."""
    if config.model.pretrained:
        fetch_weights(config.model.backbone, download=not config.offline)
    parts: dict[str, Any] = {**vars(config.model)}
    named = {name: parts.pop(name) for name in ("stem", "pretrained")} | input_options(config)
    parts["backbone"], parts["features"] = build_backbone(config.model.backbone, **named)
    kind = SimSiam if config.method == "simsiam" else VISimSiam
    if kind is VISimSiam:
        parts |= {name: value for name, value in vars(config.loss).items() if name != "loss_scale"}
    network = kind(**parts)
    network.joint_statistics = config.batch_norm == "joint"
    if config.ema is not None:
        network.add_target()
    return network
