"""Exponential moving averages of the weights, at several rates side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Averages:
    """Averages ``ema = rate * ema + (1 - rate) * weight`` of every tensor of a state dict, in float32.

    Args:
        rates: one average is kept for each; none where the process keeps no averages.
        state: the weights to start from, as ``module.state_dict()`` gives them.
    """

    def __init__(self, rates: Sequence[float], state: Mapping[str, Tensor]) -> None:
        self.states = {
            rate: {name: value.detach().float().clone() for name, value in state.items()} for rate in rates
        }

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor]) -> None:
        """Take in the weights after an optimiser step."""
        for rate, averages in self.states.items():
            torch._foreach_lerp_(
                list(averages.values()), [state[name].detach().float() for name in averages], 1 - rate
            )

    @torch.no_grad()
    def load(self, rate: float, state: Mapping[str, Tensor]) -> None:
        """Put a saved average in the place of the one at ``rate``."""
        for name, average in self.states[rate].items():
            average.copy_(state[name])
