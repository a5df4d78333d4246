"""Features of randomly augmented training images, for SimSiam's way of linear evaluation.

SimSiam's linear evaluation (Chen and He, arXiv 2011.10566) trains the classifier on a random
resized crop of 8 to 100 % of every training image, flipped half of the time, drawn anew in every
epoch. Here the frozen network maps such views to features, pass after pass: with as many passes as
epochs that is the same computation, with fewer of them the epochs take turns with the passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.views import GLOBAL_VIEWS
from vi_simsiam.errors import InputError
from vi_simsiam.inference.forward import evaluating, finite

CPU_PASSES = 4
"""Default passes on a CPU, where the network takes most of the time."""
_BATCH = 256
_KEPT_BYTES = 2**32
"""Most bytes of features kept for later epochs; beyond them only the last pair of passes is."""


def linear_policy(size: int) -> AugmentConfig:
    """The random views of SimSiam's linear evaluation: crops of 8 to 100 % of the area, flips."""
    return AugmentConfig(
        size=size, crop_scale=(0.08, 1.0), jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0
    )


def default_passes(epochs: int, device: torch.device) -> int:
    """Default number of passes: one per epoch on a GPU, at most `CPU_PASSES` elsewhere."""
    return epochs if device.type == "cuda" else min(epochs, CPU_PASSES)


class AugmentedFeatures:
    """Features of a network's random views of the training images, computed lazily.

    Pass p holds view p mod 2 of the two that the loader makes of an image in its epoch p // 2: a
    view depends on (seed, pass, image) alone. The network computes as in `extract`.

    Args:
        backbone: on `device`; maps images (B, 3, size, size) to features (B, F).
        images: N training images.
        size: side of the views in pixels.
        device: where to compute.
        workers: processes that prepare views on a CPU.
        seed: key of the views.
        report: called with a short phrase before every pair of passes that is computed.
    """

    def __init__(
        self,
        backbone: nn.Module,
        images: PackedImages,
        *,
        size: int,
        device: torch.device,
        workers: int,
        seed: int = 0,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.backbone, self.images, self.device, self.workers = backbone, images, device, workers
        self.policy, self.seed = linear_policy(size), seed
        self.report = report or (lambda phrase: None)
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._loader: MultiViewLoader | None = None

    def views(self, number: int) -> tuple[Tensor, Tensor]:
        """Pass `number`, from 0 on: features (n, F) float32 and their images (n,) int64, ascending.

        Both are on the CPU. Batches are of equal size; the few images left over, fewer than there
        are batches, are missing in both passes of a loader's epoch and other ones in the next.

        Raises:
            InputError: there are no images, or features are not finite.
        """
        epoch, view = divmod(number, GLOBAL_VIEWS)
        if epoch not in self._kept:
            pair = self._compute(epoch)
            kept = [each for passes in (*self._kept.values(), pair) for each in passes]
            if sum(features.nbytes + index.nbytes for features, index in kept) > _KEPT_BYTES:
                self._kept.clear()
            self._kept[epoch] = pair
        return self._kept[epoch][view]

    def close(self) -> None:
        """End the loader's workers and forget the features. Another pass would start it again."""
        if self._loader is not None:
            self._loader.close()
        self._loader = None
        self._kept.clear()

    def _compute(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """Both views of an epoch of the loader."""
        count = len(self.images)
        if count == 0:
            raise InputError(f"source: {self.images.name} holds no images")
        if self._loader is None:
            self._loader = MultiViewLoader(
                self.images,
                self.policy,
                count // math.ceil(count / _BATCH),
                self.device,
                seed=self.seed,
                workers=self.workers,
            )
        number = GLOBAL_VIEWS * epoch + 1
        self.report(f"features of augmented training images, pass {number} and the next")
        parts: list[list[Tensor]] = []
        indices = []
        with evaluating(self.backbone, self.device):
            for batch in self._loader.epoch(epoch):
                parts.append([self.backbone(view).float().cpu() for view in batch.views])
                indices.append(batch.index.cpu())
        index, order = torch.cat(indices).sort()
        features = [torch.cat(views)[order] for views in zip(*parts, strict=True)]
        return [(finite(view, self.images), index) for view in features]
