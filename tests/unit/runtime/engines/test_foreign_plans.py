"""Plans that came with a bundle are not run, unless their folder is named."""

from __future__ import annotations

import json
import shlex
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from bundles import exported_bundle
from engine_double import RtxRuntimeConfig
from engine_rig import GPU, Rig

from admtrt.bundle import Bundle
from admtrt.cli import run
from admtrt.errors import PlanError
from admtrt.runtime.backends.auto import memo_key
from admtrt.runtime.backends.choice import AUTO, BackendChoice
from admtrt.runtime.backends.tensorrt import TensorRTDenoiser
from admtrt.runtime.engines import build
from admtrt.runtime.engines.build import PlanBuilder
from admtrt.runtime.engines.builder import BuiltPlan
from admtrt.runtime.engines.library import find_library
from admtrt.runtime.engines.options import BatchProfile, BuildOptions
from admtrt.runtime.engines.plans import PlanStore
from admtrt.runtime.engines.sources import graph_source
from admtrt.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

Capture = pytest.CaptureFixture[str]


@pytest.fixture(params=[False, True], ids=["tensorrt", "rtx"])
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    """A bundle that was downloaded with plans, on a machine that has built nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "theirs"))
    copy = tmp_path / "model.bundle"
    shutil.copytree(exported_bundle("guided"), copy)
    made = Rig(monkeypatch, copy / "plans", rtx=request.param)
    made.bundle = Bundle.open(copy)
    made.build()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "ours"))
    return made


def opened(rig: Rig, **options: Any) -> TensorRTDenoiser:
    return TensorRTDenoiser(rig.bundle, **options)


def test_they_are_refused_by_name_with_two_ways_out(rig: Rig) -> None:
    with pytest.raises(PlanError, match="was not built on this machine by this user") as info:
        opened(rig)
    library = "rtx" if rig.flavor == "rtx" else "tensorrt"
    assert info.value.hint == (
        f"Make one with: admtrt build {rig.bundle.path} --library {library} --precision fp32. "
        f"Or, if you trust whoever built it as you trust a program, add: --plans {rig.folder}"
    )


def test_the_folder_that_is_named_is_trusted(rig: Rig, tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(PlanError) as info:
        opened(rig)
    added = shlex.split(info.value.hint.rsplit(": ", 1)[1])
    given = ["sample", rig.bundle.path, "--out", tmp_path / "run", "--classes", "0", "--backend", "tensorrt"]
    assert run([str(each) for each in given]) == 2
    assert "was not built on this machine" in capsys.readouterr().err
    assert run([str(each) for each in given] + added) == 0


def test_plans_of_this_machine_are_run_also_from_a_copy(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.build()
    opened(rig).close()
    copy = rig.bundle.path.with_name("copy.bundle")
    shutil.copytree(rig.bundle.path, copy)
    TensorRTDenoiser(Bundle.open(copy)).close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(rig.bundle.path.with_name("nobody")))
    with pytest.raises(PlanError, match="was not built on this machine"):
        opened(rig)


def test_a_plan_that_replaces_one_of_ours_is_refused(rig: Rig) -> None:
    """Plan and record agree with each other, and have the name that the build here would have."""
    theirs = {path.name: path.read_bytes() for path in rig.folder.iterdir()}
    rig.build(scratch=1)
    opened(rig).close()
    for name, content in theirs.items():
        (rig.folder / name).write_bytes(content)
    with pytest.raises(PlanError, match="was not built on this machine"):
        opened(rig)


def test_a_build_replaces_them(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    builder = PlanBuilder(find_library(rig.flavor), GPU, PlanStore.of(rig.bundle), note=notes.append)
    record = PlanStore.of(rig.bundle).records()[0][0]
    source = graph_source(rig.bundle, record.key.graph, "fp32")
    monkeypatch.setattr(build, "build_plan", lambda *_, **__: BuiltPlan(memoryview(b"ours"), 1.0, (), b""))
    options = BuildOptions(profiles=(BatchProfile(smallest=1, best=4, largest=8),))
    assert builder.make(source, options).built
    assert "was not built on this machine by this user; building it again" in notes[0]
    assert not builder.make(source, options).built


def test_a_build_that_cannot_be_remembered_says_how_to_run_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    notes: list[str] = []
    monkeypatch.setattr(build, "build_plan", lambda *_, **__: BuiltPlan(memoryview(b"ours"), 1.0, (), b""))
    builder = PlanBuilder(find_library(rig.flavor), GPU, PlanStore.of(rig.bundle), note=notes.append)
    builder.make(graph_source(rig.bundle, "unet", "fp32"), BuildOptions())
    assert f"--plans {rig.folder}" in notes[-1]


def test_inspect_says_so_and_lists_no_layers(rig: Rig, capsys: Capture) -> None:
    assert run(["inspect", str(rig.bundle.path), "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert {plan["fault"] for plan in plans} == {"was not built on this machine by this user"}
    name = rig.store.records()[0][0].key.digest
    assert run(["inspect", str(rig.bundle.path), "--layers", name]) == 2
    assert "cannot be opened: it was not built on this machine" in capsys.readouterr().err
    assert run(["inspect", str(rig.bundle.path), "--layers", name, "--plans", str(rig.folder)]) == 0


def test_a_choice_of_auto_is_made_anew_once_plans_are_trusted(rig: Rig) -> None:
    def key() -> str:
        return memo_key(rig.bundle, [], BackendChoice(AUTO, "fp16", batch_size=4))

    before = key()
    rig.build()
    assert key() != before


def test_kernels_that_came_with_a_bundle_are_compiled_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Plans that are built here have a name that others can foresee, and so have their kernels."""
    copy = tmp_path / "model.bundle"
    shutil.copytree(exported_bundle("guided"), copy)
    rig = Rig(monkeypatch, copy / "plans", rtx=True)
    rig.bundle = Bundle.open(copy)

    def kernels_read() -> list[bytes]:
        RtxRuntimeConfig.made.clear()
        with opened(rig) as denoiser:
            Pipeline(rig.bundle, denoiser)([0], steps=2)
        return [data for cache in RtxRuntimeConfig.made for data in cache.read]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "theirs"))
    rig.build()
    assert kernels_read() == []
    assert len(kernels_read()) == len(rig.bundle.manifest.graphs)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "ours"))
    rig.build()
    assert kernels_read() == []
    assert len(kernels_read()) == len(rig.bundle.manifest.graphs)  # ours by now
