"""Two backends side by side: the UNet on the one, the classifier's gradient on the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from admtrt.runtime.sampler import Denoiser, Images, Labels


class Composite:
    """A :class:`~admtrt.runtime.sampler.Denoiser` made of two.

    Args:
        generator: runs the UNet and the update.
        guide: runs the gradient.
    """

    def __init__(self, generator: Denoiser, guide: Denoiser) -> None:
        self._generator = generator
        self._guide = guide

    def unet(self, x: Images, t: NDArray[np.float32], y: Labels | None, low_res: Images | None) -> Images:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        return self._generator.unet(x, t, y, low_res)

    def classifier_gradient(self, x: Images, t: NDArray[np.float32], y: Labels) -> Images:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        return self._guide.classifier_gradient(x, t, y)

    def update(
        self, x: Images, out: Images, grad: Images, noise: Images, coefficients: NDArray[np.float32]
    ) -> tuple[Images, Images]:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        return self._generator.update(x, out, grad, noise, coefficients)
