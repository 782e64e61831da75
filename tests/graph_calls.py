"""Functions that return a single output of a graph, for comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from admtrt.runtime.sampler import Denoiser


def unet_out(denoiser: Denoiser, x: Any, t: Any, **conditions: Any) -> Any:
    """The UNet's output."""
    return denoiser.run("unet", {"x": x, "t": t, **conditions})["out"]


def gradient(denoiser: Denoiser, x: Any, t: Any, y: Any) -> Any:
    """The classifier's gradient."""
    return denoiser.run("classifier_gradient", {"x": x, "t": t, "y": y})["grad"]
