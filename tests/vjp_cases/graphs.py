"""A case as a graph, and its value by PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from onnx_graphs import parse

from vjp_cases.case import Case, ints, normal

if TYPE_CHECKING:
    import onnx


def weighted(case: Case) -> onnx.ModelProto:
    """The case's graph, its scalar being the sum of y times the input w."""
    x = torch.from_numpy(normal(2, *case.shape))
    y_type = ", ".join(["N", *map(str, value_of(case, x.double()).shape[1:])])
    text = f"""
        g (float[N, {", ".join(map(str, case.shape))}] x, float[{y_type}] w)
            => (float[N] value) <float[{y_type}] y> {{
            {case.body}
            weighted = Mul (y, w)
            flat = Flatten <axis = 1> (weighted)
            value = ReduceSum <keepdims = 0> (flat, last)
        }}"""
    return parse(text, case.constants | {"last": ints(1)}, opset=case.opset)


def value_of(case: Case, x: torch.Tensor) -> torch.Tensor:
    constants = {name: torch.from_numpy(np.asarray(value)) for name, value in case.constants.items()}
    return case.reference(x, **{k: v.double() if v.is_floating_point() else v for k, v in constants.items()})
