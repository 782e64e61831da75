"""Every rule and its derivatives against float64 autograd, at batch sizes other than the traced one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from goldens import relative_error
from onnx_graphs import differentiated, op_types, parse, proto, run, session
from torch.nn import functional as F
from vjp_cases import CASES, Case
from vjp_cases.case import VECTOR, ints, normal
from vjp_cases.graphs import value_of, weighted
from vjp_cases.normalisation import SCORES4, attend, weights_of

from admtrt.errors import ExportError
from admtrt.export.differentiate import NothingToDifferentiateError, add_input_gradient
from admtrt.export.passes import simplify
from admtrt.export.vjp import RULES

# One operator in float32 against float64: some 10 roundings of 6e-8; second derivatives have more terms.
TOLERANCE, SECOND = 2e-6, 1e-5
BATCHES = (1, 3)
GRAPHS: dict[int, ir.Model] = {}


def graph_of_gradient(case: Case) -> ir.Model:
    """J' w of the case's y as the output ``grad``; made once."""
    if id(case) not in GRAPHS:
        model = GRAPHS[id(case)] = ir.serde.deserialize_model(weighted(case))
        simplify(model)
        add_input_gradient(model, wrt="x", of="value", name="grad")
        onnx.checker.check_model(proto(model), full_check=True)
    return GRAPHS[id(case)].clone()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule(case: Case) -> None:
    """J' w, and its gradients with respect to x and to w: the latter is J v, the directional derivative."""
    graphs = {"along": graph_of_gradient(case), "product": graph_of_gradient(case)}
    add_input_gradient(graphs["along"], wrt="w", of="grad", name="along", cotangent="v")
    try:
        add_input_gradient(graphs["product"], wrt="x", of="grad", name="product", cotangent="v")
    except NothingToDifferentiateError:
        del graphs["product"]
    sessions = {name: session(proto(graph)) for name, graph in graphs.items()}
    for batch in BATCHES:
        x = normal(batch, *case.shape, seed=batch)
        x = np.abs(x) + np.float32(0.5) if case.positive else x
        leaf = torch.from_numpy(x).double().requires_grad_()
        y = value_of(case, leaf)
        w = torch.from_numpy(normal(*y.shape, seed=10 + batch)).double().requires_grad_()
        v = normal(*x.shape, seed=20 + batch)
        (grad,) = torch.autograd.grad((y * w).sum(), leaf, create_graph=True)
        found: dict[str, np.ndarray] = {}
        for opened in sessions.values():
            found |= run(opened, x=x, w=w.detach().float(), v=v)
        value = (y * w).reshape(batch, -1).sum(1).detach()
        np.testing.assert_allclose(found["value"], value, rtol=1e-4, atol=1e-5)
        assert relative_error(found["grad"], grad.detach()) <= TOLERANCE
        for name, wrt in (("along", w), ("product", leaf)):
            (expected,) = torch.autograd.grad(
                grad, wrt, torch.from_numpy(v).double(), retain_graph=True, materialize_grads=True
            )
            if name in found:
                assert relative_error(found[name], expected) <= SECOND, name
            else:
                assert not expected.any(), "the graph has no curvature, PyTorch's function has"


def test_what_a_rule_writes_has_a_rule() -> None:
    """Or gives no floating-point numbers, so that no derivative passes through it."""
    nodes = [node for case in CASES for node in graph_of_gradient(case).graph]
    written = {node.op_type for node in nodes if node.outputs[0].dtype.is_floating_point()}
    assert written <= set(RULES)


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
        y = value_of(case, leaf)
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
    for body, function in (
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
        (expected,) = torch.autograd.grad(function(leaf).sum(), leaf)
        np.testing.assert_array_equal(run(differentiated(model), x=x)["grad"], expected, err_msg=body)


UNKNOWN = "an axis of unknown size"
VARIES = "input {}, '{}', which must not depend on the differentiated input"
REFUSED = [
    ("CumSum", f"adds up along {UNKNOWN}", "y = CumSum (x, zero)"),
    (
        "ReduceProd",
        "multiplies over several axes or one of unknown size",
        "p = ReduceProd <keepdims = 0> (x) y = Mul (x, p)",
    ),
    ("Clip", VARIES.format(1, "m"), "m = ReduceMin <keepdims = 0> (x) y = Clip (x, m)"),
    ("MatMul", "multiplies by a vector; use matrices", "m = MatMul (x, vector) y = Add (x, m)"),
    ("Gather", f"selects along {UNKNOWN}", "y = Gather <axis = 0> (x, places)"),
    ("GatherND", f"selects along {UNKNOWN}", "y = GatherND (x, pair_of_one)"),
    (
        "Tile",
        f"repeats {UNKNOWN}",
        "t = Tile (x, pair) s = ReduceSum <keepdims = 1> (t, zeros) y = Add (x, s)",
    ),
    ("Slice", f"cuts {UNKNOWN}", "y = Slice (x, zeros, ones, zeros)"),
    ("Pad", f"pads {UNKNOWN}", 'y = Pad <mode = "edge"> (x, batch_pads)'),
    ("Concat", f"joins along {UNKNOWN}", "y = Concat <axis = 0> (x, x)"),
    ("ReduceMean", f"averages over {UNKNOWN}", "m = ReduceMean (x) y = Add (x, m)"),
    ("LayerNormalization", VARIES.format(1, "e"), "e = Exp (x) y = LayerNormalization (x, e)"),
    ("LayerNormalization", VARIES.format(2, "e"), "e = Exp (x) y = LayerNormalization (x, vector, e)"),
    ("Max", "is of 3 values; nest pairs of them", "y = Max (x, vector, x)"),
    (
        "'If'",
        "it is control flow",
        "y = If (yes) <then_branch = a () => (u) { u = Neg (x) }, else_branch = b () => (v) { v = Abs (x) }>",
    ),
]
SAME = 'kernel_shape = [2, 2], auto_pad = "SAME_UPPER"'
REFUSED_IMAGES = [
    ("AveragePool", r"uses auto_pad\nGive explicit padding", f"y = AveragePool <{SAME}> (x)"),
    ("MaxPool", r"uses auto_pad\nGive explicit padding", f"y = MaxPool <{SAME}> (x)"),
    ("Conv", "uses auto_pad; export explicit pads", 'y = Conv <auto_pad = "SAME_UPPER"> (x, kernel)'),
    ("Conv", VARIES.format(1, "k"), "k = ReduceSum <keepdims = 1> (x, zeros) y = Conv (x, k)"),
    ("Conv", VARIES.format(2, "b"), "b = ReduceSum <keepdims = 0> (x, rest) y = Conv (x, kernel, b)"),
    (
        "ConvTranspose",
        "uses auto_pad; export explicit pads",
        'y = ConvTranspose <auto_pad = "SAME_UPPER"> (x, kernel)',
    ),
    (
        "ConvTranspose",
        VARIES.format(1, "k"),
        "k = ReduceSum <keepdims = 1> (x, zeros) y = ConvTranspose (x, k)",
    ),
]


@pytest.mark.parametrize(
    ("op", "reason", "body", "shape"),
    [(*case, "4") for case in REFUSED] + [(*case, "4, 4, 4") for case in REFUSED_IMAGES],
)
def test_refusals_name_the_operator_and_the_reason(op: str, reason: str, body: str, shape: str) -> None:
    """Nodes without a rule are refused, never differentiated wrongly."""
    constants = {
        "zero": np.int64(0), "zeros": ints(0), "ones": ints(1), "places": ints(1, 2),
        "vector": VECTOR, "batch_pads": ints(1, 1, 0, 1), "yes": np.array(True), "rest": ints(0, 2, 3),
        "pair": ints(2, 1), "pair_of_one": ints(0, 1).reshape(2, 1),
        "kernel": normal(4, 4, 3, 3),
    }  # fmt: skip
    text = (
        f"g (float[N, {shape}] x) => (float[N] value) {{ {body} value = ReduceSum <keepdims = 0> (y, last) }}"
    )
    model = parse(text, constants | {"last": ints(*range(1, 1 + len(shape.split(","))))})
    with pytest.raises(ExportError, match=f"{op} .*{reason}"):
        differentiated(model)


def test_other_versions_of_operators_are_refused() -> None:
    text = """g (float[N, 4] x) => (float[N] value) <float[N, 4] y> {
        y = GroupNormalization <num_groups = 2> (x, groups, groups)
        value = ReduceSum <keepdims = 0> (y, c)
    }"""
    with pytest.raises(ExportError, match=r"GroupNormalization before opset 21 .*\nExport with opset 21"):
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
    """Near p = 1 it is the whole gradient of log p: every element must be exact, not only the largest."""
    case = Case("Softplus", (13,), "y = Softplus (x)", F.softplus)
    x = np.float32([[-87, -40, -20, -18, -17, -16, -14, -12, -5, 0, 5, 20, 88]])
    got = run(differentiated(weighted(case)), x=x, w=np.ones_like(x))["grad"]
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-x.astype(np.float64))), rtol=2e-6)


@pytest.mark.parametrize("label", [0, 1, 3])
@pytest.mark.parametrize("lead", [0.0, 8.0, 20.0, 40.0])
def test_log_softmax_of_a_certain_class(lead: float, label: int) -> None:
    """Every element has p's relative precision, even if 1 - p and the others are far below p's rounding."""
    case = Case("LogSoftmax", (5,), "y = LogSoftmax (x)", lambda x: x.log_softmax(-1))
    x = normal(3, 5, seed=7)
    x[:, 1] += np.float32(lead)
    w = np.zeros_like(x)
    w[:, label] = 1
    p = torch.from_numpy(x).double().softmax(-1).numpy()
    rest = np.stack([np.delete(row, label).sum() for row in p])
    expected = -p
    expected[:, label] = rest  # 1 - p of this class, which even float64 loses for a lead of 40
    got = run(differentiated(weighted(case)), x=x, w=w)["grad"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
