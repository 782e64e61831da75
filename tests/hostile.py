"""PyTorch files with arbitrary pickles."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

Write = Callable[[Path], None]
MEBIBYTE = 2**20


def archive(pickled: bytes, *, compression: int = zipfile.ZIP_STORED, zeros: int = 0) -> Write:
    """A PyTorch file that contains this pickle."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as made:
            made.writestr("x/data.pkl", pickled)
            made.writestr("x/byteorder", "little")
            made.writestr("x/version", "3\n")
            if zeros:
                with made.open("x/data/0", "w") as member:
                    for _ in range(zeros // MEBIBYTE):
                        member.write(bytes(MEBIBYTE))

    return write


def legacy(pickled: bytes) -> Write:
    """A PyTorch file in the format before version 1.6 that contains this pickle."""

    def write(path: Path) -> None:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        data = path.read_bytes()
        middle = pickle.dumps({}, protocol=2)
        assert data.count(middle) == 1
        path.write_bytes(data.replace(middle, pickled))

    return write


def tensor(storage: bytes = b"X\x01\x00\x00\x000", size: int = 4, elements: int = 4) -> bytes:
    """The opcodes of a float32 tensor whose storage has this many elements."""
    whole = struct.pack("<i", elements)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + storage
        + b"X\x03\x00\x00\x00cpuJ"
        + whole
        + b"tQK\x00\x8a\x08"
        + struct.pack("<q", size)
        + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
    )


def shared(op: bytes, times: int) -> bytes:
    """An object that contains the previous one twice, nested this many times."""
    parts = (b"r" + struct.pack("<I", i) + b"j" + struct.pack("<I", i) + op for i in range(times))
    return b"".join(parts)


NAME = b"X\x01\x00\x00\x00a"
