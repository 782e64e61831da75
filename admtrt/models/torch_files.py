"""PyTorch's files, checked before PyTorch reads them: a small file must not cost much time or memory.

PyTorch's reader for weights alone runs no code, but does whatever work the file asks of it: it inflates, and
it hashes tuples of tuples. A state dict needs little of that, and the rest is refused here.
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

_ZIP_START = b"PK\x03\x04"  # by which PyTorch tells archives from the files of before 1.6
_LONG_END, _LOCATOR, _END = map(struct.Struct, ("<4sQ2H2L4Q", "<4sLQL", "<4s4H2LH"))
_LONGEST_DIRECTORY = 2**23  # bytes; about 90 a tensor
_LEGACY_PICKLES = 5  # magic number, version, system, the object itself, the names of the storages
_LARGEST_PICKLE = 2**24  # bytes; that of a state dict has about 200 a tensor
_MOST_STEPS = 200_000  # about 40 a tensor
_DEEPEST = 100
_MOST_WORK = 20_000_000  # objects taken up again and again, shared ones every time

_OPCODES = frozenset(
    {
        *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
        *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
        *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "SETITEM", "SETITEMS", "APPEND", "APPENDS"),
        *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
    }
)
"""Of those that PyTorch's reader knows, the ones that dictionaries of tensors are written with."""

_GROWTH = frozenset({"SETITEM", "SETITEMS", "APPEND", "APPENDS", "BUILD"})
"""Those that add to the first object that they take."""

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
"""Callables that are allowed: all of them make dictionaries, sizes and views of the file's own bytes."""

_NAMED = re.compile(r"torch\.(storage\.)?(\w*Storage|bool|[a-z]+\d+(_\w+)?)")
"""Names that are allowed besides: types of storages and numbers."""


class UnneededGlobalError(ValueError):
    """The pickle uses something that weights do not need; ``args`` hold its name."""


class _Object(NamedTuple):
    """Depth and size of an object, known without making it."""

    depth: int = 0
    size: int = 1
    name: str = ""


_ATOM, _MARK = _Object(), _Object()  # told apart by identity


def check_torch_file(path: Path) -> bool:
    """Make sure that PyTorch can read a file in bounded time and memory, without reading its weights.

    Returns:
        Whether it is an archive, which can be mapped; files from before PyTorch 1.6 are none.

    Raises:
        UnneededGlobalError: if a name in its pickle is none that weights need.
        Exception: of many types, if it is damaged, or more than the weights of a network.
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
    """Offset of an archive's directory, by the record at its very end and ZIP64's before that.

    Python and PyTorch look for it in ways that differ where an archive does not end as PyTorch writes it.

    Raises:
        ValueError: if it does not, or the directory is absurdly long.
        struct.error: if it is too short for any.
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
    """The one pickle of an archive, whose other members are raw bytes.

    Raises:
        ValueError: if it is not such an archive, or its members could be larger than it is.
    """
    names = {entry.filename.lower() for entry in entries}  # PyTorch's reader does not tell cases apart
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
    """Follow one pickle, leaving its objects unmade.

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
    """Remove what an opcode takes from the stack, in the order in which it was put there."""
    before = opcode.stack_before
    taken: list[_Object] = []
    if pickletools.markobject in before:
        while (top := stack.pop()) is not _MARK:
            taken.append(top)
        before = before[: before.index(pickletools.markobject)]
    taken += [stack.pop() for _ in before]
    return taken[::-1]


def _allowed(argument: str) -> str:
    """The full name of what the opcode GLOBAL asks for.

    Raises:
        UnneededGlobalError: if weights do not need it.
    """
    name = argument.replace(" ", ".", 1)
    if name not in _CALLED and not _NAMED.fullmatch(name):
        raise UnneededGlobalError(name)
    return name
