"""The graphs that a run opens: those that its schedule needs, before its first step and before its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from bundles import exported_bundle
from opened_sessions import opened_sessions

from admtrt.bundle import Bundle
from admtrt.errors import BundleError
from admtrt.evaluate.sweep import Sweep, points, run_sweep
from admtrt.runtime.bulk import BulkRequest, draw
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.sampler import runs_of
from admtrt.schedule.table import sampling_schedule

IMAGE = np.zeros((1, 1, 8, 8), np.float32)
MEASURED = {"linear": {"measurement": IMAGE, "operator": "identity"}}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs that ONNX Runtime opens, in order."""
    exported_bundle("steered")  # exports run graphs as well
    return opened_sessions(monkeypatch)


@pytest.mark.parametrize(
    ("request_", "graphs"),
    [
        ({"scale": 0}, {"unet", "update"}),
        ({"scale": 0, "method": "dpmpp"}, {"unet", "update_full"}),
        ({"scale": 0, "threshold": "dynamic"}, {"unet", "threshold", "update_full"}),
        ({"labels": [1], "scale": 2}, {"unet", "classifier_gradient", "update"}),
        ({"labels": [1], "scale": 2, "guidance_interval": (0, 1)}, {"unet", "classifier_gradient", "update"}),
        ({"scale": 0, "init": IMAGE, "strength": 0.5}, {"unet", "update"}),
        ({"scale": 0, "guides": MEASURED}, {"guide.linear", "update_full"}),
        ({"scale": 0, "guides": MEASURED | {"tv": {}}}, {"guide.linear", "guide.tv", "update_full"}),
        ({"scale": 0, "guides": {"weak": {}}}, {"unet", "guide.weak", "update_full"}),
        (
            {"scale": 0, "guides": MEASURED, "guide_interval": {"linear": (0, 1)}},
            {"unet", "guide.linear", "update_full"},
        ),
        (
            {
                "scale": 0,
                "guides": {"tv": {}, **MEASURED},
                "guide_interval": {"linear": (0, 1), "tv": (1, 1e9)},
            },
            {"guide.tv", "guide.linear", "update_full"},
        ),
    ],
)
def test_a_run_opens_what_its_schedule_needs(
    opened: list[str], request_: dict[str, Any], graphs: set[str]
) -> None:
    pipeline = Pipeline.from_bundle(exported_bundle("steered"), threads=1)
    assert opened == []
    at_the_first_step: list[list[str]] = []
    pipeline(steps=6, **request_, callback=lambda _: at_the_first_step.append(list(opened)))
    assert set(at_the_first_step[0]) == graphs
    assert opened == at_the_first_step[-1]
    assert len(set(opened)) == len(opened)


def test_the_graphs_of_a_schedule_are_those_of_its_bundle() -> None:
    manifest = Bundle.open(exported_bundle("guided")).manifest
    schedule = sampling_schedule(manifest.diffusion, manifest.sampler)
    assert set(runs_of(schedule, manifest.guides)) == {"unet", "classifier_gradient", "update"}


def refuse(monkeypatch: pytest.MonkeyPatch, graph: str) -> None:
    session = onnxruntime.InferenceSession

    def refusing(path: str, **options: Any) -> Any:
        if Path(path).stem == graph:
            raise RuntimeError("not this one")
        return session(path, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refusing)


def test_a_refused_graph_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported_bundle("guided")
    refuse(monkeypatch, "update")
    pipeline = Pipeline.from_bundle(exported_bundle("guided"), threads=1)
    request = BulkRequest(1, None, 0, pipeline.sampler(steps=2, scale=0), batch_size=1, shard_size=1)
    with pytest.raises(BundleError, match="not this one"):
        draw(pipeline, request, tmp_path / "run", ("npz",))
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_refused_before_its_first_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported_bundle("guided")
    refuse(monkeypatch, "classifier_gradient")
    pipeline = Pipeline.from_bundle(exported_bundle("guided"), threads=1)
    chosen = points(["ddim"], ["2"], [0.0, 2.0], ["fp32"], [None])
    sweep = Sweep({"fp32": pipeline}, chosen, [0, 1], 2, 0, 2, {})
    with pytest.raises(BundleError, match="not this one"):
        run_sweep(sweep, [], tmp_path, {}, progress=lambda *_: None)
    assert not any(tmp_path.iterdir())
