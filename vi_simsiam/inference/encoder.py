"""A trained run as a function of images: features, projections and predicted distributions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.checks import require
from vi_simsiam.data.channels import Pixels
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.sources import FileSource, ImageSource, Unreadable, UnreadableError
from vi_simsiam.data.views import eval_square, normalised
from vi_simsiam.engine.forward import evaluating, random_views
from vi_simsiam.engine.origin import placed
from vi_simsiam.engine.run import Run, Weights, load_model, resolve_device, resolve_workers
from vi_simsiam.errors import ImageWarning, InputError
from vi_simsiam.inference.images import Images, open_images, read
from vi_simsiam.inference.product import product_of_experts
from vi_simsiam.paths import user_path
from vi_simsiam.stages import recorded
from vi_simsiam.text import brief_repr

_MOST_WHOLE = 64
"""Whole images in memory at a time, to make random crops of."""


@dataclass(frozen=True)
class Encoding:
    """Outputs of a model for N images; float32 tensors, an encoder's are on the CPU."""

    embedding: Tensor
    """(N, F) features of the backbone."""
    projection: Tensor
    """(N, D) projections z, not normalised."""
    loc: Tensor
    """(N, D) mean directions mu, of unit length."""
    loc_norm: Tensor
    """(N,) length of the predictions before they were normalised."""
    concentration: Tensor | None
    """(N,) kappa, at least 0; None for SimSiam, which predicts none."""
    layer_norms: dict[str, Tensor] = field(default_factory=dict)
    """(N,) lengths of the pooled outputs of the backbone's stages by name, see `stages.stages`."""

    __repr__ = brief_repr

    def __len__(self) -> int:
        return len(self.embedding)

    @property
    def dim(self) -> int:
        """D, the dimension of the space of the mean directions."""
        return self.loc.shape[1]

    @property
    def uncertainty(self) -> Tensor:
        """1 - E[mu.z] = (D - 1)/(kappa + D - 1), (N,) in (0, 1]: near 0 for a certain z.

        Raises:
            InputError: the run is SimSiam, which predicts no concentration.
        """
        if self.concentration is None:
            raise InputError(
                "uncertainty: a SimSiam run predicts none; train with --method vi-simsiam"
            )
        return (self.dim - 1) / (self.concentration + (self.dim - 1))

    @classmethod
    def joined(cls, parts: Sequence[Encoding]) -> Encoding:
        """Concatenate several encodings (at least one) by the same model."""
        *columns, norms = zip(*(vars(part).values() for part in parts), strict=True)
        joined: list[Any] = [None if each[0] is None else torch.cat(each) for each in columns]
        joined.append({name: torch.cat([part[name] for part in norms]) for name in norms[0]})
        return cls(*joined)


class Encoder:
    """A trained run as a function of images.

    Images are seen un-augmented, as in evaluation: the shorter side resized to `size` (bicubic),
    the centre cropped, normalised. The network computes in eval mode and float32, without gradient
    and never under autocast; the batch size changes nothing beyond rounding. A GPU's convolutions
    round their factors to TF32, 10 bits of mantissa, where `torch.backends.cudnn.allow_tf32` is
    set, which is PyTorch's default.

    Args:
        run: a run, as `engine.run.load_run` opens it; `load` opens one without its data set.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.model, self.config, self.device = run, run.model, run.config, run.device
        self.size = run.config.augment.size
        """Side of the view in pixels."""

    def __repr__(self) -> str:
        return f"Encoder({self.run!r}, views of {self.size} x {self.size} pixels)"

    def encode(
        self,
        images: Images | Tensor,
        *,
        views: int | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> Encoding:
        """Encode images; the result is held in memory. `stream` is for larger sets.

        Args:
            images: everything that `inference.images.open_images` takes: an ImageSource, a Dataset,
                a folder, a file, PIL images and paths, uint8 (N, 3, H, W). A float tensor
                (N, 3, H, W) holds views that are normalised already (by the mean and
                deviation of the run), of any size, and (N, V, 3, h, w) V views of
                each image, which are joined as with `views`. A run of other channels takes those.
            views: None for the un-augmented view; M to join M random global views of each image by
                the run's own policy. The distribution is their `product_of_experts` (for SimSiam,
                whose concentration is one constant, the normalised sum); embedding, projection and
                lengths are means over the views.
            seed: of the views: those of image i are a function of seed, i and its size.
            batch_size: images at a time, at least 1; with several views, views at a time.

        Returns:
            The encoding of every image in order; of no image, if none is given.

        Raises:
            InputError: an image cannot be read, numbers out of range, tensors of another kind, or
                outputs that are not finite.
        """
        found = self.stream(images, views=views, seed=seed, batch_size=batch_size, skipped=_refuse)
        parts = [part for _, part in found]
        return Encoding.joined(
            parts
            or [self._forward(torch.empty(0, self.config.decode.channels, self.size, self.size))]
        )

    def stream(
        self,
        images: Images | Tensor,
        *,
        views: int | None = None,
        seed: int = 0,
        batch_size: int = 256,
        skipped: Callable[[Unreadable], object] | None = None,
    ) -> Iterator[tuple[Tensor, Encoding]]:
        """Encode images batch by batch, for folders that do not fit into memory.

        Files are decoded in threads while the network computes. At most three batches of views
        (with `views` three times 64 whole images) are in memory, and nothing is kept on disk.

        Args:
            images, views, seed, batch_size: as for `encode`.
            skipped: called with every image that cannot be read and is left out, a list's `append`,
                say; None to warn of it.

        Yields:
            (B,) int64, the numbers of these images, ascending, and their encoding.

        Raises:
            InputError: as for `encode`, but for images that cannot be read.
        """
        for name, number in (("batch_size", batch_size), ("views", 1 if views is None else views)):
            if not isinstance(number, int) or number < 1:
                raise InputError(f"{name}: {number!r} must be an integer of at least 1")
        if isinstance(images, Tensor) and images.is_floating_point():
            if views is not None:
                raise InputError(
                    "views: random views are drawn of images; a float tensor holds views already"
                )
            return self._of_views(images, batch_size)
        source = open_images(images, self.config.decode)  # type: ignore[arg-type]
        channels, fits = source.decode.channels, self.config.decode.channels
        require("channels", channels, channels == fits, f"{fits} in {source.name}, as the run's")
        for note in source.notes:
            warnings.warn(note, ImageWarning, stacklevel=2)
        report = _warn if skipped is None else skipped
        return self._of_images(source, views, seed, batch_size, report)

    def _of_views(self, images: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Encoding]]:
        count = self.config.decode.channels
        if images.ndim not in (4, 5) or images.shape[-3] != count or 0 in images.shape[1:]:
            raise InputError(
                f"images: shape {tuple(images.shape)} given; accepted are (N, {count}, H, W) and "
                f"(N, V, {count}, h, w) of normalised views, or uint8 (N, {count}, H, W)"
            )
        several = images if images.ndim == 5 else images.unsqueeze(1)
        step = max(1, batch_size // several.shape[1])
        for start in range(0, len(several), step):
            encoding = self._joined_views(several[start : start + step], batch_size)
            indices = range(start, start + len(encoding))
            yield _numbered(encoding, indices, "image {}".format)

    def _of_images(
        self,
        source: ImageSource,
        views: int | None,
        seed: int,
        batch_size: int,
        skipped: Callable[[Unreadable], object],
    ) -> Iterator[tuple[Tensor, Encoding]]:
        # Threads run Pillow's part of the view; the device normalises a whole batch. Whole images
        # are kept until they are cropped, hence fewer at a time.
        square, finish = eval_square(self.size), normalised(self.config.augment.constants)
        step = batch_size if views is None else min(max(1, batch_size // views), _MOST_WHOLE)

        def prepare(image: Image.Image | Pixels) -> Pixels:
            return np.asarray(square(image) if views is None else image)

        for chunk in read(source, prepare, chunk=step, threads=max(1, self.run.workers)):
            for entry in chunk.unreadable:
                skipped(entry)
            if not chunk.indices:
                continue
            if views is None:
                pixels = torch.from_numpy(np.stack(chunk.pixels)).permute(0, 3, 1, 2)
                encoding = self._forward(finish(pixels.to(self.device)))
            else:
                drawn = random_views(
                    chunk.pixels,
                    np.array(chunk.indices),
                    self.config.augment,
                    views=views,
                    seed=seed,
                    device=self.device,
                    later_epochs=True,
                )
                encoding = self._joined_views(drawn.transpose(0, 1), batch_size)
            yield _numbered(encoding, chunk.indices, source.describe)

    def _joined_views(self, images: Tensor, batch_size: int) -> Encoding:
        """The encoding of (B, V, 3, h, w), the V views of every image joined."""
        count, views = images.shape[:2]
        parts = images.flatten(0, 1).split(batch_size)
        each = Encoding.joined([self._forward(part) for part in parts])
        if views == 1:
            return each
        shape = (count, views)
        embedding, projection, loc_norm = (
            column.unflatten(0, shape).mean(1)
            for column in (each.embedding, each.projection, each.loc_norm)
        )
        loc = each.loc.unflatten(0, shape)
        if each.concentration is None:
            joined, concentration = F.normalize(loc.sum(1), dim=-1), None
        else:
            joined, concentration = product_of_experts(loc, each.concentration.unflatten(0, shape))
        norms = {name: norm.unflatten(0, shape).mean(1) for name, norm in each.layer_norms.items()}
        return Encoding(embedding, projection, joined, loc_norm, concentration, norms)

    def _forward(self, views: Tensor) -> Encoding:
        """The encoding of normalised views (B, 3, h, w)."""
        views = views.to(self.device, torch.float32)
        with evaluating(self.model, self.device), recorded(self.model.backbone) as norms:
            columns = self.model.encode(views)
        found: list[Any] = [None if each is None else each.float().cpu() for each in columns]
        found.append({name: each.float().cpu() for name, each in norms.items()})
        return Encoding(*found)


def load(
    run_folder: str | Path,
    device: str = "auto",
    *,
    workers: int | None = None,
    checkpoint: Weights = "last",
) -> Encoder:
    """Open a trained run to encode images: ``vi_simsiam.load(RUN).encode(images).uncertainty``.

    The data set that it was trained on is not opened and may be gone: `run.splits` has no images.

    Args:
        run_folder: the folder that training wrote.
        device: "auto" (the GPU where there is one), "cpu", "cuda" or "cuda:N".
        workers: threads that read images; None for a number that suits the device.
        checkpoint: "last", or "best" for the weights with the best kNN accuracy during training.

    Raises:
        InputError: no run there, a damaged file, or no such device.
    """
    path = user_path("run_folder", run_folder)
    chosen = resolve_device(device)
    config, model, step, steps = load_model(path, chosen, checkpoint)
    config = placed(path, config, data=config.data)  # a name only: no image is opened
    splits = Splits(config.data, FileSource((), name=config.data), None)
    threads = resolve_workers(workers, chosen)
    return Encoder(Run(path, config, model, splits, chosen, threads, step, steps, checkpoint))


def _numbered(
    encoding: Encoding, indices: Sequence[int], describe: Callable[[int], str]
) -> tuple[Tensor, Encoding]:
    """The numbers of images (B,) int64, and their encoding, if all of it is finite."""
    *columns, norms = vars(encoding).values()
    for column in (*columns, *norms.values()):
        if column is not None and not torch.isfinite(column).all():
            row = int((~torch.isfinite(column.reshape(len(column), -1))).any(1).nonzero()[0])
            raise InputError(
                f"images: the model's outputs for {describe(indices[row])} are not finite; the "
                "image's values or the run's weights are damaged"
            )
    return torch.tensor(indices, dtype=torch.int64, device="cpu"), encoding


def _refuse(entry: Unreadable) -> NoReturn:
    raise UnreadableError(*entry)


def _warn(entry: Unreadable) -> None:
    warnings.warn(f"skipped: {entry.path} ({entry.reason})", ImageWarning, stacklevel=3)
