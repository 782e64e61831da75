"""A generator and its classifier: what the two checkpoints must have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.bundle import check_networks
from admtrt.errors import CheckpointError

if TYPE_CHECKING:
    from admtrt.models.settings import CheckpointConfig

_NOISE = ("steps", "schedule", "rescale_timesteps")
"""The two may differ in what the UNet predicts, but not in the noise that they were trained on."""


def check_pair(generator: CheckpointConfig, guide: CheckpointConfig | None) -> None:
    """Refuse a classifier for other images, classes or noise than its UNet's, and names of other classes.

    Raises:
        CheckpointError: naming what differs.
    """
    assert generator.unet is not None  # its kind says so
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
    for field in _NOISE:
        ours_, theirs_ = getattr(generator.diffusion, field), getattr(guide.diffusion, field)
        if ours_ != theirs_:
            raise CheckpointError(
                f"the UNet was trained with diffusion.{field} = {ours_!r}, the classifier with {theirs_!r}",
                hint="Train the classifier on the UNet's noise: with the same [diffusion] section.",
            )
