"""Drift of a backend or a precision from float32: per graph, per step, and in the images.

The reference is ONNX Runtime on the CPU form of the bundle's own graphs, with the same seeds. There is no
pass or fail: the numbers show the cost of a precision.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from admtrt.config import EdmConfig
from admtrt.contract import graph_of
from admtrt.errors import AdmtrtError, RequestError
from admtrt.runtime.example import every_guide, example_targets
from admtrt.runtime.pipeline import Pipeline, consecutive_seeds
from admtrt.runtime.sampler import advance, guide_feeds, hold, step_inputs
from admtrt.runtime.slots import slots_for
from admtrt.schedule.guides import GUIDE_GRAPH
from admtrt.schedule.table import sampling_schedule
from admtrt.verify.inputs import Inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from admtrt.bundle import Bundle, Manifest
    from admtrt.config import DiffusionConfig
    from admtrt.contract import GraphName
    from admtrt.runtime.sampler import Denoiser
    from admtrt.runtime.slots import Array, Images, Slots
    from admtrt.schedule.sampler import SamplerConfig
    from admtrt.schedule.table import SamplingSchedule

    Values = NDArray[np.float64]

BINS = 5
"""Number of equal ranges of timesteps, or of log noise levels, that errors are grouped by."""
EQUAL_PSNR = 120.0
"""Upper limit of the shown PSNR in dB, for images that are equal or nearly so."""

_COMPARED: dict[GraphName, str] = {"unet": "out", "classifier_gradient": "grad"}
_RANGE = "In fp16 numbers end at 65504: export with more in float32 (--fp32), or use bf16."
_WEIGHTS = "The weights themselves give it, in any precision: check the checkpoint."
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class GraphDrift:
    """Errors of one graph's output over the samples and steps of one range of a process.

    Attributes:
        graph: its name.
        first, last: the range of timesteps of the base process (inclusive) or of noise levels S.
        mean_error, max_error: over samples, of |difference| / |reference| in the Euclidean norm.
        mean_cosine, min_cosine: over samples, of the cosine between the two outputs.
    """

    graph: str
    first: float
    last: float
    mean_error: float
    max_error: float
    mean_cosine: float
    min_cosine: float


@dataclass(frozen=True)
class StepDrift:
    """The distance of two free trajectories after one step.

    Attributes:
        timestep: timestep of the base process at the start of the step; None if the process has none.
        sigma: noise level S at the start of the step.
        mean_error, max_error: of x_t over the samples, as of :class:`GraphDrift`.
    """

    timestep: float | None
    sigma: float
    mean_error: float
    max_error: float


@dataclass(frozen=True)
class DriftReport:
    """Result of :func:`measure_drift`.

    Attributes:
        images: number of images.
        axis: unit of the ranges: ``timestep``, or ``noise level`` for a process without timesteps.
        graphs: by graph, then by range, at the reference's x_t.
        steps: in the order of sampling.
        mean_psnr, min_psnr: of the final images against the reference's, over values in [-1, 1], in dB.
        max_levels: the largest difference of a pixel, of 255.
    """

    images: int
    axis: Literal["timestep", "noise level"]
    graphs: tuple[GraphDrift, ...]
    steps: tuple[StepDrift, ...]
    mean_psnr: float
    min_psnr: float
    max_levels: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self)


def measure_drift(
    bundle: Bundle,
    reference: Denoiser,
    measured: Denoiser,
    *,
    images: int = 64,
    steps: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> DriftReport:
    """Compare two denoisers over the same graphs.

    Args:
        bundle: the bundle. Its recommended scale and clipping are used; its classes alternate.
        reference, measured: the denoisers to compare.
        images: number of images to draw.
        steps: of the trajectories, as for :class:`~admtrt.schedule.sampler.SamplerConfig`; None for 25 steps
            of DDIM, or the recommended sampler if the process has no timesteps.
        batch_size: samples computed at once.
        seed: seed of the first sample; the others count up.
        progress: called with the number of sample-steps done.

    Raises:
        RequestError: if the steps, the seed or a number is out of range.
        AdmtrtError: if either side returns non-finite values, naming the graph and the timestep.
    """
    for name, value in (("images", images), ("batch_size", batch_size)):
        if value < 1:
            raise RequestError(f"{name} is {value}; expected at least 1")
    sampler = drift_sampler(Pipeline(bundle, reference), steps)
    schedule = sampling_schedule(bundle.manifest.diffusion, sampler)
    seeds = list(consecutive_seeds(seed, images))
    inputs = Inputs(bundle.manifest, seed)
    paired = _Paired(reference, measured, schedule)
    drifts: list[Values] = []
    psnr: list[Values] = []
    levels = 0.0
    for first in range(0, images, batch_size):
        chosen = seeds[first : first + batch_size]
        exact = slots_for(
            bundle.manifest.network,
            bundle.manifest.classifier,
            [schedule] * len(chosen),
            chosen,
            labels=inputs.labels(len(chosen), shift=first),
            low_res=inputs.low_res(len(chosen)),
            guided=bool(sampler.scale),
            guides=bundle.manifest.guides,
        )
        other = exact.take(range(len(exact)))
        led = _led(bundle.manifest, sampler, exact, inputs, shift=first)
        drifts.append(np.stack(list(_drifts(exact, paired, other, measured, progress, led))))
        psnr.append(_psnr(other.x, exact.x))
        levels = max(levels, float(np.abs(_clipped(other.x) - _clipped(exact.x)).max()) * 127.5)
    each = np.concatenate(drifts, axis=1)
    quality = np.concatenate(psnr)
    return DriftReport(
        images=images,
        axis="timestep" if len(schedule.timesteps) else "noise level",
        graphs=tuple(_by_place(paired.errors, schedule, bundle.manifest.diffusion)),
        steps=tuple(
            StepDrift(
                timestep=schedule.timestep(index),
                sigma=float(schedule.sigma[index]),
                mean_error=float(errors.mean()),
                max_error=float(errors.max()),
            )
            for index, errors in enumerate(each)
        ),
        mean_psnr=float(quality.mean()),
        min_psnr=float(quality.min()),
        max_levels=levels,
    )


def drift_sampler(pipeline: Pipeline, steps: str | None) -> SamplerConfig:
    """The sampler of the trajectories of :func:`measure_drift`.

    Raises:
        RequestError: if the process cannot be sampled so.
    """
    edm = isinstance(pipeline.bundle.manifest.diffusion, EdmConfig)
    return pipeline.sampler(steps="ddim25" if steps is None and not edm else steps)


def _led(
    manifest: Manifest, sampler: SamplerConfig, samples: Slots, inputs: Inputs, *, shift: int
) -> Slots | None:
    """The same samples with every guide of the bundle, with random targets; None without guides."""
    if not manifest.guides:
        return None
    count = len(samples)
    # These slots are never stepped, so the solver need not support the guides.
    schedule = sampling_schedule(
        manifest.diffusion, sampler.model_copy(update={"guided_by": every_guide(manifest)})
    )
    return slots_for(
        manifest.network,
        None,
        [schedule] * count,
        samples.seeds,
        labels=inputs.labels(count, shift),
        low_res=inputs.low_res(count),
        guided=False,
        latents=samples.x,
        guides=manifest.guides,
        targets={name: example_targets(guide, count) for name, guide in manifest.guides.items()},
    )


def _drifts(
    exact: Slots,
    paired: _Paired,
    other: Slots,
    measured: Denoiser,
    progress: Callable[[int], None],
    led: Slots | None,
) -> Iterator[Values]:
    """Run both trajectories; the relative error of each sample's x_t after each step."""
    schedule = exact.schedules[0]
    for paired.step in range(len(schedule)):
        if led is not None:
            led.x, led.position[:] = exact.x, paired.step
            paired.look(led)
        advance(exact, paired)
        # Hold for single steps only: while slots are held, the device runs no other graphs.
        with hold(other, measured) as held:
            held.advance()
            held.read()
        _check_finite(other.x, "x_t of the measured trajectory", schedule, paired.step)
        yield _relative(other.x, exact.x)
        progress(len(exact))


class _Paired:
    """The reference :class:`~admtrt.runtime.sampler.Denoiser`, which also runs the measured one.

    Attributes:
        step: position in the schedule, set by the caller.
        errors: by graph and step, the relative error and the cosine of samples, float64 [2, N] each.
    """

    def __init__(self, reference: Denoiser, measured: Denoiser, schedule: SamplingSchedule) -> None:
        self._reference = reference
        self._measured = measured
        self._schedule = schedule
        self.step = 0
        self.errors: dict[str, dict[int, list[Values]]] = {}

    def run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        exact = self._reference.run(graph, feeds)
        if graph in _COMPARED:
            name = _COMPARED[graph]
            self._note(graph, exact[name], self._measured.run(graph, feeds)[name])
        return exact

    def look(self, led: Slots) -> None:
        """Compare the graphs of all guides at the samples' positions, without changing the trajectories."""
        inputs = step_inputs(led)
        for name, guide in led.guides.items():
            graph, feeds = graph_of(name, guide), guide_feeds(led, inputs, name)
            output = "out" if guide.kind == "reference" else "grad"
            exact, other = (side.run(graph, feeds)[output] for side in (self._reference, self._measured))
            self._note(f"{GUIDE_GRAPH}{name}", exact, other)

    def _note(self, graph: str, exact: Images, other: Images) -> None:
        _check_finite(exact, f"graph '{graph}' in fp32 on ONNX Runtime", self._schedule, self.step, _WEIGHTS)
        _check_finite(other, f"graph '{graph}' as measured", self._schedule, self.step)
        found = np.stack([_relative(other, exact), _cosine(other, exact)])
        self.errors.setdefault(graph, {}).setdefault(self.step, []).append(found)


def _check_finite(
    values: Images, what: str, schedule: SamplingSchedule, step: int, hint: str = _RANGE
) -> None:
    wrong = len(values) - int(np.isfinite(_rows(values)).all(axis=1).sum())
    if wrong:
        raise AdmtrtError(
            f"{what} gives values that are not finite for {wrong} of {len(values)} samples at "
            f"{'timestep' if len(schedule.timesteps) else 'noise level'} {_places(schedule)[step]:g}",
            hint=hint,
        )


def _places(schedule: SamplingSchedule) -> list[float]:
    """The timesteps of the evaluations, or their noise levels if there are none."""
    places: list[float] = (schedule.timesteps if len(schedule.timesteps) else schedule.sigma).tolist()
    return places


def _by_place(
    errors: dict[str, dict[int, list[Values]]],
    schedule: SamplingSchedule,
    process: DiffusionConfig | EdmConfig,
) -> Iterator[GraphDrift]:
    if isinstance(process, EdmConfig):
        edges = np.geomspace(process.sigma_min, process.sigma_max, BINS + 1)
        ends = edges[1:]
    else:
        edges = np.linspace(0, process.steps, BINS + 1).astype(int)
        ends = edges[1:] - 1
    # Timesteps may be fractional, and rounding may push noise levels out of the range.
    inner = np.searchsorted(edges[1:-1], _places(schedule), side="right")
    for graph, by_step in errors.items():
        for index, (first, last) in enumerate(zip(edges[:-1].tolist(), ends.tolist(), strict=True)):
            inside = [found for step, batches in by_step.items() if inner[step] == index for found in batches]
            if not inside:
                continue
            error, cosine = np.concatenate(inside, axis=1)
            yield GraphDrift(
                graph=graph,
                first=first,
                last=last,
                mean_error=float(error.mean()),
                max_error=float(error.max()),
                mean_cosine=float(cosine.mean()),
                min_cosine=float(cosine.min()),
            )


def _rows(images: Images) -> Values:
    return images.reshape(len(images), -1).astype(np.float64)


def _relative(other: Images, exact: Images) -> Values:
    """Euclidean norm of the difference over that of the reference, of each sample, float64 [N]."""
    norm = np.linalg.norm(_rows(exact), axis=1)
    result: Values = np.linalg.norm(_rows(other) - _rows(exact), axis=1) / np.maximum(norm, _TINY)
    return result


def _cosine(other: Images, exact: Images) -> Values:
    a, b = _rows(other), _rows(exact)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(norms > 0, (a * b).sum(axis=1) / np.maximum(norms, _TINY), 1.0)


def _psnr(other: Images, exact: Images) -> Values:
    """Peak signal-to-noise ratio of each sample, values in [-1, 1], in dB, float64 [N]."""
    error = ((_clipped(other) - _clipped(exact)) ** 2).mean(axis=1)
    ratio: Values = 10 * np.log10(4 / np.maximum(error, 4 * 10 ** (-EQUAL_PSNR / 10)))
    return ratio


def _clipped(images: Images) -> Values:
    return _rows(images).clip(-1, 1)
