"""Refused requests: each message says what was given, what was expected and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import CLASSIFIER, UNET, sham_bundle

from admtrt.errors import BundleError, RequestError
from admtrt.runtime.pipeline import Pipeline, consecutive_seeds
from admtrt.runtime.two_stage import TwoStage


class Fixed:
    """A denoiser whose every step gives the same image."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def run(self, graph: str, feeds: Any) -> dict[str, Any]:
        filled = np.full_like(feeds["x"], self.value)
        return {
            "out": np.concatenate([filled, filled], axis=1),
            "grad": np.zeros_like(filled),
        } | dict.fromkeys(("x_prev", "pred_x0"), filled)


def sham(folder: Path, value: float = 0.0, **fields: Any) -> Pipeline:
    return Pipeline(sham_bundle(folder / "bundle", **fields), Fixed(value))


@pytest.fixture
def guided(tmp_path: Path) -> Pipeline:
    return sham(tmp_path)


@pytest.fixture
def plain(tmp_path: Path) -> Pipeline:
    """Unconditional, no classifier."""
    return sham(tmp_path, classifier=None, class_names=())


@pytest.fixture
def conditional(tmp_path: Path) -> Pipeline:
    unet = UNET.model_copy(update={"num_classes": 3})
    return sham(tmp_path, network=unet, classifier=None, class_names=())


@pytest.fixture
def upsampler(tmp_path: Path) -> Pipeline:
    unet = UNET.model_copy(update={"low_res_size": 4})
    return sham(tmp_path, network=unet, classifier=None, class_names=())


def refusal(pipeline: Pipeline, **request: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        pipeline(**request)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"labels": [3]}, "class 3 is out of range; the classes are 0 to 2"),
        ({"labels": [0, -1]}, "class -1 is out of range"),
        ({}, "labels are needed: the bundle has 3 classes"),
        ({"seeds": [1, 2]}, "labels are needed"),
        ({"labels": []}, "no sample was asked for"),
        ({"labels": [0], "seeds": [-1]}, "seed -1 is out of range"),
        ({"labels": [0], "seeds": [2**64]}, f"seed {2**64} is out of range"),
        ({"labels": [0, 1], "seeds": [1]}, "1 seeds for 2 samples; give one for each"),
        ({"labels": [0], "scale": float("nan")}, "'scale' is nan; input should be a finite number"),
        ({"labels": [0], "scale": float("inf")}, "'scale' is inf"),
        ({"labels": [0], "scale": 1e7}, "'scale': 10000000.0 is out of range"),
        ({"labels": [0], "eta": 0.5}, "eta belongs to ddim"),
        ({"labels": [0], "steps": "ddim5", "eta": 1.5}, "'eta' is 1.5"),
        ({"labels": [0], "steps": "ddim5", "eta": float("nan")}, "'eta' is nan"),
        ({"labels": [0], "steps": "ddim300"}, "no integer stride"),
        ({"labels": [0], "steps": "1001"}, "cannot give 1001"),
        ({"labels": [0], "steps": "some"}, "'some' is not a positive whole number"),
        ({"labels": [0], "steps": "1"}, "keeps 1 of 1000 timesteps"),
        ({"labels": [0], "method": "plms"}, "'method': 'plms' is unknown; expected one of"),
        ({"labels": [0], "batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"labels": [0], "batch_size": -3}, "batch_size is -3"),
        ({"labels": [0], "low_res": np.zeros((1, 4, 4, 1), np.uint8)}, "is no upsampler"),
    ],
)
def test_requests_that_cannot_be_met(guided: Pipeline, request_: dict[str, Any], message: str) -> None:
    assert message in refusal(guided, **request_).message


def test_guidance_without_a_classifier(plain: Pipeline) -> None:
    error = refusal(plain, scale=1.0)
    assert "scale 1.0 asks for guidance" in error.message
    assert "holds no classifier" in error.message
    assert "--classifier" in error.hint


def test_labels_without_classes(plain: Pipeline) -> None:
    assert "the bundle knows no classes" in refusal(plain, labels=[0]).message


def test_a_class_conditional_unet_needs_labels_even_unguided(conditional: Pipeline) -> None:
    assert "labels are needed" in refusal(conditional, scale=0.0).message
    assert "class 3 is out of range" in refusal(conditional, labels=[3]).message


@pytest.mark.parametrize(
    ("low_res", "message"),
    [
        (None, "is an upsampler and needs low_res images"),
        (np.zeros((2, 5, 5, 1), np.uint8), "low_res is uint8 [N, 5, 5, 1]; expected uint8 [N, 4, 4, 1] or"),
        (np.zeros((2, 1, 4, 4), np.uint8), "low_res is uint8 [N, 1, 4, 4]"),
        (np.zeros((2, 4, 4, 1), np.float32), "low_res is float32 [N, 4, 4, 1]"),
        (np.zeros((2, 1, 4, 4), np.float64), "low_res is float64"),
        (np.full((2, 1, 4, 4), np.nan, np.float32), "low_res has values that are not finite"),
        (np.uint8(3), "low_res is uint8 []"),
        ("text", "low_res is <U4 []"),
        (np.zeros((0, 4, 4, 1), np.uint8), "no sample was asked for"),
    ],
)
def test_bad_conditioning(upsampler: Pipeline, low_res: Any, message: str) -> None:
    assert message in refusal(upsampler, low_res=low_res).message


def test_as_many_seeds_as_small_images(upsampler: Pipeline) -> None:
    images = np.zeros((2, 4, 4, 1), np.uint8)
    assert "2 low_res for 3 samples" in refusal(upsampler, seeds=[1, 2, 3], low_res=images).message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_no_numbers_are_not_given_out(tmp_path: Path, value: float) -> None:
    error = refusal(sham(tmp_path, value), labels=[0], scale=50.0)
    assert "values that are not finite (scale 50.0, steps '5')" in error.message
    assert "smaller scale or more steps" in error.hint


@pytest.mark.parametrize(
    ("threads", "expected"),
    [(0, "1 to 1024"), (-1, "1 to 1024"), (1025, "1 to 1024"), (2.5, "a whole number")],
)
def test_threads_out_of_range(tmp_path: Path, threads: Any, expected: str) -> None:
    with pytest.raises(RequestError, match=f"threads is {threads}; expected {expected}"):
        Pipeline.from_bundle(tmp_path / "absent", threads=threads)


def test_graphs_that_the_library_refuses(tmp_path: Path) -> None:
    """A bundle that is intact but has a graph that ONNX Runtime cannot load."""
    opened = Pipeline.from_bundle(sham_bundle(tmp_path / "bundle", classifier=CLASSIFIER).path)
    steps: list[object] = []
    with pytest.raises(BundleError, match="ONNX Runtime refuses"):
        opened([0], steps=2, callback=steps.append)
    assert not steps


@pytest.mark.parametrize(("name", "dtype", "size"), [("X", 1, 8), ("x", 7, 8), ("x", 1, 16)])
def test_graphs_that_are_not_what_the_manifest_declares(
    tmp_path: Path, name: str, dtype: int, size: int
) -> None:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [name], ["out"])],
        "g",
        [value(name, dtype, ["N", 1, size, size]), value("t", 1, ["N"])],
        [value("out", dtype, ["N", 1, size, size])],
    )
    opset = onnx.helper.make_opsetid("", 18)
    content = onnx.helper.make_model(graph, ir_version=9, opset_imports=[opset]).SerializeToString()
    path = sham_bundle(tmp_path / "bundle", graph=content).path
    opened = Pipeline.from_bundle(path)
    with pytest.raises(BundleError, match=r"the manifest declares x float32\[N, 1, 8, 8\], t float32\[N\]"):
        opened([0], steps=2)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"labels": [3.5]}, "a label is 3.5; expected a whole number"),
        ({"labels": [1.0]}, "a label is 1.0; expected a whole number"),
        ({"labels": [True]}, "a label is True; expected a whole number"),
        ({"labels": np.array([True])}, "a label is np.True_; expected a whole number"),
        ({"labels": [None]}, "a label is None; expected a whole number"),
        ({"labels": ["1"]}, "class '1' is neither a number nor a name of the bundle; the names are ant, bee"),
        ({"labels": 1}, "labels is 1; expected one for each sample"),
        ({"labels": np.array(1)}, "labels is array(1); expected one for each sample"),
        ({"labels": "cat"}, "labels is 'cat'; expected one for each sample"),
        ({"labels": [0], "seeds": [1.5]}, "a seed is 1.5; expected a whole number"),
        ({"labels": [0], "seeds": [True]}, "a seed is True; expected a whole number"),
        ({"labels": [0], "seeds": ["1"]}, "a seed is '1'; expected a whole number"),
        ({"labels": [0], "seeds": 1}, "seeds is 1; expected one for each sample"),
        ({"labels": [0], "batch_size": 2.5}, "batch_size is 2.5; expected a whole number"),
        ({"labels": [0], "batch_size": True}, "batch_size is True; expected a whole number"),
        ({"labels": [0], "steps": 2.5}, "'2.5' is not a positive whole number"),
        ({"labels": [0], "steps": 0}, "'0' is not a positive whole number"),
    ],
)
def test_values_of_another_type(guided: Pipeline, request_: dict[str, Any], message: str) -> None:
    assert message in refusal(guided, **request_).message


def test_whole_numbers_of_any_type(guided: Pipeline) -> None:
    samples = guided(np.array([0, 2], np.int32), np.array([2**64 - 1, 0], np.uint64))
    assert samples.seeds == (2**64 - 1, 0)
    taken: list[int] = []
    guided([1], steps=2, batch_size=np.int64(1), callback=lambda step: taken.append(step.total))
    assert taken == [2, 2]


def test_classes_by_name(guided: Pipeline) -> None:
    samples = guided(["cat", 0, np.str_("bee")])
    assert samples.labels is not None
    assert samples.labels.tolist() == [2, 0, 1]
    message = refusal(guided, labels=["dog"]).message
    assert message == "class 'dog' is neither a number nor a name of the bundle; the names are ant, bee, cat"


def test_a_name_that_looks_like_a_number_is_a_name(tmp_path: Path) -> None:
    samples = sham(tmp_path, class_names=("2", "1", "0"))(["0", 0])
    assert samples.labels is not None
    assert samples.labels.tolist() == [2, 0]


def test_two_stages_take_names_and_numbers_too(guided: Pipeline, tmp_path: Path) -> None:
    """The second stage's bundle may have no class names."""
    unet = UNET.model_copy(update={"image_size": 16, "low_res_size": 8, "num_classes": 3})
    high = sham(tmp_path / "high", network=unet, classifier=None, class_names=())
    totals: list[int] = []
    drawn = TwoStage(guided, high)(
        ["cat", 1], steps=2, upsample_steps=3, callback=lambda step: totals.append(step.total)
    )
    for stage in (drawn.low, drawn.high):
        assert stage.labels is not None
        assert stage.labels.tolist() == [2, 1]
    assert totals == [2, 2, 3, 3, 3]
    with pytest.raises(RequestError, match="labels is 1; expected one for each sample"):
        TwoStage(guided, high)(1)  # type: ignore[arg-type]


def test_consecutive_seeds() -> None:
    assert list(consecutive_seeds(5, 3)) == [5, 6, 7]
    assert list(consecutive_seeds(2**64 - 1, 1)) == [2**64 - 1]
    for first, count, message in (
        (0, 0, "0 samples were asked for"),
        (0, -1, "-1 samples were asked for"),
        (-1, 1, "seed -1 is out of range"),
        (2**64 - 1, 2, "leave the range"),
    ):
        with pytest.raises(RequestError, match=message):
            consecutive_seeds(first, count)
