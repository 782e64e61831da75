"""A bundle of schema 1, without memory for solvers: it opens, draws the same images, and refuses the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from admtrt.bundle import Bundle
from admtrt.cli import run
from admtrt.errors import RequestError
from admtrt.export.small_graphs import update_graph
from admtrt.export.write import write_graph
from admtrt.images import to_uint8
from admtrt.runtime.pipeline import Pipeline

DATA = Path(__file__).parents[1] / "data"
PATH = DATA / "schema1.bundle"
DRAWN = {
    "ddpm": {"steps": "5"},
    "ddim": {"steps": "ddim5"},
    "eta": {"steps": "5", "method": "ddim", "eta": 0.5, "scale": 0.0},
}
"""Samples in ``schema1.npz``, by ONNX Runtime on another machine: labels 0 and 1, seeds 3 and 4."""


@pytest.mark.parametrize("name", DRAWN)
def test_images_are_the_same(name: str) -> None:
    samples = Pipeline.from_bundle(PATH, threads=1)([0, 1], [3, 4], **DRAWN[name])
    expected = np.load(DATA / "schema1.npz")[name]
    np.testing.assert_allclose(samples.x, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(samples.images.astype(int) - to_uint8(expected)).max() <= 1


def test_the_update_is_written_as_it_was(tmp_path: Path) -> None:
    write_graph(update_graph(Bundle.open(PATH).manifest.network), tmp_path / "update.onnx")
    assert (tmp_path / "update.onnx").read_bytes() == (PATH / "update.onnx").read_bytes()


@pytest.mark.parametrize(
    "choices", [{"method": "unipc"}, {"method": "heun", "steps": 5}, {"method": "dpmpp", "sde": True}]
)
def test_other_solvers_need_another_export(choices: Any) -> None:
    with pytest.raises(RequestError, match="needs the graph 'update_full'") as caught:
        Pipeline.from_bundle(PATH, threads=1)([0], **choices)
    assert "Export the checkpoint again" in caught.value.hint


def test_a_run_that_began_before_goes_on(tmp_path: Path) -> None:
    bundle = shutil.copytree(PATH, tmp_path / "old.bundle")
    command = ["sample", str(bundle), "--out", str(tmp_path / "run"), "--classes", "0,1", "--num", "6"]
    assert run([*command, "--batch-size", "2"]) == 0
    expected = np.load(tmp_path / "run" / "samples.npz")["arr_0"]
    request = tmp_path / "run" / "request.json"
    known = json.loads(request.read_text())
    assert known["sampler"].keys() == {"method", "steps", "scale", "eta", "clip", "guidance_interval"}
    request.write_text(json.dumps(known | {"labels": [0, 1, 0, 1, 0, 1]}))  # as it was written then
    (tmp_path / "run" / "samples.npz").unlink()
    sorted((tmp_path / "run" / "shards").iterdir())[0].unlink()
    assert run([*command, "--batch-size", "2"]) == 0
    assert np.array_equal(np.load(tmp_path / "run" / "samples.npz")["arr_0"], expected)
    assert run([*command, "--batch-size", "2", "--method", "ddim"]) == 2
