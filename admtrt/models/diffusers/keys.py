"""Rename the tensors of a ``UNet2DModel`` to ADM's names.

Diffusers counts blocks by level, ADM from the first convolution on. Queries, keys and values are three linear
maps in diffusers and one 1x1 convolution in ADM.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from admtrt.brief import listed
from admtrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from admtrt.config import UNetConfig
    from admtrt.models.infer import Shapes

_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "proj_out": ("to_out.0",)}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "label_emb": "class_embedding",
}
_OLD = re.compile(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW = re.compile(r"(.*\battentions\.\d+)\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)")
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_FIRST_EMBEDDING = "time_embed.0.weight"


def with_new_spelling(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename attention's tensors as in v0.17 and later.

    Raises:
        CheckpointError: if a block has both spellings.
    """
    new = {found[1] for key in tensors if (found := _NEW.fullmatch(key))}
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        old = _OLD.fullmatch(key)
        if old and old[1] in new:
            raise CheckpointError(
                f"{file}: {old[1]} has attention in two spellings, {key} beside "
                f"{next(one for one in tensors if one.startswith(old[1]) and _NEW.fullmatch(one))}",
                hint="Save the model again with one version of diffusers.",
            )
        renamed[f"{old[1]}.{_RENAMED[old[2]]}.{old[3]}" if old else key] = tensor
    return renamed


def adm_tensors(
    file: Path, tensors: Mapping[str, Tensor], config: UNetConfig, shapes: Shapes, *, sines_first: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by ADM's names, and the source names of each.

    Args:
        file: the file, for messages.
        tensors: by the names of the current class.
        config: configuration of the network.
        shapes: shapes of its tensors.
        sines_first: whether the halves of the first embedding weight's columns have to be swapped.

    Raises:
        CheckpointError: if names or shapes differ from the network's.
    """
    sources = dict(named_sources(config, shapes))
    _check(file, tensors, sources, shapes)
    made = {}
    for key, names in sources.items():
        parts = [tensors[name] for name in names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if key == _FIRST_EMBEDDING and sines_first:
            sines, cosines = tensor.chunk(2, dim=1)
            tensor = torch.cat([cosines, sines], dim=1)
        made[key] = tensor.reshape(shapes[key])
    return made, {key: " with ".join(names) for key, names in sources.items()}


def _check(
    file: Path, tensors: Mapping[str, Tensor], sources: Mapping[str, tuple[str, ...]], shapes: Shapes
) -> None:
    """Refuse tensors that do not match the network, naming them as in the file."""
    expected = {
        name: shape_of_part(shapes[key], len(names)) for key, names in sources.items() for name in names
    }
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    other = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    told = [
        f"{len(names)} {fault}: {listed(names, separator='; ')}" for fault, names in faults.items() if names
    ]
    if told:
        raise CheckpointError(
            "\n".join([f"the tensors of {file.parent} are not those of {file.name}:", *told]),
            hint="The folder must hold the weights and the configuration of one and the same model.",
        )
    narrow = next((name for name in expected if tensors[name].dtype.itemsize == 1), None)
    if narrow is not None:
        raise CheckpointError(
            f"{file.parent}: {narrow} is a {tensors[narrow].dtype} tensor; types of 8 bits are not read",
            hint="Save it in fp16, bf16 or fp32.",
        )


def shape_of_part(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """The shape of one source tensor of an ADM tensor; linear maps lack the kernel's axis."""
    plain = shape[:2] if len(shape) == 3 else shape
    return (plain[0] // parts, *plain[1:])


def named_sources(config: UNetConfig, shapes: Shapes) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The names of the source tensors of each ADM tensor."""
    modules = dict(_modules(config))
    for key in shapes:
        module, _, leaf = key.rpartition(".")
        yield key, tuple(f"{name}.{leaf}" for name in modules[module])


def _modules(config: UNetConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The same for all modules that the network may have."""
    yield from ((ours, (theirs,)) for ours, theirs in _ENDS.items())
    levels, depth = len(config.channel_mult), config.num_res_blocks
    place = 1
    for level in range(levels):
        block = f"down_blocks.{level}"
        for index in range(depth):
            yield from _residual(f"input_blocks.{place}.0", f"{block}.resnets.{index}")
            yield from _attention(f"input_blocks.{place}.1", f"{block}.attentions.{index}")
            place += 1
        if level < levels - 1:
            yield f"input_blocks.{place}.0.op", (f"{block}.downsamplers.0.conv",)
            yield from _residual(f"input_blocks.{place}.0", f"{block}.downsamplers.0")
            place += 1
    yield from _residual("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _residual("middle_block.2", "mid_block.resnets.1")
    place = 0
    for up, size in enumerate(reversed(config.level_sizes)):
        block = f"up_blocks.{up}"
        for index in range(depth + 1):
            yield from _residual(f"output_blocks.{place}.0", f"{block}.resnets.{index}")
            if size in config.attention_resolutions:
                yield from _attention(f"output_blocks.{place}.1", f"{block}.attentions.{index}")
            if index == depth and up < levels - 1:
                behind = f"output_blocks.{place}.{2 if size in config.attention_resolutions else 1}"
                yield f"{behind}.conv", (f"{block}.upsamplers.0.conv",)
                yield from _residual(behind, f"{block}.upsamplers.0")
            place += 1


def _residual(ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from ((f"{ours}.{inner}", (f"{theirs}.{name}",)) for inner, name in _BLOCK.items())


def _attention(ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for inner, names in _ATTENTION.items():
        yield f"{ours}.{inner}", tuple(f"{theirs}.{name}" for name in names)
