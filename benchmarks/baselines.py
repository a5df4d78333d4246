"""References that the project's results are compared with, here and in the tests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from vi_simsiam.ops.augment import BLUR_TAPS, ColourOperation, Column
from vi_simsiam.ops.multiview_loss import LossForm

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
