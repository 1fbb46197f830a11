"""Texts and lists that are cut: never longer than asked, and whole where they fit."""

from __future__ import annotations

import pytest

from ptconvert.heal.needs import _millions
from ptconvert.shorten import clipped, counted, few, without_middle


@pytest.mark.parametrize("length", [0, 5, 29, 30, 31, 32, 200])
def test_cut_texts_fit_and_others_are_whole(length: int) -> None:
    text = ("0123456789" * 20)[:length]
    for cut, ends in ((clipped, ("01234", "…")), (without_middle, ("01234", text[-5:]))):
        found = cut(text, 30)
        assert len(found) <= 30 and (found == text) == (length <= 30)
        if length > 30:
            assert found.startswith(ends[0]) and found.endswith(ends[1]) and "…" in found


def test_a_list_says_how_many_it_leaves_out() -> None:
    assert few(["a", "b", "c"]) == "a, b, c" and few([]) == ""
    assert few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert few(range(9), 1) == "0 and 8 more"
    assert few(["x is y", "z is w"], joint="; ") == "x is y; z is w"


def test_what_is_counted_agrees_with_its_number() -> None:
    assert counted(1, "rank") == "1 rank" and counted(0, "rank") == "0 ranks"
    assert counted(1, "pass", "passes") == "1 pass" and counted(2, "pass", "passes") == "2 passes"
    assert counted(65_536, "window") == "65,536 windows"


def test_weights_are_told_in_millions_with_digits_that_say_something() -> None:
    assert [_millions(n) for n in (12_345, 8.03e9, 1.5e6)] == ["0.0123 M", "8,030 M", "1.5 M"]
