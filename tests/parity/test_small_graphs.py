"""The small graphs row by row: no row depends on its neighbours, and no column is idle."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from bundles import UNET, exported_bundle
from onnx_graphs import proto, run, session

from admtrt.bundle import Bundle
from admtrt.config import DiffusionConfig
from admtrt.export.small_graphs import SMALL_GRAPHS
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import UPDATE, UPDATE_FULL, sampling_schedule
from admtrt.verify.inputs import Inputs
from admtrt.verify.small_graphs import FORMULAS, cases


@cache
def graph(name: Any) -> ort.InferenceSession:
    return session(proto(SMALL_GRAPHS[name](UNET)))


def feeds_of(name: Any, batch: int) -> dict[str, Any]:
    manifest = Bundle.open(exported_bundle("guided")).manifest
    ((feeds, _),) = cases(name, manifest.graphs[name].spec, Inputs(manifest, 5), (batch,))
    return dict(feeds)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_row_is_the_same_whatever_its_neighbours(name: str) -> None:
    feeds = feeds_of(name, 5)
    together = run(graph(name), **feeds)
    for rows in ([3], [4, 3], [3, 0, 3]):
        apart = run(graph(name), **{key: values[rows] for key, values in feeds.items()})
        for output, values in apart.items():
            np.testing.assert_array_equal(values, together[output][rows])


def test_rows_of_update_give_the_same_bits_in_update_full() -> None:
    feeds = feeds_of("update_full", 10)
    schedules = [
        sampling_schedule(DiffusionConfig(), SamplerConfig.from_dict({"steps": "10", **choices}))
        for choices in ({}, {"method": "ddim", "eta": 0.5, "clip": False}, {"method": "ddim", "scale": 0.0})
    ]
    for schedule in schedules:
        feeds["coefficients"] = np.ascontiguousarray(schedule.coefficients)
        feeds["r"] = np.ascontiguousarray(schedule.coefficients[:, UPDATE_FULL.index("clip")])
        full = run(graph("update_full"), **feeds)
        few = {name: feeds[name] for name in ("x", "out", "grad", "noise")}
        coefficients = np.ascontiguousarray(schedule.coefficients[:, : len(UPDATE)])
        for name, values in run(graph("update"), **few, coefficients=coefficients).items():
            np.testing.assert_array_equal(full[name], values)


@pytest.mark.parametrize("name", FORMULAS)
def test_no_column_is_idle(name: str) -> None:
    read = {"threshold": ("clip", "x0_from_x", "x0_from_out", "x0_from_grad", "bound")}
    width = feeds_of(name, 1)["coefficients"].shape[1]
    columns = [UPDATE_FULL.index(one) for one in read[name]] if name in read else list(range(width))
    if name == "update_full":
        columns.remove(UPDATE_FULL.index("bound"))  # of threshold alone
    feeds = feeds_of(name, 6)
    before = run(graph(name), **feeds)
    for column in columns:
        moved = feeds["coefficients"].copy()
        moved[:, column] += 9
        after = run(graph(name), **{**feeds, "coefficients": moved})
        assert any(np.abs(before[output] - after[output]).max() > 1e-4 for output in before), column
