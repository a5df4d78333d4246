"""Features of randomly augmented training images, for a linear classifier that is trained as SimSiam's is.

SimSiam's linear evaluation (Chen and He, arXiv 2011.10566, and their published code) shows the classifier a random
resized crop of 8 to 100 % of every training image, flipped half of the time, drawn anew in every epoch; the validation
images are resized and cropped at the centre. The frozen network maps these views to features before the classifier is
trained, pass after pass: with as many passes as epochs that is the same computation, with fewer of them the epochs take
turns with the passes.
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

CPU_PASSES = 4
"""Passes on a CPU where no number is given: there the network takes most of the time. On a GPU there is one an epoch."""
_BATCH = 256
# Of features kept for the epochs that come back to a pass; with more of them only the last pair of passes is kept.
_KEPT_BYTES = 2**32


def linear_policy(size: int) -> AugmentConfig:
    """The random views of SimSiam's linear evaluation, `size` pixels: crops of 8 to 100 % of the area, and flips."""
    return AugmentConfig(
        size=size, crop_scale=(0.08, 1.0), jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0
    )


def default_passes(epochs: int, device: torch.device) -> int:
    """Passes where no number is given: one for every epoch on a GPU, `CPU_PASSES` at most elsewhere."""
    return epochs if device.type == "cuda" else min(epochs, CPU_PASSES)


class AugmentedFeatures:
    """Features of a network's random views of the training images; nothing is computed before it is asked for.

    Pass p holds view p mod 2 of the two that the loader makes of an image in its epoch p // 2: a view depends on (seed,
    pass, image) alone. Computed in eval mode and float32, never under autocast, like the un-augmented features.

    Args:
        backbone: on `device`; maps images (B, 3, size, size) to features (B, F). Its training mode is restored.
        images: N training images.
        size: side of the views in pixels.
        device: where to compute.
        workers: processes that prepare views on a CPU.
        seed: key of the views.
        report: called with a short phrase at the start of every pair of passes that is computed.
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
        """Pass `number`, from 0 on: features (n, F) float32 on the CPU, and their images (n,) int64, in ascending order.

        Batches are of equal size; the few images that this leaves over, fewer than there are batches, are missing in
        both passes of a loader's epoch and other ones in the next.

        Raises:
            InputError: there are no images, or features are not finite.
        """
        epoch, view = divmod(number, GLOBAL_VIEWS)
        if epoch not in self._kept:
            views = self._compute(epoch)
            kept = [*self._kept.values(), views]
            if (
                sum(tensor.nbytes for pair in kept for both in pair for tensor in both)
                > _KEPT_BYTES
            ):
                self._kept.clear()
            self._kept[epoch] = views
        return self._kept[epoch][view]

    def close(self) -> None:
        """End the loader's workers and forget the features. Another pass would start it again."""
        if self._loader is not None:
            self._loader.close()
        self._loader = None
        self._kept.clear()

    @torch.no_grad()
    def _compute(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """Both views of an epoch of the loader."""
        if len(self.images) == 0:
            raise InputError(f"source: {self.images.name} holds no images")
        if self._loader is None:
            batch_size = len(self.images) // math.ceil(len(self.images) / _BATCH)
            self._loader = MultiViewLoader(
                self.images,
                self.policy,
                batch_size,
                self.device,
                seed=self.seed,
                workers=self.workers,
            )
        self.report(
            f"features of augmented training images, pass {GLOBAL_VIEWS * epoch + 1} and the next"
        )
        parts: list[list[Tensor]] = [[] for _ in range(GLOBAL_VIEWS)]
        indices = []
        was_training = self.backbone.training
        self.backbone.eval()
        try:
            for batch in self._loader.epoch(epoch):
                for part, view in zip(parts, batch.views, strict=True):
                    part.append(self.backbone(view).float().cpu())
                indices.append(batch.index.cpu())
        finally:
            self.backbone.train(was_training)
        index, order = torch.cat(indices).sort()
        features = [torch.cat(part)[order] for part in parts]
        if not all(torch.isfinite(view).all() for view in features):
            raise InputError(
                f"features: those of {self.images.name} are not finite; the model's weights are damaged"
            )
        return [(view, index) for view in features]
