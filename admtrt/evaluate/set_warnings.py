"""Warnings about sets of images and their features, independent of metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from admtrt.evaluate.compare import Warned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.evaluate.kept import FeatureSet
    from admtrt.evaluate.network import FeatureNetwork
    from admtrt.evaluate.sets import OpenedSet

USUAL_SAMPLES = 50_000
"""Number of samples behind published numbers."""


def set_warnings(
    samples: FeatureSet, network: FeatureNetwork | None, asked: Sequence[str], precision: str
) -> list[Warned]:
    """Warnings about a set of features, independent of metrics."""
    warnings = []
    distinct = len(np.unique(samples.hashes))
    if distinct == 1 < len(samples):
        warnings.append(Warned("all-equal", f"all {len(samples)} samples are equal"))
    elif distinct < len(samples):
        warnings.append(
            Warned("duplicates", f"{len(samples) - distinct} of {len(samples)} samples are exact duplicates")
        )
    if network is not None and network.kind == "inception":
        if not network.published:
            warnings.append(
                Warned("not-comparable", "the Inception weights are not the published file: not comparable")
            )
        if len(samples) != USUAL_SAMPLES and {"fid", "sfid", "is", "recall"} & {*asked}:
            warnings.append(
                Warned(
                    "count",
                    f"{len(samples)} samples; published numbers are of {USUAL_SAMPLES:,}, and FID and recall "
                    "depend on their number",
                )
            )
    if precision != "fp32":
        warnings.append(Warned("precision", f"features computed in {precision}: see precision_change"))
    return warnings


def shape_warnings(samples: OpenedSet, reference: OpenedSet | None) -> list[Warned]:
    """Warnings about two sets of images, independent of features."""
    found = []
    ours, theirs = samples.images, None if reference is None else reference.images
    if ours is not None and theirs is not None and ours.shape[:2] != theirs.shape[:2]:
        found.append(
            Warned(
                "sizes-differ",
                f"samples are {_shown(ours.shape)}, reference images {_shown(theirs.shape)}: both are "
                "resized to what the network sees",
            )
        )
    if ours is not None and ours.asked is not None and ours.asked > len(ours):
        found.append(Warned("unfinished", f"the run has drawn {len(ours)} of {ours.asked} samples"))
    return found


def _shown(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]}x{shape[1]} pixels"
