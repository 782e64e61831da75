"""Paths that are not bundles: the message says what was given, and what to do with it."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

import pytest
from bundles import sham_bundle

from admtrt.bundle import MANIFEST, Bundle
from admtrt.cli import run
from admtrt.errors import BundleError
from admtrt.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path


def _refused(path: str | Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        Pipeline.from_bundle(path)
    return caught.value


@pytest.mark.parametrize(
    "url", ["https://example.org/mine.bundle", "hf://someone/model", "s3://bucket/mine.bundle/"]
)
def test_a_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = _refused(url)
    assert f"{url.rstrip('/')} is a URL; a bundle is a directory on this machine" in error.message
    assert f"Download and unpack it, then name the directory that has its {MANIFEST}" in error.hint
    assert run(["inspect", url]) == 2  # a path keeps one slash of the two
    assert f"{url.rstrip('/')} is a URL" in " ".join(capsys.readouterr().err.split())


def test_a_folder_whose_name_begins_like_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sham_bundle(tmp_path / "file:" / "bundle")
    monkeypatch.chdir(tmp_path)
    assert Bundle.open("file:/bundle").manifest.graphs


@pytest.mark.parametrize(
    ("name", "unpacks"),
    [("my bundle.zip", "python -m zipfile -e"), ("b.tar.gz", "tar -xf"), ("B.TGZ", "tar -xf")],
)
def test_an_archive(tmp_path: Path, name: str, unpacks: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mine/manifest.json", "{}")
    error = _refused(path)
    assert f"{path} is an archive" in error.message
    assert f"Unpack it, e.g. {unpacks} " in error.hint
    for command in (["inspect", str(path)], ["sample", str(path), "--out", str(tmp_path / "out")]):
        assert run(command) == 2
        assert "is an archive" in " ".join(capsys.readouterr().err.split())


def test_a_file(tmp_path: Path) -> None:
    bundle = sham_bundle(tmp_path / "mine.bundle").path
    assert "is not a bundle but a file" in _refused(bundle / "unet.onnx").message
    assert _refused(bundle / MANIFEST).hint == f"Name its directory: {bundle}"


def test_a_folder_around_the_bundle(tmp_path: Path) -> None:
    bundle = sham_bundle(tmp_path / "unpacked" / "mine.bundle").path
    error = _refused(bundle.parent)
    assert error.message == f"{bundle.parent} is not a bundle: it has no {MANIFEST}"
    assert error.hint == f"{bundle} has one: name that directory."


@pytest.mark.parametrize("name", ["absent.zip", "https", "c:/bundle", "a b:/c"])
def test_a_path_that_leads_nowhere(name: str) -> None:
    assert _refused(name).message == f"{name} does not exist"
