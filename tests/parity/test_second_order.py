"""Derivatives of derivatives: every operator that a rule writes has a rule itself, and PyTorch's value."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx_ir as ir
import pytest
import torch
from goldens import relative_error
from onnx_graphs import proto, run, session
from vjp_cases import CASES, Case
from vjp_cases.case import normal
from vjp_cases.graphs import value_of, weighted

from admtrt.export.differentiate import NothingToDifferentiateError, add_input_gradient
from admtrt.export.passes import simplify
from admtrt.export.vjp import RULES

TOLERANCE = 1e-5
"""Some tens of roundings of 6e-8, amplified by cancellation between terms."""
BATCHES = (1, 3)


def graph_of_gradient(case: Case) -> ir.Model:
    """J' w of the case's y as the output ``grad``."""
    model = ir.serde.deserialize_model(weighted(case))
    simplify(model)
    add_input_gradient(model, wrt="x", of="value", name="grad")
    return model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rule_can_be_differentiated(case: Case) -> None:
    """g -> J' g has PyTorch's gradients with respect to x and to g; the latter is J v."""
    along = graph_of_gradient(case)
    add_input_gradient(along, wrt="w", of="grad", name="along", cotangent="v")
    sessions = {"along": session(proto(along))}
    twice = graph_of_gradient(case)
    with contextlib.suppress(NothingToDifferentiateError):
        add_input_gradient(twice, wrt="x", of="grad", name="product", cotangent="v")
        sessions["product"] = session(proto(twice))
    for batch in BATCHES:
        x = normal(batch, *case.shape, seed=batch)
        x = np.abs(x) + np.float32(0.5) if case.positive else x
        leaf = torch.from_numpy(x).double().requires_grad_()
        y = value_of(case, leaf)
        w = torch.from_numpy(normal(*y.shape, seed=10 + batch)).double().requires_grad_()
        v = normal(*x.shape, seed=20 + batch)
        (grad,) = torch.autograd.grad((y * w).sum(), leaf, create_graph=True)
        for name, wrt in (("along", w), ("product", leaf)):
            (expected,) = torch.autograd.grad(
                grad, wrt, torch.from_numpy(v).double(), retain_graph=True, materialize_grads=True
            )
            if name in sessions:
                found = run(sessions[name], x=x, w=w.detach().float(), v=v)[name]
                assert relative_error(found, expected) <= TOLERANCE, name
            else:
                assert not expected.any(), "the graph has no curvature, PyTorch's function has"


def test_what_a_rule_writes_has_a_rule() -> None:
    """Or gives no floating-point numbers, so that no derivative passes through it."""
    written: set[str] = set()
    for case in CASES:
        written |= {
            node.op_type
            for node in graph_of_gradient(case).graph
            if node.outputs[0].dtype.is_floating_point()
        }
    assert written <= set(RULES)
