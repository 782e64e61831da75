"""State dicts in files: memory-mapped, never executed; every error is a :class:`CheckpointError`."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from admtrt.errors import CheckpointError
from admtrt.files import atomic_file
from admtrt.models.torch_files import UnneededGlobalError, check_torch_file
from admtrt.reading import open_regular

SUFFIXES = (".safetensors", ".pt", ".pth")
"""Suffixes of the files that are read and written."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes of weights by the name of the precision."""

_LONGEST_HEADER = 2**23  # bytes: more than 50,000 tensors
_MOST_SHARING = 4  # tensors may have this many times the file's size, since some networks tie weights
_DEEPEST = 3  # nested dictionaries around a state dict
_RESAVE = "If you trust its source, save its state dict alone as .safetensors where it was made."


def suffix_of(path: Path) -> str:
    """The suffix of a readable checkpoint file, in lower case.

    Raises:
        CheckpointError: if there is no such file, or it is of another type.
    """
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {found}; expected a checkpoint file (.safetensors, .pt or .pth)")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise CheckpointError(f"{path} has the suffix '{path.suffix}'; expected .safetensors, .pt or .pth")
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return suffix


def read_state_dicts(path: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a file by name; a file that is a state dict itself gives one called "".

    Tensors keep their stored form and are memory-mapped: their bytes are read when used.

    Raises:
        CheckpointError: if the file is missing or damaged, would run code, has no state dict, or has tensors
            that repeat its bytes excessively.
    """
    if suffix_of(path) == ".safetensors":
        found = {"": _read_safetensors(path)}
    else:
        found = _state_dicts(path, _read_pickle(path))
    for tensors in found.values():
        _check_extent(path, tensors)
    return found


def read_part(path: Path) -> dict[str, Tensor]:
    """The tensors of one weight file of a folder, a ``.safetensors`` file or a pickle.

    Raises:
        CheckpointError: as :func:`read_state_dicts`, or if it holds several state dicts.
    """
    try:
        open_regular(path).close()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    else:
        found = _state_dicts(path, _read_pickle(path))
        if list(found) != [""]:
            raise CheckpointError(f"{path} holds state dicts called {', '.join(found)}; expected one alone")
        tensors = found[""]
    _check_extent(path, tensors)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; empty for other files.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    if suffix_of(path) != ".safetensors":
        return {}
    with _opened_safetensors(path) as opened:
        return opened.metadata() or {}


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object], *, replace: bool = True
) -> None:
    """Write tensors with metadata (strings or JSON values), atomically.

    Raises:
        OutputError: if the place cannot be written, or is taken and not to be replaced.
    """
    storages: set[int] = set()
    plain = {}
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        # The format does not allow tensors that share memory, such as views of a flat buffer.
        plain[key] = tensor.clone() if address in storages else tensor
        storages.add(address)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    with atomic_file(path, replace=replace) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(plain, temporary, metadata=texts)  # itself writes a temporary file in the same folder
        except SafetensorError as error:
            # safetensors has its own error for a full disk.
            raise OSError(str(error)) from error
        # safetensors makes files unreadable for others, ignoring the umask.
        temporary.chmod(mode)


def write_pickle(path: Path, tensors: Mapping[str, Tensor], *, replace: bool = True) -> None:
    """Write a state dict as the original code does: ``torch.save`` of an ordered dictionary.

    Raises:
        OutputError: if the place cannot be written, or is taken and not to be replaced; what stood there is
            untouched.
    """
    with atomic_file(path, replace=replace) as temporary, temporary.open("wb") as opened:
        try:
            torch.save(OrderedDict(tensors), opened)
        except RuntimeError as error:
            # PyTorch's writer raises this for a full disk.
            raise OSError(str(error).splitlines()[0]) from error


def check_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights unless they are dense, real and finite.

    Raises:
        CheckpointError: naming the first that is not.
    """
    for key, stored in tensors.items():
        _check_plain(path, key, stored)


def _check_extent(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that repeat the file's bytes: reading them would need unbounded memory."""
    stored = path.stat().st_size
    sizes = {key: value.numel() * value.element_size() for key, value in tensors.items()}
    largest = max(sizes, key=sizes.__getitem__, default="")
    if max(sizes.values(), default=0) > stored or sum(sizes.values()) > _MOST_SHARING * stored:
        raise CheckpointError(
            f"the tensors of {path} have {sum(sizes.values())} bytes, the file {stored}: they repeat what it "
            f"holds; the largest is {largest} {list(tensors[largest].shape)}",
            hint=_RESAVE,
        )


def _check_plain(path: Path, key: str, stored: Tensor) -> None:
    if stored.layout is not torch.strided or not stored.is_floating_point():
        raise CheckpointError(
            f"{path}: {key} is a {stored.dtype} tensor; expected plain floating-point weights"
        )
    if stored.dtype.itemsize == 1:
        raise CheckpointError(
            f"{path}: {key} is a {stored.dtype} tensor; types of 8 bits are not read",
            hint="Save it in fp16, bf16 or fp32.",
        )
    if not bool(torch.isfinite(stored).all()):
        raise CheckpointError(
            f"{path}: {key} has weights that are NaN or infinite",
            hint="The training that wrote it diverged, or the file is damaged; take an earlier checkpoint.",
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _opened_safetensors(path) as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict


@contextlib.contextmanager
def _opened_safetensors(path: Path) -> Iterator[Any]:  # its methods are untyped
    try:
        with path.open("rb") as header:
            length = int.from_bytes(header.read(8), "little")
        if length > _LONGEST_HEADER:
            raise SafetensorError(f"its header would have {length} bytes")
        with safe_open(path, framework="pt", device="cpu") as opened:
            yield opened
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or no safetensors file: {error}", hint="Copy or download it again."
        ) from None


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notices about formats
            mapped = check_torch_file(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UnneededGlobalError as error:
        raise CheckpointError(
            f"{path} was refused: its pickle wants to use '{error}', which plain weights do not need; "
            "nothing was executed",
            hint=_RESAVE,
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # arbitrary bytes can raise anything
        reason = f": {error}" if type(error) is ValueError else ""
        raise CheckpointError(
            f"{path} is truncated, damaged or no PyTorch file of weights alone{reason}; "
            "nothing in it was executed",
            hint=f"Copy or download it again. {_RESAVE}",
        ) from error


def _state_dicts(path: Path, content: object) -> dict[str, dict[str, Tensor]]:
    if isinstance(content, Mapping):
        if not _is_state_dict(content) and (found := dict(_named(content))):
            return found
        if content.keys() >= {"state", "param_groups"}:
            raise CheckpointError(
                f"{path} holds the state of an optimiser, no weights",
                hint="Take the model's file beside it (model*.pt), or the averaged one (ema_*.pt).",
            )
        if isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict", hint=_RESAVE)
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} is no state dict: its entry {key!r} is a {type(value).__name__}, not a named tensor",
                hint=_RESAVE,
            )
    return {"": dict(content)}


def _named(
    content: Mapping[object, object], place: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Find state dicts anywhere in a saved object; averages saved without names give empty ones."""
    for key, value in content.items():
        if not isinstance(key, str) or key.startswith("opt") or len(place) == _DEEPEST:
            continue
        name = ".".join([*place, key])
        if _is_state_dict(value):
            yield name, dict(value)
        elif isinstance(value, Mapping):
            yield from _named(value, (*place, key))
        elif key == "shadow_params":  # the name in torch_ema
            yield name, {}


def _is_state_dict(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(one, Tensor) for key, one in value.items())
    )
