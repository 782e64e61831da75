"""Engine graphs against the CPU form of the same bundle: values, types, sizes, and what a CPU runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from graph_calls import gradient, unet_out
from rtx import NEEDS_RTX
from typed_bundles import typed_bundle

from admtrt.contract import PRECISIONS
from admtrt.export.check import rtx_parser_errors
from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser
from admtrt.verify.emulation import emulated

if TYPE_CHECKING:
    from admtrt.contract import Precision
    from admtrt.runtime.sampler import Denoiser

NETWORKS = ("unet", "classifier_gradient")
STEP = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
TOLERANCE = {"fp32": 2e-6, "fp16": 16 * STEP["fp16"], "bf16": 16 * STEP["bf16"]}
"""Of the Euclidean norm: some sixty roundings of independent sign lie behind a gradient, each of which these
weights (no layer is zero) amplify up to twice: 2 sqrt(60) = 15.5 steps of the type."""
BATCHES = {1: [0.0], 3: [999.0, 31.5, 500.0], 6: [1.0, 10.0, 100.0, 250.0, 700.0, 900.0]}


def feeds(batch: int) -> dict[str, Any]:
    x = np.random.default_rng(batch).standard_normal((batch, 1, 8, 8), dtype=np.float32)
    return {"x": x, "t": np.float32(BATCHES[batch]), "y": np.arange(batch, dtype=np.int64) % 3}


def outputs(denoiser: Denoiser, batch: int) -> dict[str, np.ndarray]:
    given = feeds(batch)
    return {
        "unet": unet_out(denoiser, given["x"], given["t"]),
        "classifier_gradient": gradient(denoiser, given["x"], given["t"], given["y"]),
    }


def errors(denoiser: Denoiser, batch: int) -> dict[str, float]:
    """Largest over the samples, of the Euclidean norm of each."""
    exact, found = outputs(OnnxRuntimeDenoiser(typed_bundle(), threads=1), batch), outputs(denoiser, batch)
    worst = {}
    for name in NETWORKS:
        a, b = (values[name].reshape(batch, -1).astype(np.float64) for values in (found, exact))
        worst[name] = float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())
    return worst


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounded_values(precision: Precision, batch: int) -> None:
    with emulated(typed_bundle(), precision, threads=1) as denoiser:
        worst = errors(denoiser, batch)
    assert max(worst.values()) < TOLERANCE[precision], worst
    if precision != "fp32":  # and the types are at work
        assert min(worst.values()) > STEP[precision] / 10, worst


def test_errors_are_those_of_the_type() -> None:
    """bf16 has 8 times the step of fp16: an error that does not follow it is no rounding."""
    worst = {}
    for precision in ("fp16", "bf16"):
        with emulated(typed_bundle(), precision, threads=1) as denoiser:
            worst[precision] = errors(denoiser, 6)
    for name in NETWORKS:
        assert 4 < worst["bf16"][name] / worst["fp16"][name] < 16, worst


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_runtime_runs_them(precision: Precision, batch: int) -> None:
    worst = errors(OnnxRuntimeDenoiser(typed_bundle().with_engine(precision), threads=1), batch)
    assert max(worst.values()) < TOLERANCE[precision], worst


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
@pytest.mark.parametrize("batch", BATCHES)
def test_openvino_runs_bf16(batch: int) -> None:
    from admtrt.runtime.backends.openvino import OpenVinoDenoiser

    worst = errors(OpenVinoDenoiser(typed_bundle().with_engine("bf16"), threads=1), batch)
    assert max(worst.values()) < TOLERANCE["bf16"], worst


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_update_is_exact(precision: Precision) -> None:
    bundle = typed_bundle()
    assert bundle.graph_entry("update", precision).precision == "fp32"
    rng = np.random.default_rng(0)
    given = {
        tensor.name: rng.standard_normal(tensor.sized(3), dtype=np.float32)
        for tensor in bundle.graph_entry("update").spec.inputs
    }
    exact, found = (
        OnnxRuntimeDenoiser(form, threads=1, graphs=["update"]).run("update", given)
        for form in (bundle, bundle.with_engine(precision))
    )
    for name, values in exact.items():
        np.testing.assert_array_equal(found[name], values)


def weight_bytes(precision: Precision | None, name: Any) -> int:
    model = onnx.load(str(typed_bundle().graph_path(name, precision)))
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)


def test_sizes() -> None:
    """fp16 halves the weights; transposed convolutions share theirs, which bf16 engines cannot."""
    unet = {precision: weight_bytes(precision, "unet") for precision in PRECISIONS}
    assert unet["fp32"] <= weight_bytes(None, "unet") * 1.01
    assert unet["fp16"] == unet["bf16"] < 0.6 * unet["fp32"]
    gradient = {precision: weight_bytes(precision, "classifier_gradient") for precision in PRECISIONS}
    assert gradient["fp32"] < 0.75 * weight_bytes(None, "classifier_gradient")
    assert gradient["fp16"] < 0.6 * gradient["fp32"]
    assert gradient["fp16"] < 0.75 * gradient["bf16"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_form(precision: Precision, name: Any) -> None:
    model = onnx.load(str(typed_bundle().graph_path(name, precision)))
    kinds = [node.op_type for node in model.graph.node]
    entry = typed_bundle().graph_entry(name, precision)
    assert (entry.precision, entry.opset, entry.nodes) == (
        precision,
        model.opset_import[0].version,
        len(kinds),
    )
    if name == "unet":
        assert "GroupNormalization" in kinds
    else:
        assert ("ConvTranspose" in kinds) == (precision != "bf16")


@NEEDS_RTX
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_parser_takes_them(precision: Precision) -> None:
    for name in typed_bundle().manifest.graphs:
        assert rtx_parser_errors(typed_bundle().graph_path(name, precision)) == []
