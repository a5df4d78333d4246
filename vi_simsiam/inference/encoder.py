"""A trained run as a function of images: features, projections and predicted distributions."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vi_simsiam.config import TrainConfig
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.sources import FileSource, ImageSource, Unreadable, UnreadableError
from vi_simsiam.data.views import GLOBAL_VIEWS, add_offsets, draw_table, eval_square, normalised
from vi_simsiam.engine.run import Run, load_model, resolve_device, resolve_workers
from vi_simsiam.errors import ImageWarning, InputError
from vi_simsiam.inference.images import Images, open_images, read
from vi_simsiam.inference.product import product_of_experts
from vi_simsiam.models import SimSiam, VISimSiam
from vi_simsiam.ops.augment import augment
from vi_simsiam.paths import user_path
from vi_simsiam.text import counted

_MOST_WHOLE = 64
"""Whole images held at a time, where random crops are made of them."""


@dataclass(frozen=True)
class Encoding:
    """What a model makes of N images; float32 tensors on the CPU."""

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

    def __len__(self) -> int:
        return len(self.embedding)

    def __repr__(self) -> str:
        said = "no concentration"
        if self.concentration is not None:
            said = (
                f"median uncertainty {float(self.uncertainty.median()):.3g}"
                if len(self)
                else "no uncertainty"
            )
        return (
            f"Encoding({counted(len(self), 'image')}: embedding {tuple(self.embedding.shape)}, "
            f"projection and loc {tuple(self.loc.shape)}, {said})"
        )

    @property
    def dim(self) -> int:
        """D, the dimension of the space the mean directions lie in."""
        return self.loc.shape[1]

    @property
    def uncertainty(self) -> Tensor:
        """1 - E[mu.z] = (D - 1)/(kappa + D - 1), (N,) in (0, 1]: 1 where nothing is known, near 0 where z is.

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
        """The images of several encodings (at least one) of the same model, one after the other."""
        concentration = [part.concentration for part in parts if part.concentration is not None]
        return cls(
            torch.cat([part.embedding for part in parts]),
            torch.cat([part.projection for part in parts]),
            torch.cat([part.loc for part in parts]),
            torch.cat([part.loc_norm for part in parts]),
            torch.cat(concentration) if concentration else None,
        )


class Encoder:
    """A trained run as a function of images.

    Images are seen un-augmented, as in evaluation: the shorter side resized to `size` (bicubic), the centre cropped,
    normalised. The network computes in eval mode and float32, without gradient and never under autocast; the batch
    size changes nothing beyond rounding. A GPU's convolutions round their factors to TF32, 10 bits of
    mantissa, where `torch.backends.cudnn.allow_tf32` lets them, which is PyTorch's default.

    Args:
        run: a run, as `engine.run.load_run` opens it; `load` opens one without its data set.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model: SimSiam = run.model
        self.config: TrainConfig = run.config
        self.device = run.device
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
        """Encode images, all of them held in memory; `stream` is for more than that.

        Args:
            images: everything that `inference.images.open_images` takes: an ImageSource, a Dataset, a folder, a file,
                PIL images and paths, uint8 (N, 3, H, W). A float tensor (N, 3, H, W) is taken for views that are
                normalised already (ImageNet mean and standard deviation), of any size, and (N, V, 3, h, w) for V views
                of each image, which are joined as with `views`.
            views: None for the un-augmented view; M to draw M random global views of each image by the run's own
                policy and join them. The distribution is their product of experts (see `product_of_experts`; for
                SimSiam, whose concentration is one constant, the normalised sum); embedding, projection and loc_norm
                are means over the views.
            seed: of the views: those of image i are a function of seed, i and its size.
            batch_size: images at a time, at least 1; with several views, views at a time.

        Returns:
            The encoding of every image in order; of no image, if none is given.

        Raises:
            InputError: an image cannot be read, numbers out of range, tensors of another kind, or outputs that are not
                finite.
        """
        parts = [
            part
            for _, part in self.stream(
                images, views=views, seed=seed, batch_size=batch_size, skipped=_refuse
            )
        ]
        return Encoding.joined(parts) if parts else self._nothing()

    def stream(
        self,
        images: Images | Tensor,
        *,
        views: int | None = None,
        seed: int = 0,
        batch_size: int = 256,
        skipped: Callable[[Unreadable], object] | None = None,
    ) -> Iterator[tuple[Tensor, Encoding]]:
        """Encode images batch by batch: for folders that do not fit into memory.

        Files are decoded in threads while the network computes, three batches of views being held at most (with `views`
        three times 64 whole images), and nothing is kept on disk. Images that cannot be read are left out.

        Args:
            images: as for `encode`.
            views: as for `encode`.
            seed: as for `encode`.
            batch_size: as for `encode`.
            skipped: called with every image that cannot be read, a list's `append`, say; None to warn of it.

        Yields:
            (B,) int64, which images these are, ascending, and their encoding.

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
        for note in source.notes:
            warnings.warn(note, ImageWarning, stacklevel=2)
        told = _warn if skipped is None else skipped
        if views is None:
            return self._of_images(source, batch_size, told)
        return self._of_random_views(source, views, seed, batch_size, told)

    def _of_views(self, images: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Encoding]]:
        if images.ndim not in (4, 5) or images.shape[-3] != 3 or 0 in images.shape[1:]:
            raise InputError(
                f"images: shape {tuple(images.shape)} given; accepted are (N, 3, H, W) and (N, V, 3, h, w) of "
                "normalised views, or uint8 (N, 3, H, W)"
            )
        several = images if images.ndim == 5 else images.unsqueeze(1)
        step = max(1, batch_size // several.shape[1])
        for start in range(0, len(several), step):
            indices = torch.arange(start, min(start + step, len(several)), device="cpu")
            encoding = self._joined_views(several[start : start + step], batch_size)
            yield indices, _finite(encoding, [f"image {i}" for i in indices.tolist()].__getitem__)

    def _of_images(
        self, source: ImageSource, batch_size: int, skipped: Callable[[Unreadable], object]
    ) -> Iterator[tuple[Tensor, Encoding]]:
        # Threads do what Pillow does; the arithmetic on floats is done for a batch at once, on the device.
        square, finish = eval_square(self.size), normalised()

        def prepare(image: Image.Image) -> NDArray[np.uint8]:
            return np.asarray(square(image))

        for chunk in read(source, prepare, chunk=batch_size, threads=self._threads):
            for entry in chunk.unreadable:
                skipped(entry)
            if chunk.indices:
                pixels = torch.from_numpy(np.stack(chunk.pixels)).permute(0, 3, 1, 2)
                encoding = self._forward(finish(pixels.to(self.device)))
                yield _indices(chunk.indices), _finite(encoding, _places(source, chunk.indices))

    def _of_random_views(
        self,
        source: ImageSource,
        views: int,
        seed: int,
        batch_size: int,
        skipped: Callable[[Unreadable], object],
    ) -> Iterator[tuple[Tensor, Encoding]]:
        # Whole images are kept until they are cropped, hence fewer at a time.
        step = min(max(1, batch_size // views), _MOST_WHOLE)
        for chunk in read(source, np.asarray, chunk=step, threads=self._threads):
            for entry in chunk.unreadable:
                skipped(entry)
            if chunk.indices:
                drawn = self._random_views(chunk.pixels, chunk.indices, views, seed)
                encoding = self._joined_views(drawn, batch_size)
                yield _indices(chunk.indices), _finite(encoding, _places(source, chunk.indices))

    def _random_views(
        self, images: list[NDArray[np.uint8]], indices: list[int], views: int, seed: int
    ) -> Tensor:
        """`views` random global views of images, (B, views, 3, size, size) on the device."""
        policy = dataclasses.replace(self.config.augment, local_views=0)
        heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
        # Training draws two global views in an epoch; further ones are those of the epochs after it.
        tables = [
            draw_table(
                policy,
                seed=seed,
                epoch=epoch,
                samples=np.array(indices),
                heights=heights,
                widths=widths,
            )
            for epoch in range(math.ceil(views / GLOBAL_VIEWS))
        ]
        table = np.concatenate(tables)[:views]
        flat = [image.reshape(-1) for image in images]
        add_offsets(table, np.cumsum([0, *(len(pixels) for pixels in flat[:-1])]))
        pixels = torch.from_numpy(np.concatenate(flat)).to(self.device)
        return augment(pixels, torch.from_numpy(table).to(self.device), self.size).transpose(0, 1)

    def _joined_views(self, images: Tensor, batch_size: int) -> Encoding:
        """The encoding of (B, V, 3, h, w), the V views of every image joined."""
        count, views = images.shape[:2]
        each = Encoding.joined(
            [self._forward(part) for part in images.flatten(0, 1).split(batch_size)]
        )
        if views == 1:
            return each
        loc = each.loc.unflatten(0, (count, views))
        if each.concentration is None:
            joined, concentration = F.normalize(loc.sum(1), dim=-1), None
        else:
            joined, concentration = product_of_experts(
                loc, each.concentration.unflatten(0, (count, views))
            )
        means = (
            x.unflatten(0, (count, views)).mean(1)
            for x in (each.embedding, each.projection, each.loc_norm)
        )
        embedding, projection, loc_norm = means
        return Encoding(embedding, projection, joined, loc_norm, concentration)

    @torch.no_grad()
    def _forward(self, views: Tensor) -> Encoding:
        """The encoding of normalised views (B, 3, h, w)."""
        model = self.model
        was_training = model.training
        model.eval()
        try:
            with torch.autocast(self.device.type, enabled=False):
                embedding = model.backbone(views.to(self.device, torch.float32))
                projection = model.projector(embedding)
                prediction = model.predictor(projection)
                direction = prediction[:, : model.dim].float()
                concentration = (
                    model.concentration(prediction) if isinstance(model, VISimSiam) else None
                )
        finally:
            model.train(was_training)
        return Encoding(
            embedding.float().cpu(),
            projection.float().cpu(),
            F.normalize(direction, dim=-1).cpu(),
            torch.linalg.vector_norm(direction, dim=-1).cpu(),
            None if concentration is None else concentration.float().cpu(),
        )

    def _nothing(self) -> Encoding:
        features, dim = self.model.features, self.model.dim
        concentration = torch.empty(0, device="cpu") if isinstance(self.model, VISimSiam) else None
        embedding, projection, loc = (
            torch.empty((0, width), device="cpu") for width in (features, dim, dim)
        )
        return Encoding(embedding, projection, loc, torch.empty(0, device="cpu"), concentration)

    @property
    def _threads(self) -> int:
        return max(1, self.run.workers)


def load(run_folder: str | Path, device: str = "auto", *, workers: int | None = None) -> Encoder:
    """Open a trained run to encode images with it.

    The data set that it was trained on is not opened and may be gone: `run.splits` holds no images.

    Args:
        run_folder: the folder that training wrote.
        device: "auto" (the GPU where there is one), "cpu", "cuda" or "cuda:N".
        workers: threads that read images; None for a number that suits the device.

    Raises:
        InputError: no run there, a damaged file, or no such device.
    """
    path = user_path("run_folder", run_folder)
    place_ = resolve_device(device)
    config, model = load_model(path, place_)
    splits = Splits(config.data, FileSource((), name=config.data), None)
    return Encoder(Run(path, config, model, splits, place_, resolve_workers(workers, place_)))


def _finite(encoding: Encoding, place_of: Callable[[int], str]) -> Encoding:
    """The encoding, if all of it is finite."""
    columns: list[Any] = [getattr(encoding, field.name) for field in dataclasses.fields(encoding)]
    for column in columns:
        if column is not None and not bool(torch.isfinite(column).all()):
            row = int(
                (~torch.isfinite(column.flatten(1) if column.ndim > 1 else column[:, None]))
                .any(1)
                .nonzero()[0]
            )
            raise InputError(
                f"images: the model's outputs for {place_of(row)} are not finite; the image's values or the run's "
                "weights are damaged"
            )
    return encoding


def _places(source: ImageSource, indices: list[int]) -> Callable[[int], str]:
    return lambda row: source.describe(indices[row])


def _indices(indices: list[int]) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device="cpu")


def _refuse(entry: Unreadable) -> NoReturn:
    raise UnreadableError(*entry)


def _warn(entry: Unreadable) -> None:
    warnings.warn(f"skipped: {entry.path} ({entry.reason})", ImageWarning, stacklevel=4)
