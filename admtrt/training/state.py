"""The training state in one safetensors file, replaced atomically, without pickles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from admtrt.errors import CheckpointError
from admtrt.models.weights import write_safetensors
from admtrt.reading import open_regular, parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_VERSION = 1
_METADATA = "admtrt_training_state"
_SEPARATOR = "/"

Groups = dict[str, dict[str, "Tensor"]]
"""Tensors by group and name. Names may contain slashes; groups may not."""


def save_state(path: Path, groups: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
    """Write tensors and JSON-ready values, atomically.

    Raises:
        OutputError: if the file cannot be written; the old one is kept.
    """
    tensors = {
        f"{group}{_SEPARATOR}{name}": tensor
        for group, members in groups.items()
        for name, tensor in members.items()
    }
    write_safetensors(path, tensors, {_METADATA: {"version": _VERSION, **values}})


def load_state(path: Path) -> tuple[Groups, dict[str, Any]]:
    """Read what :func:`save_state` wrote.

    Raises:
        CheckpointError: if the file is damaged or was written by another version.
    """
    groups: Groups = {}
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as opened:
            values = parse_json((opened.metadata() or {}).get(_METADATA, "{}"))
            for key in opened.keys():  # noqa: SIM118 - not a dict
                group, _, name = key.partition(_SEPARATOR)
                groups.setdefault(group, {})[name] = opened.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read the training state {path}: {error}",
            hint="It is damaged; begin again with --overwrite, or put back a copy of it.",
        ) from None
    if not isinstance(values, dict) or values.pop("version", None) != _VERSION:
        raise CheckpointError(
            f"{path} is not a training state of version {_VERSION}",
            hint="Resume with the version of admtrt that wrote it.",
        )
    return groups, values


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as ``<parameter>/<name>`` tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{name}": value for index, members in state.items() for name, value in members.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what :func:`optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
