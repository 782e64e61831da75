"""Pages of a mapped file are released and read from the file again."""

from __future__ import annotations

import contextlib
import mmap
import time
from pathlib import Path

import pytest

from admtrt.runtime.backends import mapped
from admtrt.runtime.backends.mapped import release_pages, releasing

SIZE = 4 * 2**20

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="there is no list of mappings")


def resident(file: Path) -> int:
    """KiB of a file's mappings that are in memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [index for index, line in enumerate(lines) if line.endswith(str(file))]
    sizes = [line for start in starts for line in lines[start : start + 6] if line.startswith("Rss:")]
    return sum(int(line.split()[1]) for line in sizes)


def test_pages_go_and_come_again(tmp_path: Path) -> None:
    file, link = tmp_path / "weights with spaces.data", tmp_path / "link"
    file.write_bytes(bytes(range(256)) * (SIZE // 256))
    link.symlink_to(file)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        assert memory[:][257] == 1  # every page is read
        assert resident(file) == SIZE // 1024
        assert release_pages(link) == 1
        assert resident(file) == 0
        assert memory[257] == 1


def test_pages_go_while_a_library_works(tmp_path: Path) -> None:
    file = tmp_path / "weights.data"
    file.write_bytes(bytes(range(256)) * (SIZE // 256))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as older:
        assert older[:][257] == 1
        with releasing([file]), mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            assert memory[:][257] == 1
            ends = time.monotonic() + 30
            while resident(file) > SIZE // 1024:
                assert time.monotonic() < ends
                time.sleep(0.01)
            assert memory[257] == 1
        assert resident(file) == SIZE // 1024  # the older mapping is as it was


def test_pages_are_released_at_the_end_and_by_no_thread_after_it(tmp_path: Path) -> None:
    file = tmp_path / "weights.data"
    file.write_bytes(bytes(SIZE))
    with file.open("rb") as opened:
        with contextlib.suppress(ZeroDivisionError), releasing([file]):
            memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            assert not any(memory[:])
            raise ZeroDivisionError
        assert resident(file) == 0
        assert not any(memory[:])
        time.sleep(0.3)
        assert resident(file) == SIZE // 1024
        memory.close()


def test_a_file_that_is_not_mapped(tmp_path: Path) -> None:
    assert release_pages(tmp_path / "absent") == 0


def test_a_system_without_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_MAPS", tmp_path / "absent")
    assert release_pages(tmp_path) == 0
