"""The small graphs of a bundle: the rest of a step beside the networks, elementwise except the threshold.

Each is written node by node from its columns; :mod:`admtrt.schedule.table` has the equations. They compute in
float32 whatever the precision of the networks, because x must not be rounded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir as ir

from admtrt.contract import (
    BATCH,
    NO_GUIDES,
    edit_low_pass_spec,
    edit_spec,
    event_shape,
    guide_input,
    largest_values,
    threshold_quantile,
    threshold_spec,
    update_full_spec,
    update_spec,
)
from admtrt.export.capture import OPSET
from admtrt.schedule.edits import EDIT
from admtrt.schedule.guides import columns_with_guides
from admtrt.schedule.table import UPDATE, UPDATE_FULL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from admtrt.config import UNetConfig
    from admtrt.contract import GraphName, GraphSpec, Guides, TensorSpec


class _Writer:
    """Writes nodes over the inputs of a graph's spec.

    Args:
        spec: of the graph.
        name: of the graph.
        columns: the columns of its input ``coefficients``, in order.
    """

    def __init__(self, spec: GraphSpec, name: str, columns: Sequence[str]) -> None:
        self._spec = spec
        self._name = name
        self._tape = ir.tape.Tape()
        self.inputs = {tensor.name: _value(tensor) for tensor in spec.inputs}
        row = [0, len(columns), *[1] * (len(spec.inputs[0].shape) - 2)]
        sizes, shape = self.ints("sizes", [1] * len(columns)), self.ints("row", row)
        given = self.op("Reshape", self.inputs["coefficients"], shape)
        split = self._tape.op_multi_out(
            "Split", [given, sizes], attributes={"axis": 1}, num_outputs=len(columns)
        )
        self.columns = dict(zip(columns, split, strict=True))

    def ints(self, name: str, values: Sequence[int]) -> ir.Value:
        """A constant of whole numbers."""
        return self._tape.initializer(ir.tensor(list(values), dtype=ir.DataType.INT64, name=name))

    def number(self, name: str, value: float) -> ir.Value:
        """A constant in float32."""
        return self._tape.initializer(ir.tensor(value, dtype=ir.DataType.FLOAT, name=name))

    def op(self, kind: str, *operands: ir.Value, **attributes: int | list[int]) -> ir.Value:
        """Add a node with one output."""
        return self._tape.op(kind, list(operands), attributes=attributes or None)

    def split(
        self, kind: str, operands: Sequence[ir.Value], outputs: int, **attributes: int
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs."""
        return self._tape.op_multi_out(kind, list(operands), attributes=attributes, num_outputs=outputs)

    def mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """a b."""
        return self.op("Mul", a, b)

    def add(self, *terms: ir.Value) -> ir.Value:
        """The sum from left to right."""
        total = terms[0]
        for term in terms[1:]:
            total = self.op("Add", total, term)
        return total

    def within(self, value: ir.Value, bound: ir.Value) -> ir.Value:
        """clamp(value, -bound, bound)."""
        return self.op("Max", self.op("Min", value, bound), self.op("Neg", bound))

    def model(self, *outputs: ir.Value) -> ir.Model:
        """The finished graph."""
        for made, tensor in zip(outputs, self._spec.outputs, strict=True):
            declared = _value(tensor)
            made.name, made.type, made.shape = declared.name, declared.type, declared.shape
        graph = ir.Graph(
            list(self.inputs.values()),
            list(outputs),
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET},
            name=self._name,
        )
        return ir.Model(graph, ir_version=9)


def _value(tensor: TensorSpec) -> ir.Value:
    return ir.Value(
        name=tensor.name,
        shape=ir.Shape([ir.SymbolicDim(BATCH) if size == BATCH else size for size in tensor.shape]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )


def _value_and_log_weight(config: UNetConfig, write: _Writer) -> tuple[ir.Value, ir.Value]:
    """The first C channels of the network's output, and log w."""
    c, out = write.columns, write.inputs["out"]
    if not config.learn_sigma:
        return out, c["log_weight"]
    sizes = write.ints("channels", [config.in_channels] * 2)
    value, v = write.split("Split", [out, sizes], 2, axis=1)
    return value, write.add(c["log_weight"], write.mul(c["log_weight_from_v"], v))


def update_graph(config: UNetConfig) -> ir.Model:
    """One evaluation's update without memory: DDPM and DDIM."""
    write = _Writer(update_spec(config), "update", UPDATE)
    c, given, mul, add = write.columns, write.inputs, write.mul, write.add
    half = write.number("half", 0.5)
    value, log_weight = _value_and_log_weight(config, write)
    x_0 = write.within(add(mul(c["x0_from_x"], given["x"]), mul(c["x0_from_out"], value)), c["clip"])
    weight, std = write.op("Exp", log_weight), write.op("Exp", mul(half, log_weight))
    x_prev = add(
        mul(c["prev_from_x0"], x_0),
        mul(c["prev_from_x"], given["x"]),
        mul(c["prev_from_out"], value),
        mul(mul(c["guidance"], weight), given["grad"]),
        mul(mul(c["noise"], std), given["noise"]),
    )
    return write.model(x_prev, add(x_0, mul(c["x0_shift"], given["grad"])))


def update_full_graph(config: UNetConfig, guides: Guides = NO_GUIDES) -> ir.Model:
    """One evaluation's update with memory, for every solver and guide.

    The terms of ``update`` come first and in the same order, so that its rows give bit-equal results here.
    """
    columns = columns_with_guides(UPDATE_FULL, tuple(guides))
    write = _Writer(update_full_spec(config, guides), "update_full", columns)
    c, given, mul, add = write.columns, write.inputs, write.mul, write.add
    half = write.number("half", 0.5)
    value, log_weight = _value_and_log_weight(config, write)
    r = write.op("Reshape", given["r"], _column_shape(config, write))
    tensors = _guide_tensors(config, guides, write)
    d = write.within(_unbounded(write, value, tensors), r)
    d = mul(d, write.op("Div", c["clip"], r))
    m = add(d, mul(c["x0_shift"], given["grad"]), *_weighted(write, "x0_shift", tensors))
    weight, std = write.op("Exp", log_weight), write.op("Exp", mul(half, log_weight))
    x_prev = add(
        mul(c["prev_from_x0"], d),
        mul(c["prev_from_x"], given["x"]),
        mul(c["prev_from_out"], value),
        mul(mul(c["guidance"], weight), given["grad"]),
        mul(mul(c["noise"], std), given["noise"]),
        *(mul(c[f"prev_from_{name}"], given[name]) for name in ("saved", "h1", "h2")),
        mul(c["shift"], given["grad"]),
        *(mul(mul(c[f"guidance.{name}"], weight), tensor) for name, tensor in tensors.items()),
        *_weighted(write, "shift", tensors),
    )
    memory = {"x": given["x"], "saved": given["saved"], "x0": m, "h1": given["h1"], "h2": given["h2"]}
    saved = add(*(mul(c[f"saved_from_{name}"], tensor) for name, tensor in memory.items()))
    return write.model(write.within(x_prev, c["state_clip"]), m, saved)


def threshold_graph(
    config: UNetConfig, guides: Guides = NO_GUIDES, quantile: float | None = None
) -> ir.Model:
    """The threshold of dynamic thresholding: the quantile of |y| over a sample, interpolated as NumPy does.

    Only the values above the quantile are needed: a TopK of fixed size.

    Args:
        config: of the network.
        quantile: as for :func:`~admtrt.contract.threshold_quantile`.
    """
    columns = columns_with_guides(UPDATE_FULL, tuple(guides))
    write = _Writer(threshold_spec(config, guides), "threshold", columns)
    size = math.prod(event_shape(config))
    chosen = threshold_quantile(config, quantile)
    position, largest = chosen * (size - 1), largest_values(size, chosen)
    value, _ = _value_and_log_weight(config, write)
    unbounded = _unbounded(write, value, _guide_tensors(config, guides, write))
    flat = write.op("Reshape", write.op("Abs", unbounded), write.ints("flat", [0, size]))
    top, _ = write.split("TopK", [flat, write.ints("largest", [largest])], 2, axis=1, largest=1, sorted=1)
    found = _entry(write, top, "below", largest - 1)
    if largest > 1:
        above = _entry(write, top, "above", largest - 2)
        fraction = write.number("fraction", position - math.floor(position))
        found = write.add(found, write.mul(fraction, write.op("Sub", above, found)))
    column = write.ints("column", [-1])
    clip, bound = (write.op("Reshape", write.columns[name], column) for name in ("clip", "bound"))
    return write.model(write.op("Min", write.op("Max", clip, write.op("Reshape", found, column)), bound))


def _unbounded(write: _Writer, value: ir.Value, tensors: Mapping[str, ir.Value]) -> ir.Value:
    """The prediction of x_0 before clipping."""
    c, given = write.columns, write.inputs
    return write.add(
        write.mul(c["x0_from_x"], given["x"]),
        write.mul(c["x0_from_out"], value),
        write.mul(c["x0_from_grad"], given["grad"]),
        *_weighted(write, "x0_from_grad", tensors),
    )


def _guide_tensors(config: UNetConfig, guides: Guides, write: _Writer) -> dict[str, ir.Value]:
    """The tensor of each guide, shaped as x: a gradient, or the first C channels of a reference's output."""
    tensors = {}
    for name, guide in guides.items():
        tensor = write.inputs[guide_input(name, guide)]
        if guide.kind == "reference" and (guide.network or config).learn_sigma:
            sizes = write.ints(f"channels.{name}", [config.in_channels] * 2)
            tensor, _ = write.split("Split", [tensor, sizes], 2, axis=1)
        tensors[name] = tensor
    return tensors


def _weighted(write: _Writer, column: str, tensors: Mapping[str, ir.Value]) -> list[ir.Value]:
    return [write.mul(write.columns[f"{column}.{name}"], tensor) for name, tensor in tensors.items()]


def _entry(write: _Writer, sorted_values: ir.Value, name: str, index: int) -> ir.Value:
    start, end, axis = (
        write.ints(f"{name}_{part}", [number])
        for part, number in (("start", index), ("end", index + 1), ("axis", 1))
    )
    return write.op("Slice", sorted_values, start, end, axis)


def _column_shape(config: UNetConfig, write: _Writer) -> ir.Value:
    return write.ints("column", [-1, *[1] * len(event_shape(config))])


def edit_graph(config: UNetConfig) -> ir.Model:
    """Known pixels, and noise for a jump back: with z2 the second noise and q the noised reference::

    x'' = x + renoise z2,    x''' = x'' + keep mask (q - x''),    q = reference r + noise z2
    """
    write = _Writer(edit_spec(config), "edit", EDIT)
    state, missing = _renoised(write)
    kept = write.mul(write.mul(write.columns["keep"], write.inputs["mask"]), missing)
    return write.model(write.add(state, kept))


def edit_low_pass_graph(config: UNetConfig, *, products: bool = True) -> ir.Model:
    """As ``edit``, with a filter in place of the mask: x''' = x'' + keep rows (q - x'') columns^T.

    Args:
        config: of the network.
        products: use matrix products; otherwise sums of elementwise products, which engines fuse.
    """
    write = _Writer(edit_low_pass_spec(config), "edit_low_pass", EDIT)
    state, missing = _renoised(write)
    rows, columns = write.inputs["rows"], write.inputs["columns"]
    if products:
        one = write.ints("channel", [1])
        transposed = write.op("Transpose", write.op("Unsqueeze", columns, one), perm=[0, 1, 3, 2])
        passed = write.op("MatMul", write.op("MatMul", write.op("Unsqueeze", rows, one), missing), transposed)
    else:
        # On Turing, a plan cannot mix matrix products in float32 and fp16.
        for matrix, own, image, summed in ((rows, [1, 4], [2], [3]), (columns, [1, 2], [3], [4])):
            name = "rows" if matrix is rows else "columns"
            left = write.op("Unsqueeze", matrix, write.ints(f"{name}_own", own))
            right = write.op("Unsqueeze", missing, write.ints(f"{name}_image", image))
            missing = write.op(
                "ReduceSum", write.mul(left, right), write.ints(f"{name}_summed", summed), keepdims=0
            )
        passed = missing
    return write.model(write.add(state, write.mul(write.columns["keep"], passed)))


def _renoised(write: _Writer) -> tuple[ir.Value, ir.Value]:
    """x'' and q - x''."""
    c, given, mul = write.columns, write.inputs, write.mul
    state = write.add(given["x_prev"], mul(c["renoise"], given["noise2"]))
    noised = write.add(mul(c["reference"], given["reference"]), mul(c["noise"], given["noise2"]))
    return state, write.op("Sub", noised, state)


SMALL_GRAPHS: Mapping[GraphName, Callable[..., ir.Model]] = {
    "update": lambda config, *_: update_graph(config),
    "update_full": lambda config, guides=NO_GUIDES, *_: update_full_graph(config, guides),
    "threshold": threshold_graph,
    "edit": lambda config, *_: edit_graph(config),
    "edit_low_pass": lambda config, *_: edit_low_pass_graph(config),
}
"""Functions that make the small graphs, by name, from a network, further guides and a threshold quantile."""
FOR_ENGINES: Mapping[GraphName, Callable[..., ir.Model]] = {
    **SMALL_GRAPHS,
    "edit_low_pass": lambda config, *_: edit_low_pass_graph(config, products=False),
}
"""The same for the engine form."""
