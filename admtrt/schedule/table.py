"""The table of a sample: float32 coefficients of every evaluation, lowered from a solver's rows.

One update serves every solver, parameterisation, variance and guide, because each is linear once x_0 is
bounded::

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
(:mod:`admtrt.schedule.guides`). The combinations are formed in float64 and rounded once, which avoids the
1 / alpha amplification of the textbook order of operations. The graph ``update`` has the first columns (no
memory, nothing of the guide before the bound), ``update_full`` has them all.
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

``bound`` is read by ``threshold`` alone: r = min(max(clip, quantile), bound), so that a row whose bound is
its clip keeps a static threshold beside others in a batch.
"""
_LARGEST = float(np.finfo(np.float32).max)
_GUIDED = tuple(UPDATE_FULL.index(name) for name in ("guidance", "x0_shift", "x0_from_grad", "shift"))
_MORE = {
    "state_clip": _LARGEST
}  # what is not 0 in the columns behind those of ``update``, in rows of ``update``
_ONLY_FULL = tuple(
    UPDATE_FULL.index(name) for name in UPDATE_FULL[len(UPDATE) :] if name not in ("bound", *_MORE)
)
_CLIP, _BOUND, _NOISE = (UPDATE_FULL.index(name) for name in ("clip", "bound", "noise"))


@dataclass(frozen=True, eq=False)
class GuideRows:
    """Effect of a guide in each evaluation of a sample.

    Attributes:
        columns: float32 [R, 4], see :data:`~admtrt.schedule.guides.GUIDE_COLUMNS`.
        clip: the bound of the x_0 that its loss sees.
    """

    columns: Float32
    clip: float

    @functools.cached_property
    def active(self) -> NDArray[np.bool_]:
        """True for evaluations that it guides, bool [R]."""
        return np.asarray(self.columns.any(axis=1))


@dataclass(frozen=True, eq=False)
class SamplingSchedule:
    """A sample's schedule in the order of use: entry 0 is the noisiest of R evaluations.

    Attributes:
        model_t: float32 [R], the ``t`` given to the graphs.
        coefficients: float32 [R, len(UPDATE_FULL)].
        step: int64 [R], R-1 down to 0: evaluations that are still to come, which name the noise of this one.
        timesteps: of the base process, [R]: int64 where all are whole, float64 otherwise; empty where there
            are none.
        sigma: float64 [R], the noise level S of each evaluation.
        init_signal, init_scale, init_noise: weights of a given image, of the sample's initial noise and of
            further noise in the first state.
        edits: float32 [R, len(EDIT)], see :mod:`admtrt.schedule.edits`; zeros where nothing is edited.
        edit_graph: the graph that edits; None where none does.
        guides: those that guide the sample besides the classifier, by name.
        x0_weights: float32 [R, 2], of the state and of the network's output in x_0, as losses take them.
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
        """Timestep of an evaluation, an int where all are whole; None where the process has none."""
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
        """Effect of a guide on the sample, zeros where it guides none of its evaluations."""
        return self.guides.get(name, self._no_guide)

    @functools.cached_property
    def _no_guide(self) -> GuideRows:
        return GuideRows(np.zeros((len(self), len(GUIDE_COLUMNS)), np.float32), 1.0)

    @functools.cached_property
    def full(self) -> bool:
        """True where the sample needs the graph ``update_full``: memory, guides, or one before the bound."""
        return bool(self.guides or self.coefficients[:, _ONLY_FULL].any() or self.dynamic.any())


@functools.lru_cache(maxsize=256)
def sampling_schedule(
    process: DiffusionConfig | EdmConfig,
    sampler: SamplerConfig,
    start: int | None = None,
    edit: Edit | None = None,
) -> SamplingSchedule:
    """The schedule of one sample.

    Args:
        process: of the networks.
        sampler: method, steps, scale and everything else.
        start: the last so many evaluations alone, of a sample that starts at an image; None for all.
        edit: to images that hold the sample on the way; None for none.

    Raises:
        RequestError: if the process cannot be sampled so.
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
    """Refuse a solver that walks no respaced process: ddpm and ddim do.

    Raises:
        RequestError: naming it; ``what`` says what was asked for.
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
    """A solver's rows as a table, with what the parameterisation, the guide and the bound add."""
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
