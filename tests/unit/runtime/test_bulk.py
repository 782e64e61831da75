"""Long runs: shards that survive anything, and results in every format."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import UNET, sham_bundle
from PIL import Image

from admtrt.errors import OutputError, RequestError
from admtrt.runtime import bulk
from admtrt.runtime.bulk import (
    GRID_LIMIT,
    MAX_SAMPLES,
    BulkRequest,
    Format,
    draw,
    recorded_shard_size,
)
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.shards import Shards
from admtrt.schedule.sampler import SamplerConfig

SAMPLER = SamplerConfig(steps="3", scale=1.0)


class Echo:
    """A denoiser that returns x_T, so that an image tells its seed, and counts the images it has seen."""

    def __init__(self) -> None:
        self.seen = 0
        self.fails_at: int | None = None

    def run(self, graph: str, feeds: Any) -> dict[str, Any]:
        x = feeds["x"]
        if graph == "update":
            return {"x_prev": x, "pred_x0": x}
        if graph == "classifier_gradient":
            return {"grad": np.zeros_like(x)}
        self.seen += len(x)
        if self.fails_at is not None and self.seen >= self.fails_at:
            raise KeyboardInterrupt
        return {"out": np.concatenate([x, x], axis=1)}


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return Pipeline(sham_bundle(tmp_path / "bundle"), Echo())


@pytest.fixture
def echo(pipeline: Pipeline) -> Echo:
    assert isinstance(pipeline.denoiser, Echo)
    return pipeline.denoiser


def request(count: int = 10, **changes: Any) -> BulkRequest:
    given: dict[str, Any] = {
        "count": count,
        "labels": None if "labels" in changes else np.arange(count, dtype=np.int64) % 3,
        "first_seed": 7,
        "sampler": SAMPLER,
        "batch_size": 2,
        "shard_size": 4,
    }
    return BulkRequest(**given | changes)


def expected(pipeline: Pipeline, count: int = 10) -> np.ndarray:
    seeds = list(range(7, 7 + count))
    return pipeline([index % 3 for index in range(count)], seeds, steps="3", scale=1.0).images


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "shards").iterdir())


def images_in(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        images: np.ndarray = archive["arr_0"]
    return images


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
        top, left = 2 + index // 2 * (cell + header) + header, 2 + index % 2 * cell
        np.testing.assert_array_equal(pixels[top : top + 64 : 8, left : left + 64 : 8], image[..., 0])


def test_a_grid_has_an_end(pipeline: Pipeline, tmp_path: Path) -> None:
    count = GRID_LIMIT + 30
    (path,) = draw(pipeline, request(count, shard_size=150, batch_size=150), tmp_path / "run", ["grid"])
    assert pixels_of(path).shape == (20 * 82 + 2, 20 * 66 + 2)


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
    """A run is of one precision and backend, or the record of what computed it is wrong."""

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


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: the write in the middle of it fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 400, 700])
def test_a_disk_without_room_for_a_shard(pipeline: Pipeline, tmp_path: Path, size: int) -> None:
    """The run before it is whole, and the same command goes on when there is room."""
    draw(pipeline, request(), tmp_path / "run", ["npz"])
    (tmp_path / "run" / "shards" / "00000004.npz").unlink()
    before = sorted((tmp_path / "run").rglob("*"))
    with room_for(size), pytest.raises(OutputError, match=r"cannot write .*00000004.npz"):
        draw(pipeline, request(), tmp_path / "run", ["npz"])
    assert sorted((tmp_path / "run").rglob("*")) == before
    (path,) = draw(pipeline, request(), tmp_path / "run", ["npz"])
    np.testing.assert_array_equal(images_in(path), expected(pipeline))


@pytest.mark.parametrize(
    ("kind", "size"), [("npz", 0), ("npz", 300), ("npz", 1200), ("png", 60), ("grid", 100)]
)
def test_a_disk_without_room_for_the_results(
    pipeline: Pipeline, tmp_path: Path, kind: Format, size: int
) -> None:
    draw(pipeline, request(), tmp_path / "run", [])
    with room_for(size), pytest.raises(OutputError, match="cannot write"):
        draw(pipeline, request(), tmp_path / "run", [kind])
    assert [path.name for path in (tmp_path / "run").rglob("*.*") if "tmp" in path.name] == []
    assert Shards(tmp_path / "run", request(), pipeline.bundle.manifest).finished == 10
    draw(pipeline, request(), tmp_path / "run", [kind])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY"])
def test_a_damaged_shard_is_named(pipeline: Pipeline, tmp_path: Path, content: bytes) -> None:
    draw(pipeline, request(), tmp_path / "run", ["npz"])
    shard = tmp_path / "run" / "shards" / "00000004.npz"
    shard.write_bytes(content)
    with pytest.raises(OutputError) as caught:
        draw(pipeline, request(), tmp_path / "run", ["npz"])
    assert (
        caught.value.message == f"cannot read the shard {shard}: it is truncated, damaged or something else"
    )
    assert "Delete it" in caught.value.hint
    shard.unlink()
    draw(pipeline, request(), tmp_path / "run", ["npz"])


def zeros(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)


LABELS = np.array([1, 2, 0, 1])  # of the second shard


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"images": zeros(4, 9, 9, 1), "labels": LABELS}, "its images are uint8 [4, 9, 9, 1]"),
        ({"images": zeros(4, 8, 8, 3), "labels": LABELS}, "its images are uint8 [4, 8, 8, 3]"),
        ({"images": zeros(0, 8, 8, 1), "labels": LABELS}, "its images are uint8 [0, 8, 8, 1]"),
        ({"images": zeros(5, 8, 8, 1), "labels": LABELS}, "its images are uint8 [5, 8, 8, 1]"),
        ({"images": zeros(4, 8, 8, 1, dtype=np.float32), "labels": LABELS}, "its images are float32"),
        ({"images": np.uint8(3), "labels": LABELS}, "its images are uint8 []"),
        ({"images": zeros(4, 8, 8, 1), "labels": LABELS[::-1]}, "its labels are others"),
        ({"images": zeros(4, 8, 8, 1), "labels": LABELS[:1]}, "its labels are others"),
        ({"images": zeros(4, 8, 8, 1)}, "it holds images"),
        ({"x": zeros(1)}, "it holds x"),
        ({}, "it holds nothing"),
        ({"images": np.array([{}], object), "labels": LABELS}, "truncated, damaged or something else"),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "png", "grid"])
def test_a_shard_of_something_else_is_refused(
    pipeline: Pipeline, tmp_path: Path, arrays: dict[str, Any], fault: str, kind: Format
) -> None:
    draw(pipeline, request(), tmp_path / "run", [])
    shard = tmp_path / "run" / "shards" / "00000004.npz"
    np.savez(shard, **arrays)
    (tmp_path / "run" / "shards" / "00000008.npz").unlink()
    with pytest.raises(OutputError) as caught:
        draw(pipeline, request(), tmp_path / "run", [kind])
    assert str(shard) in caught.value.message
    assert fault in caught.value.message
    assert "Delete it" in caught.value.hint
    assert shards(tmp_path / "run") == ["00000000.npz", "00000004.npz"]  # seen before the next was drawn


@pytest.mark.parametrize("thing", ["folder", "pipe", "bomb", "twice"])
def test_a_shard_that_is_no_archive_of_ours(pipeline: Pipeline, tmp_path: Path, thing: str) -> None:
    draw(pipeline, request(), tmp_path / "run", [])
    shard = tmp_path / "run" / "shards" / "00000004.npz"
    if thing == "twice":
        with zipfile.ZipFile(shard, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("images.npy", b"none")
    else:
        shard.unlink()
    if thing == "folder":
        shard.mkdir()
    if thing == "pipe":
        os.mkfifo(shard)
    if thing == "bomb":  # says 256 bytes and inflates to 64 MiB
        write_bomb(shard, {"descr": "|u1", "fortran_order": False, "shape": (4, 8, 8, 1)})
    with pytest.raises(OutputError, match=r"cannot read the shard .*00000004.npz"):
        draw(pipeline, request(), tmp_path / "run", ["npz"])


def write_bomb(path: Path, header: dict[str, Any]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(64):
                member.write(bytes(2**20))
        with archive.open("labels.npy", "w") as member:
            np.lib.format.write_array(member, LABELS)


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
