"""Cases of normalisations and softmax."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from vjp_cases.case import BIAS, MATRIX, SCALE, Case

SCORES = "t = Transpose <perm = [0, 2, 1]> (x) m = MatMul (x, t) s = Tanh (m)"
SCORES4 = "t = Transpose <perm = [0, 1, 3, 2]> (x) m = MatMul (x, t) s = Tanh (m)"


def weights_of(x: torch.Tensor, axis: int = -1) -> torch.Tensor:
    return (x @ x.mT).tanh().softmax(axis)


def attend(x: torch.Tensor, axis: int = -1) -> torch.Tensor:
    return weights_of(x, axis) @ x


CASES = [
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
]
