"""Reference formulas, in float64, of the small graphs for memory and edits, tested on random rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.contract import quantile_of
from admtrt.schedule.edits import EDIT
from admtrt.schedule.guides import columns_with_guides
from admtrt.schedule.table import UPDATE_FULL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from admtrt.contract import GraphName, GraphSpec
    from admtrt.runtime.slots import Array, Images
    from admtrt.verify.inputs import Inputs

    Values = NDArray[np.float64]
    Given = Mapping[str, Any]

_LARGEST = float(np.finfo(np.float32).max)


def cases(
    name: GraphName, spec: GraphSpec, inputs: Inputs, batches: tuple[int, ...]
) -> Iterator[tuple[dict[str, Array], dict[str, Images]]]:
    """Feeds of a graph and what it shall give: every column weighs something, in each row something else."""
    for batch in batches:
        feeds: dict[str, Array] = {tensor.name: inputs.normal(*tensor.sized(batch)) for tensor in spec.inputs}
        if "mask" in feeds:
            feeds["mask"] = (feeds["mask"] > 0).astype(np.float32)
        row = feeds["coefficients"] = inputs.uniform(*feeds["coefficients"].shape)
        if row.shape[1] >= len(UPDATE_FULL):
            clip, bound, state_clip = (
                UPDATE_FULL.index(column) for column in ("clip", "bound", "state_clip")
            )
            row[:, clip] = 0.5 + 0.5 * np.abs(row[:, clip])
            row[:, bound] = np.where(np.arange(batch) % 2, row[:, clip], _LARGEST)
            row[:, state_clip] = np.where(np.arange(batch) % 3, _LARGEST, 1.0)
        if "r" in feeds:
            feeds["r"] = (1.0 + 0.5 * np.abs(feeds["r"])).astype(np.float32)
        expected = FORMULAS[name]({**_wide(feeds), "quantile": inputs.quantile})
        yield feeds, {output: values.astype(np.float32) for output, values in expected.items()}


def _wide(feeds: Mapping[str, Array]) -> dict[str, Any]:
    """The feeds in float64, the columns by name, the networks' output as value and log w."""
    given: dict[str, Any] = {name: values.astype(np.float64) for name, values in feeds.items()}
    row = given.pop("coefficients")
    guides = tuple(name.partition(".")[2] for name in feeds if "." in name)
    names = columns_with_guides(UPDATE_FULL, guides) if row.shape[1] >= len(UPDATE_FULL) else EDIT
    given["guides"] = {
        name.partition(".")[2]: given[name][:, : feeds["x"].shape[1]] for name in feeds if "." in name
    }
    given["c"] = {name: row[:, index, None, None, None] for index, name in enumerate(names)}
    if "out" in given:
        channels, c = given["x"].shape[1], given["c"]
        v = given["out"][:, channels:]
        given["value"] = given["out"][:, :channels]
        given["log_w"] = c["log_weight"] + (c["log_weight_from_v"] * v if v.shape[1] else 0.0)
    return given


def _update_full(given: Given) -> dict[str, Values]:
    c, memory = given["c"], {name: given[name] for name in ("x", "saved", "h1", "h2")}
    r = given["r"].reshape(-1, 1, 1, 1)
    d = np.clip(_unbounded(given), -r, r) * c["clip"] / r
    m = d + c["x0_shift"] * given["grad"] + _of_guides(given, "x0_shift")
    x = sum(c[f"prev_from_{name}"] * values for name, values in memory.items())
    x = x + c["prev_from_x0"] * d + c["prev_from_out"] * given["value"] + c["shift"] * given["grad"]
    x = x + c["guidance"] * np.exp(given["log_w"]) * given["grad"]
    x = x + np.exp(given["log_w"]) * _of_guides(given, "guidance") + _of_guides(given, "shift")
    x = x + c["noise"] * np.exp(0.5 * given["log_w"]) * given["noise"]
    saved = sum(c[f"saved_from_{name}"] * values for name, values in {**memory, "x0": m}.items())
    return {"x_prev": np.clip(x, -c["state_clip"], c["state_clip"]), "pred_x0": m, "saved_next": saved}


def _threshold(given: Given) -> dict[str, Values]:
    y = np.abs(_unbounded(given)).reshape(len(given["x"]), -1)
    clip, bound = (given["c"][name].reshape(-1) for name in ("clip", "bound"))
    quantile = np.quantile(y, quantile_of(y.shape[1], given["quantile"]), axis=1)
    return {"r": np.minimum(np.maximum(quantile, clip), bound)}


def _unbounded(given: Given) -> Values:
    c = given["c"]
    y: Values = (
        c["x0_from_x"] * given["x"] + c["x0_from_out"] * given["value"] + c["x0_from_grad"] * given["grad"]
    )
    guided: Values = y + _of_guides(given, "x0_from_grad")
    return guided


def _of_guides(given: Given, column: str) -> Any:
    """The sum over the guides of a column times their tensor; 0 without guides."""
    return sum(given["c"][f"{column}.{name}"] * tensor for name, tensor in given["guides"].items())


def _edit(given: Given) -> dict[str, Values]:
    state, noised = _edited(given)
    kept = given["c"]["keep"] * given["mask"]
    return {"x_edited": (1 - kept) * state + kept * noised}


def _edit_low_pass(given: Given) -> dict[str, Values]:
    state, noised = _edited(given)
    passed = np.einsum("nij,ncjk,nlk->ncil", given["rows"], noised - state, given["columns"])
    return {"x_edited": state + given["c"]["keep"] * passed}


def _edited(given: Given) -> tuple[Values, Values]:
    """The state with more noise, and the reference at its noise level."""
    c, z = given["c"], given["noise2"]
    return given["x_prev"] + c["renoise"] * z, c["reference"] * given["reference"] + c["noise"] * z


FORMULAS: Mapping[GraphName, Callable[[Given], dict[str, Values]]] = {
    "update_full": _update_full,
    "threshold": _threshold,
    "edit": _edit,
    "edit_low_pass": _edit_low_pass,
}
"""The formulas by graph; ``update`` is compared with the papers' steps instead."""
