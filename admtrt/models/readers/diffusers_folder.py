"""Diffusers' folders: a ``UNet2DModel`` with its configuration and its scheduler's, read without diffusers.

A pipeline's folder has them in ``unet/`` and ``scheduler/``. The oldest pipelines have all files in one
folder, and a bare ``unet/`` uses the scheduler beside it. No other place is searched, and nothing is
executed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from admtrt.config_files import toml_of
from admtrt.errors import CheckpointError
from admtrt.models.diffusers.keys import adm_tensors, with_new_spelling
from admtrt.models.diffusers.network import CLASS, check_class, read_network
from admtrt.models.diffusers.scheduler import read_scheduler
from admtrt.models.diffusers.values import shown
from admtrt.models.settings import CheckpointConfig, shapes_of_network
from admtrt.models.stored import StoredCheckpoint
from admtrt.models.weights import read_part
from admtrt.reading import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from admtrt.models.diffusers.network import Network
    from admtrt.models.readers.opened import Opened

_CONFIG, _SCHEDULER, _INDEX = "config.json", "scheduler_config.json", "model_index.json"
_WEIGHTS = "diffusion_pytorch_model"
_SUFFIXES = ("safetensors", "bin")
_VARIANT = re.compile(rf"{_WEIGHTS}\.([A-Za-z0-9_-]+)\.({'|'.join(_SUFFIXES)})")
_SHARD = re.compile(r"\d+-of-\d+")
_LARGEST_JSON, _LARGEST_INDEX = 2**20, 2**23  # bytes
_MOST_SHARDS = 1000


def recognises(opened: Opened) -> bool:
    """True for any folder. Reading reports what is missing."""
    return opened.path.is_dir()


def read(opened: Opened) -> StoredCheckpoint:
    """Read the folder, which contains all settings.

    Raises:
        CheckpointError: naming the file and, if one is wrong, the key and its value.
    """
    path = opened.path
    if opened.weights is not None:
        raise CheckpointError(
            f"{path} is a folder, in which no weights are called {opened.weights!r}",
            hint=f"Leave out {opened.options.prefix}weights; averaged weights may be in {path}/unet_ema.",
        )
    folder = _network_folder(path)
    config_file = folder / _CONFIG
    if folder == path:
        _check_pipeline(path.resolve().parent, None, path)
    else:
        _check_pipeline(path, folder.name, path)
    data = _object(config_file)
    check_class(config_file, data)
    weights, notes = _weights(folder)
    tensors = with_new_spelling(folder, weights)
    network = read_network(config_file, data, tensors)
    if network.config.num_blocks > len(tensors):  # before building a network of any depth for the comparison
        raise CheckpointError(
            f"{folder} has {len(tensors)} tensors, too few for {len(network.config.channel_mult)} levels of "
            f"{network.config.num_res_blocks} residual blocks, which {config_file} says"
        )
    scheduler_file = _scheduler_file(path, folder)
    scheduler = read_scheduler(scheduler_file, _object(scheduler_file), network.config)
    embedded = CheckpointConfig(
        kind="unet",
        unet=network.config,
        diffusion=scheduler.process,
        sampler=scheduler.sampler,
        threshold_quantile=scheduler.quantile,
    )
    made, names = adm_tensors(
        config_file, tensors, network.config, shapes_of_network(embedded), sines_first=network.sines_first
    )
    said = "; ".join([*_in_words(network), *network.notes, *notes, *scheduler.notes])
    use = ", for training a classifier" if scheduler.process.kind == "discrete" else ""
    process = toml_of(scheduler.process, "diffusion").rstrip()
    note = f"{CLASS} read as ADM's UNet: {said}. Its process{use}:\n{process}"
    return StoredCheckpoint(
        path=path, tensors=made, prefix="", embedded=embedded, made_from="diffusers", names=names, note=note
    )


def _in_words(network: Network) -> list[str]:
    config = network.config
    said = []
    if config.strided and len(config.channel_mult) > 1:
        where = "after the image" if config.downsample_padding == "after" else "on both sides"
        said.append(f"strided convolutions pad {where}")
    return [*said, f"epsilon {config.norm_eps:g}, {config.norm_groups} groups"]


def _network_folder(path: Path) -> Path:
    """The folder of the network's configuration: ``unet`` in it, or the folder itself.

    Raises:
        CheckpointError: if there is none, or two that differ.
    """
    found = [folder for folder in (path / "unet", path) if (folder / _CONFIG).is_file()]
    if not found:
        raise CheckpointError(
            f"{path} is a directory without unet/{_CONFIG} or {_CONFIG}; expected a checkpoint file "
            "(.safetensors, .pt or .pth), or a folder that diffusers saved"
        )
    if len(found) == 2 and _object(found[0] / _CONFIG) != _object(found[1] / _CONFIG):
        raise CheckpointError(
            f"{found[0] / _CONFIG} and {found[1] / _CONFIG} describe two networks",
            hint=f"Give {found[0]} to take the first, or move one of them away.",
        )
    return found[0]


def _check_pipeline(root: Path, own: str | None, path: Path) -> None:
    """Refuse a network that belongs to a pipeline other than one for unconditional images.

    Args:
        root: the pipeline's folder, if it is one.
        own: name of the network's folder in the pipeline; None if ``path`` is that folder, or the whole
            pipeline.
        path: the given path.
    """
    files = [root / _INDEX] if own is not None else [path / _INDEX, root / _INDEX]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return
    index = _object(file)
    name = own or ("unet" if file.parent == path else path.resolve().name)
    if name == "unet_ema":  # never listed in the index
        name = "unet"
    if file.parent != path and name not in index:
        return  # the index of something else
    unet = index.get(name)
    if not isinstance(unet, list) or unet[-1:] != [CLASS]:
        raise CheckpointError(f"{file}: {name} is {shown(unet)}; expected a {CLASS}")
    for part, value in index.items():
        used = isinstance(value, list) and any(one is not None for one in value)
        if used and part not in (name, "scheduler") and not part.startswith("_"):
            raise CheckpointError(
                f"{file}: {part} is {shown(value[-1])}; where a pipeline has more than unet and scheduler, "
                "the unet alone makes no images"
            )


def _scheduler_file(path: Path, folder: Path) -> Path:
    """The scheduler's file.

    Raises:
        CheckpointError: naming the places searched.
    """
    places = [path / "scheduler" / _SCHEDULER, path / _SCHEDULER]
    if folder == path and path.resolve().name in ("unet", "unet_ema"):
        places.append(path.resolve().parent / "scheduler" / _SCHEDULER)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{path} has no {_SCHEDULER}, which says the process; looked for {', '.join(map(str, places))}",
            hint="Copy the scheduler's file of the pipeline there.",
        )
    return found


def _object(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        CheckpointError: if it cannot be read, or is not an object.
    """
    try:
        data = read_json(file, _LARGEST_INDEX if file.name.endswith(".index.json") else _LARGEST_JSON)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a {type(data).__name__}; expected a JSON object")
    return data


def _weights(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the tensors beside a configuration, with notes about their file.

    Raises:
        CheckpointError: if there are none, several variants, or files that cannot be read.
    """
    for suffix in _SUFFIXES:
        file = folder / f"{_WEIGHTS}.{suffix}"
        index = folder / f"{_WEIGHTS}.{suffix}.index.json"
        if file.is_file():
            return read_part(file), []
        if index.is_file():
            return _shards(index), []
    variants: dict[str, str] = {}
    for suffix in _SUFFIXES:
        for file in sorted(folder.glob(f"{_WEIGHTS}.*.{suffix}")):
            found = _VARIANT.fullmatch(file.name)
            if found and not _SHARD.fullmatch(found[1]):
                variants.setdefault(found[1], file.name)
    if len(variants) > 1:
        raise CheckpointError(
            f"{folder} holds several variants of weights: {', '.join(variants.values())}",
            hint=f"Leave one of them there, or call it {_WEIGHTS}.safetensors.",
        )
    for variant, name in variants.items():
        return read_part(folder / name), [f"the weights are the variant '{variant}', {name}"]
    raise CheckpointError(f"{folder} has no weights: no {_WEIGHTS}.safetensors, its index, nor .bin")


def _shards(index: Path) -> dict[str, Tensor]:
    """Read the tensors of all files that an index lists.

    Raises:
        CheckpointError: if a file is missing or outside the folder, or its tensors differ from the index.
    """
    listed = _object(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{index}: weight_map is no object of file names")
    names = sorted(set(listed.values()))
    if len(names) > _MOST_SHARDS:
        raise CheckpointError(
            f"{index}: weight_map names {len(names)} files; expected {_MOST_SHARDS} at most"
        )
    tensors: dict[str, Tensor] = {}
    for name in names:
        plain = name.endswith(_SUFFIXES) and "/" not in name and "\\" not in name and name.isprintable()
        if not plain:
            raise CheckpointError(f"{index}: weight_map names {name[:100]!r}, which is no plain file name")
        file = index.parent / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, which {index.name} lists", hint="Copy it there.")
        part = read_part(file)
        expected = {key for key, place in listed.items() if place == name}
        if part.keys() != expected:
            odd = sorted(part.keys() ^ expected)[0]
            raise CheckpointError(f"{file} and {index.name} do not agree on the tensor {odd}")
        tensors |= part
    return tensors
