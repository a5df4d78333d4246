"""Pictures of images side by side: with the random views of a policy, or with captions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vi_simsiam.checks import require
from vi_simsiam.config import AugmentConfig, DecodeConfig
from vi_simsiam.data.channels import Pixels, picture
from vi_simsiam.data.pixels import loss_lines, losses
from vi_simsiam.data.sources import ImageSource, Unreadable, UnreadableError, left_out
from vi_simsiam.data.views import GLOBAL_VIEWS, draw_table, layout_of
from vi_simsiam.errors import ImageWarning, InputError
from vi_simsiam.ops.augment import eager_augment
from vi_simsiam.text import counted

_GAP = 4
_BACKGROUND = (255, 255, 255)
_INK = (36, 41, 47)
_MUTED = (87, 96, 106)
_THUMBNAIL = 112
_MARGIN = 12
_COLUMNS = 8


def contact_sheet(
    source: ImageSource, policy: AugmentConfig, *, images: int = 8, seed: int = 0
) -> Image.Image:
    """Draw one row for each image: the original in a global view's square, then all its views.

    Images are spread evenly over the source; in place of an unreadable one the next is shown.
    ImageWarnings name unreadable images, and losses in decoding those shown.

    Args:
        source: the images.
        policy: the random views.
        images: number of rows, at least 1; no more than there are readable images.
        seed: of the views. With the image's number it gives the views of the first epoch of
            training, which counts the readable images only.

    Raises:
        InputError: `images` is below 1, or no image can be read.
    """
    require("images", images, images >= 1, "at least 1")
    chosen, failed = _readable(source, min(images, len(source)))
    if not chosen:
        reason = f": {failed[0]}" if failed else ""
        raise InputError(
            f"source: {source.name} has {counted(len(source), 'image')}, but none that can be "
            f"read{reason}"
        )
    pictures = [image for _, image in chosen if isinstance(image, Image.Image)]
    lost = [loss for image in pictures for loss in losses(image)]
    for text in (*([left_out(failed)] if failed else []), *loss_lines(source.name, lost)):
        warnings.warn(text, ImageWarning, stacklevel=2)
    if not source.decode.is_rgb and policy.mean is None:  # any do: they are undone to be shown
        channels = source.decode.channels
        policy = policy.normalised_by(((0.0,) * channels, (1.0,) * channels))
    table = draw_table(
        policy,
        seed=seed,
        epoch=0,
        samples=np.array([index for index, _ in chosen]),
        heights=np.array([np.asarray(image).shape[0] for _, image in chosen]),
        widths=np.array([np.asarray(image).shape[1] for _, image in chosen]),
        pixel_bytes=source.decode.pixel_bytes,
    )
    return view_rows([image for _, image in chosen], table, policy)


def view_rows(
    images: Sequence[Image.Image | Pixels], table: NDArray[np.int32], policy: AugmentConfig
) -> Image.Image:
    """Draw one row for each image: the original, then the views that a table describes.

    Args:
        images: B images in mode RGB, or pixels, which are shown as `data.channels.picture` does.
        table: (V, B, 16), see `draw_table`, without offsets.
        policy: the views' sizes.
    """
    sizes = [policy.size] * GLOBAL_VIEWS + [policy.local_size] * policy.local_views
    cell = policy.size
    width = cell + sum(size + _GAP for size in sizes)
    height = max(sizes)
    sheet = Image.new("RGB", (width, len(images) * (height + _GAP) - _GAP), _BACKGROUND)
    for row, image in enumerate(images):
        top, left = row * (height + _GAP), cell + _GAP
        pixels = np.array(image)
        shown = image if isinstance(image, Image.Image) else picture(image)
        fitted = ImageOps.contain(shown, (cell, cell), Image.Resampling.LANCZOS)
        sheet.paste(fitted, ((cell - fitted.width) // 2, top + (cell - fitted.height) // 2))
        decode = DecodeConfig(channels=pixels.shape[2], bits=8 * pixels.dtype.itemsize)
        layout = layout_of(policy, decode)
        mean, std = map(torch.tensor, policy.constants)
        values = torch.from_numpy(pixels.reshape(-1).view(np.uint8))
        for size, parameters in zip(sizes, table[:, row, None, None], strict=True):
            rows = torch.from_numpy(parameters)
            view = eager_augment(values, rows, size, layout=layout)[0, 0]
            most = 2.0**decode.bits - 1
            levels = (view.permute(1, 2, 0) * std + mean).mul(most).round().clamp(0, most)
            sheet.paste(picture(levels.numpy().astype(pixels.dtype)), (left, top))
            left += size + _GAP
    return sheet


def _readable(
    source: ImageSource, count: int
) -> tuple[list[tuple[int, Image.Image | Pixels]], list[Unreadable]]:
    """Up to `count` numbered images spread evenly over a source, and the unreadable ones met."""
    found: dict[int, Image.Image | Pixels] = {}
    failed: dict[int, Unreadable] = {}
    for first in np.arange(count) * len(source) // count:
        for index in ((int(first) + step) % len(source) for step in range(len(source))):
            if index in found or index in failed:
                continue
            try:
                found[index] = source.content(index)
                break
            except UnreadableError as error:
                failed[index] = error.entry
    return sorted(found.items()), list(failed.values())


def thumbnails(groups: Sequence[tuple[str, Sequence[tuple[Image.Image, str]]]]) -> Image.Image:
    """Draw groups of images, each a title and (image in mode RGB, caption) of every image.

    Every image is cut to a square of 112 pixels around its centre; smaller images are enlarged
    without smoothing. There are eight in a row.
    """
    title_font, caption_font = _font("DejaVuSans-Bold", 15), _font("DejaVuSans", 12)
    title_height, caption_height = 28, 20
    columns = min(_COLUMNS, max(len(images) for _, images in groups))
    step, row_height = _THUMBNAIL + _GAP, _THUMBNAIL + caption_height
    # A title may be wider than few images.
    widest = max(int(title_font.getlength(title)) + 1 for title, _ in groups)
    width = max(columns * step - _GAP, widest) + 2 * _MARGIN
    heights = [title_height + -(-len(images) // columns) * row_height for _, images in groups]
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN * (len(groups) + 1)), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for (title, images), height in zip(groups, heights, strict=True):
        draw.text((_MARGIN, top), title, _INK, title_font)
        for number, (image, caption) in enumerate(images):
            row, column = divmod(number, columns)
            place = (_MARGIN + column * step, top + title_height + row * row_height)
            small = min(image.size) < _THUMBNAIL
            method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            sheet.paste(ImageOps.fit(image, (_THUMBNAIL, _THUMBNAIL), method), place)
            middle = (place[0] + _THUMBNAIL // 2, place[1] + _THUMBNAIL + 2)
            draw.text(middle, caption, _MUTED, caption_font, anchor="ma")
        top += height + _MARGIN
    return sheet


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib: Pillow's own has no Greek letters."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    return ImageFont.truetype(str(path), size)
