"""Uncertainty scores of images: the concentration, and everything cheaper to compare it with.

Every score rises with uncertainty. One pass of the network over a set of images gives all of them
(`Network.observe`), except `agreement`, which takes one pass for every view.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from vi_simsiam.config import AugmentConfig, Constants
from vi_simsiam.data.channels import Pixels
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.views import IMAGENET
from vi_simsiam.engine.forward import evaluating, nearest, random_views
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.corruptions import brightness, jpeg_bytes
from vi_simsiam.evaluation.logistic import LogisticProbe
from vi_simsiam.evaluation.metrics import calibration
from vi_simsiam.inference.encoder import Encoding
from vi_simsiam.inference.label_free import (
    AGREEMENT,
    NEIGHBOURS,
    Gaussian,
    knn_distances,
    neighbour_agreement,
)
from vi_simsiam.models import SimSiam
from vi_simsiam.stages import NAMES as STAGES
from vi_simsiam.stages import recorded, stages

JPEG_QUALITY = 75
VIEWS = 4
"""Augmented views of every image: 12 ordered pairs to calibrate on."""

DESCRIPTIONS = {
    "kappa": "minus the predicted concentration",
    "embedding_norm": "minus the length of the backbone's features",
    **{f"{name}_norm": f"minus the length of the pooled output of {name}" for name in STAGES},
    "projection_norm": "minus the length of the projection",
    "prediction_norm": "minus the length of the predicted mean direction before it is normalised",
    "view_agreement": "1 minus the mean cosine between the embeddings of augmented views",
    "knn_distance": f"1 minus the mean cosine to the {NEIGHBOURS} nearest training embeddings",
    AGREEMENT: f"1 minus the mean share of the {NEIGHBOURS} nearest training images that the runs "
    "of several seeds have in common",
    "mahalanobis": "squared Mahalanobis distance to the nearest class mean, "
    "shared shrunk covariance",
    "mahalanobis_label_free": "squared Mahalanobis distance to the mean of all training images, "
    "shrunk covariance",
    "softmax": "1 minus the largest class probability of the logistic probe",
    "energy": "minus the log-sum-exp of the logistic probe's logits",
    "edge_energy": "minus the mean gradient of the brightness of the pixels",
    "contrast": "minus the standard deviation of the brightness of the pixels",
    "jpeg_size": f"minus the size of the image as a JPEG file of quality {JPEG_QUALITY}",
}
"""In the order of every result. In a ResNet layer4_norm is embedding_norm."""

TRIVIAL = (
    "embedding_norm",
    *(f"{name}_norm" for name in STAGES),
    "projection_norm",
    "prediction_norm",
    "edge_energy",
    "contrast",
    "jpeg_size",
)
"""Scores that need no labels, training images or second pass: lengths of vectors, and pixels."""

_BATCH = 64


class Network:
    """A trained model in eval mode and float32, and scores of images by it.

    Args:
        model: is copied: its memory format stays as it is.
        device: where it computes.
        constants: mean and deviation of the channels of its images.
    """

    def __init__(
        self, model: SimSiam, device: torch.device, constants: Constants = IMAGENET
    ) -> None:
        # channels_last is a third faster on a CPU.
        self.model = copy.deepcopy(model).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device, self.constants = device, constants
        places = stages(self.model.backbone)
        self.descriptions = DESCRIPTIONS | {
            f"{name}_norm": f"minus the length of the pooled output of {place}"
            for name, place in places.items()
        }
        """`DESCRIPTIONS` with the places of this network's stages."""

    def __call__(self, views: Tensor) -> Encoding:
        """Pass normalised views (B, C, height, width) float32 through the network."""
        views = views.to(self.device).contiguous(memory_format=torch.channels_last)
        with evaluating(self.model, self.device), recorded(self.model.backbone) as norms:
            columns: list[Any] = [*self.model.encode(views), norms]
        return Encoding(*columns)

    def observe(self, batches: Iterable[Pixels]) -> tuple[Tensor, dict[str, NDArray[np.float64]]]:
        """Embeddings (N, F) float32 of images, and (N,) scores by name that need them alone.

        Args:
            batches: un-augmented views as pixels, (B, side, side, C) each, one at least.

        Raises:
            InputError: the network's output is not finite.
        """
        embeddings: list[Tensor] = []
        parts: list[dict[str, NDArray[np.float64]]] = []
        for pixels in batches:
            found = self(views_of(pixels, self.constants))
            embeddings.append(found.embedding.cpu())
            norms = {
                **{name: getattr(found, name).norm(dim=1) for name in ("embedding", "projection")},
                **found.layer_norms,
                "prediction": found.loc_norm,
            }
            values = {f"{name}_norm": norm for name, norm in norms.items()}
            if found.concentration is not None:
                values["kappa"] = found.concentration
            scores = {name: -value.double().cpu().numpy() for name, value in values.items()}
            parts.append({**scores, **image_scores(pixels)})
        names = [name for name in DESCRIPTIONS if name in parts[0]]
        scores = {name: np.concatenate([part[name] for part in parts]) for name in names}
        if not all(np.isfinite(values).all() for values in scores.values()):
            raise InputError("run: the network's output is not finite; its weights are damaged")
        return torch.cat(embeddings), scores


class Seeds:
    """Networks that differ from another one in their seed, and their embeddings of the same images.

    Args:
        networks: of other seeds; without any there is no score.
    """

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks
        self._seen: list[list[Tensor]] = []
        self._reference: list[Tensor] = []

    def watch(self, batches: Iterable[Pixels]) -> Iterator[Pixels]:
        """Pass batches of pixels on, as for `Network.observe`, and embed them on the way."""
        self._seen = [[] for _ in self._networks]
        for pixels in batches:
            for network, parts in zip(self._networks, self._seen, strict=True):
                parts.append(network(views_of(pixels, network.constants)).embedding.cpu())
            yield pixels

    def refer(self, embedding: Tensor) -> None:
        """Take the images watched last as those that neighbours are among.

        Args:
            embedding: (N, F) of them by the network that is compared.
        """
        self._reference = self._spaces(embedding)

    def scores(self, embedding: Tensor) -> dict[str, NDArray[np.float64]]:
        """The score "neighbour_agreement", (M,) float64, of the images watched last.

        Args:
            embedding: (M, F) of them by the network that is compared.
        """
        if not self._networks:
            return {}
        device = self._networks[0].device
        agreement = neighbour_agreement(self._spaces(embedding), self._reference, device)
        return {AGREEMENT: 1 - agreement}

    def _spaces(self, embedding: Tensor) -> list[Tensor]:
        return [embedding, *map(torch.cat, self._seen)]


def views_of(pixels: Pixels, constants: Constants = IMAGENET) -> Tensor:
    """Pixels (B, side, side, C) as normalised views (B, C, side, side) float32.

    Args:
        pixels: uint8 or uint16.
        constants: mean and deviation of the channels.
    """
    # `data.views.normalised` multiplies by 1/255, which rounds otherwise: it would change results.
    most = int(np.iinfo(pixels.dtype).max)
    floats = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / most
    views: Tensor = V.normalize(floats, *map(list, constants))
    return views


def image_scores(pixels: Pixels) -> dict[str, NDArray[np.float64]]:
    """Scores of the pixels without any network: "edge_energy", "contrast" and "jpeg_size".

    (B,) float64 each. Brightness is 0.299 R + 0.587 G + 0.114 B in 0..255, the gradient the length
    of its differences to the right and below. Where channels are not three, it is their mean; other
    images than 8-bit RGB have no "jpeg_size".

    Args:
        pixels: (B, side, side, C) uint8 or uint16.
    """
    channels = pixels.shape[3]
    gray = pixels.astype(np.float32) @ brightness(channels).astype(np.float32)
    right, below = np.diff(gray, axis=2)[:, :-1], np.diff(gray, axis=1)[:, :, :-1]
    found = {
        "edge_energy": -np.hypot(right, below).mean((1, 2)).astype(np.float64),
        "contrast": -gray.std((1, 2), dtype=np.float64),
    }
    if channels == 3 and pixels.dtype == np.uint8:
        sizes = [len(jpeg_bytes(image, JPEG_QUALITY)) for image in pixels]
        found["jpeg_size"] = -np.array(sizes, dtype=np.float64)
    return found


def agreement(
    network: Network,
    images: PackedImages,
    chosen: NDArray[np.int64],
    policy: AugmentConfig,
    *,
    seed: int,
    calibrate: bool = False,
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """The score "view_agreement" of the images `chosen`, (N,) float64, by `VIEWS` views of each.

    The views are random global ones of `policy`, each a function of the seed, the image's number
    and its own. With `calibrate` also the calibration of the concentrations, else {}.
    """
    parts, pairs = [], []
    for start in range(0, len(chosen), _BATCH):
        samples = chosen[start : start + _BATCH]
        views = random_views(
            [images.array(number) for number in samples.tolist()],
            samples,
            policy,
            views=VIEWS,
            seed=seed,
            device=network.device,
            later_epochs=False,
        )
        shape = views.shape[:2]
        views = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        found = network(views)
        parts.append(disagreement(found.embedding.unflatten(0, shape)))
        if calibrate:
            assert found.concentration is not None
            target = found.projection
            if network.model.target is not None:
                with evaluating(network.model, network.device):
                    target = network.model.target(views)
            outputs = (found.loc, found.concentration, target)
            each = [output.unflatten(0, shape) for output in outputs]
            pairs.append([cosines.cpu().flatten() for cosines in pair_cosines(*each)])
    if not calibrate:
        return np.concatenate(parts), {}
    expected, observed = (torch.cat(each).double().numpy() for each in zip(*pairs, strict=True))
    return np.concatenate(parts), calibration(expected, observed)


def disagreement(embeddings: Tensor) -> NDArray[np.float64]:
    """The score "view_agreement", (B,) float64, of embeddings (V, B, F) of V >= 2 views."""
    unit = F.normalize(embeddings.double(), dim=-1)
    count = len(unit)
    # The sum over all ordered pairs of different views is |sum of the vectors|^2 less the squares.
    pairs = unit.sum(0).square().sum(-1) - unit.square().sum(-1).sum(0)
    score: NDArray[np.float64] = (1 - pairs / (count * (count - 1))).cpu().numpy()
    return score


def pair_cosines(loc: Tensor, concentration: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Expected and observed cosines of V views, for every ordered pair v != g.

    For a Power Spherical distribution E[mu.z] = kappa / (kappa + D - 1) (De Cao and Aziz, arXiv
    2006.04437): the prediction of view v implies the mean of its cosine with the representation of
    another view g.

    Args:
        loc: (V, B, D) mean directions mu, unit vectors.
        concentration: (V, B) kappa.
        projection: (V, B, D) projections z of the same views, of any length.

    Returns:
        kappa_v / (kappa_v + D - 1) and mu_v.z_g / |z_g|, two tensors (V (V - 1), B).
    """
    count, dim = len(loc), loc.shape[-1]
    cosines = torch.einsum("vbd,gbd->vgb", loc, F.normalize(projection, dim=-1))
    expected = (concentration / (concentration + dim - 1)).unsqueeze(1).expand_as(cosines)
    others = ~torch.eye(count, dtype=torch.bool, device=loc.device)
    return expected[others], cosines[others]


class Reference:
    """Embeddings of the training images, to which the distances of others are measured.

    Args:
        embedding: (N, F) float32.
        labels: (N,) int64; None for one Gaussian about the mean of all.
        probe: a classifier of embeddings; None for no "softmax" and "energy".
        device: where distances are computed.
    """

    def __init__(
        self,
        embedding: Tensor,
        labels: NDArray[np.int64] | None,
        probe: LogisticProbe | None,
        device: torch.device,
    ) -> None:
        from sklearn.covariance import LedoitWolf

        self.probe, self.device, self.embedding = probe, device, embedding.to(device)
        self._cluster = None if labels is None else Gaussian(embedding.numpy())
        members = embedding.double().numpy()
        groups = np.zeros(len(members), np.int64)
        if labels is not None:
            groups = np.unique(labels, return_inverse=True)[1]
        means = [members[groups == group].mean(0) for group in range(groups.max() + 1)]
        self._means = np.stack(means)
        precision = LedoitWolf(assume_centered=True).fit(members - self._means[groups]).precision_
        # precision = root root^T, also where it is singular because all members are the same.
        values, vectors = np.linalg.eigh(precision)
        self._root = vectors * np.sqrt(values.clip(0))

    def scores(self, embedding: Tensor) -> dict[str, NDArray[np.float64]]:
        """Scores of embeddings (M, F): "knn_distance", "mahalanobis" and those of the probe.

        (M,) float64 each. With labels there is "mahalanobis_label_free", too.
        """
        near = nearest(embedding, self.embedding, NEIGHBOURS, device=self.device)
        distances = np.concatenate([knn_distances(cosines.cpu().numpy()) for _, cosines in near])
        points, means = embedding.double().numpy() @ self._root, self._means @ self._root
        squares = np.stack([np.square(points - mean).sum(1) for mean in means])
        found = {"knn_distance": distances, "mahalanobis": squares.min(0)}
        if self._cluster is not None:
            found["mahalanobis_label_free"] = self._cluster.distances(embedding.numpy())
        if self.probe is not None:
            logits = self.probe.logits(embedding).double()
            found["softmax"] = 1 - logits.softmax(1).amax(1).numpy()
            found["energy"] = -logits.logsumexp(1).numpy()
        return found
