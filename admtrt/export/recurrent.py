"""Unroll LSTM, GRU and RNN into the plain operators of every step, which have gradient rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from admtrt.export.nodes import int_attribute
from admtrt.export.passes import constant, pass_by

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def unroll(model: ir.Model) -> bool:
    """Unroll recurrences with constant weights and known sequence length; others are left alone."""
    changed = False
    for node in list(model.graph):
        if node.op_type in _GATES and _plain(node):
            unrolled = _Unrolled(model.graph, node)
            results = unrolled.results()
            model.graph.insert_after(node, unrolled.tape.nodes)
            for made in unrolled.tape.nodes:
                made.metadata_props.update(node.metadata_props)
            for old, new in zip(node.outputs, results, strict=False):
                new.shape, new.type = old.shape, old.type
                changed |= pass_by(old, new)
    return changed


def _plain(node: ir.Node) -> bool:
    """True if a node has only the attributes that PyTorch's modules export."""
    x, *weights = node.inputs[:3]
    bias = node.inputs[3] if len(node.inputs) > 3 else None
    others = {"activations", "activation_alpha", "activation_beta", "clip", "layout", "input_forget"}
    return (
        x is not None
        and x.shape is not None
        and isinstance(x.shape[0], int)
        and all(value is not None and value.const_value is not None for value in weights)
        and (bias is None or bias.const_value is not None)
        and all(value is None for value in (*node.inputs[4:5], *node.inputs[7:8]))  # lengths, peepholes
        and not any(node.attributes[name].value for name in others & set(node.attributes))
        and not any(output.is_graph_output() for output in node.outputs)
    )


class _Unrolled:
    """Writes the nodes of an unrolled recurrence."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        self.tape = ir.tape.Tape()
        self.kind, self.gates = node.op_type, _GATES[node.op_type]
        self.x = self._input(0)
        assert self.x.shape is not None
        length = self.x.shape[0]
        assert isinstance(length, int)
        self.length = length

    def _input(self, index: int) -> ir.Value:
        value = self.node.inputs[index]
        assert value is not None
        return value

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return self.tape.op(op_type, list(inputs), attributes=attributes)

    def _constant(self, values: NDArray[np.generic]) -> ir.Value:
        return constant(self.graph, np.ascontiguousarray(values))

    def _ints(self, *values: int) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def _parts(self, value: ir.Value, count: int, axis: int, size: int) -> Sequence[ir.Value]:
        if count == 1:
            return [value]
        return self.tape.op_multi_out(
            "Split", [value, self._ints(*[size] * count)], attributes={"axis": axis}, num_outputs=count
        )

    def results(self) -> list[ir.Value]:
        """Y [T, directions, N, H], the last h and, of an LSTM, the last c, [directions, N, H]."""
        attribute = self.node.attributes.get("direction")
        direction = "forward" if attribute is None else attribute.as_string()
        backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
        every = [self._direction(index, back) for index, back in enumerate(backwards)]
        columns = list(zip(*every, strict=True))
        joined = [self._op("Concat", *columns[0], axis=1)]
        joined += [self._op("Concat", *column, axis=0) for column in columns[1:]]
        return joined

    def _direction(self, index: int, backwards: bool) -> list[ir.Value]:
        weights, recurrent = (self._array(position)[index] for position in (1, 2))
        hidden = recurrent.shape[1]
        biases = self._array(3)[index] if len(self.node.inputs) > 3 and self.node.inputs[3] else None
        of_x, of_h = (None, None) if biases is None else np.split(biases, 2)
        apart = self.kind == "GRU"  # its reset gate is applied between the two
        added = of_x if apart or of_x is None or of_h is None else of_x + of_h
        driven = self._op("MatMul", self.x, self._constant(weights.T))
        if added is not None:
            driven = self._op("Add", driven, self._constant(added))
        h, c = (self._initial(position, index) for position in (5, 6))
        states: list[ir.Value] = []
        steps = list(self._parts(driven, self.length, 0, 1))
        for piece in reversed(steps) if backwards else steps:
            flat = self._op("Squeeze", piece, self._ints(0))
            if self.kind == "GRU":
                h = self._gru(flat, h, recurrent, of_h, hidden)
            else:
                given = flat if h is None else self._op("Add", flat, self._product(h, recurrent))
                h, c = self._lstm(given, c, hidden) if self.kind == "LSTM" else (self._op("Tanh", given), c)
            states.append(h)
        assert h is not None
        ordered = states[::-1] if backwards else states
        both = self._ints(0, 1)
        y = self._op("Concat", *(self._op("Unsqueeze", state, both) for state in ordered), axis=0)
        last = [self._op("Unsqueeze", state, self._ints(0)) for state in (h, c) if state is not None]
        return [y, *last[: 2 if self.kind == "LSTM" else 1]]

    def _array(self, index: int) -> NDArray[np.generic]:
        tensor = self._input(index).const_value
        assert tensor is not None
        return tensor.numpy()

    def _initial(self, position: int, index: int) -> ir.Value | None:
        if position >= len(self.node.inputs) or self.node.inputs[position] is None:
            return None
        one = self._ints(index), self._ints(index + 1), self._ints(0)
        return self._op("Squeeze", self._op("Slice", self._input(position), *one), self._ints(0))

    def _product(self, h: ir.Value, recurrent: NDArray[np.generic]) -> ir.Value:
        return self._op("MatMul", h, self._constant(recurrent.T))

    def _lstm(self, given: ir.Value, c: ir.Value | None, hidden: int) -> tuple[ir.Value, ir.Value]:
        i, o, f, cell = self._parts(given, 4, 1, hidden)
        new = self._op("Mul", self._op("Sigmoid", i), self._op("Tanh", cell))
        if c is not None:
            new = self._op("Add", self._op("Mul", self._op("Sigmoid", f), c), new)
        return self._op("Mul", self._op("Sigmoid", o), self._op("Tanh", new)), new

    def _gru(
        self,
        flat: ir.Value,
        h: ir.Value | None,
        recurrent: NDArray[np.generic],
        bias: NDArray[np.generic] | None,
        hidden: int,
    ) -> ir.Value:
        if h is None:
            h = self._op(
                "Mul", self._parts(flat, 3, 1, hidden)[0], self._constant(np.zeros(1, recurrent.dtype))
            )
        z, r, new = self._parts(flat, 3, 1, hidden)
        biases = [None] * 3 if bias is None else np.split(bias, 3)
        gates = []
        for given, rows, own in zip((z, r), np.split(recurrent, 3)[:2], biases[:2], strict=True):
            driven = self._op("Add", given, self._with_bias(self._product(h, rows), own))
            gates.append(self._op("Sigmoid", driven))
        rows, own = np.split(recurrent, 3)[2], biases[2]
        if int_attribute(self.node, "linear_before_reset", 0):
            inner = self._op("Mul", gates[1], self._with_bias(self._product(h, rows), own))
        else:
            inner = self._with_bias(self._product(self._op("Mul", gates[1], h), rows), own)
        candidate = self._op("Tanh", self._op("Add", new, inner))
        kept = self._op("Mul", gates[0], self._op("Sub", h, candidate))
        return self._op("Add", candidate, kept)

    def _with_bias(self, value: ir.Value, bias: NDArray[np.generic] | None) -> ir.Value:
        return value if bias is None else self._op("Add", value, self._constant(bias))
