"""Noise: a pure function of seed and step, the same on every machine and in any batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from admtrt.errors import RequestError
from admtrt.runtime.noise import MAX_SEED, check_seed, initial_noise, step_noise

SHAPE = (3, 8, 8)
SEEDS = st.integers(0, MAX_SEED)


@given(st.lists(st.tuples(SEEDS, st.integers(0, 10**6)), min_size=1, max_size=16), st.randoms())
def test_a_row_depends_on_its_own_seed_and_step_alone(rows: list[tuple[int, int]], random: object) -> None:
    seeds, steps = zip(*rows, strict=True)
    together = step_noise(seeds, steps, SHAPE)
    for index, (seed, step) in enumerate(rows):
        np.testing.assert_array_equal(together[index], step_noise([seed], [step], SHAPE)[0])
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = step_noise([seeds[i] for i in order], [steps[i] for i in order], SHAPE)
    np.testing.assert_array_equal(shuffled, together[order])


@given(SEEDS)
def test_the_start_is_no_steps_noise(seed: int) -> None:
    start = initial_noise([seed], SHAPE)
    assert all((start != step_noise([seed], [step], SHAPE)).any() for step in (0, 1, 999))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((0, 0), (0, 1)),
        ((0, 0), (1, 0)),
        ((0, 1), (1, 0)),
        ((2**32, 0), (0, 0)),
        ((MAX_SEED, 5), (2**63 - 1, 5)),
    ],
)
def test_different_seeds_and_steps_are_independent(left: tuple[int, int], right: tuple[int, int]) -> None:
    a, b = (step_noise([seed], [step], (1, 64, 64)).reshape(-1) for seed, step in (left, right))
    # The correlation of 4096 independent pairs has a standard deviation of 1/64.
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / 64


def test_it_is_standard_normal() -> None:
    """One seed over many steps, many seeds at one step, and the start of many."""
    shape = (1, 16, 16)
    draws = {
        "steps": step_noise([7] * 400, range(400), shape),
        "seeds": step_noise(range(400), [3] * 400, shape),
        "start": initial_noise(range(400), shape),
    }
    for name, x in draws.items():
        assert x.dtype == np.float32
        assert x.shape == (400, 1, 16, 16)
        values = x.astype(np.float64).reshape(-1)
        deviation = 1 / np.sqrt(values.size)
        assert abs(values.mean()) < 4 * deviation, name
        assert abs(values.var() - 1) < 4 * np.sqrt(2) * deviation, name
        assert abs((values**3).mean()) < 4 * np.sqrt(15) * deviation, name
        assert abs((values**4).mean() - 3) < 4 * np.sqrt(96) * deviation, name


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (lambda: initial_noise([0], (1, 2, 2)), [0.059911035, 0.015559634, -1.1644385, -0.13264713]),
        (lambda: step_noise([0], [0], (1, 2, 2)), [-1.431463, 1.6707169, -0.40272397, -1.295642]),
        (lambda: step_noise([42], [249], (1, 2, 2)), [1.8984779, 1.3217407, -0.7112505, -0.30985224]),
        (lambda: initial_noise([MAX_SEED], (1, 2, 2)), [-1.7444787, -0.48715827, 1.5449836, -0.9327644]),
    ],
)
def test_the_numbers_of_all_time(drawn: object, expected: list[float]) -> None:
    """A seed names an image. Should numpy ever draw other numbers, seeds would silently name others."""
    assert drawn().reshape(-1).tolist() == np.array(expected, np.float32).tolist()  # type: ignore[operator]


@pytest.mark.parametrize("seed", [0, 1, 2**63, MAX_SEED])
def test_seeds_in_range(seed: int) -> None:
    assert check_seed(seed) == seed
    assert np.isfinite(initial_noise([seed], SHAPE)).all()


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seeds_out_of_range(seed: int) -> None:
    with pytest.raises(RequestError, match=f"seed {seed} is out of range"):
        check_seed(seed)


def test_one_step_for_each_seed() -> None:
    with pytest.raises(ValueError, match="zip"):
        step_noise([1, 2], [0], SHAPE)
