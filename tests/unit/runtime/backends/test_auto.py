"""``--backend auto``: what is measured, what is chosen, and when it is measured again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_stub
import numpy as np
import pytest
from bundles import exported_bundle, pipeline
from engine_rig import Rig
from graph_calls import gradient, unet_out

from admtrt.bundle import Bundle
from admtrt.cli import run
from admtrt.errors import EngineError
from admtrt.runtime.backends import auto
from admtrt.runtime.backends import backend as declaration
from admtrt.runtime.backends.auto import Fastest, Measured, fastest, find_fastest
from admtrt.runtime.backends.choice import AUTO, BackendChoice
from admtrt.runtime.backends.composite import Composite
from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser
from admtrt.runtime.backends.opening import open_denoiser
from admtrt.runtime.backends.openvino import OpenVinoDenoiser
from admtrt.runtime.backends.probe import ProbeRequest, ProbeResult, measure
from admtrt.runtime.backends.registry import BACKENDS
from admtrt.runtime.engines.library import Library
from admtrt.runtime.engines.options import BuildOptions
from admtrt.runtime.engines.plans import PlanStore, plan_key
from admtrt.runtime.engines.report import fusion_report
from admtrt.runtime.engines.sources import graph_source

MIXED = {
    "onnxruntime": {"unet": 0.9, "classifier_gradient": 0.3},
    "openvino": {"unet": 0.6, "classifier_gradient": 0.4},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "admtrt" / "backends.json"


@pytest.fixture
def bundle() -> Bundle:
    return pipeline("guided").bundle


class Probes:
    """Replaces the measuring processes."""

    def __init__(self) -> None:
        self.requests: list[ProbeRequest] = []
        self.seconds: dict[str, Any] = dict(MIXED)
        self.errors: dict[str, str] = {}

    def __call__(self, request: ProbeRequest) -> ProbeResult:
        self.requests.append(request)
        if request.backend in self.errors:
            return ProbeResult(error=self.errors[request.backend])
        return ProbeResult(seconds=self.seconds[request.backend])


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Probes:
    made = Probes()
    monkeypatch.setattr(auto, "measure_apart", made)
    return made


def chosen(
    bundle: Bundle,
    precision: Any = "fp32",
    threads: int | None = 1,
    batch_size: int = 2,
    plans: Path | None = None,
) -> Fastest:
    choice = BackendChoice(AUTO, precision, threads, plans, batch_size)
    return find_fastest(bundle, choice, progress=lambda _: None)


@pytest.mark.parametrize(
    ("further", "expected"),
    [
        ({}, ("openvino", "onnxruntime")),
        ({"tensorrt": (0.1, 0.1)}, ("tensorrt", "tensorrt")),
        # Only its UNet is faster: arrays would cross to the device and back at every step.
        ({"tensorrt": (0.55, 0.45)}, ("openvino", "onnxruntime")),
        ({"onnxruntime-cuda": (0.2, 0.1), "tensorrt": (0.1, 0.1)}, ("tensorrt", "tensorrt")),
    ],
)
def test_processors_share_the_graphs_and_devices_do_not(further: Any, expected: tuple[str, str]) -> None:
    seconds = MIXED | {
        name: {"unet": unet, "classifier_gradient": gradient} for name, (unet, gradient) in further.items()
    }
    found = fastest(seconds)  # type: ignore[arg-type]
    assert (found["unet"], found["classifier_gradient"]) == expected


def test_a_bundle_without_a_classifier() -> None:
    seconds: Any = {"onnxruntime": {"unet": 1.0}, "openvino": {"unet": 2.0}}
    assert fastest(seconds) == {"unet": "onnxruntime"}


def test_the_choice_is_measured_once_and_remembered(bundle: Bundle, probes: Probes) -> None:
    first = chosen(bundle)
    assert first.graphs == {"unet": "openvino", "classifier_gradient": "onnxruntime"}
    assert not first.remembered
    assert [request.backend for request in probes.requests] == ["onnxruntime", "openvino"]
    assert {(request.choice.threads, request.choice.batch_size) for request in probes.requests} == {(1, 2)}
    again = chosen(bundle)
    assert again.remembered
    assert again.graphs == first.graphs
    assert len(probes.requests) == 2
    assert str(again) == (
        "auto: unet on openvino (0.6 s, onnxruntime 0.9 s); "
        "classifier_gradient on onnxruntime (0.3 s, openvino 0.4 s); measured earlier at a batch of 2"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 2},
        {"threads": None},
        {"batch_size": 3},
        {"precision": "bf16"},
        ("processor", lambda: "another"),
        ("_gpus", lambda: ["H100"]),
        ("version_of", lambda _: "0.1"),
        ("__version__", "9"),
    ],
)
def test_every_part_of_the_key_counts(
    bundle: Bundle, probes: Probes, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    chosen(bundle)
    if isinstance(change, tuple):
        monkeypatch.setattr(auto, *change)
        assert not chosen(bundle).remembered
    else:
        assert not chosen(bundle, **change).remembered


def put_plan(store: PlanStore, content: bytes) -> None:
    source = graph_source(pipeline("guided").bundle, "unet", "fp32")
    key = plan_key(source, BuildOptions(), Library("rtx", None, "1.7"), None)
    store.put(key, content, seconds=1.0, report=fusion_report([]))


def test_another_bundle_and_new_plans_are_measured_again(
    bundle: Bundle, probes: Probes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(bundle)
    assert not chosen(pipeline("conditional").bundle).remembered
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "manifest.json").write_bytes((bundle.path / "manifest.json").read_bytes())
    moved = Bundle(copy, bundle.manifest, bundle.digest)
    assert chosen(moved).remembered  # the same graphs elsewhere
    put_plan(PlanStore.of(moved), b"one")
    assert not chosen(moved).remembered
    elsewhere = tmp_path / "plans"
    chosen(bundle, "bf16")
    assert chosen(bundle, "bf16", plans=elsewhere).remembered  # no plans there either
    assert probes.requests[-1].choice.plans is None
    put_plan(PlanStore(elsewhere), b"another")
    assert not chosen(bundle, "bf16", plans=elsewhere).remembered
    assert probes.requests[-1].choice.plans == elsewhere
    monkeypatch.setattr(auto.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    assert not chosen(bundle).remembered


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b"\xff\xfe"])
def test_a_damaged_file_is_measured_again(bundle: Bundle, probes: Probes, cache: Path, damage: bytes) -> None:
    chosen(bundle)
    cache.write_bytes(damage)
    assert not chosen(bundle).remembered
    assert chosen(bundle).remembered


@pytest.mark.parametrize(
    "value", [3, {}, {"seconds": {}}, {"seconds": {"openvino": {"unet": -1}}}, {"other": 1}, "openvino"]
)
def test_damaged_values_are_measured_again(bundle: Bundle, probes: Probes, cache: Path, value: Any) -> None:
    chosen(bundle)
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: value}))
    assert not chosen(bundle).remembered


def test_values_of_other_backends_or_graphs_are_measured_again(
    bundle: Bundle, probes: Probes, cache: Path
) -> None:
    chosen(bundle)
    (key,) = json.loads(cache.read_text())
    for seconds in ({"unknown": {"unet": 1.0, "classifier_gradient": 1.0}}, {"openvino": {"unet": 1.0}}):
        cache.write_text(json.dumps({key: {"seconds": seconds, "failed": {}}}))
        assert not chosen(bundle).remembered


def test_a_backend_that_fails_is_left_out_and_named(bundle: Bundle, probes: Probes) -> None:
    probes.errors = {"openvino": "no memory"}
    choice = chosen(bundle)
    assert set(choice.graphs.values()) == {"onnxruntime"}
    assert "the only one" in str(choice)
    assert str(choice).endswith("; openvino failed: no memory")


def test_a_failure_is_remembered_for_a_while(
    bundle: Bundle, probes: Probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes.errors = {"openvino": "no memory"}
    chosen(bundle)
    probes.errors = {}
    assert chosen(bundle).remembered
    now = auto.time.time()
    monkeypatch.setattr(auto.time, "time", lambda: now + 2 * 3600)
    later = chosen(bundle)
    assert not later.remembered
    assert later.graphs["unet"] == "openvino"
    monkeypatch.setattr(auto.time, "time", lambda: now + 9e9)
    assert chosen(bundle).remembered  # what failed nowhere is remembered for good


def test_none_that_works(bundle: Bundle, probes: Probes, cache: Path) -> None:
    probes.errors = dict.fromkeys(MIXED, "no memory")
    with pytest.raises(EngineError, match=r"in fp32 \(onnxruntime: no memory; openvino: no memory\)"):
        chosen(bundle)
    assert not cache.exists()
    with pytest.raises(EngineError, match=r"no backend on this machine runs .* in fp16") as raised:
        chosen(bundle, "fp16")
    assert "onnxruntime-cuda" in raised.value.hint


def test_fp32_admits_exact_backends_only() -> None:
    exact = [name for name, backend in BACKENDS.items() if backend.admits("fp32")]
    assert exact == ["onnxruntime", "openvino", "onnxruntime-cuda"]
    assert [name for name, backend in BACKENDS.items() if backend.admits("fp16")] == [
        name for name in BACKENDS if "fp16" in BACKENDS[name].precisions
    ]


def test_what_is_opened(bundle: Bundle, probes: Probes) -> None:
    said: list[Any] = []
    opened = open_denoiser(bundle, BackendChoice(AUTO, threads=1), progress=said.append)
    assert isinstance(opened, Composite)
    assert isinstance(opened.generator, OpenVinoDenoiser)
    assert isinstance(opened.guide, OnnxRuntimeDenoiser)
    assert said[-1].graphs == {"unet": "openvino", "classifier_gradient": "onnxruntime"}
    x = np.random.default_rng(0).standard_normal((1, 1, 8, 8), dtype=np.float32)
    t, y = np.array([5.0], dtype=np.float32), np.array([1])
    expected = pipeline("guided").denoiser
    assert np.allclose(unet_out(opened, x, t), unet_out(expected, x, t), atol=1e-5)
    assert np.allclose(gradient(opened, x, t, y), gradient(expected, x, t, y), atol=1e-5)
    probes.seconds["openvino"] = {"unet": 0.1, "classifier_gradient": 0.1}
    assert isinstance(open_denoiser(bundle, BackendChoice(AUTO, threads=1, batch_size=7)), OpenVinoDenoiser)


def test_the_command_says_which_and_why(
    probes: Probes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--backend", "auto", "--num", "3", "--threads", "1", "--format", "npz", "--json"]
    code = run(["sample", str(exported_bundle("guided")), "--out", str(tmp_path / "run"), *options])
    shown, notes = capsys.readouterr()
    assert code == 0, notes
    assert "measuring openvino in fp32 at a batch of 3" in notes
    assert "auto: unet on openvino (0.6 s, onnxruntime 0.9 s)" in notes
    (choice,) = json.loads(shown)["chosen"]
    assert choice["graphs"] == {"unet": "openvino", "classifier_gradient": "onnxruntime"}
    assert choice["measured"]["seconds"] == MIXED


def request(backend: str = "onnxruntime", bundle: str = "guided", plans: Path | None = None) -> ProbeRequest:
    choice = BackendChoice(AUTO, threads=1, batch_size=2)
    if plans is not None:
        choice = BackendChoice(backend, plans=plans, batch_size=2)
    return ProbeRequest(
        bundle=str(exported_bundle(bundle)),
        backend=backend,
        choice=choice,
        graphs=("unet", "classifier_gradient") if bundle == "guided" else ("unet",),
    )


@pytest.mark.parametrize("name", ["guided", "conditional", "upsampler"])
def test_a_measurement(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("admtrt.runtime.backends.probe._SECONDS", 0.0)
    found = measure(request(bundle=name))
    assert found.error == ""
    assert set(found.seconds) == set(request(bundle=name).graphs)
    assert all(0 < seconds < 5 for seconds in found.seconds.values())


def test_steps_on_a_device_are_measured_as_they_are_sampled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(declaration, "is_installed", lambda _: True)
    rig = Rig(monkeypatch, tmp_path)
    rig.build()
    found = measure(request("tensorrt", plans=rig.folder))
    assert found.error == ""
    assert all(0 < found.seconds[name] < 5 for name in ("unet", "classifier_gradient"))
    assert cuda_stub.log().count("s0: graph") > 10


def test_a_measurement_that_cannot_be_made() -> None:
    assert "needs an NVIDIA GPU" in measure(request("onnxruntime-cuda")).error


def test_a_process_of_its_own() -> None:
    found = auto.measure_apart(request())
    assert found.error == ""
    assert set(found.seconds) == {"unet", "classifier_gradient"}


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.abort()", "its process ended with code -6"),
        ("raise OSError('broken')", "its process ended with code 1: OSError: broken"),
        ("print('{}x')", "its process ended with code 0"),
        ("import time; time.sleep(60)", "it took more than 0.5 s"),
    ],
)
def test_a_process_that_dies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, message: str
) -> None:
    real: Callable[..., Any] = auto.subprocess.run

    def other(command: list[str], **given: Any) -> Any:
        return real([command[0], "-c", program], **given)

    monkeypatch.setattr(auto.subprocess, "run", other)
    if "sleep" in program:
        monkeypatch.setattr(auto, "_TIMEOUT", 0.5)
    assert auto.measure_apart(request()).error == message


def test_measured_round_trip() -> None:
    measured = Measured(seconds=MIXED, failed={"tensorrt": "no driver"})  # type: ignore[arg-type]
    assert Measured.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
