"""A batch for measurements, equal for every backend and process, and its steps on a device."""

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

_STEPS = 10  # steps per measurement on a device: the final wait would distort that of a single step


def example_slots(manifest: Manifest, batch: int, *, led: bool = False) -> Slots:
    """A batch whose samples are at different positions of the recommended schedule.

    The first is at the start, the others are in the first half. Every step is guided if there is a
    classifier. With ``led``, all other guides of the bundle are included: such slots only provide the inputs
    of the guides' graphs. Do not step them: the solver may not support every guide.
    """
    unet = manifest.network
    scale = example_scale(manifest)
    chosen = {**manifest.sampler.to_dict(), "scale": scale, "guidance_interval": None}
    sampler = SamplerConfig.from_dict(chosen)
    if led:
        # In early steps x_0 is out of range, and a clamp would make every gradient 0.
        unclamped = tuple(choice.model_copy(update={"clip": False}) for choice in every_guide(manifest))
        sampler = sampler.model_copy(update={"guided_by": unclamped})
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
    """Labels spread over all classes of the bundle, int64 [N]; None without classes."""
    classes = manifest.num_classes
    if classes is None:
        return None
    labels: Labels = np.arange(batch, dtype=np.int64) * max(1, classes // batch) % classes
    return labels


def every_guide(manifest: Manifest) -> tuple[GuideChoice, ...]:
    """All guides of a bundle except the classifier, for the inputs of their graphs."""
    return tuple(
        GuideChoice(name=name, scale=2.0, place=guide.place, clip=guide.clip)
        for name, guide in manifest.guides.items()
    )


def example_targets(guide: GuideConfig, batch: int, seed: int = 0) -> dict[str, Images]:
    """Targets of a guide, drawn as for the check of its loss: uniform in [0, 1], float32 [N, ...] each."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.uniform(0, 1, (batch, *sizes)).astype(np.float32)
        for name, sizes in guide.targets.items()
    }


def example_scale(manifest: Manifest) -> float:
    """The recommended guidance scale, or a default if there is a classifier but no recommendation."""
    return 0.0 if manifest.classifier is None else manifest.sampler.scale or 1.0


def held_step(denoiser: ResidentDenoiser, slots: Slots) -> float:
    """Seconds per step of slots held on the device, averaged over several steps enqueued without waiting."""
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
