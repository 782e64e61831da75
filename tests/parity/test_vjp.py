"""Every gradient rule against PyTorch's autograd in float64, at batch sizes that no graph was made for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from goldens import relative_error
from onnx_graphs import differentiated, op_types, parse, run
from torch.nn import functional as F

from admtrt.errors import ExportError
from admtrt.export.differentiate import add_input_gradient
from admtrt.export.vjp import RULES

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

# One operator in float32 against float64: some 10 roundings of 6e-8.
TOLERANCE = 2e-6
BATCHES = (1, 3)


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
]


def weighted(case: Case) -> onnx.ModelProto:
    """The case's graph, its scalar being the sum of y times the input w."""
    x = torch.from_numpy(normal(2, *case.shape))
    y_type = ", ".join(["N", *map(str, _reference(case, x.double()).shape[1:])])
    text = f"""
        g (float[N, {", ".join(map(str, case.shape))}] x, float[{y_type}] w)
            => (float[N] value) <float[{y_type}] y> {{
            {case.body}
            weighted = Mul (y, w)
            flat = Flatten <axis = 1> (weighted)
            value = ReduceSum <keepdims = 0> (flat, last)
        }}"""
    return parse(text, case.constants | {"last": ints(1)}, opset=case.opset)


def _reference(case: Case, x: torch.Tensor) -> torch.Tensor:
    constants = {name: torch.from_numpy(np.asarray(value)) for name, value in case.constants.items()}
    return case.reference(x, **{k: v.double() if v.is_floating_point() else v for k, v in constants.items()})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: Case) -> None:
    model = differentiated(weighted(case))
    for batch in BATCHES:
        x = normal(batch, *case.shape, seed=batch)
        x = np.abs(x) + np.float32(0.5) if case.positive else x
        leaf = torch.from_numpy(x).double().requires_grad_()
        y = _reference(case, leaf)
        w = normal(*y.shape, seed=10 + batch)
        (expected,) = torch.autograd.grad((y * torch.from_numpy(w)).sum(), leaf)
        out = run(model, x=x, w=w)
        assert relative_error(out["grad"], expected) <= TOLERANCE
        np.testing.assert_allclose(
            out["value"], (y * torch.from_numpy(w)).reshape(batch, -1).sum(1).detach(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("product", "large"),
    [
        ("y = MatMul (p, x)", 0),
        ("u = Transpose <perm = [0, 1, 3, 2]> (p) y = MatMul (t, u)", 0),
        ("y = MatMul (t, p)", 1),  # the columns of the product, not its rows, belong to the weights
    ],
)
def test_a_softmax_that_weighs_is_summed_over_channels(product: str, large: int) -> None:
    """Sums over products of two tensors of all pairs of positions, which are the largest of all."""

    def reference(x: torch.Tensor) -> torch.Tensor:
        y = weights_of(x).mT @ x if large else attend(x)
        return y if product.startswith("y = MatMul (p") else y.mT

    model = differentiated(
        weighted(Case("Softmax", (2, 5, 3), f"{SCORES4} p = Softmax (s) {product}", reference))
    )
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim][-2:]
        for value in model.graph.value_info
    }
    summed = [node.input[0] for node in model.graph.node if node.op_type == "ReduceSum"]
    assert sum(shapes.get(name) == [5, 5] for name in summed) == large


@pytest.mark.parametrize("conv_backward", ["flipped", "transposed"])
@pytest.mark.parametrize(
    ("kernel", "stride", "pads", "dilation", "group", "size"),
    [
        ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, (5, 6)),
        ((3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1, (5, 6)),
        ((3, 3), (1, 1), (3, 0, 3, 0), (1, 1), 1, (5, 6)),  # pads beyond the kernel's reach
        ((2, 4), (1, 1), (1, 2, 0, 1), (1, 1), 1, (5, 6)),
        ((3, 2), (1, 1), (2, 1, 2, 0), (2, 1), 1, (5, 6)),
        ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, (3, 4)),
        ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1, (5, 6)),
        ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1, (5, 6)),
        ((3, 3), (3, 2), (0, 1, 0, 1), (1, 1), 1, (8, 7)),
        ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2, (5, 6)),
        ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1), 4, (5, 6)),
        ((3,), (1,), (1, 1), (1,), 1, (7,)),
        ((1,), (1,), (0, 0), (1,), 1, (7,)),
    ],
)  # fmt: skip
def test_conv(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pads: tuple[int, ...],
    dilation: tuple[int, ...],
    group: int,
    size: tuple[int, ...],
    conv_backward: Any,
) -> None:
    rank = len(kernel)

    def reference(x: torch.Tensor, k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        both_ends = [end for axis in reversed(range(rank)) for end in (pads[axis], pads[axis + rank])]
        conv = F.conv2d if rank == 2 else F.conv1d
        return conv(F.pad(x, both_ends), k, b, stride=stride, dilation=dilation, groups=group)

    body = (
        f"y = Conv <strides = {list(stride)}, pads = {list(pads)}, dilations = {list(dilation)}, "
        f"group = {group}> (x, k, b)"
    )
    constants = {"k": normal(8, 4 // group, *kernel), "b": normal(8, seed=1)}
    case = Case("Conv", (4, *size), body, reference, constants)
    model = differentiated(weighted(case), conv_backward=conv_backward)
    for batch in BATCHES:
        x = normal(batch, *case.shape, seed=batch)
        leaf = torch.from_numpy(x).double().requires_grad_()
        y = _reference(case, leaf)
        w = normal(*y.shape, seed=7)
        (expected,) = torch.autograd.grad((y * torch.from_numpy(w)).sum(), leaf)
        assert relative_error(run(model, x=x, w=w)["grad"], expected) <= TOLERANCE
    shared = conv_backward == "transposed" or stride != (1,) * rank or group > 1 or max(pads) > 2
    assert ("ConvTranspose" in op_types(model)) == shared


def test_every_rule_has_a_case() -> None:
    assert {case.op for case in CASES} | {"Conv"} == set(RULES)
    for case in CASES:
        assert f"{case.op} " in case.body, case


def test_bounds_of_clip_and_zeros_as_in_pytorch() -> None:
    """It passes at the ends of Clip; at 0 those of Relu, Abs, the norm are 0; of equals the first has it."""
    x = np.float32([[-1, 0, 1], [0, 0, 0]])
    for body, reference in (
        ("y = Clip (x, low, high)", lambda v: v.clamp(-1, 1)),
        ("y = Relu (x)", torch.relu),
        ("y = Abs (x)", torch.abs),
        ("y = ReduceL2 <keepdims = 1> (x, one)", lambda v: v.norm(dim=1, keepdim=True)),
        (
            "u = Unsqueeze (x, one) p = MaxPool <kernel_shape = [3], strides = [3]> (u) y = Squeeze (p, one)",
            lambda v: F.max_pool1d(v[:, None], 3)[:, 0],
        ),
    ):
        model = parse(
            f"g (float[N, 3] x) => (float[N] value) {{ {body} value = ReduceSum <keepdims = 0> (y, one) }}",
            {"low": np.float32(-1), "high": np.float32(1), "one": ints(1)},
        )
        leaf = torch.from_numpy(x).requires_grad_()
        (expected,) = torch.autograd.grad(reference(leaf).sum(), leaf)
        np.testing.assert_array_equal(run(differentiated(model), x=x)["grad"], expected, err_msg=body)


REFUSED = [
    ("CumSum", "y = CumSum (x, zero)"),
    ("Clip", "m = ReduceMin <keepdims = 0> (x) y = Clip (x, m)"),
    ("Pow", "y = Pow (x, vector)"),
    ("Pow", "y = Pow (x, x)"),
    ("MatMul", "m = MatMul (x, vector) y = Add (x, m)"),
    ("Gather", "y = Gather <axis = 1> (x, two)"),
    ("Tile", "t = Tile (x, pair) s = ReduceSum <keepdims = 1> (t, zeros) y = Add (x, s)"),
    ("Slice", "y = Slice (x, zeros, ones, zeros)"),
    ("Pad", 'y = Pad <mode = "edge"> (x, pads)'),
    ("Concat", "y = Concat <axis = 0> (x, x)"),
    ("ReduceMean", "m = ReduceMean (x) y = Add (x, m)"),
    ("LayerNormalization", "e = Exp (x) y = LayerNormalization (x, e)"),
    ("LayerNormalization", "e = Exp (x) y = LayerNormalization (x, vector, e)"),
    ("Max", "y = Max (x, vector, x)"),
    (
        "If",
        "y = If (yes) <then_branch = a () => (u) { u = Neg (x) }, else_branch = b () => (v) { v = Abs (x) }>",
    ),
]
REFUSED_IMAGES = [
    ("AveragePool", "y = AveragePool <kernel_shape = [2, 2]> (x)"),
    ("AveragePool", "y = AveragePool <kernel_shape = [3, 3], strides = [3, 3]> (x)"),
    ("AveragePool", "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2], pads = [1, 1, 1, 1]> (x)"),
    ("Resize", 'y = Resize <mode = "linear"> (x, , scales)'),
    ("Resize", 'y = Resize <coordinate_transformation_mode = "asymmetric"> (x, , scales)'),
    (
        "Resize",
        'y = Resize <coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (x, , halves)',
    ),
    ("Conv", 'y = Conv <auto_pad = "SAME_UPPER"> (x, kernel)'),
    ("Conv", "k = ReduceSum <keepdims = 1> (x, zeros) y = Conv (x, k)"),
    ("Conv", "b = ReduceSum <keepdims = 0> (x, rest) y = Conv (x, kernel, b)"),
    ("MaxPool", "y = MaxPool <kernel_shape = [2, 2]> (x)"),
    ("MaxPool", "y = MaxPool <kernel_shape = [2, 2], strides = [2, 2], dilations = [2, 2]> (x)"),
    ("ConvTranspose", 'y = ConvTranspose <auto_pad = "SAME_UPPER"> (x, kernel)'),
    ("ConvTranspose", "k = ReduceSum <keepdims = 1> (x, zeros) y = ConvTranspose (x, k)"),
]


@pytest.mark.parametrize(
    ("op", "body", "shape"), [(*c, "4") for c in REFUSED] + [(*c, "4, 4, 4") for c in REFUSED_IMAGES]
)
def test_refusals_name_the_operator(op: str, body: str, shape: str) -> None:
    """What no rule covers is refused, never differentiated wrongly."""
    constants = {
        "zero": np.int64(0), "two": ints(2), "zeros": ints(0), "ones": ints(1), "fours": ints(4),
        "vector": VECTOR, "pads": ints(0, 1, 0, 1), "yes": np.array(True), "rest": ints(0, 2, 3),
        "pair": ints(2, 1),
        "scales": np.float32([1, 1, 2, 2]), "halves": np.float32([1, 1, 0.5, 0.5]),
        "kernel": normal(4, 4, 3, 3),
    }  # fmt: skip
    if op == "Gather":
        constants["two"] = ints(1, 2)
    text = (
        f"g (float[N, {shape}] x) => (float[N] value) {{ {body} value = ReduceSum <keepdims = 0> (y, last) }}"
    )
    model = parse(text, constants | {"last": ints(*range(1, 1 + len(shape.split(","))))})
    with pytest.raises(ExportError, match=op):
        differentiated(model)


def test_other_versions_of_operators_are_refused() -> None:
    text = """g (float[N, 4] x) => (float[N] value) <float[N, 4] y> {
        y = GroupNormalization <num_groups = 2> (x, groups, groups)
        value = ReduceSum <keepdims = 0> (y, c)
    }"""
    with pytest.raises(ExportError, match="GroupNormalization"):
        differentiated(parse(text, {"c": ints(1), "groups": normal(2)}, opset=18))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wrt": "z"}, r"no input 'z'; it has \['x', 'u'\]"),
        ({"of": "z"}, r"no output 'z'; it has \['value'\]"),
        ({"wrt": "u"}, "'value' does not depend on input 'u'"),
        ({"name": "u"}, "already has an input or output 'u'"),
    ],
)
def test_names_that_do_not_fit(arguments: dict[str, str], message: str) -> None:
    text = "g (float[N, 4] x, float[N] u) => (float[N] value) { value = ReduceSum <keepdims = 0> (x, c) }"
    model = ir.serde.deserialize_model(parse(text, {"c": ints(1)}))
    with pytest.raises(ExportError, match=message):
        add_input_gradient(model, **{"wrt": "x", "of": "value", "name": "grad"} | arguments)


def test_a_path_through_integers_carries_no_gradient() -> None:
    text = "g (float[N] x) => (float[N] value) { i = Cast <to = 7> (x) value = Cast <to = 1> (i) }"
    with pytest.raises(ExportError, match="does not depend"):
        differentiated(parse(text))


def test_softplus_far_below_zero() -> None:
    """Its gradient is all of log p's where p is near 1: each element has to be exact, not the largest."""
    case = Case("Softplus", (13,), "y = Softplus (x)", F.softplus)
    x = np.float32([[-87, -40, -20, -18, -17, -16, -14, -12, -5, 0, 5, 20, 88]])
    got = run(differentiated(weighted(case)), x=x, w=np.ones_like(x))["grad"]
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-x.astype(np.float64))), rtol=2e-6)


@pytest.mark.parametrize("label", [0, 1, 3])
@pytest.mark.parametrize("lead", [0.0, 8.0, 20.0, 40.0])
def test_log_softmax_of_a_certain_class(lead: float, label: int) -> None:
    """Every element is as exact as p, where 1 - p and the rest of the gradient are far below p's rounding."""
    case = Case("LogSoftmax", (5,), "y = LogSoftmax (x)", lambda x: x.log_softmax(-1))
    x = normal(3, 5, seed=7)
    x[:, 1] += np.float32(lead)
    w = np.zeros_like(x)
    w[:, label] = 1
    p = torch.from_numpy(x).double().softmax(-1).numpy()
    rest = np.stack([np.delete(row, label).sum() for row in p])
    expected = -p
    expected[:, label] = rest  # 1 - p of this class, which float64 itself does not hold for a lead of 40
    got = run(differentiated(weighted(case)), x=x, w=w)["grad"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
