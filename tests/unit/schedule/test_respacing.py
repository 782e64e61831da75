"""Respacing: what is kept, by its properties, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from admtrt.errors import RequestError
from admtrt.schedule.process import retained_timesteps


def test_respacing_keeps_what_is_asked_for() -> None:
    assert retained_timesteps(5, "") == retained_timesteps(5, " ") == (0, 1, 2, 3, 4)
    assert retained_timesteps(1000, "3") == (0, 500, 999)  # 499.5 is rounded to even
    assert retained_timesteps(1000, "ddim4") == (0, 250, 500, 750)
    assert retained_timesteps(10, "2, 3") == (0, 4, 5, 7, 9)
    assert retained_timesteps(7, "2,1") == (0, 3, 4)  # the first sections take what does not divide


@pytest.mark.parametrize(
    ("respacing", "message", "hint"),
    [
        ("many", "'many' is not a positive whole number", "'ddim25'"),
        ("0", "'0' is not a positive", ""),
        ("-5", "'-5' is not a positive", ""),
        ("2.5", "'2.5' is not a positive", ""),
        ("1e2", "'1e2' is not a positive", ""),
        ("nan", "'nan' is not a positive", ""),
        ("٣", "'٣' is not a positive", ""),
        ("9" * 5000, "is not a positive", ""),
        ("10,,10", "'' is not a positive", ""),
        ("ddim", "'' is not a positive", ""),
        ("ddim-3", "'-3' is not a positive", ""),
        ("ddimfoo", "'foo' is not a positive", ""),
        ("1001", "section 1 has 1000 timesteps, which cannot give 1001", "at most 1000"),
        ("300,300,401", "section 3 has 333 timesteps, which cannot give 401", "at most 333"),
        ("ddim300", "no integer stride divides 1000 timesteps into exactly 300", "'ddim334'"),
        ("ddim1001", "no integer stride", "At most 1000 steps are possible: 'ddim1000'."),
        ("ddim7777", "into exactly 7777", "At most 1000 steps are possible"),
        ("1", "keeps 1 of 1000 timesteps", "more steps"),
        ("ddim1", "keeps 1 of 1000 timesteps", "more steps"),
        (",".join("1" * 1001), "1001 sections for 1000 timesteps", ""),
    ],
)
def test_impossible_respacing(respacing: str, message: str, hint: str) -> None:
    with pytest.raises(RequestError) as caught:
        retained_timesteps(1000, respacing)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_what_the_hint_names_is_possible() -> None:
    with pytest.raises(RequestError) as caught:
        retained_timesteps(1000, "ddim300")
    assert len(retained_timesteps(1000, "ddim334")) == 334
    assert len(retained_timesteps(1000, caught.value.hint.split("'")[3])) == 300


@given(steps=st.integers(2, 2000), data=st.data())
def test_sections_keep_their_counts_within_their_bounds(steps: int, data: st.DataObject) -> None:
    sections = data.draw(st.integers(1, min(steps, 6)))
    lengths = [steps // sections + (index < steps % sections) for index in range(sections)]
    counts = [data.draw(st.integers(1, length)) for length in lengths]
    text = ",".join(map(str, counts))
    if sum(counts) < 2:
        return
    retained = retained_timesteps(steps, text)
    assert list(retained) == sorted(set(retained))
    start = 0
    for length, count in zip(lengths, counts, strict=True):
        inside = [t for t in retained if start <= t < start + length]
        assert len(inside) == count
        assert inside[0] == start
        assert count == 1 or inside[-1] == start + length - 1
        gaps = np.diff(inside)
        assert count < 2 or gaps.max() - gaps.min() <= 1  # evenly spaced but for rounding
        start += length
    assert start == steps


@given(steps=st.integers(2, 2000), stride=st.integers(1, 2000))
def test_ddim_respacing_has_an_integer_stride(steps: int, stride: int) -> None:
    count = len(range(0, steps, stride))
    if count < 2:
        return
    retained = retained_timesteps(steps, f"ddim{count}")
    assert len(retained) == count
    assert retained[0] == 0
    assert len(set(np.diff(retained))) == 1
    assert retained[-1] < steps


@given(
    st.integers(2, 3000),
    st.one_of(st.text(max_size=20), st.from_regex(r"\A(ddim)?[0-9]{1,4}(,[0-9]{1,3}){0,4}\Z")),
)
@example(1000, "²")
@example(1000, "ddim²")
@example(1000, "+5")
@example(1000, "1_0")
def test_any_text_is_a_respacing_or_a_request_error(steps: int, text: str) -> None:
    try:
        retained = retained_timesteps(steps, text)
    except RequestError:
        return
    assert len(retained) >= 2
    assert retained[0] >= 0
    assert retained[-1] < steps
    assert list(retained) == sorted(set(retained))
