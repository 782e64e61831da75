"""Read the locations of weights and the nodes of an ONNX file without onnx.

ONNX is a protocol-buffer message. Reading the few fields on the way to ``external_data`` takes a page of
code; depending on the onnx package for it would pull the export stack into every deployment.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING

from admtrt.errors import BundleError
from admtrt.reading import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Field numbers of onnx.proto that lead from a model to a tensor's external_data.
CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2
_GRAPH, _TRAINING, _FUNCTION = 7, 20, 25  # fields of a model
_NODE = 1  # field of a graph
_NODE_NAME, _OPERATOR, _ATTRIBUTE, _DOMAIN, _NODE_METADATA = 3, 4, 5, 7, 9  # fields of a node
_NESTED = (6, 11)  # fields of an attribute that hold graphs
_OWN_DOMAINS = (b"", b"ai.onnx")
_SHOWN = 60  # bytes of a name in a message
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def external_locations(path: Path) -> frozenset[str]:
    """The names of all files with external weights of an ONNX file.

    Raises:
        BundleError: if the file is no protocol-buffer message.
    """
    with _opened(path) as data:
        return frozenset(_locations(data))


def check_operators(path: Path) -> None:
    """Refuse an ONNX file unless it is one graph of standard ONNX operators without subgraphs.

    Loops and branches have subgraphs. Without them, a run executes each node once and ends.

    Raises:
        BundleError: naming the operator, or if the file is no protocol-buffer message.
    """
    with _opened(path) as data:
        fault = next(_foreign_parts(data), None)
    if fault is not None:
        raise BundleError(
            f"{path} has {fault}; a graph of a bundle has ONNX's own operators only, without control flow",
            hint="Do not run it: no export of ours made it.",
        )


def node_metadata(path: Path, key: str) -> dict[str, str]:
    """One metadata entry of all named nodes that have it, by the node's name.

    Raises:
        BundleError: if the file is no protocol-buffer message.
    """
    with _opened(path) as data:
        return dict(_node_metadata(data, key.encode()))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[mmap.mmap]:
    with open_regular(path) as opened:
        if os.fstat(opened.fileno()).st_size == 0:
            raise BundleError(f"{path} is empty; expected an ONNX graph")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                yield data
            except ValueError as error:
                raise BundleError(f"{path} is not an ONNX graph: {error}") from None


def _foreign_parts(data: mmap.mmap) -> Iterator[str]:
    for number, begin, end in _fields(data, 0, len(data)):
        if number in (_TRAINING, _FUNCTION):
            yield "functions" if number == _FUNCTION else "graphs for training"
        elif number == _GRAPH:
            for node in _children(data, (begin, end), _NODE):
                yield from _foreign_in_node(data, *node)


def _foreign_in_node(data: mmap.mmap, start: int, stop: int) -> Iterator[str]:
    operator, domain, nested = "", b"", False
    for number, begin, end in _fields(data, start, stop):
        if number == _OPERATOR:
            operator = data[begin:end][:_SHOWN].decode("utf-8", "replace")
        elif number == _DOMAIN:
            domain = data[begin:end]
        elif number == _ATTRIBUTE:
            nested = nested or any(field in _NESTED for field, _, _ in _fields(data, begin, end))
    if domain not in _OWN_DOMAINS:
        yield f"the operator {operator!r} of the domain {domain[:_SHOWN].decode('utf-8', 'replace')!r}"
    if nested:
        yield f"a graph within the operator {operator!r}"


def _node_metadata(data: mmap.mmap, key: bytes) -> Iterator[tuple[str, str]]:
    for graph in _children(data, (0, len(data)), _GRAPH):
        for node in _children(data, graph, _NODE):
            name = b"".join(data[begin:end] for begin, end in _children(data, node, _NODE_NAME))
            for entry in _children(data, node, _NODE_METADATA):
                pair = {number: data[begin:end] for number, begin, end in _fields(data, *entry)}
                if name and pair.get(_KEY) == key:
                    yield name.decode("utf-8"), pair.get(_VALUE, b"").decode("utf-8")


def _children(data: mmap.mmap, within: tuple[int, int], number: int) -> Iterator[tuple[int, int]]:
    return ((begin, end) for found, begin, end in _fields(data, *within) if found == number)


def _locations(data: mmap.mmap) -> Iterator[str]:
    messages = [("model", 0, len(data))]  # a stack, since a hostile file may nest deeper than Python recurses
    while messages:
        kind, start, end = messages.pop()
        if kind == "entry":
            pair = {number: data[begin:stop] for number, begin, stop in _fields(data, start, end)}
            if pair.get(_KEY) == b"location":
                yield pair.get(_VALUE, b"").decode("utf-8")
            continue
        children = CHILDREN[kind]
        messages += [
            (children[n], begin, stop) for n, begin, stop in _fields(data, start, end) if n in children
        ]


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Length-delimited fields of one message: number, first byte, end."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        number, wire_type = tag >> 3, tag & 7
        if not 0 < number < 2**29:  # 32-bit readers would see another field number
            raise ValueError(f"unknown field number {number}")
        if wire_type == _BYTES:
            length, position = _varint(data, position, end)
            if length > end - position:
                raise ValueError("a field reaches past the end of its message")
            yield number, position, position + length
            position += length
        elif wire_type == _VARINT:
            _, position = _varint(data, position, end)
        elif wire_type in (_FIXED64, _FIXED32):
            position += 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {wire_type}")
    if position != end:
        raise ValueError("a message ends in the middle of a field")


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    raise ValueError("a number is cut off")
