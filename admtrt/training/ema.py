"""Exponential moving averages of the weights, at several rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Averages:
    """Averages ``ema = rate * ema + (1 - rate) * weight`` of every tensor of a state dict, in float32.

    Args:
        rates: the rate of each average; empty if this process keeps none.
        state: the initial weights, from ``module.state_dict()``.
        warmup: limit the rates to (1 + n) / (10 + n) after n steps, so that untrained weights are forgotten
            soon.
    """

    def __init__(self, rates: Sequence[float], state: Mapping[str, Tensor], *, warmup: bool = False) -> None:
        self._warmup = warmup
        self.states = {
            rate: {name: value.detach().float().clone() for name, value in state.items()} for rate in rates
        }

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor], step: int) -> None:
        """Update with the weights after the optimiser step from ``step`` to ``step + 1``."""
        most = (1 + step) / (10 + step) if self._warmup else 1.0
        for rate, averages in self.states.items():
            torch._foreach_lerp_(
                list(averages.values()),
                [state[name].detach().float() for name in averages],
                1 - min(rate, most),
            )

    @torch.no_grad()
    def load(self, rate: float, state: Mapping[str, Tensor]) -> None:
        """Replace the average of ``rate`` by a saved one."""
        for name, average in self.states[rate].items():
            average.copy_(state[name])
