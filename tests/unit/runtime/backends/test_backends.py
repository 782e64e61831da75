"""The backends by name: what is refused, what each opens, and ONNX Runtime's providers on a stand-in."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from bundles import CLASSIFIER, UNET, exported_bundle, pipeline, sham_bundle
from graph_calls import gradient, unet_out

from admtrt.bundle import Bundle
from admtrt.cli import run
from admtrt.contract import GraphName, bundle_specs
from admtrt.errors import BundleError, EngineError, MissingDependencyError, RequestError
from admtrt.installing import install_extra
from admtrt.runtime.backends import backend as declaration
from admtrt.runtime.backends.choice import AUTO, BackendChoice
from admtrt.runtime.backends.composite import Composite
from admtrt.runtime.backends.graphs import GraphDenoiser
from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser
from admtrt.runtime.backends.opening import open_denoiser
from admtrt.runtime.backends.registry import BACKENDS
from admtrt.runtime.engines.device import Driver
from admtrt.runtime.pipeline import Pipeline

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 1, 8, 8), dtype=np.float32)
T = np.array([900, 30, 500], dtype=np.float32)
Y = np.array([2, 0, 1])


NAMES = "onnxruntime, openvino, onnxruntime-cuda, onnxruntime-tensorrt, onnxruntime-rtx, tensorrt, auto"


def test_the_help_names_every_backend() -> None:
    from admtrt.commands.options import BackendName

    (option,) = BackendName.__metadata__
    assert ", ".join([*BACKENDS, AUTO]) == NAMES
    assert all(name in option.help for name in [*BACKENDS, AUTO])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "tensorflow"}, f"backend 'tensorflow' is unknown; expected one of {NAMES}"),
        ({"precision": "int8"}, "precision 'int8' is unknown; expected fp32, fp16, bf16"),
        ({"precision": "bf16"}, "backend 'onnxruntime' computes in fp32, not in bf16"),
        ({"name": "openvino", "precision": "fp16"}, "computes in fp32 or bf16, not in fp16"),
        ({"plans": Path("kept")}, "backend 'onnxruntime' runs no plans, but kept was given as their folder"),
        ({"name": "tensorrt", "threads": 2}, "threads is 2, but backend 'tensorrt' does not run on the"),
        ({"threads": 0}, "threads is 0; expected 1 to 1024"),
        ({"batch_size": 0, "name": "auto"}, "batch_size is 0; expected at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5; expected a whole number"),
    ],
)
def test_refused_requests(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        BackendChoice(**given)


def test_a_wrong_name_is_refused_before_the_bundle_is_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is unknown"):
        Pipeline.from_bundle(tmp_path / "absent", backend="cuda")


def test_the_other_backends_of_a_precision_are_named(bundle: Bundle) -> None:
    with pytest.raises(RequestError) as raised:
        open_denoiser(bundle, BackendChoice("onnxruntime", "bf16"))
    assert (
        raised.value.hint == "Backends with bf16: openvino, onnxruntime-tensorrt, onnxruntime-rtx, tensorrt."
    )


@pytest.mark.parametrize("name", [name for name in BACKENDS if BACKENDS[name].device == "cuda"])
def test_a_machine_without_a_driver(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(declaration, "is_installed", lambda _: True)
    monkeypatch.setattr(declaration, "query_driver", lambda: Driver(None, (), "no driver here"))
    with pytest.raises(EngineError, match=f"backend '{name}' needs an NVIDIA GPU: no driver here"):
        open_denoiser(bundle, BackendChoice(name))
    assert not BACKENDS[name].available()
    assert "no driver" in BACKENDS[name].available().reason


@pytest.mark.parametrize("name", BACKENDS)
def test_a_package_that_is_missing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(declaration, "is_installed", lambda _: False)
    with pytest.raises(MissingDependencyError) as raised:
        open_denoiser(bundle, BackendChoice(name))
    assert f"'{name}' needs the package" in raised.value.message
    commands = map(install_extra, BACKENDS[name].extra.split(" or "))
    assert raised.value.hint == "Install it with: " + " or ".join(commands)
    assert "' or '" not in raised.value.message


def test_modules_within_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not declaration.is_installed("no_such_package.core")
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert not declaration.is_installed("openvino")
    assert declaration.is_installed("numpy")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_installed_backends_for_cpus_are_available(name: str) -> None:
    assert BACKENDS[name].available()
    assert BACKENDS[name].available().reason == ""


def test_some_graphs_alone(bundle: Bundle) -> None:
    denoiser = OnnxRuntimeDenoiser(bundle, threads=1, graphs=("classifier_gradient",))
    expected = gradient(pipeline("guided").denoiser, X, T, Y)
    assert np.array_equal(gradient(denoiser, X, T, Y), expected)
    with pytest.raises(KeyError):
        unet_out(denoiser, X, T)


def test_engine_graphs_that_the_bundle_has_not(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="has no engine graphs in fp16"):
        bundle.with_engine("fp16")


def test_a_composite_runs_each_graph_where_it_belongs() -> None:
    class Named(GraphDenoiser):
        def __init__(self, name: str, *graphs: GraphName) -> None:
            self.name = name
            self.specs = {graph: specs[graph] for graph in graphs}
            self.prepared: Any = None
            self.closed = False

        def _run(self, graph: GraphName, feeds: Any) -> Any:
            return {"by": (self.name, graph, feeds)}

        def prepare(self, sizes: Any) -> None:
            self.prepared = sizes

        def close(self) -> None:
            self.closed = True

    specs = bundle_specs(UNET, CLASSIFIER)
    first, second = Named("a", "unet", "update"), Named("b", "classifier_gradient")
    with Composite(first, second) as both:
        for graph, owner in (("unet", "a"), ("classifier_gradient", "b"), ("update", "a")):
            feeds = {
                tensor.name: np.zeros(tensor.sized(2), tensor.dtype)
                for tensor in specs[graph].inputs  # type: ignore[index]
            }
            assert both.run(graph, feeds) == {"by": (owner, graph, feeds)}  # type: ignore[arg-type]
        both.prepare({"unet": [1, 4], "classifier_gradient": [2]})
    assert (first.prepared, second.prepared) == ({"unet": [1, 4]}, {"classifier_gradient": [2]})
    assert first.closed
    assert second.closed


def test_onnx_runtime_tells_nobody_that_it_runs(tmp_path: Path) -> None:
    """Checks the variable that it reads at import; in a CI, ONNX Runtime is silent without it."""
    (tmp_path / "onnxruntime.py").write_text("import os; print(os.environ['ORT_DISABLE_TELEMETRY'])")
    code = (
        "from admtrt.runtime.backends.onnxruntime import import_onnxruntime as get; get(extra='', purpose='')"
    )
    others = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    for given, found in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        run = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env=others | {"PYTHONPATH": str(tmp_path)} | given,
        )
        assert run.stdout.split() == [found]


def test_onnx_runtime_takes_any_size_prepared_or_not(bundle: Bundle) -> None:
    denoiser = OnnxRuntimeDenoiser(bundle, threads=1)
    expected = unet_out(denoiser, X, T)
    denoiser.prepare({"unet": [1]})
    assert np.array_equal(unet_out(denoiser, X, T), expected)


def test_a_run_that_fails_names_the_batch(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", fail)
    denoiser = OnnxRuntimeDenoiser(bundle, threads=1)
    with pytest.raises(EngineError, match="cannot run graph 'unet' for a batch of 3: no memory"):
        unet_out(denoiser, X, T)


def test_numbers_of_numpy_and_folders_as_text(bundle: Bundle, tmp_path: Path) -> None:
    given = {"threads": np.int64(1), "batch_size": np.int64(1)}
    assert Pipeline.from_bundle(bundle, backend="auto", **given).computed == "auto, fp32"  # type: ignore[arg-type]
    with contextlib.suppress(EngineError):  # of a processor without bf16
        open_denoiser(bundle, BackendChoice(AUTO, "bf16", plans=str(tmp_path)))


def test_auto_takes_no_plans_in_fp32(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'auto' runs no plans in fp32"):
        open_denoiser(bundle, BackendChoice(AUTO, plans=tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        ["--backend", "cuda"],
        ["--backend", "onnxruntime", "--precision", "bf16"],
        ["--precision", "int8"],
        ["--backend", "onnxruntime-cuda"],
        ["--guidance-interval", "3"],
        ["--guidance-interval", "3:1"],
        ["--guidance-interval", "a:b"],
        ["--guidance-interval", "0:nan"],
    ],
)
def test_bad_options_of_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str]
) -> None:
    path = sham_bundle(tmp_path / "bundle", classifier=CLASSIFIER).path
    if "--guidance-interval" in options:
        path = exported_bundle("guided")
    assert run(["sample", str(path), "--out", str(tmp_path / "run"), *options]) == 2
    shown, complaint = capsys.readouterr()
    assert shown == ""
    assert "error:" in complaint
    assert "Traceback" not in complaint
    assert not (tmp_path / "run").exists()
