"""Build the FID Inception as one ONNX graph from its weights, with only onnx and NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from admtrt.errors import CheckpointError, ExportError
from admtrt.features.plain import features
from admtrt.features.topology import CLASSES, EPSILON, POOL, SIZE, SPATIAL, SPATIAL_CHANNELS, inception

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from admtrt.features.weights import Array

OPSET = 18
IR_VERSION = 9
_CHECKED_SIZES = ((40, 72), (320, 305))  # one to enlarge, one to shrink, neither square
_TOLERANCES = {"pool": 1e-5, "spatial": 1e-4, "logits": 1e-5}
"""Relative to the largest value, in float32: two orders of summation differ by 1e-6 to 6e-6 in ``pool``, and
by up to 3e-5 in ``spatial``, which is not averaged over positions."""


def write_inception(weights: dict[str, Array], path: Path) -> None:
    """Write the graph: ``images`` uint8 [N, H, W, 3] -> ``pool``, ``spatial``, ``logits`` (without the bias).

    The resize is TensorFlow 1's, in the graph, bit for bit; ``spatial`` is flattened like in the ADM
    evaluator (17, 17, 7), which stored statistics depend on. Batch normalisations are folded in float64.

    Raises:
        CheckpointError: if the weights do not fit together.
    """
    build = _Onnx(weights)
    try:
        last, spatial = inception(build, build.prepared("images"))
        build.finish(last, spatial)
        model = build.model()
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"the weights do not fit together as an Inception: {reason}") from None
    onnx.save(model, path)


def check_inception(
    weights: dict[str, Array], run: Callable[[NDArray[np.uint8]], dict[str, Array]]
) -> dict[str, float]:
    """Compare a written graph with NumPy on generated images. Returns the largest relative errors.

    Raises:
        ExportError: if an output differs by more than float32 rounding.
    """
    worst = dict.fromkeys(_TOLERANCES, 0.0)
    rng = np.random.default_rng(0)
    for height, width in _CHECKED_SIZES:
        blocks = rng.integers(0, 256, (1, -(-height // 8), -(-width // 8), 3))
        large = np.repeat(np.repeat(blocks, 8, axis=1), 8, axis=2)[:, :height, :width]
        images = np.clip(large + rng.integers(-20, 21, large.shape), 0, 255).astype(np.uint8)
        expected, found = features(weights, images), run(images)
        for name in worst:
            error = float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max())
            worst[name] = max(worst[name], error)
    for name, tolerance in _TOLERANCES.items():
        if not worst[name] <= tolerance:
            raise ExportError(
                f"the graph's output '{name}' is {worst[name]:.2g} of its largest value from the network in "
                f"NumPy; expected at most {tolerance:g}",
                hint="The inference library computes something else: try another version of it.",
            )
    return worst


class _Onnx:
    """Operations that write nodes; values are their names."""

    def __init__(self, weights: dict[str, Array]) -> None:
        self._weights = weights
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._made = 0

    def prepared(self, images: str) -> str:
        """Resized and scaled, [N, 3, 299, 299]."""
        x = self._node("Cast", [images], to=TensorProto.FLOAT)
        x = self._node("Transpose", [x], perm=[0, 3, 1, 2])
        sizes = self._node("Shape", [images], start=1, end=3)
        for axis, index in ((3, 1), (2, 0)):  # like TensorFlow: width first
            x = self._interpolated(x, axis, self._node("Gather", [sizes, self._constant(np.array([index]))]))
        x = self._node("Sub", [x, self._constant(np.float32(128))])
        return self._node("Mul", [x, self._constant(np.float32(0.0078125))])

    def _interpolated(self, x: str, axis: int, size: str) -> str:
        """ONNX's ``Resize`` divides by the scale where TensorFlow multiplies: coordinates round apart."""
        factor = self._node(
            "Div",
            [self._node("Cast", [size], to=TensorProto.FLOAT), self._constant(np.float32(SIZE))],
        )
        place = self._node("Mul", [self._constant(np.arange(SIZE, dtype=np.float32)), factor])
        floor = self._node("Floor", [place])
        low = self._node("Cast", [floor], to=TensorProto.INT64)
        one = self._constant(np.array([1]))
        high = self._node("Min", [self._node("Add", [low, one]), self._node("Sub", [size, one])])
        fraction = self._node("Sub", [place, floor])
        shape = np.array([1, 1, SIZE, 1] if axis == 2 else [1, 1, 1, SIZE])
        fraction = self._node("Reshape", [fraction, self._constant(shape)])
        near, far = (self._node("Gather", [x, index], axis=axis) for index in (low, high))
        step = self._node("Mul", [self._node("Sub", [far, near]), fraction])
        return self._node("Add", [near, step])

    def convolution(self, name: str, x: str, stride: int = 1, *, same: bool = True) -> str:
        kernel = self._weights[f"{name}/conv2d_params"].astype(np.float64)
        beta, gamma, mean, variance = (
            self._weights[f"{name}/batchnorm/{part}"].astype(np.float64)
            for part in ("beta", "gamma", "moving_mean", "moving_variance")
        )
        factor = gamma / np.sqrt(variance + EPSILON)
        weight = self._constant((kernel * factor).transpose(3, 2, 0, 1).astype(np.float32), f"{name}/weight")
        bias = self._constant((beta - mean * factor).astype(np.float32), f"{name}/bias")
        height, width = kernel.shape[:2]
        pads = [height // 2, width // 2] * 2 if same else [0] * 4
        y = self._node(
            "Conv", [x, weight, bias], kernel_shape=[height, width], pads=pads, strides=[stride, stride]
        )
        return self._node("Relu", [y])

    def average(self, x: str) -> str:
        return self._node(
            "AveragePool", [x], kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1], count_include_pad=0
        )

    def largest(self, x: str) -> str:
        return self._node("MaxPool", [x], kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1])

    def halved(self, x: str) -> str:
        return self._node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2])

    def joined(self, parts: list[str]) -> str:
        return self._node("Concat", parts, axis=1)

    def finish(self, last: str, spatial: str) -> None:
        """Add the outputs."""
        mean = self._node("GlobalAveragePool", [last])
        self._node("Flatten", [mean], "pool", axis=1)
        ends = [self._constant(np.array([value])) for value in (0, SPATIAL_CHANNELS, 1)]
        seven = self._node("Transpose", [self._node("Slice", [spatial, *ends])], perm=[0, 2, 3, 1])
        self._node("Flatten", [seven], "spatial", axis=1)
        classes = self._constant(self._weights["softmax/weights"], "softmax/weights")
        self._node("MatMul", ["pool", classes], "logits")

    def model(self) -> onnx.ModelProto:
        """The finished model."""

        def value(name: str, kind: int, *sizes: str | int) -> Any:
            return helper.make_tensor_value_info(name, kind, ["N", *sizes])

        graph = helper.make_graph(
            self._nodes,
            "inception_2015_12_05",
            [value("images", TensorProto.UINT8, "H", "W", 3)],
            [
                value("pool", TensorProto.FLOAT, POOL),
                value("spatial", TensorProto.FLOAT, SPATIAL),
                value("logits", TensorProto.FLOAT, CLASSES),
            ],
            list(self._initializers.values()),
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def _node(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        self._made += 1
        name = output or f"{kind.lower()}_{self._made}"
        self._nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def _constant(self, value: Any, name: str = "") -> str:
        self._made += 1
        name = name or f"constant_{self._made}"
        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name
