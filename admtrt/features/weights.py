"""Read the weights of FID's Inception from either published file, by TensorFlow's names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from admtrt.brief import listed
from admtrt.errors import CheckpointError, DataError
from admtrt.features.topology import CLASSES, POOL, convolution_names
from admtrt.files import sha256_of
from admtrt.reading import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator

Array = NDArray[np.float32]
NORM = ("beta", "gamma", "moving_mean", "moving_variance")
"""Parts of a batch normalisation."""


@dataclass(frozen=True)
class KnownFile:
    """One published file of the weights; ``digest`` is hexadecimal, by ``algorithm``."""

    name: str
    size: int
    algorithm: str
    digest: str
    url: str

    def matches(self, path: Path) -> bool:
        """True if a file is this one."""
        if path.stat().st_size != self.size:
            return False
        with open_regular(path) as opened:
            return hashlib.file_digest(opened, self.algorithm).hexdigest() == self.digest


KNOWN = (
    KnownFile(
        "classify_image_graph_def.pb",
        95_673_916,
        "md5",  # the only published digest of this file; nothing in it is executed
        "e6bb154e85f5d4331c22abcddb5dcf31",
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/classify_image_graph_def.pb",
    ),
    KnownFile(
        "pt_inception-2015-12-05-6726825d.pth",
        95_628_359,
        "sha256",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    ),
)


def known_files() -> str:
    """The accepted files, for a message."""
    return "; ".join(
        f"{file.name}, {file.size:,} bytes, {file.algorithm} {file.digest}, {file.url}" for file in KNOWN
    )


def read_weights(path: Path) -> dict[str, Array]:
    """Read every weight: ``NAME/conv2d_params`` HWIO, ``NAME/batchnorm/PART``, ``softmax/weights``.

    Args:
        path: TensorFlow's frozen graph (``.pb``), of which only constants are read, or a PyTorch state dict
            (``.pth``), read without executing code.

    Raises:
        CheckpointError: if it cannot be read, or lacks a weight.
        DataError: if there is no such file.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}", hint=f"Bring one of: {known_files()}")
    found = _from_torch(path) if path.suffix in (".pth", ".pt") else _from_graph(path)
    parts = ("conv2d_params", *(f"batchnorm/{part}" for part in NORM))
    needed = [f"{name}/{part}" for name in convolution_names() for part in parts] + ["softmax/weights"]
    missing = [name for name in needed if name not in found]
    if missing:
        raise CheckpointError(
            f"{path} is no Inception of 2015-12-05: it lacks {listed(missing)}",
            hint=f"Expected: {known_files()}",
        )
    for name in needed:
        if not np.isfinite(found[name]).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity")
    if found["softmax/weights"].shape != (POOL, CLASSES):
        raise CheckpointError(
            f"{path}: softmax/weights is {list(found['softmax/weights'].shape)}; expected {[POOL, CLASSES]}"
        )
    return {name: found[name] for name in needed}


def describe_weights(path: Path) -> dict[str, Any]:
    """Name and SHA-256 of a file, and whether it is a published one."""
    return {
        "name": path.name,
        "sha256": sha256_of(path),
        "known": any(file.matches(path) for file in KNOWN),
    }


# --- PyTorch's state dicts: pytorch-fid's and torch-fidelity's file -----------------------------------------
_STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
# The branches of each kind of block: TensorFlow's tower, and PyTorch's name of its convolutions.
_TOWERS: dict[str, dict[str, tuple[str, ...]]] = {
    "5": {"": ("branch1x1",), "tower": ("branch5x5_{}",), "tower_1": ("branch3x3dbl_{}",)},
    "6a": {"": ("branch3x3",), "tower": ("branch3x3dbl_{}",)},
    "6": {"": ("branch1x1",), "tower": ("branch7x7_{}",), "tower_1": ("branch7x7dbl_{}",)},
    "7a": {"tower": ("branch3x3_{}",), "tower_1": ("branch7x7x3_{}",)},
    "7": {
        "": ("branch1x1",),
        "tower": ("branch3x3_{}",),
        "tower_1": ("branch3x3dbl_{}",),
        "tower/mixed": ("branch3x3_2a", "branch3x3_2b"),
        "tower_1/mixed": ("branch3x3dbl_3a", "branch3x3dbl_3b"),
    },
}


def torch_name(name: str) -> str:
    """PyTorch's module name for a convolution that TensorFlow calls ``name``."""
    if name in _STEM:
        return _STEM[name]
    block, _, rest = name.partition("/")
    number = int(block.removeprefix("mixed").removeprefix("_") or 0)
    letter = _BLOCKS[number]
    tower, _, conv = rest.rpartition("/")
    index = int(conv.removeprefix("conv").removeprefix("_") or 0)
    if tower == "tower_2":
        return f"Mixed_{letter}.branch_pool"
    names = _TOWERS.get(letter, _TOWERS[letter[0]])[tower]
    chosen = names[index] if len(names) > 1 else names[0].format(index + 1)
    return f"Mixed_{letter}.{chosen}"


def _from_torch(path: Path) -> dict[str, Array]:
    import torch

    try:
        with open_regular(path) as opened:
            state = torch.load(opened, map_location="cpu", weights_only=True)
        arrays = {key: tensor.float().numpy() for key, tensor in state.items()}
    except Exception as error:  # damaged files can make PyTorch's reader raise anything
        raise CheckpointError(f"cannot read {path}: it is no state dict of PyTorch, or damaged") from error
    found: dict[str, Array] = {}
    norm = dict(zip(NORM, ("bias", "weight", "running_mean", "running_var"), strict=True))
    for name in convolution_names():
        module = torch_name(name)
        kernel = arrays.get(f"{module}.conv.weight")
        if kernel is not None and kernel.ndim == 4:
            found[f"{name}/conv2d_params"] = kernel.transpose(2, 3, 1, 0)
        for part, key in norm.items():
            if f"{module}.bn.{key}" in arrays:
                found[f"{name}/batchnorm/{part}"] = arrays[f"{module}.bn.{key}"]
    if "fc.weight" in arrays:
        found["softmax/weights"] = arrays["fc.weight"].T
    return found


# --- TensorFlow's GraphDef: the few fields that hold constants -------------------------------------------
_NODE, _NAME, _OPERATION, _ATTRIBUTE = 1, 1, 2, 5
_TENSOR, _DTYPE, _SHAPE, _CONTENT, _FLOATS = 8, 1, 2, 4, 5
_DIMENSION, _SIZE = 2, 1
_FLOAT = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _from_graph(path: Path) -> dict[str, Array]:
    try:
        with open_regular(path) as opened:
            return dict(_constants(np.memmap(opened, np.uint8, "r").data))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is no frozen graph of TensorFlow, or damaged: {error}",
            hint=f"Expected: {known_files()}",
        ) from None


def _constants(graph: Any) -> Iterator[tuple[str, Array]]:
    """Every float32 constant."""
    for number, node in _fields(graph):
        if number != _NODE or not isinstance(node, memoryview):
            continue
        fields = list(_fields(node))
        texts = {key: _text(value) for key, value in fields if key in (_NAME, _OPERATION)}
        if texts.get(_OPERATION) != "Const" or _NAME not in texts:
            continue
        for key, attribute in fields:
            if key != _ATTRIBUTE:
                continue
            entry: dict[int, Any] = dict(_fields(attribute))
            if _text(entry.get(1)) == "value":
                array = _tensor(dict(_fields(entry[2])).get(_TENSOR))
                if array is not None:
                    yield texts[_NAME], array


def _tensor(message: Any) -> Array | None:
    if not isinstance(message, memoryview):
        return None
    entries = list(_fields(message))
    fields = dict(entries)
    if fields.get(_DTYPE) != _FLOAT or _SHAPE not in fields:
        return None
    # Values are stored as bytes, or as single numbers, packed or not.
    content = b"".join(bytes(value) for key, value in entries if key in (_CONTENT, _FLOATS))
    sizes = [dict(_fields(size)).get(_SIZE, 0) for key, size in _fields(fields[_SHAPE]) if key == _DIMENSION]
    return np.frombuffer(content, "<f4").reshape(sizes)


def _text(value: Any) -> str:
    return bytes(value).decode("utf-8") if isinstance(value, memoryview) else ""


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Fields of one protocol-buffer message: number, and a whole number or the bytes."""
    if not isinstance(data, memoryview):
        raise ValueError("a message was expected")
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, position = _varint(data, position)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        if size > len(data) - position:
            raise ValueError("a field reaches past the end of its message")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is cut off")
