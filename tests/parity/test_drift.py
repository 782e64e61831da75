"""Drift: 0 for equal sides, correct for a known error, and the command `admtrt drift`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from bundles import exported_bundle, pipeline
from engine_rig import Rig
from onnx_graphs import parse, proto
from onnx_graphs import run as run_graph
from typed_bundles import typed_bundle

from admtrt.cli import run
from admtrt.errors import AdmtrtError
from admtrt.runtime.backends import auto
from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser
from admtrt.verify.drift import BINS, EQUAL_PSNR, measure_drift
from admtrt.verify.emulation import emulate, emulated

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.contract import GraphName
    from admtrt.runtime.slots import Images
    from admtrt.verify.drift import DriftReport

Capture = pytest.CaptureFixture[str]
STEPS = {"images": 3, "steps": "5", "batch_size": 2}


class Altered:
    """The graphs with a known error."""

    def __init__(self, *, factor: float = 1.0, turned: float = 0.0) -> None:
        self._exact = pipeline("guided").denoiser
        self._factor = np.float32(factor)
        self._turned = turned

    def run(self, graph: GraphName, feeds: Any) -> dict[str, Any]:
        results = self._exact.run(graph, feeds)
        if graph == "unet":
            return {"out": results["out"] * self._factor}
        if graph == "classifier_gradient":
            return {"grad": self._turn(results["grad"])}
        return results

    def _turn(self, gradient: Images) -> Images:
        rows = gradient.reshape(len(gradient), -1)
        across = np.roll(rows, 1, axis=1)
        across -= rows * (across * rows).sum(axis=1, keepdims=True) / (rows**2).sum(axis=1, keepdims=True)
        across *= np.linalg.norm(rows, axis=1, keepdims=True) / np.linalg.norm(across, axis=1, keepdims=True)
        turned = np.cos(self._turned) * rows + np.sin(self._turned) * across
        return turned.reshape(gradient.shape).astype(np.float32)


def against(measured: Any, **options: Any) -> DriftReport:
    exact = pipeline("guided")
    return measure_drift(exact.bundle, exact.denoiser, measured, **STEPS | options)


def test_of_itself_is_nothing() -> None:
    report = against(pipeline("guided").denoiser)
    assert {graph.graph for graph in report.graphs} == {"unet", "classifier_gradient"}
    assert all(graph.max_error == 0 and graph.min_cosine > 1 - 1e-12 for graph in report.graphs)
    assert [step.max_error for step in report.steps] == [0] * 5
    assert [step.timestep for step in report.steps] == [999, 749, 500, 250, 0]
    assert (report.mean_psnr, report.min_psnr, report.max_levels) == (EQUAL_PSNR, EQUAL_PSNR, 0)


def test_of_plans_whose_slots_are_held_on_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path)
    rig.build()
    with rig.open() as denoiser:
        report = against(denoiser)
    assert max(graph.max_error for graph in report.graphs) < 1e-4
    assert max(step.max_error for step in report.steps) < 1e-4
    assert report.min_psnr > 80


def test_auto_that_chooses_the_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        auto, "fastest", lambda seconds: dict.fromkeys(next(iter(seconds.values())), "onnxruntime")
    )
    assert run(["drift", str(exported_bundle("guided")), "--backend", "auto", "--images", "1"]) == 2
    said = capsys.readouterr().err
    assert "auto: unet on onnxruntime" in said
    assert "is what the others are measured against" in said


def test_a_known_error() -> None:
    report = against(Altered(factor=1.01, turned=0.1))
    ranges = [(graph.first, graph.last) for graph in report.graphs if graph.graph == "unet"]
    assert ranges == [(0, 199), (200, 399), (400, 599), (600, 799), (800, 999)]
    assert len(ranges) == BINS
    for graph in report.graphs:
        error, cosine = (0.01, 1.0) if graph.graph == "unet" else (2 * np.sin(0.05), np.cos(0.1))
        assert graph.mean_error == pytest.approx(error, rel=1e-4)
        assert graph.max_error == pytest.approx(error, rel=1e-4)
        assert graph.mean_cosine == pytest.approx(cosine, abs=1e-6)
        assert graph.min_cosine == pytest.approx(cosine, abs=1e-6)
    assert 0 < report.steps[0].mean_error < report.steps[-1].mean_error <= report.steps[-1].max_error
    assert 10 < report.min_psnr <= report.mean_psnr < 60
    assert 1 < report.max_levels < 255


def test_the_images_errors_follow_the_graphs() -> None:
    """A tenth of the error is a tenth of the drift: 20 dB."""
    large, small = (against(Altered(factor=1 + error)) for error in (1e-3, 1e-4))
    assert small.steps[0].mean_error == pytest.approx(large.steps[0].mean_error / 10, rel=0.05)
    assert small.mean_psnr - large.mean_psnr == pytest.approx(20, abs=2)


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_values_that_are_not_finite_are_no_result(factor: float) -> None:
    with pytest.raises(
        AdmtrtError, match="graph 'unet' as measured gives values that are not finite"
    ) as info:
        against(Altered(factor=factor))
    assert info.value.exit_code == 1
    assert "for 2 of 2 samples at timestep 999" in info.value.message


def test_batches_change_nothing() -> None:
    together, apart = (against(Altered(factor=1.01), batch_size=size) for size in (3, 1))
    assert together.mean_psnr == pytest.approx(apart.mean_psnr, abs=0.01)
    assert together.steps[-1].max_error == pytest.approx(apart.steps[-1].max_error, rel=1e-3)


@pytest.mark.slow
def test_fp16_drifts_less_than_bf16() -> None:
    bundle = typed_bundle()
    reference = OnnxRuntimeDenoiser(bundle, threads=1)
    found = {}
    for precision in ("fp32", "fp16", "bf16"):
        with emulated(bundle, precision, threads=1) as denoiser:
            found[precision] = measure_drift(bundle, reference, denoiser, **STEPS)
    psnr = [found[precision].mean_psnr for precision in ("fp32", "fp16", "bf16")]
    assert psnr[0] > psnr[1] + 20 > psnr[2] + 30
    assert psnr[2] > 30


def test_emulation_rounds_every_result() -> None:
    body = """
        h = Cast <to = 10> (x) a = Mul (h, h) b = Sub (a, c)
        r = Reshape (b, s) d = Div (r, r) y = Cast <to = 1> (d)
    """
    half = np.array([0.1, 0.7], np.float16)
    model = ir.serde.deserialize_model(
        parse(
            f"g (float[N, 2] x) => (float[N, 2] y) {{ {body} }}",
            {"c": half, "s": np.int64([-1, 2])},
            opset=22,
        )
    )
    for value in model.graph:
        for output in value.outputs:
            output.type = ir.TensorType(ir.DataType.FLOAT if output.name == "y" else ir.DataType.FLOAT16)
    emulate(model)
    x = np.array([[300, 1.2345], [1.0009765, 1 / 3]], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        h = x.astype(np.float16)
        rounded = h * h - half
        expected = (rounded / rounded).astype(np.float32)
    np.testing.assert_array_equal(run_graph(proto(model), x=x)["y"], expected)
    assert np.isnan(expected[0, 0])  # 300 squared is beyond fp16: inf / inf


def drift(*arguments: Any) -> int:
    return run(["drift", *map(str, arguments), "--images", "2", "--steps", "5", "--threads", "1"])


def test_command(tmp_path: Path, capsys: Capture) -> None:
    options = [typed_bundle().path, "--engine", "fp16", "--plot", tmp_path / "drift.png"]
    assert drift(*options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["precision"], found["emulated"], found["images"], found["sampling"]) == (
        "fp16",
        True,
        2,
        "5",
    )
    assert len(found["steps"]) == 5
    assert 30 < found["min_psnr"] <= found["mean_psnr"] < EQUAL_PSNR
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert drift(*options[:3]) == 0
    shown = capsys.readouterr().out
    assert f"PSNR {found['mean_psnr']:.1f} dB on average, {found['min_psnr']:.1f} dB at least" in shown
    assert "800-999" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "fp32 on onnxruntime is what the others are measured against"),
        (["--engine", "int8"], "--engine 'int8' is unknown; expected fp32, fp16, bf16"),
        (["--engine", "fp16"], "has no engine graphs in fp16; it has none"),
        (["--engine", "fp16", "--precision", "bf16"], "--backend, --precision and --plans a backend"),
        (["--precision", "fp16"], "'onnxruntime' computes in fp32, not in fp16"),
        (["--backend", "abacus"], "'abacus' is unknown"),
    ],
)
def test_refused(options: list[str], message: str, capsys: Capture) -> None:
    assert drift(exported_bundle("guided"), *options) == 2
    shown, complaint = capsys.readouterr()
    assert shown == ""
    assert message in complaint
    assert "Traceback" not in complaint


def test_numbers_out_of_range(capsys: Capture) -> None:
    assert run(["drift", str(exported_bundle("guided")), "--engine", "fp16", "--images", "0"]) == 2
    assert "--images is 0" in capsys.readouterr().err
