"""Load the images that a network is evaluated on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from admtrt.data.image_set import ImageSet, load_data, require_classes, split
from admtrt.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.config import UNetConfig
    from admtrt.run_config import DataConfig


def load_images(config: DataConfig, network: UNetConfig, class_names: Sequence[str]) -> ImageSet:
    """The held-out images of a source, or all if none are held out; without augmentation.

    Args:
        config: the data.
        network: the network's configuration; a class-conditional one needs labels of its classes.
        class_names: the network's class names in the order of its labels; empty if unknown.

    Raises:
        DataError: if the source cannot be read, or its images or classes are not the network's.
    """
    expected = (network.image_size, network.in_channels)
    if (config.image_size, config.channels) != expected:
        raise DataError(
            f"the data is set to {config.image_size} pixels and {config.channels} channels; "
            f"the network has {expected[0]} pixels and {expected[1]} channels",
            hint="Set data.image_size and data.channels to the network's.",
        )
    plain = config.model_copy(update={"random_crop": False, "random_flip": False})
    images = load_data(plain)
    if network.classes is not None:
        numbers = tuple(str(label) for label in range(network.classes))
        own = () if images.numbered or not class_names else (tuple(class_names),)
        known = (*own, numbers)
        images = _as_classes(images, *known)
        if images.class_names not in known:
            require_classes(images, network.classes)
        if class_names and images.class_names not in known:
            raise DataError(
                f"{config.source} has the classes {', '.join(images.class_names)}; "
                f"the network was trained on {', '.join(class_names)}",
                hint="Name the folders or files as the network's classes, or by their numbers.",
            )
    return split(images, config.hold_out)[1] if config.hold_out else images


def _as_classes(images: ImageSet, *known: tuple[str, ...]) -> ImageSet:
    """Map labels to the first list of classes that contains all of the images' classes."""
    for names in known:
        if images.labels is not None and set(images.class_names) <= set(names):
            own = np.array([names.index(name) for name in images.class_names], np.int64)
            return replace(images, labels=own[images.labels], class_names=names)
    return images
