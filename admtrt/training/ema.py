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
        warmup: after n steps no rate is above (1 + n) / (10 + n): untrained weights are soon forgotten.
    """

    def __init__(self, rates: Sequence[float], state: Mapping[str, Tensor], *, warmup: bool = False) -> None:
        self._warmup = warmup
        self.states = {
            rate: {name: value.detach().float().clone() for name, value in state.items()} for rate in rates
        }

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after the optimiser step from ``step`` to ``step + 1``."""
        most = (1 + step) / (10 + step) if self._warmup else 1.0
        for rate, averages in self.states.items():
            torch._foreach_lerp_(
                list(averages.values()),
                [state[name].detach().float() for name in averages],
                1 - min(rate, most),
            )

    @torch.no_grad()
    def load(self, rate: float, state: Mapping[str, Tensor]) -> None:
        """Put a saved average in the place of the one at ``rate``."""
        for name, average in self.states[rate].items():
            average.copy_(state[name])
