"""References that the project is compared with, and the same views by others.

The others, torchvision v2, lightly and kornia, are used as their users use them. All draw crops,
flips, colour jitter, grayscale and blur from the same policy. Peers on the CPU decode the image
files in DataLoader workers, one for each core; peers on the device start from decoded images in its
memory.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from vi_simsiam.config import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.ops.augment import BLUR_TAPS, ColourOperation, Column
from vi_simsiam.ops.multiview_loss import LossForm

from .harness import synchronize

PEER_PACKAGES = ("torchvision", "lightly", "kornia")

Views = list[Tensor]
_ADJUST = {
    ColourOperation.BRIGHTNESS: (TF.adjust_brightness, Column.BRIGHTNESS),
    ColourOperation.CONTRAST: (TF.adjust_contrast, Column.CONTRAST),
    ColourOperation.SATURATION: (TF.adjust_saturation, Column.SATURATION),
    ColourOperation.HUE: (TF.adjust_hue, Column.HUE),
}


def textbook_loss(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], form: LossForm
) -> Tensor:
    """Algorithm 1 as printed, from lgamma and log(1 + cos): the loss of every sample, (B,).

    It computes in the dtype of the predictions, but at least in float32. The merged form of the
    library is meant to be more accurate. `form` must have a loss scale of 1.
    """
    dtype = torch.promote_types(predictions[0].dtype, torch.float32)
    dim = targets[0].shape[-1]
    b = (dim - 1) / 2
    pairs = [(v, g) for v in range(len(predictions)) for g in range(len(targets)) if v != g]
    target = [F.normalize(z.detach().to(dtype), dim=-1) for z in targets]
    direction = [F.normalize(p[:, :dim].to(dtype), dim=-1) for p in predictions]
    cosine = torch.stack([(direction[v] * target[g]).sum(-1) for v, g in pairs])
    if form.distribution == "cosine":
        return -2 / len(pairs) * cosine.sum(0)
    kappa = torch.stack([_concentration(predictions[v][:, dim].to(dtype), form) for v, _ in pairs])
    uniform = math.lgamma(dim / 2) - math.log(2) - dim / 2 * math.log(math.pi)
    alpha = b + kappa
    log_normaliser = (
        (alpha + b) * math.log(2)
        + torch.lgamma(alpha)
        - torch.lgamma(alpha + b)
        + b * math.log(math.pi)
    )
    log_density = kappa * torch.log1p(cosine) - log_normaliser
    if form.cosine:
        log_density = log_density + form.cosine * cosine
    return -2 / len(pairs) * (log_density - uniform).sum(0)


def _concentration(raw: Tensor, form: LossForm) -> Tensor:
    x = form.gain * raw
    if form.link == "softplus":
        return form.scale * F.softplus(x) + form.minimum
    r = x.clamp(min=0.02)
    return form.scale * (r + r * r / 2) + form.minimum


def torchvision_view(image: Image.Image, row: NDArray[np.int32], size: int) -> Tensor:
    """The view of an image that a row of the parameter table describes, by torchvision.

    Crop, resize with antialias, flip, colour operations in the row's order, grayscale, blur.

    Returns:
        (3, size, size) float32 in [0, 1], not normalised.
    """
    pixels = TF.to_dtype(TF.pil_to_tensor(image), torch.float32, scale=True)
    floats = row.view(np.float32)
    top, left, height, width = (
        int(row[c]) for c in (Column.TOP, Column.LEFT, Column.HEIGHT, Column.WIDTH)
    )
    view: Tensor = TF.resized_crop(pixels, top, left, height, width, [size, size], antialias=True)
    if row[Column.FLIP]:
        view = TF.horizontal_flip(view)
    for operation in colour_operations(row):
        adjust, strength = _ADJUST[operation]
        view = adjust(view, float(floats[strength]))
    if row[Column.GRAY]:
        view = TF.rgb_to_grayscale(view, num_output_channels=3)
    if (sigma := float(floats[Column.SIGMA])) > 0:
        view = TF.gaussian_blur(view, [BLUR_TAPS, BLUR_TAPS], [sigma, sigma])
    return view


def colour_operations(row: NDArray[np.int32]) -> Iterator[ColourOperation]:
    """The colour operations of a row, first to last."""
    packed = int(row[Column.ORDER])
    while packed & 15:
        yield ColourOperation(packed & 15)
        packed >>= 4


@dataclass(frozen=True)
class Provider:
    """A way to make batches of views."""

    sample: Callable[[], tuple[Sequence[Tensor], dict[str, float] | None]]
    """The views of one batch, each (B, 3, size, size), and their error if it can be computed."""
    measure: Callable[[], float]
    """Microseconds a batch."""
    close: Callable[[], None] = lambda: None


def file_provider(
    source: ImageSource,
    transform: Callable[[Any], Views],
    *,
    batch: int,
    device: torch.device,
    workers: int,
    turns: int,
) -> Provider:
    """Image files decoded and augmented by DataLoader workers.

    Every measurement is a whole epoch, so that the workers of one peer rest while another is
    measured. Each worker makes `turns` batches between the first and the last.
    """
    count = batch * (1 + turns * max(workers, 1))
    order = [i % len(source) for i in range(count)]
    steps = [order[start : start + batch] for start in range(0, count, batch)]
    loader: DataLoader[Any] = DataLoader(
        SourceViews(source, transform),
        batch_sampler=steps,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )

    def sample() -> tuple[Views, None]:
        batches = iter(loader)
        views: Views = list(next(batches))
        for _ in batches:  # an epoch that is left early would keep the workers busy
            pass
        return views, None

    return Provider(sample, lambda: seconds_a_batch(iter(loader), device) * 1e6)


def device_provider(
    call: Callable[[Views], Sequence[Tensor]], images: Views, device: torch.device
) -> Provider:
    """Views made on the device of images (3, H, W) uint8 in its memory, all of the same size."""

    def measure() -> float:
        synchronize(device)
        start = time.perf_counter()
        call(images)
        synchronize(device)
        return (time.perf_counter() - start) * 1e6

    return Provider(lambda: (call(images), None), measure)


def seconds_a_batch(batches: Iterator[Sequence[Tensor]], device: torch.device) -> float:
    """Mean seconds between batches, from the first to the last, each copied to `device`."""
    count, start = 0, 0.0
    for views in batches:
        for view in views:
            view.to(device, non_blocking=True)
        if count == 0:
            synchronize(device)
            start = time.perf_counter()
        count += 1
    synchronize(device)
    return (time.perf_counter() - start) / (count - 1)


def _multi_view(
    policy: AugmentConfig, view: Callable[[int, tuple[float, float]], Callable[[Any], Tensor]]
) -> Callable[[Any], Views]:
    """A transform of an image into two global views and the local ones.

    It holds one transform for each view, and worker processes can unpickle it.
    """
    transforms = [view(policy.size, policy.crop_scale) for _ in range(2)]
    for _ in range(policy.local_views):
        transforms.append(view(policy.local_size, policy.local_scale))
    return partial(_apply_all, transforms)


def _apply_all(transforms: Sequence[Callable[[Any], Tensor]], image: Any) -> Views:
    return [transform(image) for transform in transforms]


def torchvision_transform(
    policy: AugmentConfig, *, decoded: bool = False
) -> Callable[[Any], Views]:
    """SimSiam's views with torchvision v2: of PIL images, or of uint8 (3, H, W) if `decoded`."""
    to_float = [*([] if decoded else [v2.PILToTensor()]), v2.ToDtype(torch.float32, scale=True)]
    blur = v2.GaussianBlur(BLUR_TAPS, list(policy.blur_sigma))

    def view(size: int, scale: tuple[float, float]) -> v2.Compose:
        # 8-bit arithmetic, which is faster, as long as possible.
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, policy.crop_ratio, antialias=True),
                v2.RandomHorizontalFlip(policy.flip_prob),
                v2.RandomApply([v2.ColorJitter(*policy.jitter)], policy.jitter_prob),
                v2.RandomGrayscale(policy.grayscale_prob),
                *to_float,
                v2.RandomApply([blur], policy.blur_prob),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    return _multi_view(policy, view)


def lightly_transform(policy: AugmentConfig) -> Callable[[Any], Views]:
    """lightly's SimSiamTransform, and its SwaVTransform where there are local views."""
    transforms = installed("lightly.transforms")
    strengths = zip(("cj_bright", "cj_contrast", "cj_sat", "cj_hue"), policy.jitter, strict=True)
    common = {
        **dict(strengths),
        "cj_prob": policy.jitter_prob,
        "random_gray_scale": policy.grayscale_prob,
        "gaussian_blur": policy.blur_prob,
        "sigmas": policy.blur_sigma,
        "hf_prob": policy.flip_prob,
    }
    if policy.local_views == 0:
        made = transforms.SimSiamTransform(
            input_size=policy.size, min_scale=policy.crop_scale[0], **common
        )
    else:
        made = transforms.SwaVTransform(
            crop_sizes=(policy.size, policy.local_size),
            crop_counts=(2, policy.local_views),
            crop_min_scales=(policy.crop_scale[0], policy.local_scale[0]),
            crop_max_scales=(policy.crop_scale[1], policy.local_scale[1]),
            **common,
        )
    return made  # type: ignore[no-any-return]


def resident_images(paths: Sequence[str], sides: tuple[int, int], device: torch.device) -> Views:
    """Image files decoded and resized to `sides` (height, width), uint8 (3, H, W) on the device."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize(sides[::-1])
        images.append(TF.pil_to_tensor(resized).to(device))
    return images


def torchvision_on_device(policy: AugmentConfig) -> Callable[[Views], Sequence[Tensor]]:
    """torchvision v2 on one tensor of a batch after another: it draws parameters once a call."""
    transform = torchvision_transform(policy, decoded=True)

    def call(images: Views) -> Sequence[Tensor]:
        made = [transform(image) for image in images]
        return [torch.stack(views) for views in zip(*made, strict=True)]

    return call


def kornia_on_device(
    policy: AugmentConfig, device: torch.device
) -> Callable[[Views], Sequence[Tensor]]:
    """kornia on a whole batch: each sample with its own parameters, all drawn at once."""
    augmentation = installed("kornia.augmentation")
    taps = (BLUR_TAPS, BLUR_TAPS)

    def view(size: int, scale: tuple[float, float]) -> nn.Module:
        return nn.Sequential(
            # "resample" crops the whole batch at once, "slice" one sample after another.
            augmentation.RandomResizedCrop(
                (size, size), scale, policy.crop_ratio, cropping_mode="resample"
            ),
            augmentation.RandomHorizontalFlip(p=policy.flip_prob),
            augmentation.ColorJitter(*policy.jitter, p=policy.jitter_prob),
            augmentation.RandomGrayscale(p=policy.grayscale_prob),
            augmentation.RandomGaussianBlur(taps, policy.blur_sigma, p=policy.blur_prob),
            augmentation.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
        ).to(device)

    transform = _multi_view(policy, view)
    return lambda images: transform(torch.stack(images).float() / 255)


class SourceViews(Dataset[Views]):
    """The views of a source's images, as a data set of torch."""

    def __init__(self, source: ImageSource, transform: Callable[[Any], Views]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Views:
        return self.transform(self.source.image(index))


def installed(module: str) -> ModuleType:
    """Import a module of an optional package.

    Raises:
        ImportError: the package is not installed; the message names the command to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"{package} is not installed (pip install 'vi-simsiam[bench]')"
        ) from error
