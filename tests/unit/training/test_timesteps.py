"""Timestep samplers and the random numbers of a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from admtrt.training.timesteps import (
    HISTORY,
    LossSecondMomentSampler,
    StratifiedSampler,
    Stream,
    UniformSampler,
    draw_noise,
    make_sampler,
    torch_seed,
)


def warm(sampler, losses):
    """Give timestep t the losses of row t."""
    for column in losses.T:
        sampler.record(np.arange(len(column)), column.astype(np.float32))


def test_uniform_reaches_every_timestep_with_weight_one():
    drawn = UniformSampler(10).draw(Stream.TIMESTEPS, 0, 0, 500)
    counts = np.bincount(drawn.levels, minlength=10)
    assert counts.min() > 20
    np.testing.assert_allclose(drawn.weights, 1, rtol=1e-6)


def test_second_moment_is_uniform_until_every_timestep_has_its_history():
    sampler = LossSecondMomentSampler(4)
    losses = np.random.default_rng(0).uniform(0.1, 5, (4, HISTORY))
    warm(sampler, losses[:, :-1])
    sampler.record(np.arange(3), losses[:3, -1].astype(np.float32))
    assert sampler.probabilities().tolist() == [0.25] * 4
    sampler.record(np.array([3]), losses[3:, -1].astype(np.float32))
    assert len(set(sampler.probabilities())) == 4


def test_second_moment_probabilities_are_those_of_the_paper():
    losses = np.random.default_rng(1).uniform(0.1, 5, (4, HISTORY)).astype(np.float32)
    sampler = LossSecondMomentSampler(4)
    warm(sampler, losses)
    moment = np.sqrt((losses.astype(np.float64) ** 2).mean(axis=1))
    np.testing.assert_allclose(sampler.probabilities(), moment / moment.sum() * 0.999 + 0.001 / 4, rtol=1e-12)


def test_only_the_last_losses_count():
    losses = np.random.default_rng(2).uniform(0.1, 5, (3, 2 * HISTORY + 3))
    whole, last = LossSecondMomentSampler(3), LossSecondMomentSampler(3)
    warm(whole, losses)
    warm(last, losses[:, -HISTORY:])
    np.testing.assert_allclose(whole.probabilities(), last.probabilities(), rtol=1e-12)


def test_losses_of_zero_fall_back_to_uniform():
    sampler = LossSecondMomentSampler(2)
    warm(sampler, np.zeros((2, HISTORY)))
    assert sampler.probabilities().tolist() == [0.5, 0.5]


def test_weights_undo_the_bias_of_the_sampler():
    sampler = LossSecondMomentSampler(4)
    warm(sampler, np.array([[1.0], [2.0], [4.0], [8.0]]).repeat(HISTORY, axis=1))
    value = np.array([3.0, -1.0, 0.5, 0.0])
    drawn = sampler.draw(Stream.TIMESTEPS, 0, 0, 20_000)
    timesteps, weights = drawn.levels, drawn.weights
    # The standard error is 0.011: weights are below 4, values of size 1, 20,000 draws.
    assert abs((weights * value[timesteps]).mean() - value.mean()) < 0.05
    assert abs(value[timesteps].mean() - value.mean()) > 0.2


def test_state_goes_on_where_it_stood():
    losses = np.random.default_rng(3).uniform(0.1, 5, (3, HISTORY + 1))
    sampler, resumed = LossSecondMomentSampler(3), LossSecondMomentSampler(3)
    warm(sampler, losses[:, :4])
    resumed.load(sampler.state())
    for each in (sampler, resumed):
        warm(each, losses[:, 4:])
    assert sampler.probabilities().tolist() == resumed.probabilities().tolist()


def test_state_is_a_snapshot():
    sampler = LossSecondMomentSampler(2)
    state = sampler.state()
    sampler.record(np.array([0]), np.array([1.0], dtype=np.float32))
    assert state["counts"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("uniform", UniformSampler),
        ("loss_second_moment", LossSecondMomentSampler),
        ("stratified", StratifiedSampler),
    ],
)
def test_samplers_by_name(name, kind):
    assert type(make_sampler(name, 5)) is kind


def test_stratified_timesteps_spread_over_the_process_in_any_order():
    drawn = [StratifiedSampler(1000).draw(Stream.TIMESTEPS, 0, step, 8) for step in range(500)]
    levels = np.stack([one.levels for one in drawn])
    assert (np.sort(levels, axis=1) // 125 == np.arange(8)).all()
    # Each place in the batch sees the whole process: the standard error of its mean is 13.
    assert (abs(levels.mean(axis=0) - 499.5) < 60).all()
    assert levels.min() < 5
    assert levels.max() > 994
    assert all((one.weights == 1).all() and (one.quartiles == one.levels // 250).all() for one in drawn)
    many = StratifiedSampler(3).draw(Stream.TIMESTEPS, 0, 0, 9).levels
    assert np.bincount(many).tolist() == [3, 3, 3]


def test_timesteps_depend_on_seed_step_and_stream_alone():
    def drawn(stream, seed, step):
        return UniformSampler(1000).draw(stream, seed, step, 16).levels.tolist()

    base = drawn(Stream.TIMESTEPS, 0, 0)
    assert base == drawn(Stream.TIMESTEPS, 0, 0)
    others = [
        drawn(Stream.TIMESTEPS, 1, 0),
        drawn(Stream.TIMESTEPS, 0, 1),
        drawn(Stream.HELD_OUT_TIMESTEPS, 0, 0),
    ]
    assert base not in others


def test_noise_of_a_sample_does_not_depend_on_the_division_of_the_batch():
    whole = draw_noise(Stream.NOISE, 7, 3, np.arange(6), (1, 4, 4))
    odd = draw_noise(Stream.NOISE, 7, 3, np.arange(1, 6, 2), (1, 4, 4))
    assert torch.equal(whole[1::2], odd)
    assert whole.dtype == torch.float32
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, draw_noise(Stream.NOISE, 7, 4, np.arange(6), (1, 4, 4)))
    assert not torch.equal(whole, draw_noise(Stream.HELD_OUT_NOISE, 7, 3, np.arange(6), (1, 4, 4)))


def test_noise_is_standard_normal():
    noise = draw_noise(Stream.NOISE, 0, 0, np.arange(64), (1, 16, 16))
    # 16,384 draws: the standard errors are 0.008 and 0.006.
    assert abs(noise.mean().item()) < 0.04
    assert abs(noise.std().item() - 1) < 0.03


def test_torch_seeds_differ():
    seeds = {torch_seed(Stream.DROPOUT, 0, step, shard) for step in range(10) for shard in range(3)}
    assert len(seeds) == 30
