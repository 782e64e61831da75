"""Averages of the weights."""

from __future__ import annotations

import pytest
import torch

from admtrt.training.ema import Averages


def test_every_rate_follows_its_own_recursion():
    weights = [torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]), torch.tensor([-1.0, 4.0])]
    averages = Averages((0.5, 0.9), {"w": weights[0]})
    expected = {0.5: weights[0].double(), 0.9: weights[0].double()}
    for step, weight in enumerate(weights[1:]):
        averages.update({"w": weight}, step)
        expected = {rate: rate * value + (1 - rate) * weight for rate, value in expected.items()}
    for rate, value in expected.items():
        torch.testing.assert_close(averages.states[rate]["w"], value.float(), rtol=1e-6, atol=0)


def test_start_is_a_copy_of_the_weights():
    weight = torch.ones(2)
    averages = Averages((0.9,), {"w": weight})
    weight.zero_()
    assert averages.states[0.9]["w"].tolist() == [1, 1]


def test_averages_of_half_precision_weights_are_float32():
    averages = Averages((0.999,), {"w": torch.ones(1, dtype=torch.bfloat16)})
    averages.update({"w": torch.zeros(1, dtype=torch.bfloat16)}, 0)
    assert averages.states[0.999]["w"].dtype == torch.float32
    # bfloat16 would have rounded this to 1.
    assert abs(averages.states[0.999]["w"].item() - 0.999) < 1e-6


def test_load_replaces_one_average_bit_for_bit():
    averages = Averages((0.5, 0.9), {"w": torch.zeros(2)})
    saved = torch.tensor([0.1, 0.2])
    averages.load(0.9, {"w": saved})
    assert torch.equal(averages.states[0.9]["w"], saved)
    assert averages.states[0.5]["w"].tolist() == [0, 0]


def test_a_process_without_rates_keeps_nothing():
    averages = Averages((), {"w": torch.zeros(2)})
    averages.update({"w": torch.ones(2)}, 0)
    assert averages.states == {}


def test_averages_warm_up():
    """After steps at rates 0.1 and 2/11 hardly anything of the first weights is left."""
    state = {"w": torch.zeros(3)}
    warm, cold = Averages((0.9,), state, warmup=True), Averages((0.9,), state)
    for step in (0, 1):
        for averages in (warm, cold):
            averages.update({"w": torch.ones(3)}, step)
    assert warm.states[0.9]["w"].tolist() == pytest.approx([1 - 0.1 * 2 / 11] * 3)
    assert cold.states[0.9]["w"].tolist() == pytest.approx([0.19] * 3)
    warm.update({"w": torch.zeros(3)}, 10_000)
    assert warm.states[0.9]["w"].tolist() == pytest.approx([0.9 * (1 - 0.1 * 2 / 11)] * 3)
