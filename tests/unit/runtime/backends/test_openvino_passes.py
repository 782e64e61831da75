"""Group norms in the layout of OpenVINO's convolutions, against ONNX Runtime on the graph as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx_graphs import parse, run

openvino = pytest.importorskip("openvino")

from bundles import pipeline  # noqa: E402
from graph_calls import gradient, unet_out  # noqa: E402

from admtrt.runtime.backends import openvino as openvino_backend  # noqa: E402
from admtrt.runtime.backends import openvino_passes  # noqa: E402
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
    """The number of norms that the pass changes, and the largest error after it over the largest value."""
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


WRITTEN_OUT = """
    g = Reshape (x, groups)
    m = ReduceMean <keepdims = 1> (g, last)
    c = Sub (g, m)
    q = Mul (c, c)
    v = ReduceMean <keepdims = 1> (q, last)
    e = Add (v, half)
    d = Sqrt (e)
    {end}
"""


@pytest.mark.parametrize(
    ("end", "images"),
    [
        ("n = Div (c, d) y = Reshape (n, image)", 1),
        ("n = Div (c, d) o = Add (g, n) y = Reshape (o, image)", 1),
        ("n = Div (c, d) a = Reshape (n, image) b = Reshape (q, image) y = Add (a, b)", 2),
        ("n = Div (c, d) h = Mul (n, whole) y = Reshape (h, image)", 0),  # not one number a group
        ("n = Div (c, d) h = Exp (n) y = Reshape (h, image)", 0),
        ("n = Div (c, d) y = Reshape (n, flat)", 0),
    ],
)
def test_what_a_gradient_computes_on_groups(end: str, images: int) -> None:
    constants = {
        "last": np.int64([2]), "half": np.float32(0.5), "flat": np.int64([0, -1]),
        "whole": np.linspace(-1, 2, 4 * 768, dtype=np.float32).reshape(1, 4, 768),
    }  # fmt: skip
    changed, error = converted(WRITTEN_OUT.format(end=end), (16, 16), **constants)
    assert changed == images
    assert error < 1e-5


@pytest.mark.parametrize(
    ("body", "size"),
    [
        (NORM, (8, 8)),  # too small to gain
        (NORM, (400,)),  # no image
        (NORM.replace("y = Reshape (n, image)", "h = Exp (n) y = Reshape (h, image)"), (16, 16)),
        ("y = InstanceNormalization (x, ones, ones)", (16, 16)),
        (
            "g = Reshape (x, groups) u = Reshape (x, turned) e = Exp (u) h = Reshape (e, groups) "
            "p = Mul (g, h) y = Reshape (p, image)",
            (16, 32),
        ),  # two images of unlike shapes
    ],
)
def test_other_norms_stay(body: str, size: tuple[int, ...]) -> None:
    constants = {"ones": np.ones(CHANNELS, np.float32), "turned": np.int64([0, CHANNELS, 32, 16])}
    changed, error = converted(body, size, **constants)
    assert changed == 0
    assert error < 1e-5


def test_whole_networks_stay_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every norm and its gradient, of images that would be too small."""
    monkeypatch.setattr(openvino_passes, "_MANY_POSITIONS", 1)
    counts = []
    monkeypatch.setattr(
        openvino_backend, "normalise_by_channel", lambda m: counts.append(normalise_by_channel(m))
    )
    exact = pipeline("guided")
    found = openvino_backend.OpenVinoDenoiser(exact.bundle, threads=1)
    x = np.random.default_rng(1).standard_normal((2, 1, 8, 8), dtype=np.float32)
    t, y = np.float32([900, 30]), np.int64([2, 0])
    for one, other in [
        (unet_out(found, x, t), unet_out(exact.denoiser, x, t)),
        (gradient(found, x, t, y), gradient(exact.denoiser, x, t, y)),
    ]:
        assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()
    assert len(counts) == 2
    assert min(counts) > 3
