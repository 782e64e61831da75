"""The FID Inception in NumPy, from its weights, as the reference for the exported graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from admtrt.features.topology import EPSILON, SIZE, SPATIAL_CHANNELS, inception

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.features.weights import Array


def tf1_resize(images: NDArray[np.uint8], height: int = SIZE, width: int = SIZE) -> Array:
    """TensorFlow 1's ``ResizeBilinear``: no half pixels, no antialiasing; bit for bit.

    Args:
        images: uint8 [N, H, W, C].
        height, width: the new size.

    Returns:
        float32 [N, height, width, C], 0 to 255.
    """
    x = images.astype(np.float32)

    def grid(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
        place = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
        low = place.astype(np.int64)
        return low, np.minimum(low + 1, old - 1), place - low.astype(np.float32)

    (top, bottom, dy), (left, right, dx) = grid(x.shape[1], height), grid(x.shape[2], width)
    x = x[:, :, left] + (x[:, :, right] - x[:, :, left]) * dx[:, None]
    resized: Array = x[:, top] + (x[:, bottom] - x[:, top]) * dy[:, None, None]
    return resized


def features(weights: dict[str, Array], images: NDArray[np.uint8]) -> dict[str, Array]:
    """``pool`` [N, 2048], ``spatial`` [N, 2023] and ``logits`` [N, 1008] of uint8 images [N, H, W, 3]."""
    x = (tf1_resize(images) - np.float32(128)) * np.float32(0.0078125)
    last, spatial = inception(_Plain(weights), np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    pool = last.mean(axis=(2, 3))
    return {
        "pool": pool,
        "spatial": spatial[:, :SPATIAL_CHANNELS].transpose(0, 2, 3, 1).reshape(len(images), -1),
        "logits": pool @ weights["softmax/weights"],
    }


class _Plain:
    """Operations on arrays [N, C, H, W]."""

    def __init__(self, weights: dict[str, Array]) -> None:
        self._weights = weights

    def convolution(self, name: str, x: Array, stride: int = 1, *, same: bool = True) -> Array:
        kernel = self._weights[f"{name}/conv2d_params"]
        height, width, _, _ = kernel.shape
        if same:
            x = _padded(x, height // 2, width // 2)
        windows = _windows(x, height, width, stride)  # [N, C, H, W, kh, kw]
        y = np.tensordot(windows, kernel, axes=((4, 5, 1), (0, 1, 2)))  # [N, H, W, out]
        beta, gamma, mean, variance = (
            self._weights[f"{name}/batchnorm/{part}"]
            for part in ("beta", "gamma", "moving_mean", "moving_variance")
        )
        y = (y - mean) * (gamma / np.sqrt(variance + np.float32(EPSILON))) + beta
        activated: Array = np.maximum(y, 0).transpose(0, 3, 1, 2)
        return activated

    def average(self, x: Array) -> Array:
        sums = _windows(_padded(x, 1, 1), 3, 3, 1).sum(axis=(4, 5))
        counts = _windows(_padded(np.ones_like(x[:1, :1]), 1, 1), 3, 3, 1).sum(axis=(4, 5))
        mean: Array = sums / counts
        return mean

    def largest(self, x: Array) -> Array:
        largest: Array = _windows(_padded(x, 1, 1, -np.inf), 3, 3, 1).max(axis=(4, 5))
        return largest

    def halved(self, x: Array) -> Array:
        largest: Array = _windows(x, 3, 3, 2).max(axis=(4, 5))
        return largest

    def joined(self, parts: list[Array]) -> Array:
        return np.concatenate(parts, axis=1)


def _padded(x: Array, vertical: int, horizontal: int, value: float = 0.0) -> Array:
    sides = ((0, 0), (0, 0), (vertical, vertical), (horizontal, horizontal))
    return np.pad(x, sides, constant_values=np.float32(value))


def _windows(x: Array, height: int, width: int, stride: int) -> Array:
    view = np.lib.stride_tricks.sliding_window_view(x, (height, width), axis=(2, 3))
    return view[:, :, ::stride, ::stride]
