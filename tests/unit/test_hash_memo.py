"""Hashes that are remembered: never believed of a file that changed, and never needed."""

from __future__ import annotations

import json
import mmap
import os
import time
from pathlib import Path
from typing import Any

import pytest
from bundles import sham_bundle

import admtrt.memo
from admtrt.bundle import Bundle
from admtrt.errors import BundleError
from admtrt.files import sha256_of
from admtrt.memo import Memo, cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and files that are believed at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(admtrt.memo, "_SETTLED", -1.0)
    return tmp_path / "cache" / "admtrt"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return sham_bundle(tmp_path / "bundle").path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were hashed."""
    names: list[str] = []

    def recording(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(admtrt.memo, "sha256_of", recording)
    return names


GRAPHS = [
    "classifier_gradient.onnx", "edit.onnx", "edit_low_pass.onnx", "threshold.onnx", "unet.onnx",
    "update.onnx", "update_full.onnx",
]  # fmt: skip


def test_a_bundle_is_hashed_once(bundle: Path, read: list[str], cache: Path) -> None:
    Bundle.open(bundle)
    assert sorted(read) == GRAPHS
    Bundle.open(bundle)
    assert sorted(read) == GRAPHS
    assert (cache / "hashes.json").stat().st_mode & 0o077 == 0


def test_without_the_memo_every_byte_is_read_and_nothing_is_kept(
    bundle: Path, read: list[str], cache: Path
) -> None:
    for count in (1, 2):
        Bundle.open(bundle, memo=False)
        assert len(read) == count * len(GRAPHS)
    assert not cache.exists()


def altered(file: Path) -> None:
    """Change a byte, keeping the size and restoring the times: only the inode's change time differs."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    """Another file by that name, of the same size and times."""
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes()[::-1])
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize("change", [altered, replaced])
def test_a_file_that_changed_is_hashed_again(bundle: Path, change: object) -> None:
    Bundle.open(bundle)
    assert callable(change)
    change(bundle / "unet.onnx")
    with pytest.raises(BundleError, match=r"'unet.onnx' has SHA-256"):
        Bundle.open(bundle)


def test_a_change_through_an_old_mapping_is_seen(bundle: Path, read: list[str]) -> None:
    """The page was already dirty before the file was hashed; its next change must update the times."""
    with (bundle / "unet.onnx").open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        mapped[-1] ^= 0
        Bundle.open(bundle)
        time.sleep(0.02)
        before = (bundle / "unet.onnx").stat().st_ctime_ns
        mapped[-1] ^= 1
        if (bundle / "unet.onnx").stat().st_ctime_ns == before:
            pytest.skip("this file system lies in memory, and notes no change through a mapping")
        with pytest.raises(BundleError, match=r"'unet.onnx' has SHA-256"):
            Bundle.open(bundle)


@pytest.mark.parametrize("field", ["st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"])
def test_every_field_of_the_identity_counts(bundle: Path, read: list[str], cache: Path, field: str) -> None:
    Bundle.open(bundle)
    position = ["st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"].index(field)
    kept = json.loads((cache / "hashes.json").read_text())
    other = {}
    for key, value in kept.items():
        parts = key.split(":", 5)
        parts[position] = str(int(parts[position]) + 1)
        other[":".join(parts)] = value
    (cache / "hashes.json").write_text(json.dumps(other))
    read.clear()
    Bundle.open(bundle)
    assert sorted(read) == GRAPHS


def test_a_copy_elsewhere_is_another_file(bundle: Path, read: list[str]) -> None:
    Bundle.open(bundle)
    bundle.rename(bundle.with_name("moved"))
    read.clear()
    Bundle.open(bundle.with_name("moved"))
    assert sorted(read) == GRAPHS


def test_a_file_that_has_just_changed_is_not_believed(
    bundle: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again within the same tick of the file system's clock."""
    monkeypatch.setattr(admtrt.memo, "_SETTLED", 60.0)
    Bundle.open(bundle)
    Bundle.open(bundle)
    assert len(read) == 2 * len(GRAPHS)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"a": ' * 100_000, b'{"x": 3}'])
def test_a_damaged_memo_is_as_good_as_none(
    bundle: Path, read: list[str], cache: Path, content: bytes
) -> None:
    cache.mkdir(parents=True)
    (cache / "hashes.json").write_bytes(content)
    for _ in range(2):
        Bundle.open(bundle)
    assert sorted(read) == GRAPHS


@pytest.mark.parametrize(
    "put", [os.mkfifo, lambda file: file.symlink_to("/dev/zero"), lambda file: file.mkdir()]
)
def test_a_memo_that_is_something_else_is_as_good_as_none(
    bundle: Path, read: list[str], cache: Path, put: Any
) -> None:
    cache.mkdir(parents=True)
    put(cache / "hashes.json")
    Bundle.open(bundle)
    assert sorted(read) == GRAPHS


def test_a_memo_of_any_size_is_not_read(bundle: Path, read: list[str], cache: Path) -> None:
    Bundle.open(bundle)
    with (cache / "hashes.json").open("ab") as opened:
        opened.write(b" " * 2**24)
    Bundle.open(bundle)
    assert len(read) == 2 * len(GRAPHS)


def test_values_that_are_no_hashes_are_not_believed(bundle: Path, read: list[str], cache: Path) -> None:
    Bundle.open(bundle)
    file = cache / "hashes.json"
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), 3)))
    Bundle.open(bundle)
    assert len(read) == 2 * len(GRAPHS)


def test_a_memo_that_others_could_write_is_not_believed(bundle: Path, read: list[str], cache: Path) -> None:
    Bundle.open(bundle)
    (cache / "hashes.json").chmod(0o666)
    Bundle.open(bundle)
    assert len(read) == 2 * len(GRAPHS)


def test_a_cache_that_cannot_be_written_is_no_error(bundle: Path, read: list[str], cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    for _ in range(2):
        Bundle.open(bundle)
    assert len(read) == 2 * len(GRAPHS)


def test_a_bundle_that_fails_is_not_remembered(bundle: Path, cache: Path) -> None:
    altered(bundle / "update.onnx")
    with pytest.raises(BundleError, match=r"update.onnx"):
        Bundle.open(bundle)
    assert not cache.exists()


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache" / "admtrt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "admtrt"

    def homeless(_: type[Path]) -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert cache_folder() is None
    Memo("values").update({"a": 1})
    assert Memo("values").get("a") is None


def test_what_two_processes_remember_is_kept_and_the_oldest_make_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("admtrt.memo._LIMIT", 3)
    first, second = Memo("values"), Memo("values")
    first.update({"a": 1, "b": 2})
    second.update({"a": 3, "c": 4})
    assert [Memo("values").get(key) for key in "abc"] == [3, 2, 4]
    second.update({"d": 5})
    assert [Memo("values").get(key) for key in "abcd"] == [3, None, 4, 5]
