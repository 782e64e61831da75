"""Check PyTorch's files before PyTorch reads them: a small file must not cost much time or memory.

PyTorch's weights-only reader runs no code, but does any amount of work that a file demands: it decompresses,
and it hashes nested tuples. A state dict needs little of that; everything else is refused here.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import zipfile
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from pathlib import Path

_ZIP_START = b"PK\x03\x04"  # distinguishes archives from files before PyTorch 1.6
_LONG_END, _LOCATOR, _END = map(struct.Struct, ("<4sQ2H2L4Q", "<4sLQL", "<4s4H2LH"))
_LONGEST_DIRECTORY = 2**23  # bytes; about 90 per tensor
_LEGACY_PICKLES = 5  # magic number, version, system, the object itself, the names of the storages
_LARGEST_PICKLE = 2**24  # bytes; a state dict has about 200 per tensor
_MOST_STEPS = 200_000  # about 40 per tensor
_DEEPEST = 100
_MOST_WORK = 20_000_000  # visited objects; shared ones count each time

_OPCODES = frozenset(
    {
        *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
        *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
        *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "SETITEM", "SETITEMS", "APPEND", "APPENDS"),
        *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    }
)
"""The opcodes of PyTorch's reader that dictionaries of tensors are written with."""

_GROWTH = frozenset({"SETITEM", "SETITEMS", "APPEND", "APPENDS", "BUILD"})
"""Opcodes that append to their first operand."""

_CALLED = frozenset(
    {
        "collections.OrderedDict",
        "torch.Size",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
    }
)
"""Allowed callables: they only make dictionaries, sizes and views of the file's bytes."""

_NAMED = re.compile(r"torch\.(storage\.)?(\w*Storage|bool|[a-z]+\d+(_\w+)?)")
"""Other allowed names: types of storages and numbers."""


class UnneededGlobalError(ValueError):
    """The pickle uses a name that weights do not need; ``args`` holds it."""


class _Object(NamedTuple):
    """Depth and size of an object, without creating it."""

    depth: int = 0
    size: int = 1
    name: str = ""


_ATOM, _MARK = _Object(), _Object()  # compared by identity


def check_torch_file(path: Path) -> bool:
    """Check that PyTorch can read a file in bounded time and memory, without reading its weights.

    Returns:
        Whether it is an archive, which can be memory-mapped; files before PyTorch 1.6 are not.

    Raises:
        UnneededGlobalError: if its pickle uses a name that weights do not need.
        Exception: of various types, if it is damaged or demands more work than weights need.
    """
    with path.open("rb") as opened:
        start = opened.read(_LARGEST_PICKLE)
    if not start.startswith(_ZIP_START):
        pickles = io.BytesIO(start)
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(pickles)
        return False
    directory = _directory_of(path)
    with zipfile.ZipFile(path) as archive:
        if archive.start_dir != directory:
            raise ValueError("the directory of the archive is not where its end says")
        pickled = _pickle_in(path, archive.infolist())
        _check_pickle(io.BytesIO(archive.read(pickled)))
    return True


def _directory_of(path: Path) -> int:
    """Offset of an archive's directory, from the end record and ZIP64's record before it.

    Python and PyTorch can find different directories in an archive that does not end the way PyTorch writes
    it.

    Raises:
        ValueError: for such an archive, or if the directory is too long.
        struct.error: if the file is too short.
    """
    with path.open("rb") as opened:
        size = opened.seek(0, io.SEEK_END)
        opened.seek(max(size - _LONG_END.size - _LOCATOR.size - _END.size, 0))
        tail = opened.read()
    *_, start, comment = _END.unpack(tail[-_END.size :])
    tail = tail[: -_END.size]
    if tail[-_LOCATOR.size :].startswith(b"PK\x06\x07"):
        _, _, place, _ = _LOCATOR.unpack(tail[-_LOCATOR.size :])
        if place != size - _LONG_END.size - _LOCATOR.size - _END.size:
            raise ValueError("the archive has two directories")
        *_, start = _LONG_END.unpack(tail[: _LONG_END.size])
    if comment or size - start > _LONGEST_DIRECTORY:
        raise ValueError("its directory is none that PyTorch writes")
    return int(start)


def _pickle_in(path: Path, entries: list[zipfile.ZipInfo]) -> zipfile.ZipInfo:
    """The only pickle of an archive; its other members are raw bytes.

    Raises:
        ValueError: if it is not such an archive, or its members claim to be larger than the file.
    """
    names = {entry.filename.lower() for entry in entries}  # PyTorch's reader ignores case
    if len(names) != len(entries) or len({name.partition("/")[0] for name in names}) != 1:
        raise ValueError("two members of the archive have one name, or they lie in several folders")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"its member {entry.filename} is compressed, as PyTorch's are not")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("the members of the archive are larger than the archive")
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _LARGEST_PICKLE:
        raise ValueError(f"it holds {len(pickles)} pickles, or one of more than {_LARGEST_PICKLE} bytes")
    return pickles[0]


def _check_pickle(stream: io.BytesIO) -> None:
    """Simulate one pickle without creating its objects.

    Raises:
        UnneededGlobalError: for a name that weights do not need.
        ValueError: if the pickle is too long, too deep or too much work.
        Exception: of other types, if it is damaged.
    """
    stack: list[_Object] = []
    memo: dict[int, _Object] = {}
    work = 0
    for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if name not in _OPCODES or step > _MOST_STEPS:
            raise ValueError(f"its pickle needs {name} at step {step}")
        if name.endswith("BINPUT"):
            memo[cast("int", argument)] = stack[-1]
        elif name.endswith("BINGET"):
            stack.append(memo[cast("int", argument)])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "GLOBAL":
            stack.append(_Object(name=_allowed(cast("str", argument))))
        elif not opcode.stack_before:
            stack += [_ATOM] * len(opcode.stack_after)
        else:
            taken = _taken(stack, opcode)
            if name == "REDUCE" and taken[0].name not in _CALLED:
                raise UnneededGlobalError(taken[0].name or "something that it made itself")
            whole, parts = (taken[:1], taken[1:]) if name in _GROWTH else ([], taken)
            work += sum(part.size for part in parts)
            depth = max([each.depth for each in whole] + [1 + part.depth for part in parts], default=0)
            if work > _MOST_WORK or depth > _DEEPEST:
                raise ValueError("its pickle holds objects in objects without end")
            size = 1 + sum(each.size for each in taken)
            stack += [_Object(depth, size)] * len(opcode.stack_after)


def _taken(stack: list[_Object], opcode: pickletools.OpcodeInfo) -> list[_Object]:
    """Pop an opcode's operands from the stack, in the order in which they were pushed."""
    before = opcode.stack_before
    taken: list[_Object] = []
    if pickletools.markobject in before:
        while (top := stack.pop()) is not _MARK:
            taken.append(top)
        before = before[: before.index(pickletools.markobject)]
    taken += [stack.pop() for _ in before]
    return taken[::-1]


def _allowed(argument: str) -> str:
    """Check the name that the opcode GLOBAL requests, and return it in full.

    Raises:
        UnneededGlobalError: if weights do not need the name.
    """
    name = argument.replace(" ", ".", 1)
    if name not in _CALLED and not _NAMED.fullmatch(name):
        raise UnneededGlobalError(name)
    return name
