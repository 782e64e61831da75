"""The schedule table of a sample: float32 coefficients of every evaluation, lowered from a solver's rows.

One update covers every solver, parameterisation, variance and guide, because each is linear once x_0 is
clipped::

    y      = x0_from_x x + x0_from_out value + x0_from_grad g
    d      = clamp(y, -r, r) (clip / r)             r = clip, or that of the graph ``threshold``
    m      = d + x0_shift g                         the data prediction, guided and bounded
    w      = exp(log_weight + log_weight_from_v v)
    x'     = prev_from_x0 d + prev_from_x x + prev_from_out value + guidance w g + noise sqrt(w) z
             + prev_from_saved saved + prev_from_h1 h1 + prev_from_h2 h2 + shift g, within +-state_clip
    saved' = saved_from_x x + saved_from_saved saved + saved_from_x0 m + saved_from_h1 h1 + saved_from_h2 h2
    h2', h1' = h1, m

``out`` is (value, v), ``g`` the unscaled gradient of the classifier's log probability, ``z`` standard normal
noise. Each guide of the bundle adds the four terms of g once more, for its own tensor
(:mod:`admtrt.schedule.guides`). The combined coefficients are computed in float64 and rounded once, which
avoids the 1 / alpha amplification of the textbook order of operations. The graph ``update`` takes the first
columns (no memory, no guide before the clip); ``update_full`` takes all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from admtrt.errors import RequestError
from admtrt.schedule.edits import EDIT
from admtrt.schedule.guidance import x0_shifts
from admtrt.schedule.guides import GUIDE_COLUMNS, guide_columns, reference_factor
from admtrt.schedule.levels import Level, NoiseLevels, levels_of
from admtrt.schedule.parameterisation import x0_weights
from admtrt.schedule.solvers import SOLVERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from admtrt.config import DiffusionConfig, EdmConfig
    from admtrt.schedule.edits import Edit, EditGraph
    from admtrt.schedule.rows import Rows
    from admtrt.schedule.sampler import SamplerConfig

    Float32 = NDArray[np.float32]
    Float64 = NDArray[np.float64]

UPDATE = (
    "x0_from_x", "x0_from_out", "clip", "x0_shift",
    "prev_from_x0", "prev_from_x", "prev_from_out",
    "log_weight", "log_weight_from_v", "guidance", "noise",
)  # fmt: skip
"""Columns of the graph ``update``, in order."""
UPDATE_FULL = (
    *UPDATE,
    "x0_from_grad", "prev_from_saved", "prev_from_h1", "prev_from_h2",
    "saved_from_x", "saved_from_saved", "saved_from_x0", "saved_from_h1", "saved_from_h2",
    "shift", "state_clip", "bound",
)  # fmt: skip
"""Columns of the graphs ``update_full`` and ``threshold``, in order.

Only ``threshold`` reads ``bound``: r = min(max(clip, quantile), bound). A row with ``bound`` equal to
``clip`` keeps its static threshold in a mixed batch.
"""
_LARGEST = float(np.finfo(np.float32).max)
_GUIDED = tuple(UPDATE_FULL.index(name) for name in ("guidance", "x0_shift", "x0_from_grad", "shift"))
_MORE = {"state_clip": _LARGEST}  # the further columns of ``update`` rows that are not 0
_ONLY_FULL = tuple(
    UPDATE_FULL.index(name) for name in UPDATE_FULL[len(UPDATE) :] if name not in ("bound", *_MORE)
)
_CLIP, _BOUND, _NOISE = (UPDATE_FULL.index(name) for name in ("clip", "bound", "noise"))


@dataclass(frozen=True, eq=False)
class GuideRows:
    """A guide's coefficients in each evaluation of a sample.

    Attributes:
        columns: float32 [R, 4], see :data:`~admtrt.schedule.guides.GUIDE_COLUMNS`.
        clip: the bound of the x_0 that its loss gets.
    """

    columns: Float32
    clip: float

    @functools.cached_property
    def active(self) -> NDArray[np.bool_]:
        """True for evaluations that use the guide, bool [R]."""
        return np.asarray(self.columns.any(axis=1))


@dataclass(frozen=True, eq=False)
class SamplingSchedule:
    """A sample's schedule of R evaluations, in order.

    Attributes:
        model_t: float32 [R], the ``t`` given to the graphs.
        coefficients: float32 [R, len(UPDATE_FULL)].
        step: int64 [R], R-1 down to 0: the number of evaluations still to come; it selects the noise.
        timesteps: timesteps of the base process, [R]: int64 if all are whole, else float64; empty if the
            process has none.
        sigma: float64 [R], the noise level S of each evaluation.
        init_signal, init_scale, init_noise: weights of a given image, of the sample's initial noise and of
            further noise in the first state.
        edits: float32 [R, len(EDIT)], see :mod:`admtrt.schedule.edits`; zeros without edits.
        edit_graph: the graph that edits the states; None without edits.
        guides: the guides of the sample other than the classifier, by name.
        x0_weights: float32 [R, 2], weights of the state and of the network's output in x_0, for losses.
    """

    model_t: Float32
    coefficients: Float32
    step: NDArray[np.int64]
    timesteps: NDArray[np.int64] | Float64
    sigma: Float64
    edits: Float32
    x0_weights: Float32
    edit_graph: EditGraph | None = None
    guides: Mapping[str, GuideRows] = field(default_factory=dict)
    init_signal: float = 0.0
    init_scale: float = 1.0
    init_noise: float = 0.0

    def __len__(self) -> int:
        return len(self.step)

    def timestep(self, index: int) -> float | None:
        """Timestep of an evaluation, an int if all are whole; None if the process has none."""
        return self.timesteps[index].item() if len(self.timesteps) else None

    @functools.cached_property
    def needs(self) -> NDArray[np.bool_]:
        """:attr:`guided`, :attr:`stochastic` and :attr:`dynamic` side by side, bool [R, 3]."""
        guided = self.coefficients[:, _GUIDED].any(axis=1)
        stochastic = self.coefficients[:, _NOISE] != 0
        dynamic = self.coefficients[:, _BOUND] > self.coefficients[:, _CLIP]
        return np.stack([guided, stochastic, dynamic], axis=1)

    @property
    def guided(self) -> NDArray[np.bool_]:
        """True for evaluations that use a guide's gradient, bool [R]."""
        return self.needs[:, 0]

    @property
    def stochastic(self) -> NDArray[np.bool_]:
        """True for evaluations that add noise, bool [R]."""
        return self.needs[:, 1]

    @property
    def dynamic(self) -> NDArray[np.bool_]:
        """True for evaluations that need the graph ``threshold``, bool [R]."""
        return self.needs[:, 2]

    @functools.cached_property
    def of_update(self) -> Float32:
        """The coefficients of the graph ``update``, float32 [R, len(UPDATE)]."""
        return np.ascontiguousarray(self.coefficients[:, : len(UPDATE)])

    def guide(self, name: str) -> GuideRows:
        """A guide's coefficients for the sample; zeros if it is not used."""
        return self.guides.get(name, self._no_guide)

    @functools.cached_property
    def _no_guide(self) -> GuideRows:
        return GuideRows(np.zeros((len(self), len(GUIDE_COLUMNS)), np.float32), 1.0)

    @functools.cached_property
    def full(self) -> bool:
        """True if the sample needs ``update_full``: for memory, further guides or a guide before the clip."""
        return bool(self.guides or self.coefficients[:, _ONLY_FULL].any() or self.dynamic.any())


@functools.lru_cache(maxsize=256)
def sampling_schedule(
    process: DiffusionConfig | EdmConfig,
    sampler: SamplerConfig,
    start: int | None = None,
    edit: Edit | None = None,
) -> SamplingSchedule:
    """Make the schedule of one sample.

    Args:
        process: of the networks.
        sampler: method, steps, scale and everything else.
        start: number of evaluations of a sample that starts from an image (the last ones); None for all.
        edit: how the sample is conditioned on images; None if it is not.

    Raises:
        RequestError: if the process cannot be sampled this way.
    """
    levels = levels_of(process)
    chosen = SOLVERS[sampler.method]
    if levels.kind not in chosen.processes:
        others = ", ".join(name for name, one in SOLVERS.items() if levels.kind in one.processes)
        raise RequestError(
            f"method '{sampler.method}' samples no process of kind '{levels.kind}'",
            hint=f"Methods for it: {others}.",
        )
    if sampler.scale and levels.kind == "edm":
        raise RequestError(
            f"scale {sampler.scale:g} asks for classifier guidance, but no noisy classifier fits a process "
            "of kind 'edm'",
            hint="Use scale 0.",
        )
    rows = chosen.rows(levels, sampler, None)
    if start is not None:
        if not 1 <= start <= len(rows):
            raise RequestError(f"{start} of {len(rows)} evaluations are no part of them")
        rows = chosen.rows(levels, sampler, rows.levels[len(rows) - start])
    if edit is not None:
        check_respaced(sampler, "known regions and references")
        rows = edit.applied(rows)
    return lower(rows, levels, process, sampler, from_image=start is not None)


def check_respaced(sampler: SamplerConfig, what: str) -> None:
    """Refuse solvers other than ddpm and ddim, which alone use a respaced process.

    Raises:
        RequestError: naming the solver; ``what`` is the feature that needs a respaced process.
    """
    if SOLVERS[sampler.method].steps != "respacing":
        able = " and ".join(name for name, one in SOLVERS.items() if one.steps == "respacing")
        raise RequestError(
            f"{what} go with {able}, not with {sampler.method}", hint="Choose one of them with --method."
        )


def lower(
    rows: Rows,
    levels: NoiseLevels,
    process: DiffusionConfig | EdmConfig,
    sampler: SamplerConfig,
    *,
    from_image: bool = False,
) -> SamplingSchedule:
    """Lower a solver's rows to a table, adding the parameterisation, the guides and the clip."""
    table = float64_table(rows, process, sampler)
    guides = {
        choice.name: _guide_rows(guide_columns(choice, rows, table, levels, process), clipped=choice.clip)
        for choice in sampler.guided_by
    }
    x0_weights = np.stack([table["x0_from_x"], table["x0_from_out"]], axis=1).astype(np.float32)
    factor = reference_factor(sampler.guided_by, np.array([level.sigma for level in rows.levels]))
    for name in ("x0_from_out", "prev_from_out"):
        table[name] = factor * table[name]
    steps = np.arange(len(rows), dtype=np.int64)[::-1].copy()
    schedule = SamplingSchedule(
        model_t=np.array([level.t for level in rows.levels], dtype=np.float32),
        coefficients=np.stack([table[name] for name in UPDATE_FULL], axis=1).astype(np.float32),
        step=steps,
        timesteps=_timesteps(rows.levels),
        sigma=np.array([level.sigma for level in rows.levels]),
        edits=(np.zeros((len(rows), len(EDIT))) if rows.edits is None else rows.edits).astype(np.float32),
        x0_weights=x0_weights,
        edit_graph=rows.edit_graph,
        guides=guides,
        init_signal=levels.c_in(rows.levels[0]) if from_image else 0.0,
        init_scale=rows.init_scale,
        init_noise=rows.init_noise,
    )
    for array in (
        schedule.model_t, schedule.coefficients, schedule.step, schedule.timesteps, schedule.sigma,
        schedule.edits, schedule.x0_weights,
    ):  # fmt: skip
        array.flags.writeable = False
    return schedule


def _guide_rows(columns: dict[str, Float64], *, clipped: bool) -> GuideRows:
    stacked = np.stack([columns[name] for name in GUIDE_COLUMNS], axis=1).astype(np.float32)
    stacked.flags.writeable = False
    return GuideRows(stacked, 1.0 if clipped else _LARGEST)


def float64_table(
    rows: Rows, process: DiffusionConfig | EdmConfig, sampler: SamplerConfig
) -> dict[str, Float64]:
    """Every column of :data:`UPDATE_FULL` before it is rounded, float64 [R] each."""
    zeros = np.zeros(len(rows))
    table = dict.fromkeys(UPDATE_FULL, zeros) | rows.columns
    sigma = np.array([level.sigma for level in rows.levels])
    clip = _LARGEST if sampler.bound is None else sampler.bound
    dynamic = sampler.option("threshold") == "dynamic"
    largest = sampler.option("threshold_max") or _LARGEST
    table["clip"] = np.full(len(rows), clip)
    table["bound"] = np.full(len(rows), largest if dynamic else clip)
    table["state_clip"] = np.full(len(rows), _LARGEST)
    if "x0_from_out" not in rows.columns:
        table["x0_from_x"], table["x0_from_out"] = x0_weights(process, rows.levels)
    if "guidance" not in rows.columns:
        shifts = x0_shifts(sigma, sampler)
        if sampler.option("threshold_order") == "after_guide":
            table["x0_from_grad"] = shifts
        else:
            table["x0_shift"] = shifts
            table["guidance"] = table["prev_from_x0"] * shifts
    return table


def _timesteps(levels: list[Level]) -> NDArray[np.int64] | Float64:
    timesteps = np.array([level.timestep for level in levels if level.timestep is not None], dtype=np.float64)
    whole = timesteps.astype(np.int64)
    return whole if bool((whole == timesteps).all()) else timesteps
