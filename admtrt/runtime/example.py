"""A batch to measure with, the same for every backend and every process, and its steps on a device."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from admtrt.runtime.slots import slots_for
from admtrt.schedule.guides import GuideChoice
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from admtrt.bundle import Manifest
    from admtrt.runtime.sampler import ResidentDenoiser
    from admtrt.runtime.slots import Images, Labels, Slots
    from admtrt.schedule.guides import GuideConfig

_STEPS = 10  # at once on a device: waiting for one alone would be counted as its cost


def example_slots(manifest: Manifest, batch: int, *, led: bool = False) -> Slots:
    """A batch whose samples stand at different places of the recommended schedule.

    The first stands at its start, the others in its first half. Every step is guided where there is a
    classifier, and with ``led`` by all other guides of the bundle too; such slots give the inputs of their
    graphs, and are not to be stepped: a solver may have no place for a guide.
    """
    unet = manifest.network
    scale = example_scale(manifest)
    chosen = {**manifest.sampler.to_dict(), "scale": scale, "guidance_interval": None}
    sampler = SamplerConfig.from_dict(chosen)
    if led:
        sampler = sampler.model_copy(update={"guided_by": every_guide(manifest)})
    schedule = sampling_schedule(manifest.diffusion, sampler)
    labels = example_labels(manifest, batch)
    low_res = None
    if unet.low_res_size is not None:
        shape = (batch, unet.in_channels, unet.low_res_size, unet.low_res_size)
        low_res = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    slots = slots_for(
        unet,
        manifest.classifier,
        [schedule] * batch,
        range(batch),
        labels=labels,
        low_res=low_res,
        guided=bool(scale),
        guides=manifest.guides,
        targets={
            name: example_targets(guide, batch) for name, guide in (manifest.guides if led else {}).items()
        },
    )
    slots.position[:] = np.arange(batch) * (len(schedule) // 2) // batch
    return slots


def example_labels(manifest: Manifest, batch: int) -> Labels | None:
    """Classes spread over all that the bundle has, int64 [N]; None where it has none."""
    classes = manifest.num_classes
    if classes is None:
        return None
    labels: Labels = np.arange(batch, dtype=np.int64) * max(1, classes // batch) % classes
    return labels


def every_guide(manifest: Manifest) -> tuple[GuideChoice, ...]:
    """All guides of a bundle but the classifier, for the inputs of their graphs."""
    return tuple(
        GuideChoice(name=name, scale=2.0, place=guide.place, clip=guide.clip)
        for name, guide in manifest.guides.items()
    )


def example_targets(guide: GuideConfig, batch: int, seed: int = 0) -> dict[str, Images]:
    """Targets of a guide that its loss was checked with: uniform in [0, 1], float32 [N, ...] each."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.uniform(0, 1, (batch, *sizes)).astype(np.float32)
        for name, sizes in guide.targets.items()
    }


def example_scale(manifest: Manifest) -> float:
    """The recommended guidance, and some where there is a classifier but none is recommended."""
    return 0.0 if manifest.classifier is None else manifest.sampler.scale or 1.0


def held_step(denoiser: ResidentDenoiser, slots: Slots) -> float:
    """Seconds of a step of slots that stay on the device, among several between which nothing waits."""
    x, position = slots.x, slots.position.copy()
    count = min(_STEPS, len(slots.schedules[0]) - int(position.max()))
    with denoiser.hold(slots) as held:
        began = time.perf_counter()
        for _ in range(count):
            held.advance()
        held.read()
        seconds = (time.perf_counter() - began) / count
    slots.x, slots.position = x, position
    return seconds
