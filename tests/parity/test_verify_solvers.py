"""`admtrt verify` of every solver and small graph: what passes, and planted defects that do not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from bundles import CLASSIFIER, UNET, exported_bundle, network, replace_graph
from onnx import helper

from admtrt.bundle import Bundle
from admtrt.schedule.options import OPTIONS
from admtrt.schedule.solvers import SOLVERS
from admtrt.schedule.table import UPDATE_FULL
from admtrt.verify.inputs import samplers
from admtrt.verify.stages import verify_bundle

if TYPE_CHECKING:
    from collections.abc import Callable

    from admtrt.verify.report import VerificationReport

SCHEMA_1 = Path(__file__).parents[1] / "data" / "schema1.bundle"


def verified(bundle: Path, **options: Any) -> VerificationReport:
    given = {"steps": 4} | options
    return verify_bundle(Bundle.open(bundle), network(UNET), network(CLASSIFIER), **given)


def input_through(model: onnx.ModelProto, name: str, op: str, value: Any) -> None:
    """Pass an input of a graph through an operator with a constant before it is used."""
    for node in model.graph.node:
        for place, given in enumerate(node.input):
            if given == name:
                node.input[place] = f"{name}_spoilt"
    constant = onnx.numpy_helper.from_array(np.asarray(value, np.float32), f"{name}_constant")
    model.graph.initializer.append(constant)
    operands = [constant.name, name] if op == "Sub" else [name, constant.name]
    model.graph.node.insert(0, helper.make_node(op, operands, [f"{name}_spoilt"]))


def column_off(model: onnx.ModelProto) -> None:
    input_through(
        model, "coefficients", "Mul", [1.001 if name == "prev_from_h1" else 1.0 for name in UPDATE_FULL]
    )


def memory_swapped(model: onnx.ModelProto) -> None:
    other = {"h1": "h2", "h2": "h1"}
    for node in model.graph.node:
        for place, given in enumerate(node.input):
            node.input[place] = other.get(given, given)


def saved_not_kept(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if "saved_next" in node.output:
            node.output[0] = "forgotten"
    model.graph.node.append(helper.make_node("Identity", ["saved"], ["saved_next"]))


def quantile_off(model: onnx.ModelProto) -> None:
    (fraction,) = (one for one in model.graph.initializer if one.name == "fraction")
    value = onnx.numpy_helper.to_array(fraction)
    fraction.CopyFrom(onnx.numpy_helper.from_array((value - np.float32(0.1)).astype(np.float32), "fraction"))


def mask_inverted(model: onnx.ModelProto) -> None:
    input_through(model, "mask", "Sub", 1.0)


def columns_not_transposed(model: onnx.ModelProto) -> None:
    (node,) = (node for node in model.graph.node if node.op_type == "Transpose")
    node.attribute[0].CopyFrom(helper.make_attribute("perm", [0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("graph", "defect", "rows"),
    [
        ("update_full", column_off, {"update_full: x_prev"}),
        ("update_full", memory_swapped, {"update_full: x_prev", "update_full: saved_next"}),
        ("update_full", saved_not_kept, {"update_full: saved_next"}),
        ("threshold", quantile_off, {"threshold: r"}),
        ("edit", mask_inverted, {"edit: x_edited"}),
        ("edit_low_pass", columns_not_transposed, {"edit_low_pass: x_edited"}),
    ],
)
def test_planted_defects(
    graph: str, defect: Callable[[onnx.ModelProto], None], rows: set[str], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(exported_bundle("guided"), tmp_path / "bundle"))
    model = onnx.load(bundle / f"{graph}.onnx")
    defect(model)
    replace_graph(bundle, graph, model.SerializeToString())
    report = verified(bundle)
    assert report.outcome == "compare"
    assert {row.what for row in report.failures if row.stage == "graph"} == rows
    if defect in (column_off, memory_swapped):  # the trajectory of dpmpp shows it as well
        assert "dpmpp: final x_0, against float64" in {row.what for row in report.failures}


def test_a_bundle_of_schema_1() -> None:
    manifest = Bundle.open(SCHEMA_1).manifest
    assert manifest.classifier is not None
    report = verify_bundle(
        Bundle.open(SCHEMA_1),
        network(manifest.network, diffusion=manifest.diffusion),
        network(manifest.classifier, diffusion=manifest.diffusion),
        steps=4,
        every=True,
    )
    assert {row.what.split(":")[0].split(" ")[0] for row in report.rows if row.stage == "graph"} == {
        "unet", "classifier_gradient", "update",
    }  # fmt: skip
    first = {"ddim", "ddim direction network", "ddim eta 0.5", "ddpm"}
    assert report.drift.keys() == {*first, "euler threshold_order before_guide"}
    assert report.passed, report.failures


def chosen(*, every: bool) -> dict[str, Any]:
    manifest = Bundle.open(exported_bundle("guided")).manifest
    return samplers(manifest, manifest.discrete("a test"), 4, guided=True, every=every)


def test_every_solver_option_and_value_is_compared() -> None:
    found = chosen(every=True).values()
    discrete = {name for name, solver in SOLVERS.items() if "discrete" in solver.processes}
    assert {sampler.method for sampler in found} == discrete
    for name in discrete:
        for option in SOLVERS[name].options:
            values = {one.option(option) for one in found if one.method == name}
            named = SOLVERS[name].narrower.get(option, OPTIONS[option].values)
            assert values >= set(named), (name, option)
            assert len(values) > 1, (name, option)
    assert len(chosen(every=False)) == 4


@pytest.mark.slow
def test_every_solver_passes() -> None:
    report = verified(exported_bundle("guided"), steps=6, every=True)
    assert report.passed, report.failures
    assert report.drift.keys() == chosen(every=True).keys()
