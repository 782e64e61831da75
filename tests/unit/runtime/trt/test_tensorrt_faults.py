"""Error messages for drivers, GPUs, libraries, plans and memory that TensorRT cannot use."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import cuda_stub
import numpy as np
import pytest
from bundles import pipeline
from engine_double import Context, RtxRuntime
from engine_rig import GPU, Rig
from graph_calls import unet_out

from admtrt.errors import EngineError, MissingDependencyError, PlanError, RequestError, UserError
from admtrt.runtime.backends.choice import BackendChoice
from admtrt.runtime.backends.opening import open_denoiser
from admtrt.runtime.engines.device import Driver, Gpu
from admtrt.runtime.engines.library import Library, logger_of
from admtrt.runtime.engines.sources import GraphSource, graph_source
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.trt.validity import REASONS, check_validity

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Patch = pytest.MonkeyPatch


@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (
            Driver(None, (), "no NVIDIA driver was found"),
            "no engine can run here: no NVIDIA driver was found",
        ),
        (Driver("13.0", (), "the driver finds no GPU"), "the driver finds no GPU"),
        (Driver("12.8", (GPU,)), r"too old: it serves CUDA 12\.8, CUDA 13\.0 is needed"),
    ],
)
def test_drivers(rig: Rig, monkeypatch: Patch, driver: Driver, message: str) -> None:
    rig.driver(monkeypatch, driver)
    with pytest.raises(EngineError, match=message) as info:
        rig.open()
    assert info.value.exit_code == 2
    assert "admtrt doctor" in info.value.hint


def test_a_device_that_refuses(rig: Rig, monkeypatch: Patch) -> None:
    cuda_stub.fail("cuCtxSetCurrent", 46)
    with pytest.raises(
        EngineError, match=r"GeForce Double \(SM89\) cannot be used: CUDA refuses: CUDA_ERROR_DEVICE_UN"
    ):
        rig.open()


@pytest.mark.parametrize(
    ("missing", "message"),
    [("cuda.core", "'cuda-core'"), ("cuda.bindings", "'cuda-core'"), ("tensorrt", "tensorrt")],
)
def test_packages(rig: Rig, monkeypatch: Patch, missing: str, message: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingDependencyError, match=message) as info:
        rig.open()
    assert "pip install" in info.value.hint


def truncated(rig: Rig) -> None:
    for path in rig.folder.glob("*.plan"):
        path.write_bytes(path.read_bytes()[:-9])


def altered(rig: Rig) -> None:
    for path in rig.folder.glob("*.plan"):
        path.write_bytes(path.read_bytes()[:-1] + b" ")


def absent(rig: Rig) -> None:
    for path in rig.folder.iterdir():
        path.unlink()


def incomplete(rig: Rig) -> None:
    absent(rig)
    rig.build([name for name in rig.profiles if name != "classifier_gradient"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "bytes, its record says"),
        (altered, "it is not executed"),
        (absent, "no plan of graph 'unet' in fp32 for TensorRT 11.4.0.106 on GeForce Double"),
        (incomplete, "no plan of graph 'classifier_gradient'"),
    ],
)
def test_plans_on_disk(rig: Rig, damage: Callable[[Rig], None], message: str) -> None:
    damage(rig)
    with pytest.raises(PlanError, match=message) as info:
        rig.open()
    assert "admtrt build" in info.value.hint


def test_plans_of_another_gpu(rig: Rig, monkeypatch: Patch) -> None:
    rig.driver(monkeypatch, Driver("13.1", (Gpu("GeForce Other", 120, 2**30),)))
    with pytest.raises(PlanError, match=r"on GeForce Other \(SM120\): \w+ was built for GeForce Double"):
        rig.open()


def test_plans_of_another_version(rig: Rig, monkeypatch: Patch) -> None:
    monkeypatch.setattr(rig.module, "__version__", "11.5.0.1")
    with pytest.raises(PlanError, match=r"was built by version 11\.4\.0\.106"):
        rig.open()


def test_plans_of_another_graph(rig: Rig, monkeypatch: Patch) -> None:
    def exported_anew(*arguments: Any) -> GraphSource:
        return replace(graph_source(*arguments), digest="0" * 64)

    monkeypatch.setattr("admtrt.runtime.backends.tensorrt.graph_source", exported_anew)
    with pytest.raises(PlanError, match="was built from another ONNX file"):
        rig.open()


def test_plans_of_a_precision_that_the_bundle_lacks(rig: Rig) -> None:
    with pytest.raises(UserError, match="has no engine graphs in fp16") as info:
        rig.open(precision="fp16")
    assert "--engine fp16" in info.value.hint


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"gpu": "SM80"},
            r"refuses its plan of graph 'unet' on GeForce .*: The plan is for SM80",
        ),
        ({"renamed": "eps"}, "the plan of graph 'unet' has .*eps.*; the manifest declares .*out"),
    ],
)
def test_plans_that_the_library_refuses(
    monkeypatch: Patch, tmp_path: Path, plan: dict[str, Any], message: str
) -> None:
    rig = Rig(monkeypatch, tmp_path)
    rig.build(**plan)
    with pytest.raises(PlanError, match=message):
        rig.open()


def test_a_plan_that_is_no_plan(monkeypatch: Patch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path)
    monkeypatch.setattr("engine_rig.plan_bytes", lambda *_, **__: b"\x00plan")
    rig.build()
    with pytest.raises(PlanError, match="magicTagRead failed"):
        rig.open()


def test_rtx_looks_at_a_plan_before_it_opens_it(monkeypatch: Patch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path, rtx=True)
    rig.build(gpu="SM80")
    with pytest.raises(PlanError) as info:
        rig.open()
    assert info.value.message == (
        "TensorRT-RTX 1.7.1.116 refuses its plan of graph 'unet' on GeForce Double (SM89): it was not built "
        "for this GPU. It says: The engine was not built for this device."
    )
    assert re.search(r"rm .*\.plan && admtrt build .* --plans .* --target 89$", info.value.hint)


@pytest.mark.parametrize(
    ("diagnostics", "reasons", "hint"),
    [
        (1, "another version of the library built it", "Build it again with: rm "),
        (2, "it was not built for this GPU", "--target 89"),
        (4, "the NVIDIA driver is too old", "Update the driver"),
        (8, "the CUDA runtime is too old", "--upgrade tensorrt-rtx-cu13"),
        (16, "the GPU has too little memory", "--batch 1"),
        (32, "it is damaged, or no plan", "Build it again with: rm "),
        (64, "CUDA does not start", "admtrt doctor"),
        (5, "another version of the library built it, the NVIDIA driver is too old", "Update the driver"),
        (0, r"it gives no known reason \(0\)", "Build it again with: rm "),
        (128, r"it gives no known reason \(128\)", "Build it again with: rm "),
    ],
)
def test_every_reason_of_rtx_has_its_hint(
    diagnostics: int, reasons: str, hint: str, monkeypatch: Patch, tmp_path: Path
) -> None:
    rig = Rig(monkeypatch, tmp_path, rtx=True)
    rig.build(gpu="SM80")
    monkeypatch.setattr(RtxRuntime, "diagnostics", diagnostics)
    with pytest.raises(
        PlanError, match=f"refuses its plan .*: {reasons}. It says: The engine was not"
    ) as info:
        rig.open()
    assert hint in info.value.hint


def test_every_diagnostic_of_the_real_library_is_known() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    assert set(rtx.EngineInvalidityDiagnostics.__members__) == set(REASONS)


def test_the_real_library_gives_its_own_message_of_what_is_no_plan(rig: Rig) -> None:
    module = pytest.importorskip("tensorrt_rtx_bindings.tensorrt_rtx")
    library = Library("rtx", module, "1.7")
    runtime = module.Runtime(logger_of(module))
    with pytest.raises(
        PlanError, match=r"refuses this on .*: it is damaged, or no plan. It says: The engine header"
    ):
        check_validity(runtime, b"no plan" * 99, subject="this", library=library, gpu=GPU, build="make it")


def test_plans_without_weights_take_them_from_the_graph(monkeypatch: Patch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path)
    rig.build(stripped=True)
    with rig.open() as denoiser:
        samples = Pipeline(rig.bundle, denoiser)([0, 1])
    np.testing.assert_allclose(samples.x, pipeline("guided")([0, 1]).x, rtol=0, atol=2e-5)
    monkeypatch.setattr("engine_double.OnnxParserRefitter.refit_from_file", lambda self, path: False)
    with pytest.raises(PlanError, match=r"cannot put the weights of .*unet\.onnx into their plan"):
        rig.open()


def test_plans_for_later_versions_run_by_their_lean_runtime(monkeypatch: Patch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path)
    rig.build(lean=True)
    libraries = {"11.4.0.106": tmp_path / "libnvinfer_lean.so"}
    for module in ("match", "library"):
        monkeypatch.setattr(f"admtrt.runtime.engines.{module}.lean_runtime", libraries.get)
    monkeypatch.setattr("admtrt.runtime.trt.engine.lean_runtime", libraries.get)
    monkeypatch.setattr(rig.module, "__version__", "11.5.0.1")
    with rig.open() as denoiser:
        samples = Pipeline(rig.bundle, denoiser)([0, 1])
    np.testing.assert_allclose(samples.x, pipeline("guided")([0, 1]).x, rtol=0, atol=2e-5)
    libraries["11.4.0.106"] = tmp_path / "broken.so"
    with pytest.raises(
        PlanError, match=r"needs the lean runtime of TensorRT 11\.4\.0\.106: Unable to"
    ) as info:
        rig.open()
    assert "pip install tensorrt-lean-cu13==11.4.0.106" in info.value.hint
    libraries.clear()
    with pytest.raises(PlanError, match="whose lean runtime it needs"):
        rig.open()


def test_older_plans_are_used_where_the_newest_do_not_go_together(monkeypatch: Patch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path, profiles=((1, 2, 4),))
    rig.build()
    monkeypatch.setattr("admtrt.runtime.engines.plans.datetime", _Later)
    rig.profiles["unet"] = ((16, 16, 16),)
    rig.build(["unet"])
    assert rig.open().largest_batch == 4


def test_an_older_plan_is_used_where_the_newest_is_damaged(monkeypatch: Patch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path, profiles=((1, 2, 4),))
    rig.build()
    monkeypatch.setattr("admtrt.runtime.engines.plans.datetime", _Later)
    rig.profiles["unet"] = ((1, 2, 8),)
    (newest,) = rig.build(["unet"])
    file = rig.store.path(newest.key)
    file.write_bytes(file.read_bytes()[:10])
    assert rig.open().largest_batch == 4
    rig.store.path(rig.build(["update"])[0].key).unlink()
    with pytest.raises(PlanError, match="cannot read the plan") as info:
        rig.open()
    assert info.value.hint.endswith(f"--plans {rig.folder}")


def test_a_batch_that_is_too_large_shows_when_the_plans_are_opened(rig: Rig, monkeypatch: Patch) -> None:
    monkeypatch.setattr("admtrt.runtime.backends.backend.is_installed", lambda _: True)
    with pytest.raises(RequestError, match="a batch of 9 is larger than the largest that the plans take"):
        open_denoiser(rig.bundle, BackendChoice("tensorrt", plans=rig.folder, batch_size=9))


def test_a_closed_backend_gives_everything_back(rig: Rig) -> None:
    before = cuda_stub.counts()
    denoiser = rig.open()
    x, t = np.zeros((2, 1, 8, 8), np.float32), np.zeros(2, np.float32)
    unet_out(denoiser, x, t)
    denoiser.close()
    assert cuda_stub.counts() == before
    assert not denoiser.engines  # and with them the weights
    with pytest.raises(RuntimeError, match="closed"):
        unet_out(denoiser, x, t)


@pytest.mark.parametrize(
    ("said", "full"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 3)", True),
        ("Cuda failure: out of memory", True),
        ("output tensor has no memory layout", False),
        ("cannot be used without a memory pool", False),
    ],
)
def test_only_full_memory_is_called_full(rig: Rig, monkeypatch: Patch, said: str, full: bool) -> None:
    def fail(self: Any, plan: bytes) -> None:
        self.logger.log(1, said)

    monkeypatch.setattr("engine_double.Runtime.deserialize_cuda_engine", fail)
    with pytest.raises(EngineError, match="is out of memory" if full else f"refuses its plan .*{said}"):
        rig.open()


def test_a_run_that_fails_tells_only_what_was_said_of_it(rig: Rig, monkeypatch: Patch) -> None:
    accept = Context.execute_async_v3
    with rig.open() as denoiser:
        x, t = np.zeros((1, 1, 8, 8), np.float32), np.zeros(1, np.float32)

        def grumble(self: Any, stream_handle: int) -> bool:
            self.engine.runtime.logger.log(1, "an old story")
            return accept(self, stream_handle)

        monkeypatch.setattr(Context, "execute_async_v3", grumble)
        unet_out(denoiser, x, t)
        monkeypatch.setattr(Context, "execute_async_v3", lambda self, _: self._refuse("the device is lost"))
        with pytest.raises(EngineError) as info:
            unet_out(denoiser, x, t)
    assert "the device is lost" in info.value.message
    assert "old story" not in info.value.message


def test_plans_without_a_common_batch(monkeypatch: Patch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path)
    rig.profiles |= {"unet": ((1, 1, 2),), "update": ((3, 4, 8),)}
    rig.build()
    with pytest.raises(PlanError, match="no batch size in common"):
        rig.open()


def test_the_newest_plan_is_used(rig: Rig, monkeypatch: Patch) -> None:
    for graph in rig.profiles:
        rig.profiles[graph] = ((1, 2, 2),)
    monkeypatch.setattr("admtrt.runtime.engines.plans.datetime", _Later)
    rig.build()
    assert rig.open().largest_batch == 2


class _Later:
    @staticmethod
    def now(_: Any) -> Any:
        from datetime import UTC, datetime

        return datetime(2999, 1, 1, tzinfo=UTC)


def test_memory_for_the_samples(monkeypatch: Patch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path, memory=2**12)
    rig.build(scratch=0)
    before = cuda_stub.counts()
    with pytest.raises(
        EngineError, match=r"GeForce Double \(SM89\) is out of memory: 1 MiB were needed for the samples"
    ) as info:
        unet_out(rig.open(), np.zeros((8, 1, 8, 8), np.float32), np.zeros(8, np.float32))
    assert "1 MiB of 1 MiB are free" in info.value.message
    assert "smaller --batch-size" in info.value.hint
    assert cuda_stub.counts() == before  # what was there before the fault was given back


def test_memory_for_the_engine(monkeypatch: Patch, tmp_path: Path) -> None:
    rig = Rig(monkeypatch, tmp_path, profiles=((1, 1, 1), (2, 4, 8)), memory=2**21)
    rig.build(scratch=2**18)
    with rig.open() as denoiser:
        sample = Pipeline(rig.bundle, denoiser)
        with pytest.raises(EngineError, match=r"2 MiB were needed for graph '.*' at a batch of 4"):
            sample([0, 1, 2, 0])
        assert sample([0]).x.shape == (1, 1, 8, 8)  # nothing is lost


def test_memory_for_the_weights(rig: Rig, monkeypatch: Patch) -> None:
    def fail(self: Any, plan: bytes) -> None:
        self.logger.log(1, "Error Code 2: Out of memory")

    monkeypatch.setattr("engine_double.Runtime.deserialize_cuda_engine", fail)
    with pytest.raises(EngineError, match="1 MiB were needed for the weights of graph 'unet'"):
        rig.open()


@pytest.mark.parametrize("output", ["grad", "out", "x_prev"])
def test_a_run_that_the_library_refuses(rig: Rig, monkeypatch: Patch, output: str) -> None:
    accept = Context.execute_async_v3

    def refuse(self: Any, stream_handle: int) -> bool:
        if output in self.engine.tensors and self.engine.tensors[output][0] == 2:
            return bool(self._refuse("the device is lost"))
        return accept(self, stream_handle)

    before = cuda_stub.counts()
    with rig.open() as denoiser:
        monkeypatch.setattr(Context, "execute_async_v3", refuse)
        with pytest.raises(EngineError, match=r"cannot run graph .*\(the device is lost\)"):
            Pipeline(rig.bundle, denoiser)([0])
    assert cuda_stub.counts() == before  # whatever was under way on either stream
