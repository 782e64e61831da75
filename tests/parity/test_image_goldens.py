"""Starts at images, inversion, known regions and references against the public implementations.

Through exported graphs and the runtime's own step; a sample's seed is its row in the goldens' noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import image_goldens as goldens
import numpy as np
import pytest
from goldens import probed, relative_error
from image_goldens import META, PROCESS, image, normal, stored

from admtrt.contract import CLASSIFIER_GRADIENT
from admtrt.runtime import sampler as step_core
from admtrt.runtime.backends.choice import BackendChoice
from admtrt.runtime.backends.opening import open_denoiser
from admtrt.runtime.low_pass import low_pass_matrix
from admtrt.runtime.sampler import Denoiser, advance
from admtrt.runtime.slots import Slots, slots_for
from admtrt.schedule.edits import EDIT, KnownRegion, LowPass
from admtrt.schedule.inversion import decoding_schedule, inversion_schedule
from admtrt.schedule.jumps import evaluated_steps
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import SamplingSchedule, sampling_schedule

CLOSE = 1e-4
"""Of a sample's largest value. The original in float32 is 4e-7 to 1e-5 from its float64."""
CLAMPED = 2e-3
"""The same where a sample is inverted through the clamp: pixels that meet it decide (6e-5)."""


@cache
def opened(name: str, backend: str) -> Denoiser:
    return open_denoiser(goldens.bundle(name), BackendChoice(backend, threads=1))


Noise = Callable[[int], np.ndarray]


class Run:
    """A golden on a backend: slots to advance, and the results of the update before any edit."""

    def __init__(self, backend: str, patch: pytest.MonkeyPatch) -> None:
        self.backend = backend
        self.patch = patch

    def slots(
        self,
        name: str,
        schedule: SamplingSchedule,
        *,
        labels: list[int] | None = None,
        noise: Noise | None = None,
        second: Noise | None = None,
        **given: Any,
    ) -> Slots:
        """Two samples at the start of a schedule; noises are given by their step of the schedule."""

        def drawn(slots: Slots, inputs: Any) -> np.ndarray | None:
            if inputs.noise_steps is None:
                return None
            assert noise is not None
            return noise(inputs.noise_steps[0])

        def drawn_second(slots: Slots, inputs: Any) -> np.ndarray | None:
            if inputs.second_noise_steps is None:
                return None
            assert second is not None
            return second(inputs.second_noise_steps[0])

        self.patch.setattr(step_core, "draw_noise", drawn)
        self.patch.setattr(step_core, "draw_second_noise", drawn_second)
        bundle = goldens.bundle(name)
        self.denoiser = opened(name, self.backend)
        self.guide = opened("unet", self.backend)
        self.unedited: list[np.ndarray] = []
        return slots_for(
            bundle.manifest.network,
            goldens.bundle("unet").manifest.classifier,
            [schedule] * 2,
            [0, 1],
            labels=None if labels is None else np.array(labels),
            guided=labels is not None,
            **given,
        )

    def states(self, slots: Slots) -> Iterator[np.ndarray]:
        """The state after every evaluation."""
        while not slots.finished.any():
            advance(slots, self)
            yield slots.x

    def run(self, graph: Any, feeds: Any) -> Any:
        """The bundle's graph, whose update is looked at."""
        results = (self.guide if graph == CLASSIFIER_GRADIENT else self.denoiser).run(graph, feeds)
        if graph == "update":
            self.unedited.append(results["x_prev"])
        return results


@pytest.fixture(params=["onnxruntime", "openvino"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(request.param, monkeypatch)


def compare(name: str, states: list[np.ndarray], tolerance: float = CLOSE, steps: str = "steps") -> None:
    expected = stored(f"{name}.{steps}")
    assert len(states) == len(expected)
    for place, (found, wanted) in enumerate(zip(states, expected, strict=True)):
        error = relative_error(probed(found), wanted)
        assert error <= tolerance, (name, place, error)
    final = f"{name}.final" if steps == "steps" else f"{name}.{steps}.final"
    assert relative_error(states[-1], stored(final)) <= tolerance


def sampler(case: dict[str, Any], **choices: Any) -> SamplerConfig:
    return SamplerConfig(**{"steps": case["respacing"], "scale": 0.0} | choices)


@pytest.mark.parametrize("name", [pytest.param("diffpure", marks=pytest.mark.slow), "sdedit"])
def test_starts_at_an_image(run: Run, name: str) -> None:
    case = META[name]
    count = case.get("t") or case["evaluations"]
    schedule = sampling_schedule(PROCESS, sampler(case, method=case.get("method", "ddpm")), count)
    slots = run.slots(
        case["unet"],
        schedule,
        latents=normal(f"{name}.e"),
        images=image(f"{name}.x0"),
        noise=lambda step: normal(f"{name}.noise.{step}"),
    )
    compare(name, list(run.states(slots)))


@pytest.mark.parametrize(("clip", "tolerance"), [(True, CLAMPED), (False, CLOSE)])
def test_inversion_and_back(run: Run, clip: bool, tolerance: float) -> None:
    case, name = META["invert"], "invert.clip" if clip else "invert.noclip"
    ddim = sampler(case, method="ddim", clip=clip)
    up = run.slots(case["unet"], inversion_schedule(PROCESS, ddim, case["levels"]), images=image("invert.x0"))
    compare(name, list(run.states(up)), tolerance, "up")
    for part, scale, labels in (("down", 0.0, None), ("down_guided", case["scale"], case["labels"])):
        guided = ddim.model_copy(update={"scale": scale})
        schedule = decoding_schedule(PROCESS, guided, case["levels"])
        down = run.slots(case["unet"], schedule, labels=labels, latents=up.x)
        compare(name, list(run.states(down)), tolerance, part)


def test_anomaly(run: Run) -> None:
    """The original starts one level higher, and begins to go down two levels too low."""
    case = META["anomaly"]
    level, ddim = case["noise_level"], sampler(case, method="ddim")
    noised = sampling_schedule(PROCESS, ddim, 1)
    start = run.slots(case["unet"], noised, latents=normal("anomaly.e"), images=image("anomaly.x0"))
    assert relative_error(start.x, stored("anomaly.start")) <= 1e-6
    up = run.slots(case["unet"], inversion_schedule(PROCESS, ddim, level), images=image("anomaly.x0"))
    up.x, up.position[:] = start.x, 1
    states = list(run.states(up))
    guided = ddim.model_copy(update={"scale": case["scale"]})
    schedule = decoding_schedule(PROCESS, guided, level - 2)
    down = run.slots(case["unet"], schedule, labels=case["labels"], latents=up.x)
    compare("anomaly", states + list(run.states(down)))


def test_known_region_with_jumps(run: Run) -> None:
    case = META["repaint"]
    jump = (case["jump_length"], case["jump_n_sample"])
    edit = KnownRegion(jump, as_sampled=True)
    schedule = sampling_schedule(PROCESS, sampler(case), None, edit)
    total, mask = len(schedule), stored("repaint.mask").astype(np.float32)
    assert total == case["reverse"]
    renoise = schedule.edits[:, EDIT.index("renoise")].astype(np.float64)
    seconds = list(second_noises(case, mask, renoise))
    slots = run.slots(
        case["unet"],
        schedule,
        latents=normal("repaint.xT"),
        noise=lambda step: normal(f"repaint.noise.{total - 1 - step}"),
        second=lambda step: seconds[total - 1 - step],
        edits={"edit": {"mask": mask, "reference": image("repaint.gt")}},
    )
    list(run.states(slots))
    # The stored states are those before anything is replaced or noised again.
    compare("repaint", [x / np.sqrt(1 - s**2) for x, s in zip(run.unedited, renoise, strict=True)])


def second_noises(case: dict[str, Any], mask: np.ndarray, renoise: np.ndarray) -> Iterator[np.ndarray]:
    """The noise of known pixels, and that of the steps back of the others as one draw."""
    steps = evaluated_steps(8, (case["jump_length"], case["jump_n_sample"]))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[case["timesteps"]]
    alpha = alpha_bar / np.append(1.0, alpha_bar[:-1])
    count = 0
    for place, (step, following) in enumerate(pairwise(steps)):
        noise = np.zeros(mask.shape)
        for risen in range(step, following + 1):
            forward = normal(f"repaint.forward.{count}")
            noise = np.sqrt(alpha[risen]) * noise + np.sqrt(1 - alpha[risen]) * forward
            count += 1
        known = normal(f"repaint.known.{place + 1}")
        yield (mask * known + (1 - mask) * noise / (renoise[place] or 1.0)).astype(np.float32)
    assert count == case["forward"]


def test_reference(run: Run) -> None:
    case = META["ilvr"]
    matrix = low_pass_matrix(META["image_size"], case["down_N"])
    np.testing.assert_allclose(matrix, stored("ilvr.matrix"), rtol=0, atol=1e-14)
    filters = np.stack([matrix] * 2).astype(np.float32)
    slots = run.slots(
        case["unet"],
        sampling_schedule(PROCESS, sampler(case), None, LowPass(case["range_t"])),
        latents=normal("ilvr.xT"),
        noise=lambda step: normal(f"ilvr.noise.{step}"),
        second=lambda step: normal(f"ilvr.known.{step}"),
        edits={"edit_low_pass": {"rows": filters, "columns": filters, "reference": image("ilvr.ref")}},
    )
    compare("ilvr", list(run.states(slots)))
