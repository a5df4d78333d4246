"""How others make the same views: torchvision v2, lightly and kornia, used as their users use them.

All draw crops, flips, colour jitter, grayscale and blur from the same policy. Peers on the CPU decode the image files in
DataLoader workers, one for each core; peers on the device start from decoded images that already lie there.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from vi_simsiam.config import AugmentConfig
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.ops.augment import BLUR_TAPS, IMAGENET_MEAN, IMAGENET_STD

PEER_PACKAGES = ("torchvision", "lightly", "kornia")

Views = list[Tensor]


class MultiView:
    """Every view's own transform, applied to the same image; it can be sent to worker processes."""

    def __init__(self, transforms: Sequence[Callable[[Any], Tensor]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Views:
        """The views of an image, in order."""
        return [transform(image) for transform in self.transforms]


class LoaderPeer:
    """Image files decoded and augmented by DataLoader workers.

    The workers of one peer rest while another is measured: every measurement is an epoch of its own, timed from its
    first batch to its last. Between those each worker makes the same number of batches.

    Args:
        source: images; files are decoded whenever they are asked for.
        transform: a PIL image in, its views out.
        batch: images of a batch.
        device: where the views are wanted.
        workers: processes; 0 to work in this one.
        seconds: about how long a measurement may take.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Any], Views],
        *,
        batch: int,
        device: torch.device,
        workers: int,
        seconds: float,
    ) -> None:
        self.device, self.seconds = device, seconds
        self._turns = max(workers, 1)
        self._steps = _Steps(len(source), batch, self._turns + 1)
        self._loader: DataLoader[Any] | None = DataLoader(
            SourceViews(source, transform),
            batch_sampler=self._steps,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        self._calibrated = False

    def sample(self) -> Views:
        """The views of one batch."""
        batches = iter(self._loader or ())
        views: Views = list(next(batches))
        for _ in batches:  # an epoch that is left early would keep the workers busy
            pass
        return views

    def measure(self) -> float:
        """Microseconds a batch."""
        if not self._calibrated:
            once = self._epoch()
            self._steps.batches = 1 + self._turns * max(
                1, round(self.seconds / (once * self._turns))
            )
            self._calibrated = True
        return self._epoch() * 1e6

    def close(self) -> None:
        """End the workers."""
        self._loader = None

    def _epoch(self) -> float:
        """Seconds a batch of one epoch."""
        return seconds_a_batch(iter(self._loader or ()), self.device)


def seconds_a_batch(batches: Iterator[Sequence[Tensor]], device: torch.device) -> float:
    """Seconds between the first and the last batch over the batches between, all of them brought to `device`."""
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


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def torchvision_transform(policy: AugmentConfig, *, decoded: bool = False) -> MultiView:
    """SimSiam's views with torchvision v2: of PIL images, or of uint8 tensors (3, H, W) if `decoded`."""
    to_float = [*([] if decoded else [v2.PILToTensor()]), v2.ToDtype(torch.float32, scale=True)]

    def view(size: int, scale: tuple[float, float]) -> v2.Compose:
        # 8-bit arithmetic as long as possible: it is the faster one.
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, policy.crop_ratio, antialias=True),
                v2.RandomHorizontalFlip(policy.flip_prob),
                v2.RandomApply([v2.ColorJitter(*policy.jitter)], policy.jitter_prob),
                v2.RandomGrayscale(policy.grayscale_prob),
                *to_float,
                v2.RandomApply(
                    [v2.GaussianBlur(BLUR_TAPS, list(policy.blur_sigma))], policy.blur_prob
                ),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    return MultiView(_for_each_view(policy, view))


def lightly_transform(policy: AugmentConfig) -> Callable[[Any], Views]:
    """lightly's SimSiamTransform, and its SwaVTransform where there are local views."""
    transforms = installed("lightly.transforms")
    brightness, contrast, saturation, hue = policy.jitter
    common = {
        "cj_prob": policy.jitter_prob,
        "cj_bright": brightness,
        "cj_contrast": contrast,
        "cj_sat": saturation,
        "cj_hue": hue,
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


def _kornia_views(policy: AugmentConfig) -> list[nn.Module]:
    """A module for every view, of batches (B, 3, H, W) float in [0, 1]."""
    augmentation = installed("kornia.augmentation")

    def view(size: int, scale: tuple[float, float]) -> nn.Module:
        return nn.Sequential(
            # "resample" crops the whole batch at once, "slice" sample by sample.
            augmentation.RandomResizedCrop(
                (size, size), scale, policy.crop_ratio, cropping_mode="resample"
            ),
            augmentation.RandomHorizontalFlip(p=policy.flip_prob),
            augmentation.ColorJitter(*policy.jitter, p=policy.jitter_prob),
            augmentation.RandomGrayscale(p=policy.grayscale_prob),
            augmentation.RandomGaussianBlur(
                (BLUR_TAPS, BLUR_TAPS), policy.blur_sigma, p=policy.blur_prob
            ),
            augmentation.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
        )

    return _for_each_view(policy, view)


class DevicePeer:
    """Views made on the device of images that lie there decoded, all of the same size.

    Args:
        call: images (3, H, W) uint8 in, batches of views out.
        images: on the device.
        device: where they are.
    """

    def __init__(
        self,
        call: Callable[[list[Tensor]], Sequence[Tensor]],
        images: list[Tensor],
        device: torch.device,
    ) -> None:
        self.call, self.images, self.device = call, images, device

    def sample(self) -> Sequence[Tensor]:
        """The views of the batch."""
        return self.call(self.images)

    def measure(self) -> float:
        """Microseconds a batch."""
        synchronize(self.device)
        start = time.perf_counter()
        self.call(self.images)
        synchronize(self.device)
        return (time.perf_counter() - start) * 1e6

    def close(self) -> None:
        """Give back the images."""
        self.images = []


def resident_images(
    paths: Sequence[str], sides: tuple[int, int], device: torch.device
) -> list[Tensor]:
    """Image files decoded and resized to `sides` (height, width), uint8 (3, H, W) on the device."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize(sides[::-1])
        images.append(v2.functional.pil_to_tensor(resized).to(device))
    return images


def torchvision_on_device(policy: AugmentConfig) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """torchvision v2 on the tensors of a batch, one after the other: its parameters are drawn once a call."""
    transform = torchvision_transform(policy, decoded=True)

    def call(images: list[Tensor]) -> Sequence[Tensor]:
        made = [transform(image) for image in images]
        return [torch.stack(views) for views in zip(*made, strict=True)]

    return call


def kornia_on_device(
    policy: AugmentConfig, device: torch.device
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """kornia on a whole batch: each sample with its own parameters, which are drawn for all at once."""
    transform = MultiView([view.to(device) for view in _kornia_views(policy)])

    def call(images: list[Tensor]) -> Sequence[Tensor]:
        return transform(torch.stack(images).float() / 255)

    return call


class SourceViews(Dataset[Views]):
    """The views of a source's images, as a data set of torch."""

    def __init__(self, source: ImageSource, transform: Callable[[Any], Views]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Views:
        return self.transform(self.source.image(index))


class _Steps(Sampler[list[int]]):
    """Batches of indices, as many as wanted; they start again at the first image where the images end."""

    def __init__(self, images: int, batch: int, batches: int) -> None:
        self.images, self.batch, self.batches = images, batch, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.batches):
            yield [(step * self.batch + i) % self.images for i in range(self.batch)]


def _for_each_view(
    policy: AugmentConfig, view: Callable[[int, tuple[float, float]], Any]
) -> list[Any]:
    """Two global views, then the local ones."""
    makers = [partial(view, policy.size, policy.crop_scale)] * 2
    makers += [partial(view, policy.local_size, policy.local_scale)] * policy.local_views
    return [make() for make in makers]


def installed(module: str) -> ModuleType:
    """An optional package's module.

    Raises:
        ImportError: the package is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"{package} is not installed (pip install 'vi-simsiam[bench]')"
        ) from error
