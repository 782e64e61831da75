"""Generated weights for untrained networks: deterministic, and no layer is zero.

ADM initialises the last layer of every branch with zeros, so that an untrained UNet returns 0 and any
comparison passes. These weights exercise every layer. The golden tensors in ``tests/data`` use the same
recipe.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

SALT = "golden-1/"


def standard_normal(name: str, shape: tuple[int, ...], salt: str = SALT) -> NDArray[np.float32]:
    """A float32 tensor determined by its name, shape and salt."""
    seed = int.from_bytes(hashlib.sha256((salt + name).encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32)


def generated_weight(name: str, shape: tuple[int, ...], salt: str = SALT) -> NDArray[np.float32]:
    """Variance 1 / fan-in for matrices and kernels; scales near 1 and biases near 0."""
    drawn = standard_normal(name, shape, salt)
    if len(shape) >= 2:
        return drawn / np.float32(math.sqrt(math.prod(shape[1:])))
    offset = 1 if name.endswith("weight") else 0
    return np.float32(offset) + np.float32(0.1) * drawn


def generate_weights(module: nn.Module, salt: str = SALT) -> None:
    """Overwrite every parameter of a module, in place."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(generated_weight(name, tuple(parameter.shape), salt)))
