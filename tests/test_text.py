"""Words of messages."""

from __future__ import annotations

from vi_simsiam.text import counted


def test_a_count_agrees_with_its_noun() -> None:
    found = [counted(count, "unreadable image") for count in (0, 1, 2, 8000)]
    assert found == ["0 unreadable images", "1 unreadable image", "2 unreadable images", "8,000 unreadable images"]


def test_an_irregular_plural_can_be_given() -> None:
    assert [counted(count, "class", "classes") for count in (1, 2)] == ["1 class", "2 classes"]
