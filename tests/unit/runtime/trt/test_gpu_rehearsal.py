"""The tests that need a GPU, run on the driver stub, so that on a GPU they do not fail by their own bugs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from engine_rig import Rig

from admtrt.runtime.engines.options import BatchProfile

if TYPE_CHECKING:
    from types import ModuleType

    from admtrt.runtime.engines.plans import PlanStore


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """``tests/gpu/test_engines.py``, whose plans are those of the double of TensorRT."""
    rig = Rig(monkeypatch, tmp_path)
    spec = importlib.util.spec_from_file_location(
        "rehearsed", Path(__file__).parents[3] / "gpu" / "test_engines.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def build(_: Any, precision: str, library: Any, store: PlanStore, *profiles: str, **given: Any) -> None:
        assert (precision, library.flavor, store.root) == ("fp32", rig.flavor, rig.folder)
        parsed = [BatchProfile.parse(profile) for profile in profiles]
        sizes = tuple((one.smallest, one.best, one.largest) for one in parsed)
        rig.profiles = dict.fromkeys(rig.profiles, sizes)
        rig.build()

    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(module, "typed_bundle", lambda: rig.bundle)
    return module


def test_the_machine_has_a_gpu_to_the_tests(stage: ModuleType) -> None:
    assert all(not mark.args[0] for mark in stage.pytestmark if mark.name == "skipif")
    assert stage.fault_of("tensorrt") == ""


def test_parity_graphs_and_padding(
    stage: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage.test_parity_graphs_and_padding("tensorrt", "fp32", tmp_path, monkeypatch)


def test_parity_can_fail(stage: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stage, "TOLERANCES", {"fp32": -1.0})
    with pytest.raises(AssertionError):
        stage.test_parity_graphs_and_padding("tensorrt", "fp32", tmp_path, monkeypatch)
