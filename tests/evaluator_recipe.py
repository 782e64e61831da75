"""Seeded arrays of the evaluator goldens: only NumPy, elementwise, so the same bits everywhere."""

from __future__ import annotations

import hashlib

import numpy as np


def z(salt: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers, float32; the seed is derived from the salt and the name."""
    seed = int.from_bytes(hashlib.sha256((salt + name).encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32)


def integers(salt: str, name: str, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
    """Integers low .. high - 1, int64."""
    seed = int.from_bytes(hashlib.sha256((salt + name).encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(seed)).integers(low, high, shape)


def features(salt: str, name: str, n: int, d: int, *, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Correlated, non-negative features [n, d], float32, for one set of a case.

    ``name`` is CASE.SET; the sets of a case share the spread, the loadings and the direction of the shift.
    Computed in float64, one operation after another, then rounded once and clamped at 0 (as features after a
    ReLU).
    """
    case = name.split(".")[0]
    spread = 0.25 + 0.25 * np.abs(z(salt, f"{case}:spread", (d,)).astype(np.float64))
    loads = 0.3 * z(salt, f"{case}:loads", (4, d)).astype(np.float64)
    direction = z(salt, f"{case}:direction", (d,)).astype(np.float64)
    factors = z(salt, f"{name}:factors", (n, 4)).astype(np.float64)
    x = z(salt, f"{name}:noise", (n, d)).astype(np.float64) * spread
    for k in range(4):
        x = x + factors[:, k : k + 1] * loads[k]
    x = x * scale + (0.5 + shift * direction)
    return np.maximum(x, 0.0).astype(np.float32)


def logits(salt: str, name: str, n: int, k: int, strength: float) -> np.ndarray:
    """Logits [n, k], float32: noise, plus ``strength`` at a random class."""
    x = z(salt, f"{name}:noise", (n, k))
    x[np.arange(n), integers(salt, f"{name}:class", 0, k, (n,))] += np.float32(strength)
    return x


def images(salt: str, name: str, n: int, height: int, width: int, *, contrast: int = 100) -> np.ndarray:
    """uint8 [n, height, width, 3]: a colour, 8 by 8 blocks around it, and -20 .. 20 a pixel and channel."""
    rows, columns = -(-height // 8), -(-width // 8)
    colour = integers(salt, f"{name}:colour", 20, 236, (n, 1, 1, 3))
    amplitude = integers(salt, f"{name}:amplitude", 0, contrast + 1, (n, 1, 1, 1))
    blocks = integers(salt, f"{name}:blocks", -100, 101, (n, rows, columns, 3)) * amplitude // 100
    large = np.repeat(np.repeat(blocks, 8, axis=1), 8, axis=2)[:, :height, :width]
    return np.clip(colour + large + integers(salt, f"{name}:grain", -20, 21, large.shape), 0, 255).astype(
        np.uint8
    )


# --- the Inception graph's convolutions: TensorFlow name, kernel, input and output channels, stride, padding
def inception_layers() -> list[tuple[str, int, int, int, int, int, str]]:
    layers: list[tuple[str, int, int, int, int, int, str]] = []

    def conv(name: str, kh: int, kw: int, i: int, o: int, stride: int = 1, padding: str = "SAME") -> None:
        layers.append((name, kh, kw, i, o, stride, padding))

    conv("conv", 3, 3, 3, 32, 2, "VALID")
    conv("conv_1", 3, 3, 32, 32, 1, "VALID")
    conv("conv_2", 3, 3, 32, 64)
    conv("conv_3", 1, 1, 64, 80, 1, "VALID")
    conv("conv_4", 3, 3, 80, 192, 1, "VALID")
    for block, i, pool in (("mixed", 192, 32), ("mixed_1", 256, 64), ("mixed_2", 288, 64)):
        conv(f"{block}/conv", 1, 1, i, 64)
        conv(f"{block}/tower/conv", 1, 1, i, 48)
        conv(f"{block}/tower/conv_1", 5, 5, 48, 64)
        conv(f"{block}/tower_1/conv", 1, 1, i, 64)
        conv(f"{block}/tower_1/conv_1", 3, 3, 64, 96)
        conv(f"{block}/tower_1/conv_2", 3, 3, 96, 96)
        conv(f"{block}/tower_2/conv", 1, 1, i, pool)
    conv("mixed_3/conv", 3, 3, 288, 384, 2, "VALID")
    conv("mixed_3/tower/conv", 1, 1, 288, 64)
    conv("mixed_3/tower/conv_1", 3, 3, 64, 96)
    conv("mixed_3/tower/conv_2", 3, 3, 96, 96, 2, "VALID")
    for block, c in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        conv(f"{block}/conv", 1, 1, 768, 192)
        conv(f"{block}/tower/conv", 1, 1, 768, c)
        conv(f"{block}/tower/conv_1", 1, 7, c, c)
        conv(f"{block}/tower/conv_2", 7, 1, c, 192)
        conv(f"{block}/tower_1/conv", 1, 1, 768, c)
        conv(f"{block}/tower_1/conv_1", 7, 1, c, c)
        conv(f"{block}/tower_1/conv_2", 1, 7, c, c)
        conv(f"{block}/tower_1/conv_3", 7, 1, c, c)
        conv(f"{block}/tower_1/conv_4", 1, 7, c, 192)
        conv(f"{block}/tower_2/conv", 1, 1, 768, 192)
    conv("mixed_8/tower/conv", 1, 1, 768, 192)
    conv("mixed_8/tower/conv_1", 3, 3, 192, 320, 2, "VALID")
    conv("mixed_8/tower_1/conv", 1, 1, 768, 192)
    conv("mixed_8/tower_1/conv_1", 1, 7, 192, 192)
    conv("mixed_8/tower_1/conv_2", 7, 1, 192, 192)
    conv("mixed_8/tower_1/conv_3", 3, 3, 192, 192, 2, "VALID")
    for block, i in (("mixed_9", 1280), ("mixed_10", 2048)):
        conv(f"{block}/conv", 1, 1, i, 320)
        conv(f"{block}/tower/conv", 1, 1, i, 384)
        conv(f"{block}/tower/mixed/conv", 1, 3, 384, 384)
        conv(f"{block}/tower/mixed/conv_1", 3, 1, 384, 384)
        conv(f"{block}/tower_1/conv", 1, 1, i, 448)
        conv(f"{block}/tower_1/conv_1", 3, 3, 448, 384)
        conv(f"{block}/tower_1/mixed/conv", 1, 3, 384, 384)
        conv(f"{block}/tower_1/mixed/conv_1", 3, 1, 384, 384)
        conv(f"{block}/tower_2/conv", 1, 1, i, 192)
    return layers


def inception_weights(salt: str) -> dict[str, np.ndarray]:
    """Generated weights by TensorFlow name (no trained ones): convolutions HWIO, softmax [2048, 1008]."""
    weights: dict[str, np.ndarray] = {}
    for name, kh, kw, i, o, _, _ in inception_layers():
        gain = np.float32(np.sqrt(2.0 / (kh * kw * i)))
        kernel = z(salt, f"{name}/conv2d_params", (kh, kw, i, o)) * gain
        half = i // 2  # the second half of the inputs cancels the mean of the first: images differ more
        kernel[:, :, half : 2 * half] = -kernel[:, :, :half][:, :, ::-1]
        weights[f"{name}/conv2d_params"] = kernel
        weights[f"{name}/batchnorm/beta"] = np.float32(0.1) * z(salt, f"{name}/batchnorm/beta", (o,))
        weights[f"{name}/batchnorm/gamma"] = 1 + np.float32(0.1) * z(salt, f"{name}/batchnorm/gamma", (o,))
        weights[f"{name}/batchnorm/moving_mean"] = np.float32(0.1) * z(
            salt, f"{name}/batchnorm/moving_mean", (o,)
        )
        spread = np.minimum(np.abs(z(salt, f"{name}/batchnorm/moving_variance", (o,))), np.float32(2))
        weights[f"{name}/batchnorm/moving_variance"] = np.float32(0.75) + np.float32(0.25) * spread
    weights["softmax/weights"] = z(salt, "softmax/weights", (2048, 1008))
    weights["softmax/biases"] = z(salt, "softmax/biases", (1008,))
    return weights
