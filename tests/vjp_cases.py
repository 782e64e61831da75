"""One case or more for every gradient rule: a graph's text and what PyTorch says that it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Case:
    """``body`` computes y from x [N, *shape]; ``reference(x, **constants)`` says what y is."""

    op: str
    shape: tuple[int, ...]
    body: str
    reference: Callable[..., torch.Tensor]
    constants: dict[str, Any] = field(default_factory=dict)
    positive: bool = False
    opset: int = 18

    def __str__(self) -> str:
        return f"{self.op}: {' '.join(self.body.split())}"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def unary(
    op: str, reference: Callable[..., torch.Tensor], *, positive: bool = False, opset: int = 18
) -> Case:
    return Case(op, (3, 4), f"y = {op} (x)", reference, positive=positive, opset=opset)


def mean_of(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x.mean(axis, keepdim=True)


def weights_of(x: torch.Tensor, axis: int = -1) -> torch.Tensor:
    return (x @ x.mT).tanh().softmax(axis)


def attend(x: torch.Tensor, axis: int = -1) -> torch.Tensor:
    return weights_of(x, axis) @ x


def running(x: torch.Tensor, exclusive: bool, reverse: bool) -> torch.Tensor:
    x = x.flip(-1) if reverse else x
    total = x.cumsum(-1) - (x if exclusive else 0)
    return total.flip(-1) if reverse else total


def put(x: torch.Tensor, places: torch.Tensor, values: torch.Tensor, how: str) -> torch.Tensor:
    return x.scatter(1, places, values) if how == "none" else x.scatter_add(1, places, values)


def pools(kernel: Any, stride: Any, pad: Any, dilation: Any, ceil: bool) -> list[Case]:
    """Max and average pooling of [2, 7, 8] with these windows; the average has no dilation in PyTorch."""

    def pair(value: Any) -> list[int]:
        return list(value) if isinstance(value, tuple) else [value, value]

    attributes = f"kernel_shape = {pair(kernel)}, strides = {pair(stride)}, pads = {pair(pad) * 2}"
    attributes += f", ceil_mode = {int(ceil)}"
    largest = Case(
        "MaxPool",
        (2, 7, 8),
        f"y = MaxPool <{attributes}, dilations = {pair(dilation)}> (x)",
        lambda x: F.max_pool2d(x, kernel, stride, pad, dilation, ceil),
    )
    if dilation != 1 or ceil:  # with ceil_mode ONNX Runtime counts what PyTorch does not
        return [largest]
    return [
        largest,
        *(
            Case(
                "AveragePool",
                (2, 7, 8),
                f"y = AveragePool <{attributes}, count_include_pad = {int(counted)}> (x)",
                lambda x, counted=counted: F.avg_pool2d(x, kernel, stride, pad, ceil, counted),
            )
            for counted in (False, True)
        ),
    ]


SCORES = "t = Transpose <perm = [0, 2, 1]> (x) m = MatMul (x, t) s = Tanh (m)"
SCORES4 = "t = Transpose <perm = [0, 1, 3, 2]> (x) m = MatMul (x, t) s = Tanh (m)"
MEAN = "m = ReduceMean <keepdims = 1> (x, axis)"
SQUARES = "s = ReduceSumSquare <keepdims = 1> (x, axis)"
MATRIX, VECTOR, FACTORS = normal(4, 5, seed=1), normal(4, seed=2), normal(5, 1, 1, seed=3)
SCALE, BIAS = normal(4, seed=4), normal(4, seed=5)
PADDED = ints(0, 1, 0, 0, 2, 3)

CASES = [
    unary("Identity", lambda x: x),
    unary("Neg", lambda x: -x),
    unary("Exp", torch.exp),
    unary("Log", torch.log, positive=True),
    unary("Sqrt", torch.sqrt, positive=True),
    unary("Reciprocal", lambda x: 1 / x, positive=True),
    unary("Abs", torch.abs),
    unary("Sin", torch.sin),
    unary("Cos", torch.cos),
    unary("Tan", torch.tan),
    unary("Atan", torch.atan),
    unary("Sinh", torch.sinh),
    unary("Cosh", torch.cosh),
    unary("Asinh", torch.asinh),
    *(
        Case(op, (3, 4), f"t = Tanh (x) y = {op} (t)", lambda x, inverse=inverse: inverse(x.tanh()))
        for op, inverse in {"Asin": torch.asin, "Acos": torch.acos, "Atanh": torch.atanh}.items()
    ),
    Case("Acosh", (3, 4), "e = Cosh (x) y = Acosh (e)", lambda x: x, positive=True),
    unary("Sigmoid", torch.sigmoid),
    unary("Tanh", torch.tanh),
    unary("Softplus", F.softplus),
    unary("Relu", torch.relu),
    unary("Erf", torch.erf),
    unary("Gelu", F.gelu, opset=20),
    Case(
        "Gelu",
        (3, 4),
        'y = Gelu <approximate = "tanh"> (x)',
        lambda x: F.gelu(x, approximate="tanh"),
        opset=20,
    ),
    unary("Elu", F.elu),
    Case("Elu", (3, 4), "y = Elu <alpha = 0.7> (x)", lambda x: F.elu(x, 0.7)),
    unary("Selu", F.selu),
    Case("Celu", (3, 4), "y = Celu <alpha = 1.5> (x)", lambda x: F.celu(x, 1.5)),
    Case(
        "HardSigmoid",
        (9,),
        "z = Mul (x, c) y = HardSigmoid <alpha = 0.16666667> (z)",
        lambda x, c: F.hardsigmoid(3 * x),
        {"c": np.float32(3)},
    ),
    Case(
        "HardSwish",
        (9,),
        "z = Mul (x, c) y = HardSwish (z)",
        lambda x, c: F.hardswish(3 * x),
        {"c": np.float32(3)},
    ),
    unary("Mish", F.mish),
    Case(
        "PRelu",
        (4, 3),
        "y = PRelu (x, c)",
        lambda x, c: torch.where(x > 0, x, c * x),
        {"c": FACTORS[:4, :, 0]},
    ),
    *(
        Case(op, (9,), f"s = {op} (x) y = Mul (s, x)", lambda x, step=step: step(x).detach() * x)
        for op, step in {
            "Floor": torch.floor,
            "Ceil": torch.ceil,
            "Round": torch.round,
            "Sign": torch.sign,
        }.items()
    ),
    *(
        case
        for op, taken in {"Max": torch.maximum, "Min": torch.minimum}.items()
        for case in (
            Case(op, (3, 4), f"y = {op} (x, c)", lambda x, c, taken=taken: taken(x, c), {"c": VECTOR}),
            Case(op, (3, 4), f"y = {op} (c, x)", lambda x, c, taken=taken: taken(x, c), {"c": VECTOR}),
            Case(
                op,
                (3, 4),
                f"{MEAN} y = {op} (m, x)",
                lambda x, axis, taken=taken: taken(x, mean_of(x, 1)),
                {"axis": ints(1)},
            ),
            Case(
                op,
                (3, 4),
                f"r = Relu (x) z = Sub (x, x) y = {op} (r, z)",
                lambda x, taken=taken: taken(x.relu(), x - x),
            ),  # equal ones share
        )
    ),
    unary("LeakyRelu", F.leaky_relu),
    Case("LeakyRelu", (4,), "y = LeakyRelu <alpha = 0.3> (x)", lambda x: F.leaky_relu(x, 0.3)),
    Case("Cast", (4,), "d = Cast <to = 11> (x) e = Exp (d) y = Cast <to = 1> (e)", torch.exp),
    Case("Add", (3, 4), "y = Add (x, c)", lambda x, c: x + c, {"c": VECTOR}),
    Case("Add", (3, 4), f"{MEAN} y = Add (m, x)", lambda x, axis: x + mean_of(x, 1), {"axis": ints(1)}),
    Case("Sub", (3, 4), f"{MEAN} y = Sub (x, m)", lambda x, axis: x - mean_of(x, 1), {"axis": ints(1)}),
    Case("Sub", (3, 4), f"{MEAN} y = Sub (m, x)", lambda x, axis: mean_of(x, 2) - x, {"axis": ints(-1)}),
    Case("Sub", (3, 4), "y = Sub (c, x)", lambda x, c: c - x, {"c": VECTOR}),
    Case("Mul", (3, 4), "y = Mul (x, c)", lambda x, c: x * c, {"c": VECTOR}),
    Case("Mul", (3, 4), "y = Mul (x, x)", lambda x: x * x),
    Case("Mul", (3, 4), f"{MEAN} y = Mul (x, m)", lambda x, axis: x * mean_of(x, 1), {"axis": ints(1)}),
    Case("Mul", (4,), "s = Sigmoid (x) y = Mul (x, s)", F.silu),
    Case("Mul", (4,), "s = Sigmoid (x) y = Mul (s, x)", F.silu),
    Case("Mul", (4,), "s = Sigmoid (x) u = Mul (s, x) y = Add (u, s)", lambda x: F.silu(x) + x.sigmoid()),
    Case("Mul", (4,), "e = Exp (x) s = Sigmoid (x) y = Mul (e, s)", lambda x: x.exp() * x.sigmoid()),
    Case(
        "Mul",
        (2, 4),
        "z = Mul (x, c) y = ReduceSum <keepdims = 0> (z, axis)",
        lambda x, c, axis: (x * c).sum(0),
        {"c": FACTORS[:, None], "axis": ints(0)},
    ),
    Case("Div", (3, 4), "y = Div (x, c)", lambda x, c: x / c, {"c": VECTOR}),
    Case("Div", (3, 4), "y = Div (c, x)", lambda x, c: c / x, {"c": VECTOR}, positive=True),
    Case(
        "Div", (3, 4), f"{SQUARES} y = Div (x, s)", lambda x, axis: x / (x**2).sum(2, True), {"axis": ints(2)}
    ),
    Case(
        "Div",
        (3, 4),
        f"{SQUARES} y = Div (s, x)",
        lambda x, axis: (x**2).sum(2, True) / x,
        {"axis": ints(2)},
        True,
    ),
    *(
        Case("Pow", (3,), "y = Pow (x, p)", lambda x, p: x**p, {"p": np.float32(p)}, positive=p != 3)
        for p in (2.0, 3.0, 0.5, -1.5)
    ),
    Case("Pow", (3,), "y = Pow (x, p)", lambda x, p: x**p, {"p": np.array([0, 1, 2.5], np.float32)}, True),
    Case("Pow", (3,), "y = Pow (x, p)", lambda x, p: x**p, {"p": ints(0, 2, 3)}),
    Case(
        "Pow",
        (3,),
        "z = Pow (x, p) y = Reshape (z, c)",
        lambda x, p, c: x**3,
        {"p": np.full((1, 1, 1), 3, np.float32), "c": ints(-1, 3)},
    ),  # of a higher rank
    Case("Pow", (3,), "y = Pow (c, x)", lambda x, c: c**x, {"c": np.float32(2)}),
    Case("Pow", (3,), "y = Pow (x, x)", lambda x: x**x, positive=True),
    Case(
        "Clip",
        (9,),
        "y = Clip (x, a, b)",
        lambda x, a, b: x.clamp(a, b),
        {"a": np.float32(-0.3), "b": np.float32(0.5)},
    ),
    Case("Clip", (9,), "y = Clip (x, a)", lambda x, a: x.clamp(min=a), {"a": np.float32(-0.3)}),
    Case("Clip", (9,), "y = Clip (x, , b)", lambda x, b: x.clamp(max=b), {"b": np.float32(0.5)}),
    Case(
        "Where",
        (3, 4),
        "k = Less (x, c) e = Exp (x) n = Neg (x) y = Where (k, e, n)",
        lambda x, c: torch.where(x < c, x.exp(), -x),
        {"c": VECTOR},
    ),
    Case(
        "Where",
        (3, 4),
        f"{MEAN} k = Less (x, c) y = Where (k, c, m)",
        lambda x, c, axis: torch.where(x < c, c, mean_of(x, 1)),
        {"c": VECTOR, "axis": ints(1)},
    ),
    Case("MatMul", (3, 4), "y = MatMul (x, c)", lambda x, c: x @ c, {"c": MATRIX}),
    Case("MatMul", (4, 2), "y = MatMul (c, x)", lambda x, c: c @ x, {"c": MATRIX.T.copy()}),
    Case(
        "MatMul", (2, 3, 4), "t = Transpose <perm = [0, 1, 3, 2]> (x) y = MatMul (x, t)", lambda x: x @ x.mT
    ),
    Case(
        "MatMul", (2, 3, 4), "t = Transpose <perm = [0, 1, 3, 2]> (x) y = MatMul (t, x)", lambda x: x.mT @ x
    ),
    Case(
        "MatMul",
        (2, 3, 4),
        f"{MEAN} t = Transpose <perm = [0, 1, 3, 2]> (m) y = MatMul (x, t)",
        lambda x, axis: x @ mean_of(x, 1).mT,
        {"axis": ints(1)},
    ),
    Case(
        "MatMul",
        (3, 4),
        "b = ReduceSum <keepdims = 0> (x, axis) t = Transpose (b) y = MatMul (x, t)",
        lambda x, axis: x @ x.sum(0).T,
        {"axis": ints(0)},
    ),
    Case("Gemm", (4,), "y = Gemm (x, c)", lambda x, c: x @ c, {"c": MATRIX}),
    Case(
        "Gemm",
        (5,),
        "y = Gemm <transB = 1> (x, c, d)",
        lambda x, c, d: x @ c.T + d,
        {"c": MATRIX, "d": VECTOR},
    ),
    Case(
        "Gemm",
        (4,),
        "y = Gemm <alpha = 0.5, beta = 2.0> (x, c, x)",
        lambda x, c: 0.5 * x @ c + 2 * x,
        {"c": MATRIX[:, :4]},
    ),
    Case(
        "Gemm",
        (4,),
        f"{MEAN} y = Gemm (x, c, m)",
        lambda x, c, axis: x @ c + mean_of(x, 1),
        {"c": MATRIX, "axis": ints(1)},
    ),
    Case(
        "Gemm",
        (4,),
        "g = Gemm <transA = 1, alpha = 0.5> (x, x) y = MatMul (x, g)",
        lambda x: x @ (0.5 * x.T @ x),
    ),
    Case("Gemm", (4,), "g = Gemm <transB = 1> (x, x) y = MatMul (g, x)", lambda x: x @ x.T @ x),
    Case("Gemm", (4,), "t = Transpose (x) g = Gemm (x, t) y = MatMul (g, x)", lambda x: x @ x.T @ x),
    Case(
        "Gemm",
        (4,),
        "t = Transpose (x) e = Exp (x) g = Gemm <transA = 1, transB = 1> (t, e) y = MatMul (g, x)",
        lambda x: x @ x.exp().T @ x,
    ),
    Case(
        "InstanceNormalization",
        (4, 6),
        "y = InstanceNormalization <epsilon = 0.001> (x, c, d)",
        lambda x, c, d: F.instance_norm(x, weight=c, bias=d, eps=1e-3),
        {"c": SCALE, "d": BIAS},
    ),
    Case(
        "InstanceNormalization",
        (4, 2, 3),
        "y = InstanceNormalization (x, c, d)",
        lambda x, c, d: F.instance_norm(x),
        {"c": np.ones(4, np.float32), "d": np.zeros(4, np.float32)},
    ),
    Case(
        "InstanceNormalization",
        (4, 6),
        "y = InstanceNormalization (x, c, d)",
        lambda x, c, d: F.instance_norm(x, bias=d),
        {"c": np.ones(4, np.float32), "d": BIAS},
    ),
    Case(
        "LayerNormalization",
        (3, 4),
        "y = LayerNormalization <epsilon = 0.01> (x, c, d)",
        lambda x, c, d: F.layer_norm(x, (4,), c, d, eps=1e-2),
        {"c": SCALE, "d": BIAS},
    ),
    Case(
        "LayerNormalization",
        (4, 5),
        "y = LayerNormalization <axis = 1> (x, c)",
        lambda x, c: F.layer_norm(x, (4, 5), c),
        {"c": MATRIX},
    ),
    Case(
        "GroupNormalization",
        (4, 2, 3),
        "y = GroupNormalization <num_groups = 2> (x, c, d)",
        lambda x, c, d: F.group_norm(x, 2, c, d),
        {"c": SCALE, "d": BIAS},
        opset=21,
    ),
    Case(
        "BatchNormalization",
        (4, 2, 3),
        "y = BatchNormalization <epsilon = 0.1> (x, c, d, d, e)",
        lambda x, c, d, e: F.batch_norm(x, d, e, c, d, eps=0.1),
        {"c": SCALE, "d": BIAS, "e": BIAS**2},
    ),
    *(
        Case(
            "ConvTranspose",
            (4, *size),
            f"y = ConvTranspose <{options}> (x, k, b)",
            lambda x, k, b, given=given: getattr(F, f"conv_transpose{x.ndim - 2}d")(x, k, b, **given),
            {"k": normal(4, 6 // given.get("groups", 1), *kernel), "b": normal(6, seed=1)},
        )
        for size, kernel, options, given in (
            ((3, 4), (3, 3), "pads = [1, 1, 1, 1]", {"padding": 1}),
            ((3, 4), (4, 4), "strides = [2, 2], pads = [1, 1, 1, 1]", {"stride": 2, "padding": 1}),
            (
                (3, 4),
                (3, 2),
                "strides = [3, 2], output_padding = [2, 1], group = 2",
                {"stride": (3, 2), "output_padding": (2, 1), "groups": 2},
            ),
            ((5,), (3,), "dilations = [2]", {"dilation": 2}),
        )
    ),
    Case("Softmax", (3, 4), "y = Softmax (x)", lambda x: x.softmax(-1)),
    Case("Softmax", (3, 4), "y = Softmax <axis = 1> (x)", lambda x: x.softmax(1)),
    Case("Softmax", (5, 3), f"{SCORES} p = Softmax (s) y = MatMul (p, x)", lambda x: attend(x)),
    Case(
        "Softmax", (2, 5, 3), f"{SCORES4} p = Softmax <axis = 3> (s) y = MatMul (p, x)", lambda x: attend(x)
    ),
    Case(
        "Softmax",
        (2, 5, 3),
        f"{SCORES4} p = Softmax (s) u = Transpose <perm = [0, 1, 3, 2]> (p) y = MatMul (t, u)",
        lambda x: attend(x).mT,
    ),
    Case("Softmax", (3, 3), f"{SCORES} p = Softmax (s) y = MatMul (p, x)", lambda x: attend(x)),
    Case("Softmax", (5, 3), f"{SCORES} p = Softmax <axis = 1> (s) y = MatMul (p, x)", lambda x: attend(x, 1)),
    Case("Softmax", (5, 3), f"{SCORES} p = Softmax (s) y = MatMul (t, p)", lambda x: x.mT @ weights_of(x)),
    Case(
        "Softmax",
        (5, 3),
        f"{SCORES} p = Softmax (s) z = MatMul (p, x) e = Tanh (x) q = MatMul (p, e) y = Add (z, q)",
        lambda x: attend(x) + weights_of(x) @ x.tanh(),
    ),
    Case(
        "Softmax",
        (2, 5, 3),
        f"{SCORES4} p = Softmax (s) u = Transpose <perm = [0, 2, 1, 3]> (p)"
        " v = Transpose <perm = [0, 2, 1, 3]> (u) y = MatMul (v, x)",
        lambda x: attend(x),
    ),
    Case("LogSoftmax", (3, 4), "y = LogSoftmax (x)", lambda x: x.log_softmax(-1)),
    Case("LogSoftmax", (3, 4), "y = LogSoftmax <axis = 1> (x)", lambda x: x.log_softmax(1)),
    *(
        Case(op, (3, 4), f"y = {op} <keepdims = {keep}> (x, axis)", reference, {"axis": ints(2, -2)})
        for keep in (0, 1)
        for op, reference in {
            "ReduceSum": lambda x, axis, keep=bool(keep): x.sum((1, 2), keepdim=keep),
            "ReduceMean": lambda x, axis, keep=bool(keep): x.mean((1, 2), keepdim=keep),
            "ReduceSumSquare": lambda x, axis, keep=bool(keep): (x**2).sum((1, 2), keepdim=keep),
            "ReduceL2": lambda x, axis, keep=bool(keep): (x**2).sum((1, 2), keepdim=keep).sqrt(),
            "ReduceLogSumExp": lambda x, axis, keep=bool(keep): x.logsumexp((1, 2), keepdim=keep),
            "ReduceL1": lambda x, axis, keep=bool(keep): x.abs().sum((1, 2), keepdim=keep),
            "ReduceMax": lambda x, axis, keep=bool(keep): x.amax((1, 2), keepdim=keep),
            "ReduceMin": lambda x, axis, keep=bool(keep): x.amin((1, 2), keepdim=keep),
        }.items()
    ),
    Case(
        "ReduceMax",
        (3, 4),
        "r = Relu (x) n = Neg (r) y = ReduceMax (n, axis)",
        lambda x, axis: (-x.relu()).amax(2, True),
        {"axis": ints(2)},
    ),  # zeros share
    Case("ReduceSum", (4,), "s = ReduceSum (x) y = Mul (x, s)", lambda x: x * x.sum()),
    Case("GlobalAveragePool", (2, 3, 4), "y = GlobalAveragePool (x)", lambda x: x.mean((2, 3), keepdim=True)),
    Case(
        "MaxPool",
        (2, 4, 6),
        "y = MaxPool <kernel_shape = [2, 3], strides = [2, 3]> (x)",
        lambda x: F.max_pool2d(x, (2, 3)),
    ),
    Case(
        "MaxPool", (3, 8), "y = MaxPool <kernel_shape = [4], strides = [4]> (x)", lambda x: F.max_pool1d(x, 4)
    ),
    Case(
        "AveragePool",
        (2, 4, 6),
        "y = AveragePool <kernel_shape = [2, 3], strides = [2, 3]> (x)",
        lambda x: F.avg_pool2d(x, (2, 3)),
    ),
    Case(
        "Resize",
        (2, 2, 3),
        'y = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">'
        " (x, , c)",
        lambda x, c: F.interpolate(x, scale_factor=(3.0, 2.0)),
        {"c": np.float32([1, 1, 3, 2])},
    ),
    Case("Reshape", (3, 4), "y = Reshape (x, c)", lambda x, c: x.reshape(-1, 2, 6), {"c": ints(-1, 2, 6)}),
    Case(
        "Reshape",
        (4,),
        "g = Gemm <transB = 1> (x, x) s = Shape (g) r = Reshape (g, s) y = MatMul (r, x)",
        lambda x: x @ x.T @ x,
    ),
    Case("Flatten", (3, 4), "y = Flatten <axis = 1> (x)", lambda x: x.flatten(1)),
    Case("Squeeze", (1, 4), "y = Squeeze (x, c)", lambda x, c: x.squeeze(1), {"c": ints(1)}),
    Case("Unsqueeze", (4,), "y = Unsqueeze (x, c)", lambda x, c: x[:, None, :, None], {"c": ints(1, 3)}),
    Case("Transpose", (3, 4, 5), "y = Transpose <perm = [0, 2, 3, 1]> (x)", lambda x: x.permute(0, 2, 3, 1)),
    Case("Transpose", (4,), "t = Transpose (x) y = Transpose (t)", lambda x: x),
    Case("Expand", (1, 4), "y = Expand (x, c)", lambda x, c: x.expand(-1, 3, 4), {"c": ints(1, 3, 1)}),
    Case(
        "Expand",
        (4,),
        "z = Expand (x, c) y = ReduceSum <keepdims = 0> (z, axis)",
        lambda x, c, axis: 5 * x,
        {"c": ints(5, 1, 1), "axis": ints(0)},
    ),
    Case(
        "Concat",
        (3, 4),
        f"{MEAN} y = Concat <axis = 1> (m, x)",
        lambda x, axis: torch.cat([mean_of(x, 1), x], 1),
        {"axis": ints(1)},
    ),
    Case(
        "Concat", (3, 4), "e = Exp (x) y = Concat <axis = -1> (x, e)", lambda x: torch.cat([x, x.exp()], -1)
    ),
    Case(
        "Split",
        (6,),
        "a, b, d = Split <axis = 1> (x, c) e = Exp (d) f = ReduceSum <keepdims = 1> (e, one) y = Mul (b, f)",
        lambda x, c, one: x[:, 1:3] * x[:, 3:].exp().sum(1, True),
        {"c": ints(1, 2, 3), "one": ints(1)},
    ),
    Case(
        "Slice",
        (5, 6),
        "y = Slice (x, b, e, a)",
        lambda x, b, e, a: x[:, 1:4, -2:],
        {"b": ints(-2, 1), "e": ints(2**62, 4), "a": ints(2, 1)},
    ),
    Case(
        "Slice",
        (5,),
        "y = Slice (x, b, e, a, s)",
        lambda x, b, e, a, s: x[:, :-1],
        {"b": ints(0), "e": ints(-1), "a": ints(-1), "s": ints(1)},
    ),
    *(
        Case(
            "Slice",
            (7, 6),
            "y = Slice (x, b, e, a, s)",
            lambda x, b, e, a, s, cut=cut: cut(x),
            dict(zip("beas", (ints(*values) for values in given), strict=True)),
        )
        for cut, given in (
            (lambda x: x[:, ::2], ((0,), (2**62,), (1,), (2,))),
            (lambda x: x[:, 1:6:3], ((1,), (6,), (1,), (3,))),
            (lambda x: x[:, 5:6:3], ((5,), (6,), (-2,), (3,))),
            (lambda x: x[:, 1::2, 2:5:2], ((1, 2), (99, 5), (1, 2), (2, 2))),
            (lambda x: x[:, 2:, ::5], ((2, 0), (99, 99), (1, 2), (1, 5))),
            (lambda x: x.flip(1), ((-1,), (-(2**62),), (1,), (-1,))),
            (lambda x: x.flip(1, 2), ((-1, -1), (-99, -99), (1, -1), (-1, -1))),
            (lambda x: x.flip(2)[:, :, 1:5:2], ((4,), (0,), (2,), (-2,))),
        )
    ),
    Case("Tile", (3, 4), "y = Tile (x, c)", lambda x, c: x.repeat(1, 2, 3), {"c": ints(1, 2, 3)}),
    Case("Tile", (3, 4), "y = Tile (x, c)", lambda x, c: x, {"c": ints(1, 1, 1)}),
    Case(
        "DepthToSpace",
        (12, 2, 3),
        'y = DepthToSpace <blocksize = 2, mode = "CRD"> (x)',
        lambda x: F.pixel_shuffle(x, 2),
    ),
    Case(
        "DepthToSpace",
        (12, 2, 3),
        "y = DepthToSpace <blocksize = 2> (x)",
        lambda x: F.pixel_shuffle(x.unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2), 2),
    ),
    Case(
        "SpaceToDepth",
        (3, 4, 6),
        "y = SpaceToDepth <blocksize = 2> (x)",
        lambda x: F.pixel_unshuffle(x, 2).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2),
    ),
    Case("Trilu", (4, 5), "y = Trilu <upper = 0> (x, k)", lambda x, k: x.tril(1), {"k": np.int64(1)}),
    Case("Trilu", (4, 5), "y = Trilu (x)", lambda x: x.triu()),
    Case("Gather", (3, 4), "y = Gather <axis = 1> (x, c)", lambda x, c: x[:, 2], {"c": np.int64(2)}),
    Case("Gather", (3, 4), "y = Gather <axis = -1> (x, c)", lambda x, c: x[:, :, 3:], {"c": ints(-1)}),
    Case(
        "GatherElements",
        (3, 4),
        "i = ArgMax <axis = 1> (x) y = GatherElements <axis = 1> (x, i)",
        lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    ),
    Case("Pad", (4, 5), "y = Pad (x, c)", lambda x, c: F.pad(x, (0, 3, 1, 2)), {"c": PADDED}),
    Case(
        "Pad",
        (4, 5),
        "y = Pad (x, c)",
        lambda x, c: F.pad(x, (-1, 2, 1, -2)),
        {"c": ints(0, 1, -1, 0, -2, 2)},
    ),
    Case(
        "Pad", (5,), "y = Pad (x, c, , a)", lambda x, c, a: F.pad(x, (2, 1)), {"c": ints(2, 1), "a": ints(-1)}
    ),
    *(
        Case(
            "Pad",
            (2, 4, 5),
            f'y = Pad <mode = "{mode}"> (x, c)',
            lambda x, c, torchs=torchs: F.pad(x, (2, 3, 1, 0), mode=torchs),
            {"c": ints(0, 0, 1, 2, 0, 0, 0, 3)},
        )
        for mode, torchs in (("reflect", "reflect"), ("edge", "replicate"), ("wrap", "circular"))
    ),
    *(
        case
        for kernel, stride, pad, dilation, ceil in (
            (3, 2, 1, 1, False),
            (3, 1, 1, 1, False),
            (2, 2, 0, 1, False),
            (2, 3, 0, 1, False),
            (3, 2, 0, 1, True),
            (2, 2, 0, 2, False),
            ((3, 2), (1, 2), (1, 0), (2, 1), True),
        )
        for case in pools(kernel, stride, pad, dilation, ceil)
    ),
    *(
        Case(
            "Resize",
            (2, 5, 6),
            f"y = Resize <{attributes}, axes = [2, 3]> (x, , , c)",
            lambda x, c, options=options: F.interpolate(x, size=(4, 9), **options),
            {"c": ints(4, 9)},
        )
        for attributes, options in (
            ('mode = "linear"', {"mode": "bilinear"}),
            (
                'mode = "linear", coordinate_transformation_mode = "align_corners"',
                {"mode": "bilinear", "align_corners": True},
            ),
            ('mode = "cubic", cubic_coeff_a = -0.75', {"mode": "bicubic"}),
            ('mode = "linear", antialias = 1, exclude_outside = 1', {"mode": "bilinear", "antialias": True}),
            (
                'mode = "cubic", antialias = 1, cubic_coeff_a = -0.5, exclude_outside = 1',
                {"mode": "bicubic", "antialias": True},
            ),
            (
                'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"',
                {"mode": "nearest"},
            ),
        )
    ),
    Case(
        "Resize",
        (2, 5),
        'y = Resize <mode = "linear", axes = [2]> (x, , c)',
        lambda x, c: F.interpolate(x, scale_factor=1.7, mode="linear", recompute_scale_factor=False),
        {"c": np.float32([1.7])},
    ),
    Case("Gather", (4, 5), "y = Gather <axis = 1> (x, c)", lambda x, c: x[:, c], {"c": ints(2, 0, 2)}),
    Case(
        "Gather",
        (4, 5),
        "y = Gather <axis = 2> (x, c)",
        lambda x, c: x[:, :, c],
        {"c": ints(2, -1, 0, 2).reshape(2, 2)},
    ),
    Case(
        "GatherND",
        (4, 5),
        "t = Transpose <perm = [1, 2, 0]> (x) p = GatherND (t, c) y = Transpose (p)",
        lambda x, c: x[:, c[:, 0], c[:, 1]],
        {"c": ints(0, 1, 3, -1, 0, 1).reshape(3, 2)},
    ),
    Case(
        "GatherND",
        (4, 5),
        "t = Transpose <perm = [1, 0, 2]> (x) p = GatherND (t, c) y = Transpose <perm = [2, 0, 1, 3]> (p)",
        lambda x, c: x[:, c[..., 0]],
        {"c": ints(0, 1, 3, 3).reshape(2, 2, 1)},
    ),
    Case(
        "GatherElements",
        (3, 4),
        "r, i = TopK <axis = 1> (x, two) y = GatherElements <axis = 1> (x, i)",
        lambda x, two: x.topk(2, dim=1)[0],
        {"two": ints(2)},
    ),
    *(
        Case(
            "ScatterElements",
            (3, 4),
            "e = Exp (x) u, v = Split <axis = 1> (e, s) z = Shape (u) j = Expand (i, z)"
            f' y = ScatterElements <axis = 1, reduction = "{how}"> (x, j, u)',
            lambda x, i, s, how=how: put(x, i.expand(len(x), -1, -1), x.exp()[:, :2], how),
            {"i": np.int64([[[2, 0, 1, 2], [0, 1, 2, 0]]]), "s": ints(2, 1)},
        )
        for how in ("none", "add")
    ),
    Case("TopK", (5,), "y, i = TopK <axis = 1> (x, k)", lambda x, k: x.topk(3, dim=1)[0], {"k": ints(3)}),
    Case(
        "TopK",
        (4, 3),
        "y, i = TopK <axis = 1, largest = 0> (x, k)",
        lambda x, k: x.sort(dim=1)[0],
        {"k": ints(4)},
    ),
    Case("TopK", (4,), "y, i = TopK (x, k)", lambda x, k: x.amax(1, True), {"k": ints(1)}),
    *(
        Case(
            "CumSum",
            (3, 4),
            f"y = CumSum <exclusive = {exclusive}, reverse = {reverse}> (x, c)",
            lambda x, c, e=exclusive, r=reverse: running(x, bool(e), bool(r)),
            {"c": np.int64(-1)},
        )
        for exclusive in (0, 1)
        for reverse in (0, 1)
    ),
    Case(
        "ReduceProd",
        (3, 4),
        "r = Relu (x) y = ReduceProd <keepdims = 0> (r, c)",
        lambda x, c: x.relu().prod(1),
        {"c": ints(1)},
    ),  # with zeros
    Case("ReduceProd", (3, 4), "y = ReduceProd (x, c)", lambda x, c: x.prod(2, True), {"c": ints(-1)}),
    Case("Mod", (3, 4), "y = Mod <fmod = 1> (x, c)", lambda x, c: x.fmod(c), {"c": VECTOR}),
]
