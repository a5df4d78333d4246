"""Words that many messages share."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: "1 image", "8,000 images", "0 images".

    Args:
        count: how many, at least 0.
        noun: the singular, with its adjectives if it has any ("unreadable image").
        plural: the plural where it is not the noun and an s ("classes").
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
