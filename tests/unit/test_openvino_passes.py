"""Group norms in the layout of OpenVINO's convolutions, against ONNX Runtime on the graph as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx_graphs import parse, run

openvino = pytest.importorskip("openvino")

from admtrt.runtime.backends.openvino_passes import normalise_by_channel  # noqa: E402

BATCH, CHANNELS = 3, 12
NORM = """
    g = Reshape (x, groups)
    n = InstanceNormalization <epsilon = 0.001> (g, scale, bias)
    y = Reshape (n, image)
"""


def image(*shape: int) -> np.ndarray:
    """Channels far from each other, far from zero and of different spread, as a convolution makes them."""
    rng = np.random.default_rng(0)
    channel = (1, shape[1], *[1] * (len(shape) - 2))
    values = rng.standard_normal(shape) * rng.uniform(0.1, 3, channel) + 20 * rng.standard_normal(channel)
    return values.astype(np.float32)


def converted(body: str, size: tuple[int, ...], **constants: Any) -> tuple[int, float]:
    """How many norms the pass changes, and the largest error behind it over the largest value."""
    x = image(BATCH, CHANNELS, *size)
    given = {
        "groups": np.int64([0, 4, -1]), "image": np.int64([0, CHANNELS, *size]),
        "scale": np.float32([0.5, 1, 2, -1]), "bias": np.float32([0, 1, -1, 0.5]),
    } | constants  # fmt: skip
    source = parse(f"g (float[N, {', '.join(map(str, x.shape[1:]))}] x) => (float[] y) {{ {body} }}", given)
    core = openvino.Core()
    model = core.read_model(source.SerializeToString())
    model.reshape(list(x.shape))
    changed = normalise_by_channel(model)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = run(source, x=x)["y"]
    return changed, float(np.abs(compiled([x])["y"] - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("size", [(16, 16), (17, 30)])
@pytest.mark.parametrize("groups", [4, 1, 12])
def test_large_images_are_normalised_by_channel(size: tuple[int, int], groups: int) -> None:
    factors = np.linspace(-1, 2, groups).astype(np.float32)
    constants = {"groups": np.int64([0, groups, -1]), "scale": factors, "bias": factors[::-1].copy()}
    changed, error = converted(NORM, size, **constants)
    assert changed == 1
    assert error < 1e-5


@pytest.mark.parametrize(
    ("body", "size"),
    [
        (NORM, (8, 8)),  # too small to gain
        (NORM, (400,)),  # no image
        (NORM.replace("y =", "z =") + "m = Mul (n, n) k = Reshape (m, image) y = Add (z, k)", (16, 16)),
        (NORM.replace("y = Reshape (n, image)", "h = Exp (n) y = Reshape (h, image)"), (16, 16)),
        ("y = InstanceNormalization (x, ones, ones)", (16, 16)),
    ],
)
def test_other_norms_stay(body: str, size: tuple[int, ...]) -> None:
    changed, error = converted(body, size, ones=np.ones(CHANNELS, np.float32))
    assert changed == 0
    assert error < 1e-5
