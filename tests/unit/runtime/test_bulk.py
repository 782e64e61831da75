"""Long runs: shards that survive anything, and results in every format."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bulk_runs import SAMPLER, Echo, expected, images_in, request, shards
from bundles import UNET, sham_bundle
from PIL import Image

from admtrt.errors import OutputError, RequestError
from admtrt.runtime import bulk
from admtrt.runtime.bulk import (
    GRID_LIMIT,
    MAX_SAMPLES,
    draw,
    recorded_shard_size,
)
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.shards import Shards
from admtrt.schedule.sampler import SamplerConfig


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return Pipeline(sham_bundle(tmp_path / "bundle"), Echo())


@pytest.fixture
def echo(pipeline: Pipeline) -> Echo:
    assert isinstance(pipeline.denoiser, Echo)
    return pipeline.denoiser


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# --- formats --------------------------------------------------------------------------------------------


def test_npz_is_the_originals_format(pipeline: Pipeline, tmp_path: Path) -> None:
    (path,) = draw(pipeline, request(), tmp_path / "run", ["npz"])
    assert path == tmp_path / "run" / "samples.npz"
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        images, labels = archive["arr_0"], archive["arr_1"]
    assert (images.dtype, images.shape) == (np.uint8, (10, 8, 8, 1))
    assert (labels.dtype, labels.shape) == (np.int64, (10,))
    np.testing.assert_array_equal(images, expected(pipeline))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    assert shards(tmp_path / "run") == ["00000000.npz", "00000004.npz", "00000008.npz"]


def test_npz_without_labels(tmp_path: Path) -> None:
    bundle = sham_bundle(tmp_path / "bundle", classifier=None, class_names=())
    asked = request(labels=None, sampler=SamplerConfig(steps="3", scale=0.0))
    (path,) = draw(Pipeline(bundle, Echo()), asked, tmp_path / "run", ["npz"])
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].shape == (10, 8, 8, 1)


def test_png_is_a_file_for_each_sample(pipeline: Pipeline, tmp_path: Path) -> None:
    (folder,) = draw(pipeline, request(), tmp_path / "run", ["png"])
    found = sorted(folder.iterdir(), key=lambda path: path.stem.split("_")[1])
    assert [path.name for path in found] == [f"{index % 3}_{index:06d}.png" for index in range(10)]
    images = np.stack([pixels_of(path) for path in found])[..., None]
    np.testing.assert_array_equal(images, expected(pipeline))


def test_png_are_written_again_only_where_they_are_missing(pipeline: Pipeline, tmp_path: Path) -> None:
    (folder,) = draw(pipeline, request(), tmp_path / "run", ["png"])
    (folder / "0_000003.png").unlink()
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    draw(pipeline, request(), tmp_path / "run", ["png"])
    after = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert len(after) == 10
    assert before == {name: node for name, node in after.items() if name != "0_000003.png"}


def test_a_grid_shows_the_first_samples(pipeline: Pipeline, tmp_path: Path) -> None:
    (path,) = draw(pipeline, request(4), tmp_path / "run", ["grid"])
    assert path == tmp_path / "run" / "grid.png"
    pixels = pixels_of(path)
    images = expected(pipeline, 4)
    header, cell = 16, 64 + 2
    for index, image in enumerate(images):
        top, left = 2 + index // 3 * (cell + header) + header, 2 + index % 3 * cell  # three classes in turn
        np.testing.assert_array_equal(pixels[top : top + 64 : 8, left : left + 64 : 8], image[..., 0])


def test_a_grid_has_an_end(pipeline: Pipeline, tmp_path: Path) -> None:
    count = GRID_LIMIT + 30
    (path,) = draw(pipeline, request(count, shard_size=150, batch_size=150), tmp_path / "run", ["grid"])
    assert pixels_of(path).shape == (23 * 82 + 2, 18 * 66 + 2)  # 400; rows of six turns of the three classes


def test_several_formats_at_once_and_one_later(pipeline: Pipeline, echo: Echo, tmp_path: Path) -> None:
    written = draw(pipeline, request(), tmp_path / "run", ["grid", "npz"])
    assert [path.name for path in written] == ["grid.png", "samples.npz"]
    drawn = echo.seen
    draw(pipeline, request(), tmp_path / "run", ["png"])
    assert echo.seen == drawn  # from the shards alone


# --- going on -------------------------------------------------------------------------------------------


def test_a_run_that_was_cut_off_goes_on_where_it_was(pipeline: Pipeline, echo: Echo, tmp_path: Path) -> None:
    steps = 3
    echo.fails_at = (4 + 4) * steps + 1  # in the third shard
    with pytest.raises(KeyboardInterrupt):
        draw(pipeline, request(), tmp_path / "run", ["npz"])
    assert shards(tmp_path / "run") == ["00000000.npz", "00000004.npz"]
    assert Shards(tmp_path / "run", request(), pipeline.bundle.manifest).finished == 8
    assert not (tmp_path / "run" / "samples.npz").exists()
    echo.fails_at, echo.seen = None, 0
    advanced: list[int] = []
    (path,) = draw(
        pipeline, request(), tmp_path / "run", ["npz"], progress=lambda count, _: advanced.append(count)
    )
    assert echo.seen == 2 * steps
    assert sum(advanced) == 2 * steps
    np.testing.assert_array_equal(images_in(path), expected(pipeline))


def test_a_missing_shard_is_drawn_again(pipeline: Pipeline, tmp_path: Path) -> None:
    draw(pipeline, request(), tmp_path / "run", ["npz"])
    (tmp_path / "run" / "shards" / "00000000.npz").unlink()
    assert Shards(tmp_path / "run", request(), pipeline.bundle.manifest).finished == 6
    (path,) = draw(pipeline, request(), tmp_path / "run", ["npz"])
    np.testing.assert_array_equal(images_in(path), expected(pipeline))


def test_batch_size_may_change_on_the_way(pipeline: Pipeline, tmp_path: Path) -> None:
    draw(pipeline, request(), tmp_path / "run", ["npz"])
    draw(pipeline, request(batch_size=3), tmp_path / "run", ["npz"])


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"count": 9, "labels": np.arange(9) % 3}, "count is 10 there and 9 now, labels differ"),
        ({"labels": np.zeros(10, np.int64)}, "labels differ"),
        ({"first_seed": 8}, "first_seed is 7 there and 8 now"),
        ({"sampler": SamplerConfig(steps="4", scale=1.0)}, "steps is '3' there and '4' now"),
        ({"sampler": SamplerConfig(steps="3", scale=1.5)}, "scale is 1.0 there and 1.5 now"),
        ({"shard_size": 5}, "shard_size is 4 there and 5 now"),
    ],
)
def test_another_runs_shards_are_refused(
    pipeline: Pipeline, tmp_path: Path, changes: dict[str, Any], differing: str
) -> None:
    draw(pipeline, request(), tmp_path / "run", ["npz"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(OutputError) as caught:
        draw(pipeline, request(**changes), tmp_path / "run", ["npz"])
    assert caught.value.message.endswith(f"holds another run: {differing}")
    assert "--out" in caught.value.hint
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_another_backends_shards_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    """A run uses one precision and backend; otherwise its record of them would be wrong."""

    def on(computed: str) -> Pipeline:
        return Pipeline(pipeline.bundle, pipeline.denoiser, computed=computed)

    draw(on("onnxruntime, fp32"), request(), tmp_path / "run", ["npz"])
    draw(on("onnxruntime, fp32"), request(), tmp_path / "run", ["grid"])
    with pytest.raises(OutputError, match="computed is 'onnxruntime, fp32' there and 'openvino, bf16' now"):
        draw(on("openvino, bf16"), request(), tmp_path / "run", ["npz"])


def test_another_bundles_shards_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    draw(pipeline, request(), tmp_path / "run", ["npz"])
    other = Pipeline(sham_bundle(tmp_path / "other", made_with={"torch": "9"}), Echo())
    with pytest.raises(OutputError, match="another run: bundle differs"):
        draw(other, request(), tmp_path / "run", ["npz"])


def test_other_small_images_are_refused(tmp_path: Path) -> None:
    unet = UNET.model_copy(update={"low_res_size": 4})
    bundle = sham_bundle(tmp_path / "bundle", network=unet, classifier=None, class_names=())
    pipeline = Pipeline(bundle, Echo())
    plain = {"labels": None, "sampler": SamplerConfig(steps="3", scale=0.0)}
    images = np.zeros((10, 4, 4, 1), np.uint8)
    draw(pipeline, request(low_res=images, **plain), tmp_path / "run", ["npz"])
    with pytest.raises(OutputError, match="another run: low_res differs"):
        draw(pipeline, request(low_res=images + 1, **plain), tmp_path / "run", ["npz"])


@pytest.mark.parametrize("content", ["", "[]", "not json", "{}", '{"sampler": 3}'])
def test_a_run_that_cannot_be_recognised_is_refused(pipeline: Pipeline, tmp_path: Path, content: str) -> None:
    draw(pipeline, request(), tmp_path / "run", ["npz"])
    (tmp_path / "run" / "request.json").write_text(content)
    with pytest.raises(OutputError, match=r"request\.json is damaged, so the run there cannot be recognised"):
        draw(pipeline, request(), tmp_path / "run", ["npz"])


def test_a_folder_with_something_else_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name in ("run", "file"):
        with pytest.raises(OutputError, match="exists and holds no sampling run"):
            draw(pipeline, request(), tmp_path / name, ["npz"])
    with pytest.raises(OutputError, match="cannot write"):
        draw(pipeline, request(), tmp_path / "file" / "run", ["npz"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_and_one_that_was_being_claimed_are_taken(pipeline: Pipeline, tmp_path: Path) -> None:
    for name in ("empty", "begun"):
        (tmp_path / name).mkdir()
    (tmp_path / "begun" / ".admtrt-0123abcd.tmp").mkdir()  # left by a kill
    (tmp_path / "begun" / ".admtrt-0123abcd.tmp" / "request.json").write_text('{"coun')
    for name in ("empty", "begun"):
        draw(pipeline, request(), tmp_path / name, ["npz"])
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "request.json", "samples.npz", "shards",
        ]  # fmt: skip


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_requests_started_at_once_one_is_refused(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """The other claims the directory after ours was looked at and before it is claimed."""
    requests, real = [request(), request(first_seed=1000)], bulk.atomic_file
    ours, other = requests[first], requests[1 - first]

    def late(path: Path, **options: Any) -> Any:
        if path.name == "request.json" and not path.exists():
            monkeypatch.setattr(bulk, "atomic_file", real)
            draw(pipeline, other, tmp_path / "run", ["npz"])
        return real(path, **options)

    monkeypatch.setattr(bulk, "atomic_file", late)
    with pytest.raises(OutputError, match="holds another run: first_seed is"):
        draw(pipeline, ours, tmp_path / "run", ["npz"])
    seeds = range(other.first_seed, other.first_seed + 10)
    drawn = pipeline([index % 3 for index in range(10)], list(seeds), steps="3", scale=1.0).images
    np.testing.assert_array_equal(images_in(tmp_path / "run" / "samples.npz"), drawn)


def test_two_equal_requests_share_a_directory(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bulk.atomic_file

    def late(path: Path, **options: Any) -> Any:
        monkeypatch.setattr(bulk, "atomic_file", real)
        draw(pipeline, request(), tmp_path / "run", ["npz"])
        return real(path, **options)

    monkeypatch.setattr(bulk, "atomic_file", late)
    (path,) = draw(pipeline, request(), tmp_path / "run", ["npz"])
    np.testing.assert_array_equal(images_in(path), expected(pipeline))


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, f'{{"count": {"9" * 5000}}}', " " * 2**20 + "{}"],
    ids=["lists", "objects", "digits", "large"],
)
def test_a_request_that_no_run_wrote(pipeline: Pipeline, tmp_path: Path, content: str) -> None:
    draw(pipeline, request(), tmp_path / "run", ["npz"])
    (tmp_path / "run" / "request.json").write_text(content)
    assert recorded_shard_size(tmp_path / "run") is None
    with pytest.raises(OutputError, match=r"request\.json"):
        draw(pipeline, request(), tmp_path / "run", ["npz"])


@pytest.mark.parametrize("size", [10**30, True, 1.5, 0, "4", [4]])
def test_an_impossible_recorded_shard_size_is_not_taken(
    pipeline: Pipeline, tmp_path: Path, size: Any
) -> None:
    draw(pipeline, request(), tmp_path / "run", ["npz"])
    assert recorded_shard_size(tmp_path / "run") == 4
    kept = json.loads((tmp_path / "run" / "request.json").read_text())
    (tmp_path / "run" / "request.json").write_text(json.dumps(kept | {"shard_size": size}))
    assert recorded_shard_size(tmp_path / "run") is None


# --- faults ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "0 samples were asked for"),
        ({"count": -1}, "-1 samples were asked for"),
        ({"count": MAX_SAMPLES + 1}, f"expected 1 to {MAX_SAMPLES}"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"shard_size": 0}, "shard_size is 0; expected at least 1"),
        ({"shard_size": -1}, "shard_size is -1"),
        ({"shard_size": 2.5}, "shard_size is 2.5; expected a whole number"),
        ({"count": 2.5}, "count is 2.5; expected a whole number"),
    ],
)
def test_counts_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        request(**{"labels": None} | changes)


@pytest.mark.parametrize(
    "changes", [{"first_seed": -1}, {"first_seed": 2**64 - 5}, {"low_res": np.zeros((10, 4, 4, 1), np.uint8)}]
)
def test_an_impossible_request_takes_no_folder(
    pipeline: Pipeline, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(RequestError):
        draw(pipeline, request(**changes), tmp_path / "run", ["npz"])
    assert not (tmp_path / "run").exists()


def test_the_next_run_removes_what_killed_ones_left(pipeline: Pipeline, tmp_path: Path) -> None:
    draw(pipeline, request(), tmp_path / "run", ["npz", "png"])
    whole = sorted((tmp_path / "run").rglob("*"))
    for folder in ("", "shards", "png"):
        (tmp_path / "run" / folder / ".admtrt-0123abcd.tmp").mkdir()
        (tmp_path / "run" / folder / ".admtrt-0123abcd.tmp" / "half").touch()
    draw(pipeline, request(), tmp_path / "run", ["npz", "png"])
    assert sorted((tmp_path / "run").rglob("*")) == whole


def test_the_request_is_kept_for_people_too(pipeline: Pipeline, tmp_path: Path) -> None:
    draw(pipeline, request(), tmp_path / "run", ["npz"])
    kept = json.loads((tmp_path / "run" / "request.json").read_text())
    assert kept["count"] == 10
    assert kept["first_seed"] == 7
    assert kept["sampler"] == SAMPLER.to_dict()
