"""The sets of views that pipelines, steps and whole trainings are measured on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vi_simsiam.config import AugmentConfig
from vi_simsiam.config import policy as named_policy


@dataclass(frozen=True)
class ViewCase:
    """Two global views of `size` pixels and `local_views` of `local_size`, for `batch` images."""

    batch: int
    size: int
    local_views: int = 0
    local_size: int = 0
    sides: tuple[int, int] = (160, 213)
    """Shorter and longer side of generated images, in pixels."""

    @property
    def label(self) -> str:
        """Readable name of the views, such as "2x128+6x64"."""
        local = f"+{self.local_views}x{self.local_size}" if self.local_views else ""
        return f"2x{self.size}{local}"

    @property
    def name(self) -> str:
        """Name of the case in results; unique."""
        return f"{self.label} batch {self.batch}"

    @property
    def views(self) -> int:
        """Views of all images of a batch."""
        return self.batch * (2 + self.local_views)

    @property
    def policy(self) -> AugmentConfig:
        """SimSiam's views, or multi-crop's where there are local ones."""
        if self.local_views == 0:
            return dataclasses.replace(named_policy("simsiam"), size=self.size)
        return dataclasses.replace(
            named_policy("multicrop"),
            size=self.size,
            local_views=self.local_views,
            local_size=self.local_size,
        )


SMALL_IMAGES = ViewCase(64, 32, sides=(32, 32))
"""CIFAR-10's."""

_LARGE = (320, 427)
_FULL = {
    "cuda": tuple(
        case
        for batch in (64, 256)
        for case in (
            ViewCase(batch, 128),
            ViewCase(batch, 224, sides=_LARGE),
            ViewCase(batch, 128, 6, 64),
            ViewCase(batch, 224, 6, 96, _LARGE),
        )
    ),
    "cpu": (SMALL_IMAGES, ViewCase(64, 128, sides=(128, 128))),
}
_TELLING = {"cuda": _FULL["cuda"][:2], "cpu": _FULL["cpu"][:1]}


def view_cases(device_type: str, *, short: bool) -> tuple[ViewCase, ...]:
    """The cases in the order in which they are measured, the telling ones first."""
    return (_TELLING if short else _FULL)[device_type]
