"""Gradients through the UNet, DPS, Universal Guidance and classifier-free guidance against the originals.

From exported graphs and through the runtime's own step; a sample's seed is its row in the goldens' noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import guide_goldens as goldens
import numpy as np
import pytest
from goldens import probed, relative_error
from guide_goldens import EVENT, META, OPERATORS, PROCESS, normal, stored

from admtrt.runtime import sampler as step_core
from admtrt.runtime.backends.choice import BackendChoice
from admtrt.runtime.backends.opening import open_denoiser
from admtrt.runtime.guide_targets import GuideTargets
from admtrt.runtime.operators import Operator
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.sampler import Denoiser, advance
from admtrt.runtime.slots import Slots, slots_for
from admtrt.schedule.edits import Recurrence
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import sampling_schedule

GRADIENT = {"noclip": 1e-5, "clip": 2e-4}
"""Of a sample's largest value; pixels that meet the clamp decide (the original's float32: 2e-6 and 6e-5)."""
X_0 = {"noclip": 1e-5, "clip": 5e-4}
BACKENDS = ("onnxruntime", "openvino")
GRADIENTS = [name for name in META if name.startswith("grad.")]
DPS = {"dps.inpaint": 1e-4, "dps.sr": 1e-4, "dps.blur": 1e-4, "dps.full": 2e-2}
"""``full`` starts where its gradient jumps at nearly every pixel (the original's float32: 4e-3)."""


@cache
def opened(name: str, backend: str) -> Denoiser:
    return open_denoiser(goldens.bundle(name), BackendChoice(backend, threads=1))


def targets_of(operator: str, measurement: np.ndarray, masks: np.ndarray) -> dict[str, Any]:
    given = {"measurement": measurement, "operator": OPERATORS[operator]}
    return given | ({"mask": masks} if operator == "inpainting" else {})


@pytest.mark.parametrize("operator", ["super_resolution", "gaussian_blur"])
def test_operators(operator: str) -> None:
    found = Operator(OPERATORS[operator], EVENT).applied(normal("op.x"))
    assert relative_error(found, stored(f"op.{operator}")) <= 1e-6


def runs(names: Iterable[str]) -> list[Any]:
    """Each case on each backend; by default those of the first network on ONNX Runtime."""

    def quick(name: str, backend: str) -> bool:
        return (name.startswith("grad.unet") or name == "dps.inpaint") and backend == "onnxruntime"

    pairs = [(name, backend) for name in names for backend in BACKENDS]
    return [pytest.param(*pair, marks=() if quick(*pair) else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("case", "backend"), runs(GRADIENTS))
def test_gradients(case: str, backend: str) -> None:
    _, network, operator, clip = case.split(".")
    steps = META[case]["t"]
    count = len(steps)
    x, reference = normal("grad.x", count), normal("grad.ref", count).clip(-1, 1)
    masks = stored("mask")[np.arange(count) % 2].astype(np.float32)
    measured = Operator(OPERATORS[operator], EVENT).applied(reference)
    measured = masks * measured if operator == "inpainting" else measured
    manifest = goldens.bundle(network).manifest
    pipeline = Pipeline(goldens.bundle(network), opened(network, backend))
    checked = GuideTargets({"linear": targets_of(operator, measured, masks)}).checked(
        manifest, pipeline.guide_choices(["linear"])
    )
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[steps]
    feeds = {
        "x": x,
        "t": np.array(steps, np.float32),
        "x0_from_x": (1 / np.sqrt(alpha_bar)).astype(np.float32),
        "x0_from_out": (-np.sqrt(1 / alpha_bar - 1)).astype(np.float32),
        "guide_clip": np.full(count, 1.0 if clip == "clip" else 3e38, np.float32),
        **checked.of_slots(count, None, manifest.guides)["linear"],
    }
    found = opened(network, backend).run("guide.linear", feeds)
    for row in range(count):
        error = relative_error(-found["grad"][row : row + 1], stored(f"{case}.grad")[row : row + 1])
        assert error <= GRADIENT[clip], (steps[row], error)
    np.testing.assert_allclose(-found["value"], stored(f"{case}.norm"), rtol=1e-5)
    out = opened(network, backend).run("unet", {"x": x, "t": feeds["t"]})["out"]
    assert relative_error(found["out"], out) <= 1e-5
    if operator == "inpainting":
        column = (slice(None), None, None, None)
        x_0 = feeds["x0_from_x"][column] * x + feeds["x0_from_out"][column] * found["out"][:, :3]
        x_0 = x_0.clip(-1, 1) if clip == "clip" else x_0
        assert relative_error(x_0, stored(f"{case}.x0")) <= X_0[clip]


class Run:
    """Slots of a golden, whose noise is the golden's, and the values that losses had."""

    def __init__(self, name: str, backend: str, patch: pytest.MonkeyPatch) -> None:
        self.bundle = goldens.bundle(name)
        self.denoiser = opened(name, backend)
        self.pipeline = Pipeline(self.bundle, self.denoiser)
        self.patch = patch
        self.values: list[np.ndarray] = []

    def slots(
        self,
        sampler: SamplerConfig,
        latents: np.ndarray,
        noise: str = "",
        targets: dict[str, dict[str, np.ndarray]] | None = None,
        edit: Recurrence | None = None,
        labels: list[int] | None = None,
        second: str = "",
    ) -> Slots:
        manifest = self.bundle.manifest
        schedule = sampling_schedule(PROCESS, sampler, None, edit)
        checked = GuideTargets(targets or {}).checked(manifest, sampler.guided_by)
        self.patch.setattr(
            step_core,
            "draw_noise",
            lambda _, inputs: None if (at := inputs.noise_steps) is None else normal(f"{noise}.{at[0]}"),
        )
        self.patch.setattr(
            step_core,
            "draw_second_noise",
            lambda _, inputs: (
                None if (at := inputs.second_noise_steps) is None else normal(f"{second}.{at[0] // 2}")
            ),
        )
        zeros = {
            "mask": np.zeros((2, 1, *EVENT[1:]), np.float32),
            "reference": np.zeros((2, *EVENT), np.float32),
        }
        return slots_for(
            manifest.network,
            None,
            [schedule] * 2,
            [0, 1],
            labels=None if labels is None else np.array(labels),
            guided=False,
            latents=latents,
            guides=manifest.guides,
            targets=checked.of_slots(2, None, manifest.guides),
            edits=None if edit is None else {"edit": zeros},
        )

    def states(self, slots: Slots) -> list[np.ndarray]:
        states = []
        while not slots.finished.any():
            advance(slots, self)
            states.append(slots.x)
        return states

    def run(self, graph: str, feeds: Any) -> Any:
        results = self.denoiser.run(graph, feeds)
        if graph.startswith("guide."):
            self.values.append(results["value"])
        return results


def compare(name: str, states: list[np.ndarray], tolerance: float) -> None:
    expected = stored(f"{name}.steps")
    assert len(states) == len(expected)
    for place, (found, wanted) in enumerate(zip(states, expected, strict=True)):
        error = relative_error(probed(found), wanted)
        assert error <= tolerance, (name, place, error)
    assert relative_error(states[-1], stored(f"{name}.final")) <= tolerance


@pytest.mark.parametrize(("name", "backend"), runs(DPS))
def test_posterior_sampling(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = META[name]
    run = Run(case["unet"], backend, monkeypatch)
    # The original's last spans have no step: none is retained there.
    steps = ",".join(count if count != "0" else "1" for count in case["respacing"].split(","))
    guides = run.pipeline.guide_choices(["linear"], scale={"linear": case["scale"]})
    sampler = SamplerConfig(
        method=case["method"], steps=steps, scale=0.0, clip=case["clip"], guided_by=guides
    )
    targets = {"linear": targets_of(case["operator"], stored(f"{name}.y"), stored("mask"))}
    slots = run.slots(sampler, normal(f"{name}.xT"), f"{name}.noise", targets)
    slots.position[:] = len(slots.schedules[0]) - len(case["timesteps"])
    compare(name, run.states(slots), DPS[name])
    norms = -np.stack(run.values, axis=1)
    np.testing.assert_allclose(norms, stored(f"{name}.norms"), rtol=1e-3)


@pytest.mark.parametrize(("name", "backend"), runs(["ug.1", "ug.2"]))
def test_universal_guidance(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = META[name]
    run = Run(case["unet"], backend, monkeypatch)
    guides = run.pipeline.guide_choices(["pooled"], scale={"pooled": case["weight"]})
    sampler = SamplerConfig(method="ddim", steps=case["respacing"], scale=0.0, guided_by=guides)
    edit = Recurrence(case["recurrence"]) if case["recurrence"] > 1 else None
    slots = run.slots(
        sampler,
        normal("ug.xT"),
        targets={"pooled": {"small": stored("ug.y")}},
        edit=edit,
        second="ug.renoise",
    )
    compare(name, run.states(slots)[case["recurrence"] - 1 :: case["recurrence"]], 2e-3)


@pytest.mark.parametrize(("method", "backend"), runs(["ddpm", "ddim"]))
def test_classifier_free_guidance(method: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = META[f"cfg.{method}"]
    run = Run("cond", backend, monkeypatch)
    guides = run.pipeline.guide_choices(["null"], scale={"null": case["s"]})
    sampler = SamplerConfig(method=method, steps=case["respacing"], scale=0.0, guided_by=guides)
    # Users count the classes without the null class, which is the network's first.
    labels = [label - 1 for label in case["labels"]]
    slots = run.slots(sampler, normal("cfg.xT"), "cfg.noise", {"null": {}}, labels=labels)
    compare(f"cfg.{method}", run.states(slots), 2e-3)
