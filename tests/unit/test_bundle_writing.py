"""Writing bundles: after any interruption the old or the new bundle is complete."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from bundles import CLASS_NAMES, EMPTY_GRAPH, sham_bundle
from folders import names

from admtrt.bundle import Bundle, write_bundle
from admtrt.errors import BundleError, ExportError, OutputError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return sham_bundle(tmp_path / "bundle").path


def test_an_existing_bundle_is_replaced_only_on_demand(bundle: Path) -> None:
    with pytest.raises(OutputError, match="already exists"):
        sham_bundle(bundle, class_names=())
    assert Bundle.open(bundle).manifest.class_names == CLASS_NAMES
    sham_bundle(bundle, class_names=(), overwrite=True)
    assert Bundle.open(bundle).manifest.class_names == ()
    assert names(bundle.parent) == ["bundle"]


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name in ("precious", "file"):
        with pytest.raises(BundleError, match="exists and is not a bundle"):
            sham_bundle(tmp_path / name, overwrite=True)
    assert names(tmp_path / "precious") == ["thesis.tex"]


@pytest.mark.parametrize(
    "error",
    [
        ExportError("no rule"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        KeyboardInterrupt(),
    ],
)
def test_a_writing_that_fails_leaves_the_old_bundle(bundle: Path, error: BaseException) -> None:
    old = Bundle.open(bundle).manifest

    def failing(directory: Path) -> Any:
        (directory / "unet.onnx").write_bytes(b"half")
        assert Bundle.open(bundle).manifest == old
        raise error

    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_bundle(bundle, failing, {}, overwrite=True)
    assert Bundle.open(bundle).manifest == old
    assert names(bundle.parent) == ["bundle"]


def test_a_half_written_bundle_is_never_seen(tmp_path: Path) -> None:
    def write_graphs(directory: Path) -> Any:
        (directory / "unet.onnx").write_bytes(EMPTY_GRAPH)
        for path, fault in ((tmp_path / "bundle", "does not exist"), (directory, "is not a bundle")):
            with pytest.raises(BundleError, match=fault):
                Bundle.open(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "bundle", write_graphs, {})
    assert names(tmp_path) == []


def test_a_read_only_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", failing)
    with pytest.raises(OutputError, match=r"cannot write .*bundle: Read-only file system"):
        sham_bundle(tmp_path / "bundle")
