"""Layouts of forks' files: several state dicts, prefixes, attention as 2-D convolutions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from admtrt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_ROOT = "time_embed.0.weight"
"""A tensor that every ADM network has exactly once."""

_PLAIN = "plain"
_ATTENTION = re.compile(r"\.(qkv|proj_out)\.weight$")


@dataclass(frozen=True)
class WeightSet:
    """The weights of one network in a file.

    Attributes:
        tensors: by bare name, as stored.
        prefix: the prefix removed from every name.
    """

    tensors: Mapping[str, Tensor]
    prefix: str = ""


def choose_weights(
    path: Path, state_dicts: Mapping[str, Mapping[str, Tensor]], wanted: str | None, option: str
) -> WeightSet:
    """Choose the weights of one network in a file: the only ones, or the requested ones.

    Args:
        path: the file, for messages.
        state_dicts: the state dicts of the file by name; "" if the file is a state dict itself.
        wanted: the name of a state dict, or the prefix of tensor names.
        option: the option that requests weights, for hints.

    Raises:
        CheckpointError: if there are several (for instance averaged and plain ones) and none was chosen, or
            the chosen ones are missing.
    """
    named = {name: one for key, tensors in state_dicts.items() for name, one in _sets(key, tensors).items()}
    if wanted is None:
        if len(named) == 1:
            (only,) = named.values()
            whole = len(only.tensors) == len(next(iter(state_dicts.values())))
            return only if whole else WeightSet(next(iter(state_dicts.values())))
        raise CheckpointError(
            f"{path} holds several sets of weights: {', '.join(named)}",
            hint=f"Say which with {option} NAME. Images are usually drawn with the averaged ones (EMA).",
        )
    chosen = named.get(wanted.rstrip("."))
    if chosen is not None and chosen.tensors:
        return chosen
    if chosen is not None:
        raise CheckpointError(
            f"{wanted} of {path} are tensors without names",
            hint="Where the file was made, copy them into the model and save its state dict.",
        )
    names = ", ".join(name for name in named if name != _PLAIN or len(named) > 1)
    held = f"it has {names}" if names else "all of it is one network's"
    raise CheckpointError(f"{path} has no weights called {wanted!r}; {held}", hint=f"Correct {option}.")


def _sets(name: str, tensors: Mapping[str, Tensor]) -> dict[str, WeightSet]:
    """The networks in one state dict, by the state dict's name, the prefix of names, or both."""
    prefixes = [key.removesuffix(_ROOT) for key in tensors if key == _ROOT or key.endswith(f".{_ROOT}")]
    if not prefixes:
        return {name or _PLAIN: WeightSet(tensors)}
    found = {}
    for prefix in prefixes:
        others = tuple(one for one in prefixes if one != prefix and one.startswith(prefix))
        own = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix) and not key.startswith(others)
        }
        parts = [name, prefix.rstrip(".")] if len(prefixes) > 1 or not name else [name]
        found[".".join(part for part in parts if part) or _PLAIN] = WeightSet(own, prefix)
    return found


def convolved_attention(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Attention's weights, if all belong to 2-D 1x1 convolutions, [.., .., 1, 1]."""
    names = [name for name in tensors if _ATTENTION.search(name)]
    convolved = all(tensors[name].ndim == 4 and tensors[name].shape[2:] == (1, 1) for name in names)
    return frozenset(names) if convolved else frozenset()


def partial_prefix(tensors: Mapping[str, Tensor]) -> str:
    """Prefix of a network's tensors in a state dict with other tensors; "" if there is none."""
    return next((key.removesuffix(f".{_ROOT}") for key in tensors if key.endswith(f".{_ROOT}")), "")
