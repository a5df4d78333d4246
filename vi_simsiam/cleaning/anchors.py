"""Images without content: one colour, noise, or a blur that leaves no detail."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vi_simsiam.data.channels import Pixels, resized
from vi_simsiam.data.sources import ArraySource, ImageSource
from vi_simsiam.engine.forward import nearest
from vi_simsiam.inference.encoder import Encoder

_EACH = 16  # anchors of a kind
_BLURRED_TO = 3  # pixels a side that are left of a blurred image


def anchors(source: ImageSource, indices: NDArray[np.int64], side: int, *, seed: int = 0) -> Pixels:
    """Draw images without content: flat ones, noise, and blurred images of the source.

    Args:
        source: gives channels and bits, and the images that are blurred.
        indices: (N,) numbers of readable images, N >= 1.
        side: of the anchors in pixels.
        seed: of the draws.

    Returns:
        (M, side, side, C) of the source's type.
    """
    generator = np.random.default_rng(seed)
    decode = source.decode
    kind = np.uint8 if decode.bits == 8 else np.uint16
    most = float(np.iinfo(kind).max)
    shape = (_EACH, side, side, decode.channels)
    levels = np.linspace(0, 1, _EACH // 2)[:, None].repeat(decode.channels, 1)
    colours = generator.random((_EACH - len(levels), decode.channels))
    flat = np.broadcast_to(np.concatenate([levels, colours])[:, None, None], shape)
    noise = generator.random(shape)
    noise[::2] = noise[::2, ..., :1]  # gray, and in colours
    drawn = [np.rint(values * most).astype(kind) for values in (flat, noise)]
    chosen = generator.choice(indices, min(_EACH, len(indices)), replace=False)
    for index in np.sort(chosen).tolist():
        small = resized(source.array(index), _BLURRED_TO, _BLURRED_TO)
        drawn.append(resized(small, side, side)[None])
    return np.concatenate(drawn)


def anchor_cosines(
    encoder: Encoder, embedding: NDArray[np.float32], drawn: Pixels
) -> NDArray[np.float64]:
    """Largest cosine of each embedding (N, F) to one of the anchors `drawn`, (N,).

    Both are taken from the mean of all embeddings, which those of a network have in common.
    """
    found = encoder.encode(ArraySource(drawn, name="anchors")).embedding
    mean = torch.from_numpy(np.mean(embedding, 0, dtype=np.float64).astype(np.float32))
    cosines = []
    for start in range(0, len(embedding), 4096):
        rows = torch.from_numpy(np.array(embedding[start : start + 4096])) - mean
        for _, values in nearest(
            rows.to(encoder.device), (found - mean).to(encoder.device), 1, device=encoder.device
        ):
            cosines.append(values[:, 0].double().cpu().numpy())
    return np.concatenate(cosines)
