"""A generator and its classifier: check that the two checkpoints fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from admtrt.bundle import check_networks
from admtrt.config import DiffusionConfig
from admtrt.errors import CheckpointError
from admtrt.models.checkpoint import LoadedNetwork
from admtrt.models.settings import build_network

if TYPE_CHECKING:
    from admtrt.config import EdmConfig
    from admtrt.models.settings import CheckpointConfig

_PREDICTED = {"mean_type", "variance_type", "rescale_timesteps"}
"""Fields in which the two may differ: prediction type and unit of t. The noise schedule must agree."""


def check_pair(generator: CheckpointConfig, guide: CheckpointConfig | None) -> None:
    """Refuse a classifier with other images, classes, class names or noise schedule than its UNet.

    Raises:
        CheckpointError: naming what differs.
    """
    assert generator.unet is not None  # guaranteed by its kind
    try:
        check_networks(generator.unet, None if guide is None else guide.classifier, generator.diffusion)
    except ValueError as error:
        raise CheckpointError(
            str(error), hint="Give a classifier that was trained for images and classes like this UNet's."
        ) from None
    if guide is None:
        if generator.class_names and generator.unet.num_classes is None:
            raise CheckpointError("the UNet has class names, but no classes", hint="Leave the names out.")
        return
    ours, theirs = generator.class_names, guide.class_names
    if ours and theirs and ours != theirs:
        raise CheckpointError(
            f"the UNet's classes are {', '.join(ours)}; the classifier's are {', '.join(theirs)}",
            hint="Labels are numbers: guidance would pull towards other classes than the UNet draws.",
        )
    noise = generator.diffusion.model_dump(exclude=_PREDICTED)
    for field, theirs_ in guide.diffusion.model_dump(exclude=_PREDICTED).items():
        ours_ = noise.get(field)
        if ours_ != theirs_:
            raise CheckpointError(
                f"the UNet was trained with diffusion.{field} = {ours_!r}, the classifier with {theirs_!r}",
                hint="Train the classifier on the UNet's noise: with the same [diffusion] section.",
            )


def in_units_of(diffusion: DiffusionConfig | EdmConfig, guide: LoadedNetwork) -> LoadedNetwork:
    """Convert the classifier to its UNet's unit of ``t``, because a step gives both the same ``t``.

    If only one was trained on rescaled timesteps, the ratio of the units is multiplied into the frequencies
    of the classifier's time embedding, so that their products with ``t`` do not change.
    """
    factor = guide.config.diffusion.time_factor / diffusion.time_factor
    if factor == 1:
        return guide
    assert isinstance(diffusion, DiffusionConfig)  # only discrete processes have a unit
    with torch.device("meta"):
        module = build_network(guide.config)
    module.load_state_dict(guide.module.state_dict(), assign=True)
    module.timestep_embedding.frequencies *= factor
    process = guide.config.diffusion.model_copy(update={"rescale_timesteps": diffusion.rescale_timesteps})
    config = guide.config.model_copy(update={"diffusion": process})
    return LoadedNetwork(module.eval().requires_grad_(False), config)
