"""Fine-tuning: training that starts from a checkpoint's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from admtrt.brief import listed
from admtrt.errors import CheckpointError, ConfigError
from admtrt.models.checkpoint import CheckpointConfig, load_identified, open_checkpoint
from admtrt.models.identify import identify_checkpoint
from admtrt.run_config import RunConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from admtrt.models.checkpoint import LoadedNetwork, StoredCheckpoint
    from admtrt.models.identify import IdentifiedCheckpoint
    from admtrt.run_config import Task

_FREE = frozenset({"dropout"})
"""Settings of a network that do not change the meaning of its weights."""
_LABELS = "label_emb."
"""Prefix of the tensors that a network without classes lacks."""


def with_start(
    task: Task, config: RunConfig, note: Callable[[str], None]
) -> tuple[RunConfig, LoadedNetwork | None]:
    """Complete a configuration from its initial checkpoint; returns both.

    Missing sections for the network, the process and the sampler are taken from the checkpoint. A given
    network must be the same.

    Args:
        task: the network to train.
        config: the configuration as read.
        note: called with a description of the checkpoint, and if its process differs from the
            configuration's.

    Raises:
        CheckpointError: if the checkpoint cannot be used.
        ConfigError: if its network differs, or does not fit the images.
    """
    if task != "unet" or config.train_unet.init is None:
        return config, None
    path = Path(config.train_unet.init)
    identified = _identified(open_checkpoint(path), config, note)
    found = identified.config
    assert found.unet is not None  # guaranteed by its kind
    taken = {name: getattr(config, name) for name in config.model_fields_set}
    if config.unet is None:
        taken["unet"] = found.unet
    else:
        _check_same(path, found, config)
    for name in ("diffusion", "sampler"):
        if name not in config.model_fields_set:
            taken[name] = getattr(found, name)
    if taken["diffusion"] != found.diffusion:
        note(f"{path} was trained on another process than that of [diffusion], which is used")
    return RunConfig.from_dict(taken), load_identified(identified)


def begin_with(network: nn.Module, start: LoadedNetwork) -> None:
    """Load a checkpoint's weights into a network. Label embeddings are dropped if it has no classes."""
    own = network.state_dict()
    weights = start.module.state_dict()
    network.load_state_dict(
        {key: value for key, value in weights.items() if key in own or _LABELS not in key}
    )


def _identified(
    stored: StoredCheckpoint, config: RunConfig, note: Callable[[str], None]
) -> IdentifiedCheckpoint:
    given = []
    if stored.embedded is None and config.unet is not None:
        given = [CheckpointConfig(kind="unet", unet=config.unet, diffusion=config.diffusion)]
    try:
        found = identify_checkpoint(stored, kinds=("unet",), configs=given)
    except CheckpointError as error:
        hint = "Describe it in [unet], or first convert it: admtrt convert CHECKPOINT start.safetensors"
        raise CheckpointError(error.message, hint=hint) from None
    if found.note:
        note(f"{stored.path}: {found.note}")
    return found


def _check_same(path: Path, found: CheckpointConfig, config: RunConfig) -> None:
    """Refuse a network in the configuration that is not the checkpoint's.

    Raises:
        ConfigError: naming what differs.
    """
    assert found.unet is not None
    ours = found.model_copy(update={"unet": config.unet}).facts
    theirs = found.facts
    assert config.unet is not None  # checked by the caller
    free = _FREE if config.unet.num_classes is not None else _FREE | {"num_classes"}
    different = [
        f"unet.{key} is {ours[key]}, {theirs[key]} in the checkpoint"
        for key in ours
        if key not in free and ours[key] != theirs[key]
    ]
    if different:
        raise ConfigError(
            f"train_unet.init is {path}, whose network is another: {listed(different, separator='; ')}",
            hint="Leave [unet] out to take the checkpoint's.",
        )
