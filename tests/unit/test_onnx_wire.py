"""Reading the locations of external data from raw bytes: none is missed, only BundleError is raised."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from admtrt.errors import BundleError
from admtrt.onnx_wire import CHILDREN, external_locations


def tensor(location: str | None = None) -> onnx.TensorProto:
    made = onnx.numpy_helper.from_array(np.ones(2, np.float32), "t")
    if location is not None:
        made.ClearField("raw_data")
        made.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("offset", "0"), ("location", location), ("length", "8")):
            made.external_data.add(key=key, value=value)
    return made


def node(**attributes: object) -> onnx.NodeProto:
    return onnx.helper.make_node("Op", ["a"], ["b"], **attributes)


def graph(*nodes: onnx.NodeProto, name: str = "g", **fields: object) -> onnx.GraphProto:
    return onnx.helper.make_graph(list(nodes), name, [], [], **fields)


def sparse(values: str, indices: str) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=tensor(values), indices=tensor(indices), dims=[4])


def everywhere() -> tuple[onnx.ModelProto, set[str]]:
    """A model with external data in every place that can contain a tensor."""
    inner = graph(node(deep=tensor("attribute of a subgraph")), initializer=[tensor("subgraph")])
    main = graph(
        node(value=tensor("attribute"), values=[tensor("list 1"), tensor("list 2")]),
        node(body=inner, branches=[graph(initializer=[tensor("branch")], name="b")]),
        node(s=sparse("sparse attribute", "its indices"), many=[sparse("sparse list", "its indices too")]),
        initializer=[tensor(), tensor("initializer"), tensor("weights/ä.bin")],
        sparse_initializer=[sparse("sparse", "indices")],
    )
    model = onnx.helper.make_model(main)
    function = model.functions.add(name="f", domain="d")
    function.node.append(node(value=tensor("function")))
    function.attribute_proto.append(onnx.helper.make_attribute("default", tensor("default of a function")))
    model.training_info.add(
        initialization=graph(initializer=[tensor("initialization")], name="i"),
        algorithm=graph(initializer=[tensor("algorithm")], name="a"),
    )
    return model, {
        "attribute of a subgraph", "subgraph", "attribute", "list 1", "list 2", "branch", "sparse attribute",
        "its indices", "sparse list", "its indices too", "initializer", "weights/ä.bin", "sparse", "indices",
        "function", "default of a function", "initialization", "algorithm",
    }  # fmt: skip


def locations(path: Path, data: bytes) -> frozenset[str]:
    file = path / "g.onnx"
    file.write_bytes(data)
    return external_locations(file)


def test_finds_every_location(tmp_path: Path) -> None:
    model, expected = everywhere()
    assert locations(tmp_path, model.SerializeToString()) == expected


def test_no_external_data(tmp_path: Path) -> None:
    model = onnx.helper.make_model(graph(node(value=tensor()), initializer=[tensor()]))
    assert locations(tmp_path, model.SerializeToString()) == frozenset()


def _leads_to_external_data() -> dict[str, dict[int, str]]:
    """The table by ONNX's own schema: fields by which TensorProto.external_data can be reached."""
    reachable: dict[str, set[str]] = {}

    def messages(message: Descriptor) -> list[FieldDescriptor]:
        return [field for field in message.fields if field.message_type is not None]

    def visit(message: Descriptor) -> None:
        if message.name not in reachable:
            reachable[message.name] = {field.message_type.name for field in messages(message)}
            for field in messages(message):
                visit(field.message_type)

    visit(onnx.ModelProto.DESCRIPTOR)
    leading = {"TensorProto"}
    while more := {name for name, targets in reachable.items() if targets & leading} - leading:
        leading |= more
    file = onnx.ModelProto.DESCRIPTOR.file.message_types_by_name
    return {
        name: {
            field.number: field.message_type.name
            for field in messages(file[name])
            if field.message_type.name in leading
        }
        for name in leading - {"TensorProto"}
    }


def test_table_is_complete_by_the_schema() -> None:
    """A field of a later ONNX version that refers to external data must be detected."""
    names = {
        "model": "ModelProto", "graph": "GraphProto", "function": "FunctionProto", "node": "NodeProto",
        "attribute": "AttributeProto", "sparse": "SparseTensorProto", "tensor": "TensorProto",
        "training": "TrainingInfoProto",
    }  # fmt: skip
    ours = {
        names[kind]: {n: names.get(child, child) for n, child in rows.items()}
        for kind, rows in CHILDREN.items()
    }
    tensor_row = ours.pop("TensorProto")
    assert tensor_row == {onnx.TensorProto.DESCRIPTOR.fields_by_name["external_data"].number: "entry"}
    assert ours == _leads_to_external_data()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\x3a\x05ab", "past the end"),
        (b"\x3a", "cut off"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "cut off"),
        (b"\x0d\x01", "in the middle"),
        (b"\x3b", "wire type 3"),
        (b"\x02\x00", "field number 0"),
        (b"\xba\x80\x80\x80\x10\x00", "field number 536870919"),  # field 7 to a reader that keeps 32 bits
        (b"PK\x03\x04 a zip archive", "is not an ONNX graph"),
    ],
)
def test_damage(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=message):
        locations(tmp_path, data)


def test_a_location_that_is_no_text(tmp_path: Path) -> None:
    model = onnx.helper.make_model(graph(initializer=[tensor("LOCATION")]))
    with pytest.raises(BundleError, match="not an ONNX graph"):
        locations(tmp_path, model.SerializeToString().replace(b"LOCATION", b"\xff" * 8))


def test_truncation_never_shows_less_silently(tmp_path: Path) -> None:
    """Every cut inside the graph is noticed: its length no longer fits."""
    model = onnx.helper.make_model(graph(initializer=[tensor("weights.bin")]))
    data = model.graph.SerializeToString()
    whole = b"\x3a" + bytes([len(data) & 0x7F | 0x80, len(data) >> 7]) + data
    assert locations(tmp_path, whole) == {"weights.bin"}
    for end in range(1, len(whole)):
        with pytest.raises(BundleError):
            locations(tmp_path, whole[:end])


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 0x7F | 0x80]) + _varint(value >> 7)


def test_deep_nesting(tmp_path: Path) -> None:
    """Graphs within graphs, deeper than Python recurses."""
    data = b"\x2a" + _varint(len(inner := tensor("deep").SerializeToString())) + inner
    for _ in range(3000):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # attribute.g, node.attribute, graph.node
            data = tag + _varint(len(data)) + data
    assert locations(tmp_path, b"\x3a" + _varint(len(data)) + data) == {"deep"}


fuzz = settings(max_examples=200)


@fuzz
@given(data=st.binary(max_size=300))
def test_garbage(data: bytes, tmp_path: Path) -> None:
    with contextlib.suppress(BundleError):
        assert isinstance(locations(tmp_path, data), frozenset)


@fuzz
@given(data=st.data())
def test_altered_graphs(data: st.DataObject, tmp_path: Path) -> None:
    """Any bytes of a real graph changed, cut or doubled."""
    model, _ = everywhere()
    whole = bytearray(model.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(whole)))
    with contextlib.suppress(BundleError):
        assert all(isinstance(location, str) for location in locations(tmp_path, bytes(whole[:cut])))
