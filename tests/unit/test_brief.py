"""Short forms of many things and of long texts in messages."""

from __future__ import annotations

from admtrt.brief import FEW, beginning, few, listed


def test_the_first_few_are_named_and_the_rest_counted() -> None:
    assert listed(range(FEW)) == "0, 1, 2, 3, 4"
    assert listed(range(FEW + 3)) == "0, 1, 2, 3, 4, and 3 more"
    assert listed("abc", 2, separator="; ") == "a; b; and 1 more"
    assert few(iter("abc"), 1) == ["a", "and 2 more"]
    assert listed(()) == ""


def test_the_beginning_is_as_long_as_was_asked() -> None:
    assert beginning("a" * 60, 60) == "a" * 60
    assert beginning("a" * 61, 60) == "a" * 57 + "..."
