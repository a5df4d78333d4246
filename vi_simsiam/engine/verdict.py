"""The verdict on a training, in one line."""

from __future__ import annotations

from vi_simsiam.config import TrainConfig

COLLAPSE_THRESHOLD = 0.3
"""z-std * sqrt(D) is 1 for directions spread evenly over the sphere and 0 when all images map to one point."""
_NEAR_ZERO = 0.1
# Weight of the cosine in the gradient: 1 for SimSiam, near 0.05 for VI-SimSiam at the start.
_LEAST_WEIGHT = 0.02


def verdict(config: TrainConfig, metrics: dict[str, float]) -> str:
    """Judge whether a run learned, with the figure that this rests on and what to try where it did not.

    - dead: the representations have collapsed to one point, or kappa is so small that the loss hardly has a gradient:
      that of -kappa log(1 + c) is kappa / (1 + c), so that kappa times the loss's factor is the weight that SimSiam's
      cosine has.
    - barely: predictions and targets are still at right angles.
    - learned: neither. What the features are worth is for `vi-simsiam evaluate` to measure.

    Args:
        config: of the run.
        metrics: of its last steps; the keys cosine and z_std are read, and kappa if it is there.
    """
    cosine, spread, kappa = round(metrics["cosine"], 2) + 0.0, metrics["z_std"], metrics.get("kappa")  # no -0.00
    if config.frozen_run is not None:
        return f"kappa fitted: kappa/(D-1) {kappa:.3g} at a mean cosine of {cosine:.2f}"
    if spread < COLLAPSE_THRESHOLD:
        return (
            f"dead: z-std {spread:.2f}, all images are mapped to nearly one point (1 is an even spread); "
            f"try a smaller --lr than {config.lr:g} or a longer --warmup-epochs"
        )
    if kappa is not None and config.loss.concentration != "detached":
        scale = 1 / (config.model.dim - 1) if config.loss.loss_scale is None else config.loss.loss_scale
        if (weight := kappa * (config.model.dim - 1) * scale) < _LEAST_WEIGHT:
            return (
                f"dead: kappa/(D-1) {kappa:.2g}, the loss has {weight:.1%} of the gradient of SimSiam's; "
                f"try --clip-norm 1, a smaller --lr than {config.lr:g}, or another --seed"
            )
    if cosine < _NEAR_ZERO:
        milder = "" if config.augment.crop_scale[0] >= 0.5 else ", or --crop-scale 0.5 1 for milder views"
        return (
            f"barely learned: cosine {cosine:.2f}, two views of an image are predicted hardly better than by chance (0); "
            f"try more --epochs than {config.epochs}{milder}"
        )
    return f"learned: cosine {cosine:.2f} between the views of an image, z-std {spread:.2f} (1: spread evenly, 0: collapsed)"
