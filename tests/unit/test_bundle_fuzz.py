"""Fuzzed manifests and graphs: opening a bundle gives the bundle or a bundle error."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from bundles import sham_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from admtrt.bundle import MANIFEST, Bundle, Manifest
from admtrt.errors import BundleError

LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**30, 10**40)
    | st.floats()
    | st.text(st.characters(), max_size=10)
    | st.sampled_from(["..", "/", "a/../..", "unet.onnx", "\\", "\0", "x" * 300])
)
JSON = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
FUZZ = settings(max_examples=150)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sham_bundle(tmp_path_factory.mktemp("fuzz") / "bundle").path


@cache
def original(bundle: Path) -> bytes:
    return (bundle / MANIFEST).read_bytes()


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a document."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def opened(bundle: Path, manifest: bytes) -> Manifest | None:
    (bundle / MANIFEST).write_bytes(manifest)
    try:
        return Bundle.open(bundle).manifest
    except BundleError:
        return None


@FUZZ
@given(st.data())
def test_any_value_in_any_place(bundle: Path, data: st.DataObject) -> None:
    document = json.loads(original(bundle))
    *path, last = data.draw(st.sampled_from(sorted(places(document), key=repr)))
    changed = copy.deepcopy(document)
    parent = changed
    for key in path:
        parent = parent[key]
    action = data.draw(st.sampled_from(["replace", "remove", "rename"]))
    if action == "replace":
        parent[last] = data.draw(JSON)
    else:
        value = parent.pop(last)
        if action == "rename" and isinstance(parent, dict):
            parent[data.draw(st.text(max_size=8))] = value
    found = opened(bundle, json.dumps(changed).encode())
    if found is not None:
        assert Manifest.from_dict(found.to_dict()) == found


@FUZZ
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_document(bundle: Path, content: bytes) -> None:
    assert opened(bundle, content) is None


@FUZZ
@given(st.data())
def test_a_manifest_cut_off_anywhere(bundle: Path, data: st.DataObject) -> None:
    content = original(bundle).rstrip()
    end = data.draw(st.integers(0, len(content) - 1))
    assert opened(bundle, content[:end]) is None


@pytest.mark.parametrize("depth", [100, 500, 900, 950, 990, 2000])
def test_nesting_of_any_depth(bundle: Path, depth: int) -> None:
    document = json.loads(original(bundle))
    text = json.dumps(document | {"made_with": "DEEP"}).replace('"DEEP"', "[" * depth + "]" * depth)
    assert opened(bundle, text.encode()) is None


@FUZZ
@given(content=st.binary(max_size=40))
def test_any_bytes_as_a_graph(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Refused even with correct hashes: the author of a bundle is not trusted."""
    path = tmp_path_factory.getbasetemp() / "fuzz-graph"
    sham_bundle(path, graph=content, overwrite=True)
    with contextlib.suppress(BundleError):
        Bundle.open(path)
