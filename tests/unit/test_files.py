"""Atomic writes: readers always see the old or the new state, even if the writer is killed at any moment."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import names

import admtrt
from admtrt import files
from admtrt.errors import OutputError
from admtrt.files import atomic_directory, atomic_file, check_place, sha256_of

KILLED_AT_EVERY_EVENT = """
import os, signal, sys
from pathlib import Path
from admtrt.files import atomic_directory, atomic_file

root, kind = Path(sys.argv[1]), sys.argv[2]
OLD, NEW = {"a": "old", "b": "old"}, {"a": "new", "c": "new"}

def write():
    if kind == "file":
        with atomic_file(root / "target") as temporary:
            for part in ("n", "e", "w"):
                with temporary.open("a") as opened:
                    opened.write(part)
    else:
        with atomic_directory(root / "target", overwrite=True) as temporary:
            for name, text in NEW.items():
                (temporary / name).write_text(text)

def reset():
    if kind == "file":
        (root / "target").write_text("old")
    else:
        (root / "target").mkdir(exist_ok=True)
        for path in (root / "target").iterdir():
            path.unlink()
        for name, text in OLD.items():
            (root / "target" / name).write_text(text)

def state():
    if kind == "file":
        return (root / "target").read_text()
    found = {path.name: path.read_text() for path in (root / "target").iterdir()}
    return "old" if found == OLD else "new" if found == NEW else found

seen = []
for event in range(1, 1000):
    reset()
    pid = os.fork()
    if not pid:
        left = event
        def hook(name, arguments):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        write()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    seen.append(state())
    write()  # whoever comes next removes what the kill left
    assert os.listdir(root) == ["target"], os.listdir(root)
    if not os.WIFSIGNALED(status):
        break
assert set(seen) <= {"old", "new"}, seen
assert seen[0] == "old" and seen[-1] == "new", seen
assert seen == sorted(seen, reverse=True), seen
print(len(seen))
"""


def exchange_works(folder: Path) -> bool:
    (folder / "left").mkdir()
    (folder / "right").mkdir()
    return files._exchange(folder / "left", folder / "right")  # noqa: SLF001 - nothing else tells


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, kind: str) -> None:
    if kind == "directory" and not exchange_works(tmp_path):
        pytest.skip("this file system cannot exchange two directories")
    (tmp_path / "root").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_EVENT, tmp_path / "root", kind],
        env=os.environ | {"PYTHONPATH": str(Path(admtrt.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5


# --- files ----------------------------------------------------------------------------------------------


def test_a_file_appears_whole_with_its_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "file"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent.parent == target.parent
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("x")])
def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught, atomic_file(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        assert target.read_text() == "old"
        raise error
    if expected is OutputError:
        assert f"cannot write {target}: No space left on device" in str(caught.value)
        assert "untouched" in caught.value.hint
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_faults_inside_a_temporary_are_told_of_the_target(tmp_path: Path) -> None:
    """For an inner atomic write and for other writers, with and without a hint of their own."""
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(OutputError) as caught,
        atomic_directory(tmp_path / "bundle") as directory,
        atomic_file(directory / "sub" / "unet.onnx"),
    ):
        raise full
    wanted = f"cannot write {tmp_path / 'bundle' / 'sub' / 'unet.onnx'}: No space left on device"
    assert caught.value.message == wanted
    with pytest.raises(OutputError) as caught, atomic_file(tmp_path / "file") as file:
        raise OutputError(f"cannot write {file}: full")
    assert caught.value.message == f"cannot write {tmp_path / 'file'}: full"
    assert caught.value.hint == ""  # there was nothing
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught, atomic_file(tmp_path / "file") as file:
        raise OutputError(f"cannot write {file}: full")
    assert caught.value.hint == "What was there before is untouched."
    with pytest.raises(OutputError) as caught, atomic_directory(tmp_path / "bundle"):
        raise OutputError("cannot write elsewhere", hint="Go there.")
    assert (caught.value.message, caught.value.hint) == ("cannot write elsewhere", "Go there.")
    assert names(tmp_path) == ["file"]


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (atomic_file, atomic_directory):
        with pytest.raises(OutputError, match="cannot write"), write(tmp_path / "file" / "x"):
            pytest.fail("the block must not run")


def test_whoever_reads_the_old_file_reads_it_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with (tmp_path / "file").open() as reader:
        with atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"
    assert (tmp_path / "file").read_text() == "new"


def test_two_writers_do_not_share_a_temporary(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file") as first, atomic_file(tmp_path / "file") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "file").read_text() == "1"


def test_a_new_file_never_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it written between the look and the renaming, and whether or not the system renames so."""
    for name in ("renameat2", "link", "open"):
        if name != "renameat2":
            monkeypatch.setattr(files, "_renameat2", lambda *_: False)
        if name == "open":
            monkeypatch.setattr(os, "link", no_links)
        with atomic_file(tmp_path / name, replace=False) as temporary:
            temporary.write_text("first")
        with (
            pytest.raises(OutputError, match=f"{name} already exists"),
            atomic_file(tmp_path / name, replace=False) as temporary,
        ):
            temporary.write_text("second")
        assert (tmp_path / name).read_text() == "first"
    assert names(tmp_path) == ["link", "open", "renameat2"]


def no_links(*_: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


# --- what a kill leaves ---------------------------------------------------------------------------------


def leftover(folder: Path, name: str = ".admtrt-0123abcd.tmp") -> Path:
    (folder / name).mkdir()
    (folder / name / "half").write_text("half")
    return folder / name


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    for write in (atomic_file, atomic_directory):
        leftover(tmp_path)
        with write(tmp_path / write.__name__) as temporary:
            assert not (tmp_path / ".admtrt-0123abcd.tmp").exists()
            if write is atomic_file:
                temporary.touch()
    assert names(tmp_path) == ["atomic_directory", "atomic_file"]


def test_a_writer_of_many_files_leaves_the_sweeping_to_its_caller(tmp_path: Path) -> None:
    leftover(tmp_path)
    with atomic_file(tmp_path / "file", sweep=False) as temporary:
        temporary.touch()
    assert names(tmp_path) == [".admtrt-0123abcd.tmp", "file"]
    files.remove_stale(tmp_path)
    assert names(tmp_path) == ["file"]


def test_what_is_not_ours_or_is_held_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = [".admtrt-0123abcd.tmp2", ".admtrt-0123ABCD.tmp", ".other-0123abcd.tmp", "admtrt-0123abcd.tmp"]
    for name in foreign:
        leftover(tmp_path, name)
    (tmp_path / ".admtrt-00000001.tmp").symlink_to(foreign[0])
    (tmp_path / ".admtrt-00000002.tmp").touch()
    kept = names(tmp_path)
    with atomic_file(tmp_path / "file") as held:
        held.touch()
        files.remove_stale(tmp_path)
        assert held.exists()
    assert names(tmp_path) == sorted([*kept, "file"])
    leftover(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    files.remove_stale(tmp_path)
    assert (tmp_path / ".admtrt-0123abcd.tmp").exists()


def test_without_locks_files_are_written_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    leftover(tmp_path)
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == [".admtrt-0123abcd.tmp", "file"]


SWEEPERS = """
import sys
from pathlib import Path
from admtrt.files import atomic_file
for index in range(150):
    with atomic_file(Path(sys.argv[1], sys.argv[2])) as temporary:
        temporary.write_text("x" * 1000)
"""


def test_writers_beside_each_other_do_not_remove_what_the_others_write(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(admtrt.__file__).parents[1])}
    writers = [
        subprocess.Popen([sys.executable, "-c", SWEEPERS, tmp_path, str(index % 2)], env=environment)
        for index in range(4)
    ]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    assert names(tmp_path) == ["0", "1"]


# --- directories ----------------------------------------------------------------------------------------


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system call that exchanges two paths in one step, and without it."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda left, right: False)
    return str(request.param)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").write_text("old")
    return tmp_path / "target"


def is_old(target: Path) -> bool:
    return names(target) == ["old"] and names(target.parent) == ["target"]


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "target"
    with atomic_directory(target) as temporary:
        (temporary / "x").touch()
        assert not target.exists()
    assert names(target) == ["x"]
    assert names(target.parent) == ["target"]


def test_a_directory_replaces_the_old_one_completely(old: Path, way: str) -> None:
    with atomic_directory(old, overwrite=True) as temporary:
        (temporary / "new").touch()
        assert names(old) == ["old"]
    assert names(old) == ["new"]
    assert names(old.parent) == ["target"]


def test_an_existing_directory_is_kept_unless_told_otherwise(old: Path) -> None:
    with pytest.raises(OutputError, match="already exists") as caught, atomic_directory(old):
        pytest.fail("the block must not run")
    assert "--overwrite" in caught.value.hint
    assert is_old(old)


def test_a_directory_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with (  # noqa: PT012
        pytest.raises(OutputError, match="target already exists"),
        atomic_directory(target) as temporary,
    ):
        (temporary / "new").touch()
        target.mkdir()
        (target / "old").touch()
    assert is_old(target)


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system"), KeyboardInterrupt()])
def test_a_directory_that_fails_leaves_the_old_one(old: Path, way: str, error: BaseException) -> None:
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), atomic_directory(old, overwrite=True) as temporary:  # noqa: PT012
        (temporary / "half").touch()
        raise error
    assert is_old(old)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_two_renames_that_fail_put_the_old_one_back(
    old: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int, moment: str
) -> None:
    """An interruption between the two renames does not lose the old directory."""
    monkeypatch.setattr(files, "_exchange", lambda left, right: False)
    calls, rename = 0, Path.rename

    def failing(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == at and moment == "after":
            rename(self, target)
        if calls == at:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((OutputError, KeyboardInterrupt)), atomic_directory(old, overwrite=True) as temporary:
        (temporary / "new").touch()
    if (at, moment) == (2, "after"):  # by then the new one stands
        assert names(old) == ["new"]
    else:
        assert is_old(old)


def test_the_working_directory_can_be_replaced(old: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.chdir(old)
    with atomic_directory(Path(), overwrite=True) as temporary:
        (temporary / "new").touch()
    assert names(old) == ["new"]
    assert names(old.parent) == ["target"]


def test_a_link_to_a_directory_stays_a_link(old: Path) -> None:
    link = old.parent / "link"
    link.symlink_to("target")
    with atomic_directory(link, overwrite=True) as temporary:
        (temporary / "new").touch()
    assert link.is_symlink()
    assert names(old) == ["new"]
    assert names(old.parent) == ["link", "target"]


def test_places_are_looked_at_before_the_work(tmp_path: Path) -> None:
    check_place(tmp_path / "new" / "file")
    check_place(tmp_path / "other" / "folder", folder=True)
    assert names(tmp_path) == ["new", "other"]
    (tmp_path / "file").touch()
    for path, folder in ((tmp_path / "file" / "x", False), (tmp_path / "file", True), (tmp_path, False)):
        with pytest.raises(OutputError, match="cannot write"):
            check_place(path, folder=folder)


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()
