"""Cases of operators that act on each element."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from vjp_cases.case import FACTORS, MEAN, SQUARES, VECTOR, Case, ints, mean_of, unary

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
        Case(
            op,
            (3, 4),
            f"t = Tanh (x) h = Mul (t, c) y = {op} (h)",
            lambda x, c, inverse=inverse: inverse(x.tanh() * c),
            {"c": np.float32(0.7)},
        )
        for op, inverse in {"Asin": torch.asin, "Acos": torch.acos, "Atanh": torch.atanh}.items()
    ),
    Case(
        "Acosh",
        (3, 4),
        "e = Cosh (x) f = Add (e, c) y = Acosh (f)",
        lambda x, c: (x.cosh() + c).acosh(),
        {"c": np.float32(0.5)},
    ),
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
        lambda x, c: (3 * x / 6 + 0.5).clamp(0, 1),
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
    unary("Softsign", F.softsign),
    Case(
        "ThresholdedRelu",
        (3, 4),
        "y = ThresholdedRelu <alpha = 0.3> (x)",
        lambda x: F.threshold(x, 0.3, 0.0),
    ),
    Case("Sum", (3, 4), "e = Exp (x) y = Sum (x, c, e)", lambda x, c: x + c + x.exp(), {"c": VECTOR}),
    Case("Mean", (3, 4), "e = Exp (x) y = Mean (x, c, e)", lambda x, c: (x + c + x.exp()) / 3, {"c": VECTOR}),
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
    ),  # of a higher rank,
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
    Case("Mod", (3, 4), "y = Mod <fmod = 1> (x, c)", lambda x, c: x.fmod(c), {"c": VECTOR}),
    Case(
        "Mod",
        (3, 4),
        "y = Mod <fmod = 1> (c, x)",
        lambda x, c: torch.fmod(c, x),
        {"c": VECTOR * 9},
        positive=True,
    ),
    Case("Mod", (3, 4), "e = Exp (x) y = Mod <fmod = 1> (x, e)", lambda x: x.fmod(x.exp())),
]
