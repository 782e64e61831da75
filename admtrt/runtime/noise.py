"""Counter-based noise: a pure function of a sample's seed, the stage and the step, whatever the batch.

A *stage* is one network of a cascade, identified by the size of the images that it enlarges, or 0 if it
enlarges none. The same seed thus gives every stage different noise, whether it runs alone or in the cascade.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from admtrt.errors import RequestError
from admtrt.runtime.request import whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAX_SEED = 2**64 - 1
_INITIAL = 0  # counter of x_T; the noise of step i uses i + 1
_SECOND = 1 << 31  # counter bit of a step's second noise
_STAGE_BITS = 32  # counter bits below the stage; no schedule has 2**31 steps


def check_seed(seed: int) -> int:
    """Check that ``seed`` is a whole number from 0 to 2**64 - 1, and return it as an int."""
    seed = whole_number(seed, "a seed")
    if not 0 <= seed <= MAX_SEED:
        raise RequestError(
            f"seed {seed} is out of range", hint=f"Seeds are whole numbers from 0 to {MAX_SEED}."
        )
    return seed


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...], *, stage: int = 0) -> NDArray[np.float32]:
    """x_T of each sample, standard normal float32 [N, *shape]."""
    return _drawn(seeds, [_INITIAL] * len(seeds), shape, stage)


def step_noise(
    seeds: Sequence[int], steps: Sequence[int], shape: tuple[int, ...], *, stage: int = 0
) -> NDArray[np.float32]:
    """z of each sample at its own step index of the respaced process, standard normal float32 [N, *shape]."""
    return _drawn(seeds, [step + 1 for step in steps], shape, stage)


def second_noise(
    seeds: Sequence[int], steps: Sequence[int], shape: tuple[int, ...], *, stage: int = 0
) -> NDArray[np.float32]:
    """The noise of a step's edit; otherwise like :func:`step_noise`."""
    return _drawn(seeds, [_SECOND + step + 1 for step in steps], shape, stage)


def _drawn(
    seeds: Sequence[int], counters: Sequence[int], shape: tuple[int, ...], stage: int
) -> NDArray[np.float32]:
    out = np.empty((len(seeds), *shape), dtype=np.float32)
    bits = np.random.Philox(key=0)  # shared: setting its state costs a fifth of creating another
    generator, state = np.random.Generator(bits), bits.state
    for row, seed, counter in zip(out, seeds, counters, strict=True):
        state["state"]["key"] = np.array([seed, (stage << _STAGE_BITS) + counter], dtype=np.uint64)
        bits.state = state
        generator.standard_normal(out=row, dtype=np.float32)
    return out
