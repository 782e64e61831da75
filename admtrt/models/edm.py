"""EDM's process in PyTorch, written as the papers write it: Karras et al. 2022, table 1 and eq. 7.

``boundary`` selects the preconditioning of Song et al. 2023, appendix C, which makes the network the identity
at the smallest noise level. See :mod:`admtrt.models.diffusion` for why this shares no formula with the
runtime. Noise levels S are tensors [N].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from admtrt.config import EdmConfig
    from admtrt.models.diffusion import Network


def add_noise(x_0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x = x_0 + S noise."""
    return x_0 + _column(sigma) * noise


def denoise(config: EdmConfig, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
    """D(x; S), the prediction of x_0 from x = x_0 + S noise."""
    data = config.sigma_data
    above = sigma - config.sigma_min if config.boundary else sigma
    c_skip = data**2 / (above**2 + data**2)
    c_out = above * data / (sigma**2 + data**2).sqrt()
    c_in = 1 / (sigma**2 + data**2).sqrt()
    out = network(_column(c_in) * x, 250 * sigma.log())
    return _column(c_skip) * x + _column(c_out) * out


def heun_step(config: EdmConfig, network: Network, x: Tensor, sigma: Tensor, to: Tensor) -> Tensor:
    """One step of Heun's method along the probability flow ODE (Karras et al. 2022, Algorithm 1)."""
    slope = (x - denoise(config, network, x, sigma)) / _column(sigma)
    euler = x + _column(to - sigma) * slope
    corrected = (euler - denoise(config, network, euler, to)) / _column(to)
    return x + _column(to - sigma) * (slope + corrected) / 2


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]
