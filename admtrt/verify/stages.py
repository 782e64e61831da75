"""The stages of a verification, from single graphs to images. All run, even if an earlier one fails."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.config import DiffusionConfig, EdmConfig
from admtrt.contract import CLASSIFIER_GRADIENT, bundle_specs, threshold_quantile
from admtrt.errors import BundleError, CheckpointError, RequestError
from admtrt.images import to_uint8
from admtrt.models.pair import in_units_of
from admtrt.models.solvers import STEPS
from admtrt.models.unet import UNet
from admtrt.runtime.backends.opening import DEFAULT, open_denoiser
from admtrt.runtime.backends.registry import BACKENDS
from admtrt.runtime.pipeline import consecutive_seeds
from admtrt.runtime.sampler import advance, step_inputs
from admtrt.runtime.slots import conditions_for
from admtrt.schedule.process import process_from_config, retained_timesteps
from admtrt.schedule.table import UPDATE, sampling_schedule
from admtrt.verify.both import BothSides, Sides
from admtrt.verify.checked import CheckedGraphs, GraphRunError
from admtrt.verify.guide_rows import GuideComparison
from admtrt.verify.guides import TorchGuides, float64_guides, guides_of
from admtrt.verify.inputs import BATCHES, Inputs, Levels, chosen_steps, samplers, step_batches
from admtrt.verify.judged import JudgedRow, float64_sides
from admtrt.verify.reference import Reference
from admtrt.verify.report import Place, Row, Tally, VerificationReport, sample_errors
from admtrt.verify.small_graphs import FORMULAS, cases
from admtrt.verify.tolerances import TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName
    from admtrt.export.guides.guide import AnyGuide
    from admtrt.models.checkpoint import LoadedNetwork
    from admtrt.runtime.backends.auto import Fastest
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.slots import Images, Labels, Slots
    from admtrt.schedule.sampler import SamplerConfig

    Record = Callable[[GraphName, Mapping[str, Any], Mapping[str, Images]], None]

_STEPS = 10


def verify_bundle(
    bundle: Bundle,
    unet: LoadedNetwork,
    classifier: LoadedNetwork | None,
    *,
    guides: Sequence[AnyGuide] = (),
    steps: int | None = None,
    every: bool = False,
    seed: int = 0,
    backend: BackendChoice = DEFAULT,
    progress: Callable[[str], None] = lambda _: None,
    backend_progress: Callable[[str | Fastest], None] = lambda _: None,
    record: Record | None = None,
) -> VerificationReport:
    """Compare a bundle on a backend with the networks in PyTorch: graphs, steps, trajectories, images.

    Args:
        bundle: a verified bundle.
        unet: the generator that it was exported from.
        classifier: its noisy classifier, if and only if the bundle has one.
        guides: its other guides; built-in ones without a file may be omitted.
        steps: steps of the samples; None for 10, or all of a shorter process.
        every: compare all solvers and options, see :func:`~admtrt.verify.inputs.samplers`.
        seed: seed of all inputs and noise.
        backend: the backend that runs the bundle, in fp32 and with any batch size.
        progress: called with the name of each stage as it starts.
        backend_progress: called with what ``auto`` measures and finds.
        record: called with the graph, its inputs and PyTorch's outputs of every batch.

    Raises:
        CheckpointError: if the networks' inputs or outputs differ from the bundle's, so that they cannot be
            compared.
        RequestError: if the seed or the number of steps is out of range.
        UserError: if the backend cannot run here.
    """
    assert isinstance(unet.module, UNet)
    led = guides_of(bundle.manifest, guides, unet)
    _check_comparable(bundle, unet, classifier)
    if classifier is not None:
        classifier = in_units_of(unet.config.diffusion, classifier)
    seeds = list(consecutive_seeds(seed, max(BATCHES)))
    reference = Reference(unet, classifier)
    steps = _checked_steps(steps, bundle.manifest.diffusion, reference.diffusion)
    on_cpu = backend.name in BACKENDS and BACKENDS[backend.name].device == "cpu"
    graphs = list(bundle.manifest.graphs) if on_cpu else None  # optional graphs have no engine form
    progress("sessions")
    sessions = "sessions of the graphs"
    try:
        denoiser = open_denoiser(
            bundle, backend.for_batches(max(BATCHES)), graphs=graphs, progress=backend_progress
        )
        denoiser.open(list(denoiser.specs))
    except BundleError as error:
        return VerificationReport(str(bundle.path), (Row("build", sessions, "build", detail=error.message),))

    @functools.cache
    def float64() -> list[Reference]:
        progress("networks in float64")
        return float64_sides(unet, classifier, reference)

    comparison = _Comparison(
        bundle, CheckedGraphs(denoiser, bundle), reference, float64, steps, seeds, record, every=every
    )
    rows = [Row("build", sessions, "pass"), comparison.manifest_row()]
    progress("graphs")
    rows += [*comparison.unet_rows(), *comparison.classifier_rows()]
    if "unet_vector_jacobian" in (graphs or ()):
        rows += comparison.unet_rows("unet_vector_jacobian")
    if isinstance(reference.diffusion, EdmConfig):
        progress("trajectories")
        drift, trajectory_rows = comparison.recommended()
        return VerificationReport(str(bundle.path), (*rows, *trajectory_rows), drift)
    rows += [*comparison.update_rows(), *comparison.small_rows()]
    led_rows = None
    if led:
        in_torch = unet.module, bundle.manifest.network, led
        narrow = TorchGuides(*in_torch)
        led_rows = comparison.guides(narrow, functools.cache(lambda: float64_guides(*in_torch, narrow)))
        progress("guides")
        rows += led_rows.graph_rows()
    progress("steps")
    rows += comparison.step_rows()
    if led_rows is not None:
        rows += led_rows.step_rows()
    progress("trajectories")
    drift, trajectory_rows = comparison.trajectories(led_rows)
    return VerificationReport(str(bundle.path), (*rows, *trajectory_rows), drift)


def _checked_steps(
    steps: int | None, ours: DiffusionConfig | EdmConfig, theirs: DiffusionConfig | EdmConfig
) -> int:
    """Steps of the respaced process, or the number of evaluations if there is none.

    Raises:
        CheckpointError: if the two processes are of different kinds.
        RequestError: for an impossible number, or if the recommended sampler is to be compared.
    """
    if ours.kind != theirs.kind:
        raise CheckpointError(
            f"the bundle's process is of kind '{ours.kind}', the checkpoint's of kind '{theirs.kind}'",
            hint="Give the checkpoint that the bundle was exported from.",
        )
    if isinstance(ours, EdmConfig) or isinstance(theirs, EdmConfig):
        if steps is not None:
            raise RequestError(
                f"--steps {steps} respaces a discrete process, and this one is of kind 'edm'",
                hint="Leave it out: the recommended sampler is compared.",
            )
        return _STEPS
    # Then both sides have the same length, even if the manifest has another process.
    longest = min(ours.steps, theirs.steps)
    steps = min(_STEPS, longest) if steps is None else steps
    retained_timesteps(longest, str(steps))  # raises now if impossible
    return steps


def _check_comparable(bundle: Bundle, unet: LoadedNetwork, classifier: LoadedNetwork | None) -> None:
    manifest = bundle.manifest
    if classifier is None and manifest.classifier is not None:
        raise CheckpointError(
            f"{bundle.path} has a classifier", hint="Give its checkpoint with --classifier."
        )
    if classifier is not None and manifest.classifier is None:
        raise CheckpointError(f"{bundle.path} has no classifier", hint="Leave out --classifier.")
    assert unet.config.unet is not None
    null, given = manifest.network.null_class, unet.config.unet.null_class
    if null != given:
        raise CheckpointError(
            f"the null class of {bundle.path} is {null}, the checkpoint's {given}",
            hint="Leave out --null-class." if null is None else f"Say --null-class {null}.",
        )
    guide = None if classifier is None else classifier.config.classifier
    specs = bundle_specs(unet.config.unet, guide, manifest.guides, schema=manifest.schema_version)
    for name, ours in specs.items():
        theirs = manifest.graphs[name].spec
        if ours != theirs:
            listed = [", ".join(map(str, (*spec.inputs, *spec.outputs))) for spec in (theirs, ours)]
            raise CheckpointError(
                f"graph '{name}' has {listed[0]}; the checkpoint's network has {listed[1]}",
                hint="Give the checkpoint that the bundle was exported from.",
            )


class _Comparison:
    """The two sides, and the checks as methods that return their rows."""

    def __init__(
        self,
        bundle: Bundle,
        graphs: CheckedGraphs,
        reference: Reference,
        float64: Callable[[], list[Reference]],
        steps: int,
        seeds: list[int],
        record: Record | None,
        *,
        every: bool,
    ) -> None:
        self.manifest = bundle.manifest
        self.graphs = graphs
        self.reference = reference
        self.float64 = float64
        self.steps = steps
        self.seeds = seeds
        self.record = record
        self.every = every
        self.inputs = Inputs(bundle.manifest, seeds[0])
        self.base = Levels.of(reference.diffusion)

    def manifest_row(self) -> Row:
        """Compare the manifest's process with the one that the UNet was trained on."""
        ours, theirs = self.manifest.diffusion.model_dump(), self.reference.diffusion.model_dump()
        if self.manifest.diffusion.time_factor == self.reference.diffusion.time_factor:
            ours.pop("rescale_timesteps", None)  # no effect at 1000 steps
        quantile = self.manifest.threshold_quantile
        if quantile is not None:  # None in schema 1
            ours["threshold_quantile"] = quantile
            theirs["threshold_quantile"] = threshold_quantile(self.manifest.network, self.reference.quantile)
        different = [
            f"{key} is {ours[key]!r} in the bundle, {theirs[key]!r} in the checkpoint"
            for key in ours
            if ours[key] != theirs[key]
        ]
        return Row("manifest", "diffusion", "compare" if different else "pass", detail="; ".join(different))

    def unet_rows(self, graph: GraphName = "unet") -> list[Row]:
        """Rows for the UNet's graph, or its vector-Jacobian product, over the base process."""
        product = graph == "unet_vector_jacobian"
        tallies = _graph_tallies(graph, *(("grad",) if product else ()), "out")
        for shift, steps in enumerate(step_batches(len(self.base))):
            x, t = self._state(steps), self.base.t[steps]
            given = conditions_for(
                self.manifest.network,
                None,
                labels=self.inputs.labels(len(x), shift),
                low_res=self.inputs.low_res(len(x)),
                guided=False,
            )["unet"]
            expected, feeds = {"out": self.reference.unet(x, t, given)}, {"x": x, "t": t, **given}
            if product:
                feeds["cotangent"] = self.inputs.normal(*expected["out"].shape)
                expected["grad"] = self.reference.unet_vector_jacobian(x, t, feeds["cotangent"], given)
            self._compare(graph, tallies, feeds, expected, _places(t, given.get("y")))
        return [tally.row() for tally in tallies.values()]

    def classifier_rows(self) -> list[Row]:
        """Rows for the gradient graph, over the base process; empty without a classifier."""
        if self.manifest.classifier is None:
            return []
        tallies = _graph_tallies("classifier_gradient", "grad", "log_prob")
        for shift, steps in enumerate(step_batches(len(self.base))):
            x, t = self._state(steps), self.base.t[steps]
            y = self.inputs.labels(len(x), shift)
            assert y is not None  # a classifier has classes
            y = self.reference.uncertain_labels(x, t, y, self.manifest.classifier.num_classes)
            expected = {
                "grad": self.reference.classifier_gradient(x, t, y),
                "log_prob": self.reference.log_prob(x, t, y),
            }
            feeds = {"x": x, "t": t, "y": y}
            self._compare("classifier_gradient", tallies, feeds, expected, _places(t, y))
        return [tally.row() for tally in tallies.values()]

    def update_rows(self) -> list[Row]:
        """Rows for the update graph with the manifest's coefficients, compared with the papers' steps.

        The gradient is random, since the graph takes one even without a classifier.
        """
        rows = []
        for name, sampler in self._samplers(guided=True).items():
            schedule = sampling_schedule(self.manifest.diffusion, sampler)
            if sampler.method not in STEPS or schedule.full:
                continue
            process = process_from_config(self._discrete, sampler.steps)
            tallies = _graph_tallies(f"update ({name})", "x_prev", "pred_x0")
            for steps in step_batches(len(process)):
                x = self.inputs.noisy_images(process.alpha_bar[steps])
                out = self.inputs.uniform(len(x), *self.inputs.out_shape)
                grad, noise = self.inputs.normal(*x.shape), self.inputs.normal(*x.shape)
                coefficients = schedule.coefficients[len(schedule) - 1 - steps, : len(UPDATE)]
                x_prev, x_0 = self.reference.update(sampler, x, out, grad, noise, steps.tolist())
                feeds = {"x": x, "out": out, "grad": grad, "noise": noise, "coefficients": coefficients}
                expected = {"x_prev": x_prev, "pred_x0": x_0}
                self._compare("update", tallies, feeds, expected, _places(process.model_t[steps], None))
            rows += [tally.row() for tally in tallies.values()]
        return rows

    def small_rows(self) -> list[Row]:
        """Rows for the other small graphs, compared with reference formulas."""
        rows = []
        for name in FORMULAS:
            if name not in self.manifest.graphs:  # schema 1
                continue
            spec = self.manifest.graphs[name].spec
            names = [tensor.name for tensor in spec.outputs]
            tallies = {output: Tally("graph", f"{name}: {output}", TOLERANCES["small"]) for output in names}
            for feeds, expected in cases(name, spec, self.inputs, BATCHES):
                places = _places(np.zeros(len(feeds["coefficients"])), None)
                self._compare(name, tallies, feeds, expected, places)
            rows += [tally.row() for tally in tallies.values()]
        return rows

    def guides(self, guides: TorchGuides, float64: Callable[[], list[TorchGuides]]) -> GuideComparison:
        """The checks of the guides other than the classifier."""
        return GuideComparison(
            self.manifest,
            self._discrete,
            guides,
            float64,
            self.inputs,
            self.graphs,
            self._compare,
            self.steps,
            self.seeds,
        )

    def step_rows(self) -> list[Row]:
        """Rows for one evaluation of the runtime from the same x_t, at several t.

        Solvers with memory start as from an image, with order 1; :meth:`trajectories` covers higher orders.
        """
        rows = []
        for name, sampler in self._samplers(guided=self._guided).items():
            judged = JudgedRow("step", f"{name}: x_prev")
            length = len(sampling_schedule(self.manifest.diffusion, sampler))
            for shift, step in enumerate(chosen_steps(length)):
                try:
                    both = self._both(sampler, shift, None if step == length - 1 else step + 1)
                except RequestError:  # after the last step of a solver that does not end at the image
                    continue
                with _noted(judged.tally):
                    places = self._slot_places(both.slots)
                    advance(both.slots, self.graphs)
                    judged.add(both.slots.x, both.expected(1), both.float64(1), places)
            rows.append(judged.row())
        return rows

    def trajectories(self, guides: GuideComparison | None) -> tuple[dict[str, tuple[float, ...]], list[Row]]:
        """Rows for whole samples, both sides running freely from the same x_T, with drift and images."""
        chosen = self._samplers(guided=self._guided)
        if not self.every:
            chosen = {name: sampler for name, sampler in chosen.items() if name == sampler.method}
        drift: dict[str, list[float]] = {name: [] for name in chosen}
        rows = [
            row for name in chosen for row in self._trajectory(name, self._both(chosen[name]), drift[name])
        ]
        for name in self.manifest.guides if guides is not None else ():
            assert guides is not None
            sides, errors = guides.sides(name), drift.setdefault(f"guide {name}", [])
            rows += self._trajectory(f"guide {name}", sides, errors, np.zeros(len(sides.slots), bool))
        rows.sort(key=lambda row: row.stage == "image")
        return {name: tuple(errors) for name, errors in drift.items()}, rows

    def recommended(self) -> tuple[dict[str, tuple[float, ...]], list[Row]]:
        """The same with only the recommended sampler."""
        sampler, drift = self.manifest.sampler.unguided, list[float]()
        rows = self._trajectory(sampler.method, self._both(sampler), drift)
        return {sampler.method: tuple(drift)}, rows

    def _trajectory(
        self, name: str, both: Sides[Any], drift: list[float], lost: NDArray[np.bool_] | None = None
    ) -> list[Row]:
        """Rows of one trajectory; the largest error after each step is appended to ``drift``.

        ``lost`` is as of :meth:`JudgedRow.add`.
        """
        each = JudgedRow("trajectory", f"{name}: x_t of every step")
        final = JudgedRow("trajectory", f"{name}: final x_0")
        image = JudgedRow("image", f"{name}: uint8 levels", _level_errors)
        with _noted(each.tally, final.tally, image.tally):
            for place in range(1, len(both.slots.schedules[0]) + 1):
                places = self._slot_places(both.slots)
                advance(both.slots, self.graphs)
                x = both.expected(place)
                drift.append(each.add(both.slots.x, x, both.float64(place), places, lost))
            final.add(both.slots.x, x, both.float64(place), places, lost)
            image.add(both.slots.x, x, both.float64(place), places, lost)
        return [each.row(), final.row(), image.row()]

    def _both(self, sampler: SamplerConfig, shift: int = 0, start: int | None = None) -> BothSides:
        return BothSides(
            self.manifest,
            self.reference,
            self.float64,
            self.inputs,
            sampler,
            self.seeds,
            shift=shift,
            start=start,
        )

    def _slot_places(self, slots: Slots) -> Sequence[Place]:
        """Places of the slots' next network inputs."""
        labels = slots.conditions.get(CLASSIFIER_GRADIENT, slots.conditions["unet"]).get("y")
        return _places(step_inputs(slots).t, labels)

    def _samplers(self, *, guided: bool) -> dict[str, SamplerConfig]:
        return samplers(self.manifest, self._discrete, self.steps, guided=guided, every=self.every)

    @property
    def _discrete(self) -> DiffusionConfig:
        """The checkpoint's process, which must be discrete."""
        assert isinstance(self.reference.diffusion, DiffusionConfig)
        return self.reference.diffusion

    @property
    def _guided(self) -> bool:
        return self.manifest.classifier is not None

    def _compare(
        self,
        graph: GraphName,
        tallies: dict[str, Tally],
        feeds: dict[str, Any],
        expected: dict[str, Images],
        places: Sequence[Place],
    ) -> None:
        """Run one graph on one batch and add each output's errors to its tally."""
        if self.record is not None:
            self.record(graph, feeds, expected)
        with _noted(*tallies.values()):
            outputs = self.graphs.run(graph, feeds)
            for name, tally in tallies.items():
                tally.add(sample_errors(outputs[name], expected[name]), places)

    def _state(self, levels: NDArray[np.int64]) -> Images:
        return self.inputs.states(self.base.signal[levels], self.base.noise[levels])


@contextlib.contextmanager
def _noted(*tallies: Tally) -> Iterator[None]:
    """Record a graph's failure in the rows that needed it."""
    try:
        yield
    except GraphRunError as error:
        for tally in tallies:
            tally.fail("run", error.message)


def _graph_tallies(graph: str, *outputs: str) -> dict[str, Tally]:
    return {name: Tally("graph", f"{graph}: {name}", TOLERANCES["graph"]) for name in outputs}


def _level_errors(actual: Images, expected: Images) -> NDArray[np.float64]:
    """Largest difference of each sample's uint8 pixels, float64 [N]; NaN where ``expected`` is not finite."""
    with np.errstate(invalid="ignore"):
        levels = to_uint8(actual).astype(np.float64) - to_uint8(expected)
    largest = np.abs(levels).reshape(len(levels), -1).max(axis=1)
    return np.where(np.isfinite(expected).reshape(len(levels), -1).all(axis=1), largest, np.nan)


def _places(t: NDArray[np.float32] | NDArray[np.float64], y: Labels | None) -> Sequence[Place]:
    labels: Sequence[int | None] = [None] * len(t) if y is None else y.tolist()
    return [Place(t=time, y=label, batch=len(t)) for time, label in zip(t.tolist(), labels, strict=True)]
