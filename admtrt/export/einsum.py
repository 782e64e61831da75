"""Decompose Einsum into plain operators: sums, transposes, reshapes and matrix products."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_ir as ir

from admtrt.export.passes import constant

if TYPE_CHECKING:
    from collections.abc import Sequence

    Sizes = dict[str, "int | ir.SymbolicDim"]


class _Term(NamedTuple):
    """A value and a label for each of its axes."""

    value: ir.Value
    labels: tuple[str, ...]

    @property
    def repeated(self) -> list[str]:
        """Labels of more than one axis."""
        return [label for label in dict.fromkeys(self.labels) if self.labels.count(label) > 1]


def nodes_of_einsum(graph: ir.Graph, einsum: ir.Node) -> list[ir.Node]:
    """Nodes that compute the Einsum; empty if a label has two sizes, or several sizes are unknown."""
    parsed = _parsed(einsum)
    if parsed is None:
        return []
    terms, out, sizes = parsed
    if sum(not isinstance(size, int) for size in sizes.values()) > 1:
        return []  # a Reshape can have one unknown size
    writer = _EinsumWriter(graph, sizes)
    terms = [writer.diagonal(writer.squeezed(term)) for term in terms]
    terms = [
        writer.summed(
            term, {*out, *(label for other in terms if other is not term for label in other.labels)}
        )
        for term in terms
    ]
    while len(terms) > 1:
        a, b, *rest = terms
        wanted = {*out, *(label for term in rest for label in term.labels)}
        kept = out if not rest else [label for label in dict.fromkeys(a.labels + b.labels) if label in wanted]
        terms = [_Term(writer.product(a, b, kept), tuple(kept)), *rest]
    last = writer.arranged(terms[0], [[label] for label in out])
    if not writer.tape.nodes:
        writer.tape.op("Identity", [last])
    return list(writer.tape.nodes)


def _parsed(einsum: ir.Node) -> tuple[list[_Term], list[str], Sizes] | None:
    """Parse the equation: operands, labels of the result, size of each label; None if not supported."""
    equation = einsum.attributes["equation"].as_string().replace(" ", "")
    given, arrow, out = equation.partition("->")
    sizes: Sizes = {}
    terms = []
    for own, operand in zip(given.split(","), einsum.inputs, strict=True):
        if operand is None or operand.shape is None:
            return None
        labels = _labels(own, len(operand.shape))
        if len(labels) != len(operand.shape):
            return None
        for label, size in zip(labels, operand.shape, strict=True):
            if sizes.get(label, 1) == 1:
                sizes[label] = size
            elif size not in (1, sizes[label]):
                return None
        terms.append(_Term(operand, labels))
    every = [label for term in terms for label in term.labels]
    if any(not isinstance(sizes[label], int) for term in terms for label in term.repeated):
        return None
    hidden = sorted({label for label in every if label.isdigit()}, key=int, reverse=True)
    if arrow:
        wanted = [part for label in out.replace("...", ".") for part in (hidden if label == "." else [label])]
    else:
        wanted = hidden + sorted(label for label in {*every} if every.count(label) == 1 and label.isalpha())
    return (terms, wanted, sizes) if len({*wanted}) == len(wanted) and {*wanted} <= {*every} else None


def _labels(own: str, rank: int) -> tuple[str, ...]:
    """The labels of an operand. Axes of an ellipsis get numbers, counted from the last."""
    hidden = [str(number) for number in range(rank - len(own.replace("...", "")))]
    return tuple(
        part for label in own.replace("...", ".") for part in (hidden[::-1] if label == "." else [label])
    )


class _EinsumWriter:
    """Writes the nodes of one Einsum."""

    def __init__(self, graph: ir.Graph, sizes: Sizes) -> None:
        self.graph, self.sizes = graph, sizes
        self.tape = ir.tape.Tape()

    def squeezed(self, term: _Term) -> _Term:
        """Drop axes of size 1 that another operand has in full: products broadcast along them."""
        assert term.value.shape is not None
        full = [
            size != 1 or self.sizes[label] == 1
            for label, size in zip(term.labels, term.value.shape, strict=True)
        ]
        if all(full):
            return term
        axes = [axis for axis, stays in enumerate(full) if not stays]
        value = self.tape.op("Squeeze", [term.value, self._ints(axes)])
        return _Term(value, tuple(label for label, stays in zip(term.labels, full, strict=True) if stays))

    def diagonal(self, term: _Term) -> _Term:
        """Take the elements with equal places along axes of the same label; one of these axes remains."""
        for label in term.repeated:
            count, size = term.labels.count(label), self.sizes[label]
            assert isinstance(size, int)
            rest = tuple(other for other in term.labels if other != label)
            order = sorted(range(len(term.labels)), key=lambda axis: term.labels[axis] == label)
            sorted_axes = self.tape.op("Transpose", [term.value], attributes={"perm": order})
            kept = [self.sizes[other] for other in rest]
            flat = [side if isinstance(side, int) else 0 for side in kept]  # a Reshape's 0 keeps the size
            merged = self.tape.op("Reshape", [sorted_axes, self._ints([*flat, size**count])])
            step = sum(size**power for power in range(count))
            places = self._ints([place * step for place in range(size)])
            taken = self.tape.op("Gather", [merged, places], attributes={"axis": len(rest)})
            term = _Term(taken, (*rest, label))
        return term

    def summed(self, term: _Term, kept: set[str]) -> _Term:
        """Sum over axes whose labels appear nowhere else."""
        axes = [axis for axis, label in enumerate(term.labels) if label not in kept]
        if not axes:
            return term
        total = self.tape.op("ReduceSum", [term.value, self._ints(axes)], attributes={"keepdims": 0})
        return _Term(total, tuple(label for label in term.labels if label in kept))

    def product(self, a: _Term, b: _Term, out: Sequence[str]) -> ir.Value:
        """Multiply two terms and sum over the labels that both have and ``out`` lacks."""
        if out and out[-1] in a.labels and out[-1] not in b.labels:
            a, b = b, a  # the right operand provides the result's columns
        batch = [[label] for label in out if label in a.labels and label in b.labels]
        shared = [label for label in a.labels if label in b.labels and label not in out]
        rows, columns = (
            [label for label in out if label in term.labels and [label] not in batch] for term in (a, b)
        )
        left = self.arranged(a, [*batch, rows, shared])
        right = self.arranged(b, [*batch, shared, columns])
        product = self.tape.op("MatMul", [left, right])
        every = (*(label for group in batch for label in group), *rows, *columns)
        if len(rows) != 1 or len(columns) != 1:
            product = self._reshaped(product, every)
        return self.arranged(_Term(product, every), [[label] for label in out])

    def arranged(self, term: _Term, groups: Sequence[Sequence[str]]) -> ir.Value:
        """Transpose and reshape a value so that each group of labels becomes one axis, in order."""
        value, order = term.value, [label for group in groups for label in group]
        if order != list(term.labels):
            perm = [term.labels.index(label) for label in order]
            value = self.tape.op("Transpose", [value], attributes={"perm": perm})
        return value if all(len(group) == 1 for group in groups) else self._reshaped(value, groups)

    def _reshaped(self, value: ir.Value, groups: Sequence[Sequence[str]]) -> ir.Value:
        merged = [[self.sizes[label] for label in group] for group in groups]
        target = [math.prod(size for size in group if isinstance(size, int)) for group in merged]
        for index, group in enumerate(merged):
            if not all(isinstance(size, int) for size in group):
                target[index] = -1
        return self.tape.op("Reshape", [value, self._ints(target)])

    def _ints(self, values: Sequence[int]) -> ir.Value:
        return constant(self.graph, np.array(values, np.int64))
