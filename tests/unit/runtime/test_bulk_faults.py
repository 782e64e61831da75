"""Bulk runs with full disks and damaged shards: the messages, and that the same command continues."""

from __future__ import annotations

import contextlib
import os
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bulk_runs import Echo, expected, images_in, request, shards
from bundles import sham_bundle

from admtrt.errors import OutputError
from admtrt.runtime.bulk import (
    Format,
    draw,
)
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.shards import Shards


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return Pipeline(sham_bundle(tmp_path / "bundle"), Echo())


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: the write in the middle of it fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 400, 700])
def test_a_disk_without_room_for_a_shard(pipeline: Pipeline, tmp_path: Path, size: int) -> None:
    """Earlier shards are complete, and the same command continues when there is space."""
    draw(pipeline, request(), tmp_path / "run", ["npz"])
    (tmp_path / "run" / "shards" / "00000004.npz").unlink()
    before = sorted((tmp_path / "run").rglob("*"))
    with room_for(size), pytest.raises(OutputError, match=r"cannot write .*00000004.npz"):
        draw(pipeline, request(), tmp_path / "run", ["npz"])
    assert sorted((tmp_path / "run").rglob("*")) == before
    (path,) = draw(pipeline, request(), tmp_path / "run", ["npz"])
    np.testing.assert_array_equal(images_in(path), expected(pipeline))


@pytest.mark.parametrize(
    ("kind", "size"), [("npz", 0), ("npz", 300), ("npz", 1200), ("png", 60), ("grid", 100)]
)
def test_a_disk_without_room_for_the_results(
    pipeline: Pipeline, tmp_path: Path, kind: Format, size: int
) -> None:
    draw(pipeline, request(), tmp_path / "run", [])
    with room_for(size), pytest.raises(OutputError, match="cannot write"):
        draw(pipeline, request(), tmp_path / "run", [kind])
    assert [path.name for path in (tmp_path / "run").rglob("*.*") if "tmp" in path.name] == []
    assert Shards(tmp_path / "run", request(), pipeline.bundle.manifest).finished == 10
    draw(pipeline, request(), tmp_path / "run", [kind])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY"])
def test_a_damaged_shard_is_named(pipeline: Pipeline, tmp_path: Path, content: bytes) -> None:
    draw(pipeline, request(), tmp_path / "run", ["npz"])
    shard = tmp_path / "run" / "shards" / "00000004.npz"
    shard.write_bytes(content)
    with pytest.raises(OutputError) as caught:
        draw(pipeline, request(), tmp_path / "run", ["npz"])
    assert (
        caught.value.message == f"cannot read the shard {shard}: it is truncated, damaged or something else"
    )
    assert "Delete it" in caught.value.hint
    shard.unlink()
    draw(pipeline, request(), tmp_path / "run", ["npz"])


def zeros(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)


LABELS = np.array([1, 2, 0, 1])  # of the second shard


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"images": zeros(4, 9, 9, 1), "labels": LABELS}, "its images are uint8 [4, 9, 9, 1]"),
        ({"images": zeros(4, 8, 8, 3), "labels": LABELS}, "its images are uint8 [4, 8, 8, 3]"),
        ({"images": zeros(0, 8, 8, 1), "labels": LABELS}, "its images are uint8 [0, 8, 8, 1]"),
        ({"images": zeros(5, 8, 8, 1), "labels": LABELS}, "its images are uint8 [5, 8, 8, 1]"),
        ({"images": zeros(4, 8, 8, 1, dtype=np.float32), "labels": LABELS}, "its images are float32"),
        ({"images": np.uint8(3), "labels": LABELS}, "its images are uint8 []"),
        ({"images": zeros(4, 8, 8, 1), "labels": LABELS[::-1]}, "its labels are others"),
        ({"images": zeros(4, 8, 8, 1), "labels": LABELS[:1]}, "its labels are others"),
        ({"images": zeros(4, 8, 8, 1)}, "it holds images"),
        ({"x": zeros(1)}, "it holds x"),
        ({}, "it holds nothing"),
        ({"images": np.array([{}], object), "labels": LABELS}, "truncated, damaged or something else"),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "png", "grid"])
def test_a_shard_of_something_else_is_refused(
    pipeline: Pipeline, tmp_path: Path, arrays: dict[str, Any], fault: str, kind: Format
) -> None:
    draw(pipeline, request(), tmp_path / "run", [])
    shard = tmp_path / "run" / "shards" / "00000004.npz"
    np.savez(shard, **arrays)
    (tmp_path / "run" / "shards" / "00000008.npz").unlink()
    with pytest.raises(OutputError) as caught:
        draw(pipeline, request(), tmp_path / "run", [kind])
    assert str(shard) in caught.value.message
    assert fault in caught.value.message
    assert "Delete it" in caught.value.hint
    assert shards(tmp_path / "run") == ["00000000.npz", "00000004.npz"]  # seen before the next was drawn


@pytest.mark.parametrize("thing", ["folder", "pipe", "bomb", "twice"])
def test_a_shard_that_is_no_archive_of_ours(pipeline: Pipeline, tmp_path: Path, thing: str) -> None:
    draw(pipeline, request(), tmp_path / "run", [])
    shard = tmp_path / "run" / "shards" / "00000004.npz"
    if thing == "twice":
        with zipfile.ZipFile(shard, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("images.npy", b"none")
    else:
        shard.unlink()
    if thing == "folder":
        shard.mkdir()
    if thing == "pipe":
        os.mkfifo(shard)
    if thing == "bomb":  # says 256 bytes and inflates to 64 MiB
        write_bomb(shard, {"descr": "|u1", "fortran_order": False, "shape": (4, 8, 8, 1)})
    with pytest.raises(OutputError, match=r"cannot read the shard .*00000004.npz"):
        draw(pipeline, request(), tmp_path / "run", ["npz"])


def write_bomb(path: Path, header: dict[str, Any]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(64):
                member.write(bytes(2**20))
        with archive.open("labels.npy", "w") as member:
            np.lib.format.write_array(member, LABELS)
