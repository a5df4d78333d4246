"""Any map-style Dataset as a source of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vi_simsiam.config import DecodeConfig
from vi_simsiam.data.channels import Pixels, as_stored, of_pillow, picture
from vi_simsiam.data.pixels import to_rgb
from vi_simsiam.data.sources import ImageSource, UnreadableError, one_line_of
from vi_simsiam.errors import InputError


class DatasetSource(ImageSource):
    """The images of any map-style torch Dataset, without labels.

    An item is an image or a tuple or list that begins with one. An image is a PIL image, a uint8
    numpy array (H, W), (H, W, 1) or (H, W, 3), or a uint8 torch tensor (1, H, W) or (3, H, W); with
    other channels or bits in `decode`, arrays (H, W, C) and tensors (C, H, W) of uint8 or uint16.
    Random transforms belong after this.

    Raises:
        InputError: the data set has no length or no items by number.
    """

    def __init__(
        self, dataset: Dataset[Any], name: str | None = None, decode: DecodeConfig | None = None
    ) -> None:
        self.decode = decode or DecodeConfig()
        self.name = type(dataset).__name__ if name is None else name
        self.labels = self.classes = None
        self.dataset = dataset
        try:
            if isinstance(dataset, (str, bytes)) or not hasattr(dataset, "__getitem__"):
                raise TypeError
            self._count = len(dataset)  # type: ignore[arg-type]
        except TypeError as error:
            raise InputError(
                f"source: {type(dataset).__name__} must be an ImageSource or a map-style Dataset, "
                "with a length and items by number "
                "(vi_simsiam.data.datasets.open_dataset opens data sets by name)"
            ) from error

    def __len__(self) -> int:
        return self._count

    def image(self, index: int) -> Image.Image:
        """Return item `index` in mode RGB.

        Raises:
            InputError: the item is of another kind.
            UnreadableError: the data set or decoding raises an exception.
        """
        if not self.decode.is_rgb:
            return picture(self.array(index))
        image = self._item(index, to_rgb)
        if isinstance(image, Image.Image):
            return image
        pixels: Any = None
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
            pixels = image.permute(1, 2, 0).cpu().numpy()
        elif isinstance(image, np.ndarray) and image.dtype == np.uint8:
            pixels = image[:, :, None] if image.ndim == 2 else image
        if pixels is None or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
            given = type(image).__name__
            if isinstance(image, (Tensor, np.ndarray)):
                given += f" of {image.dtype}, shape {tuple(image.shape)}"
            raise InputError(
                f"{self.describe(index)}: {given} must be a PIL image, a uint8 numpy array (H, W) "
                "or (H, W, 3), a uint8 torch tensor (3, H, W), or a tuple that begins with one of "
                "these"
            )
        pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
        return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")

    def array(self, index: int) -> Pixels:
        """Return the pixels of item `index`; raises as `image`."""
        if self.decode.is_rgb:
            return super().array(index)
        found = self._item(index, of_pillow)
        if isinstance(found, Tensor):
            found = found.movedim(0, -1).cpu().numpy() if found.ndim == 3 else found.cpu().numpy()
        if not isinstance(found, np.ndarray):
            raise InputError(
                f"{self.describe(index)}: {type(found).__name__} must be a PIL image, a numpy "
                "array (H, W, C) or a torch tensor (C, H, W) of uint8 or uint16"
            )
        try:
            return as_stored(found, self.decode)
        except ValueError as error:
            raise UnreadableError(self.describe(index), str(error)) from error

    def _item(self, index: int, read: Callable[[Image.Image, DecodeConfig], Any]) -> Any:
        """The image of an item; one of Pillow is passed to `read`."""
        try:
            item = self.dataset[index]
            image = item[0] if isinstance(item, (tuple, list)) and item else item
            return read(image, self.decode) if isinstance(image, Image.Image) else image
        except Exception as error:
            reason = one_line_of(error)
            if read is to_rgb or not isinstance(error, ValueError):
                reason = f"{type(error).__name__}: {reason}"
            raise UnreadableError(self.describe(index), reason) from error


def as_source(
    images: ImageSource | Dataset[Any], decode: DecodeConfig | None = None
) -> ImageSource:
    """Return a source as it is, a map-style Dataset as a DatasetSource; else raise InputError."""
    return images if isinstance(images, ImageSource) else DatasetSource(images, decode=decode)
