"""`admtrt sample` and `admtrt inspect`: every option reaches the images, and machines get one document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CLASSIFIER, UNET, exported_bundle, pipeline, sham_bundle

from admtrt.cli import run
from admtrt.commands.labels import requested_labels
from admtrt.errors import RequestError
from admtrt.runtime.bulk import MAX_SAMPLES


def sample(capsys: pytest.CaptureFixture[str], out: Path, *options: Any, bundle: str = "guided") -> Any:
    """Run the command; its JSON, with the images and labels drawn."""
    fixed = ["sample", exported_bundle(bundle), "--out", out, "--threads", 1, "--json"]
    code = run([str(part) for part in (*fixed, *options)])
    shown, complaint = capsys.readouterr()
    assert code == 0, complaint
    assert shown.count("\n") == 1
    result = json.loads(shown)
    with np.load(out / "samples.npz") as archive:
        result["images"] = archive["arr_0"]
        result["labels"] = archive["arr_1"].tolist() if "arr_1" in archive.files else None
    return result


def test_a_sample_of_every_class_by_default(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = sample(capsys, tmp_path / "run")
    assert result["samples"] == 3
    assert result["continued_from"] == 0
    assert result["first_seed"] == 0
    assert result["labels"] == [0, 1, 2]
    assert result["sampler"]["steps"] == "5"
    assert [Path(path).name for path in result["files"]] == ["samples.npz", "grid.png"]
    expected = pipeline("guided")([0, 1, 2], [0, 1, 2]).images
    assert np.abs(result["images"].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("options", "request_"),
    [
        (["--seed", 9], {"seeds": [9, 10, 11]}),
        (["--steps", "ddim4"], {"steps": "ddim4"}),
        (["--steps", "3,2"], {"steps": "3,2"}),
        (["--method", "ddim"], {"method": "ddim"}),
        (["--method", "ddim", "--eta", 0.7], {"method": "ddim", "eta": 0.7}),
        (["--scale", 9], {"scale": 9.0}),
        (["--scale", 0], {"scale": 0.0}),
        (["--no-clip"], {"clip": False}),
        (["--classes", "2,0,0"], {"labels": [2, 0, 0]}),
    ],
)
def test_every_option_reaches_the_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[Any], request_: dict[str, Any]
) -> None:
    base = {"labels": [0, 1, 2], "seeds": [0, 1, 2]}
    expected = pipeline("guided")(**(base | request_)).images
    plain = pipeline("guided")(**base).images
    result = sample(capsys, tmp_path / "run", *options)
    assert np.abs(result["images"].astype(int) - expected).max() <= 1
    assert (result["images"] != plain).any()
    assert result["labels"] == request_.get("labels", [0, 1, 2])


def test_batch_and_shard_sizes_divide_the_work_only(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = sample(capsys, tmp_path / "whole", "--num", 5)
    parts = sample(capsys, tmp_path / "parts", "--num", 5, "--shard-size", 2, "--batch-size", 1)
    assert np.abs(whole["images"].astype(int) - parts["images"]).max() <= 1
    assert len(list((tmp_path / "parts" / "shards").iterdir())) == 3
    assert len(list((tmp_path / "whole" / "shards").iterdir())) == 1


def test_every_batch_is_kept_and_a_run_goes_on_as_it_was_divided(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, options, shards in (("one", [3], 1), ("two", [2], 2), ("own", [3, "--shard-size", 1], 3)):
        sample(capsys, tmp_path / name, "--num", 3, "--batch-size", *options)
        assert len(list((tmp_path / name / "shards").iterdir())) == shards
    (tmp_path / "two" / "shards" / "00000002.npz").unlink()
    assert sample(capsys, tmp_path / "two", "--num", 3, "--batch-size", 3)["continued_from"] == 2
    for damaged in ("[]", "{", '{"sampler": {}, "shard_size": 0}'):
        (tmp_path / "one" / "request.json").write_text(damaged)
        assert (
            run(["sample", str(exported_bundle("guided")), "--out", str(tmp_path / "one"), "--num", "3"]) == 2
        )
        assert "is damaged" in capsys.readouterr().err or damaged.startswith('{"')


def test_labels_that_nothing_heeds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, scale, told in (("guided", "0", True), ("guided", "1", False), ("conditional", "0", False)):
        options = ["--out", str(tmp_path / f"{name}{scale}"), "--scale", scale, "--steps", "2", "--num", "1"]
        assert run(["sample", str(exported_bundle(name)), *options]) == 0
        assert ("the labels have no effect" in capsys.readouterr().err) == told


def test_classes_by_name_and_count(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = sample(capsys, tmp_path / "run", "--classes", "cat:2, 0:1,bee:1")
    assert result["labels"] == [2, 2, 0, 1]


def test_formats(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--format", "png", "--format", "npz", "--format", "png"]
    result = sample(capsys, tmp_path / "run", *options)
    assert [Path(path).name for path in result["files"]] == ["png", "samples.npz"]
    assert sorted(path.name for path in (tmp_path / "run" / "png").iterdir()) == [
        "0_000000.png", "1_000001.png", "2_000002.png",
    ]  # fmt: skip
    assert not (tmp_path / "run" / "grid.png").exists()


def test_a_finished_run_is_not_drawn_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, second = (sample(capsys, tmp_path / "run") for _ in range(2))
    assert second["continued_from"] == 3
    np.testing.assert_array_equal(first["images"], second["images"])


def test_a_class_conditional_unet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = sample(capsys, tmp_path / "run", bundle="conditional")
    assert result["labels"] == [0, 1, 2, 3]
    assert result["sampler"]["scale"] == 0.0
    expected = pipeline("conditional")([0, 1, 2, 3], [0, 1, 2, 3]).images
    assert np.abs(result["images"].astype(int) - expected).max() <= 1


def test_an_upsampler(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)
    np.savez(tmp_path / "small.npz", small)
    options = ["--low-res", tmp_path / "small.npz"]
    result = sample(capsys, tmp_path / "run", *options, bundle="upsampler")
    assert (result["samples"], result["labels"]) == (3, None)
    expected = pipeline("upsampler")(low_res=small).images
    assert np.abs(result["images"].astype(int) - expected).max() <= 1
    assert sample(capsys, tmp_path / "run", *options, "--num", 3, bundle="upsampler")["continued_from"] == 3


def test_people_are_told_where_the_images_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bundle = str(exported_bundle("guided"))
    assert run(["sample", bundle, "--out", str(tmp_path / "run"), "--threads", "1"]) == 0
    shown, complaint = capsys.readouterr()
    assert f"3 samples: {tmp_path / 'run' / 'samples.npz'}, {tmp_path / 'run' / 'grid.png'}\n" == shown
    assert complaint == ""


def test_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = sham_bundle(tmp_path / "bundle").path
    assert run(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "classifier_gradient",
        "x float32[N, 1, 8, 8]",
        "log_prob float32[N]",
        "fp32",
        "opset",
        "18",
    ):
        assert part in shown
    assert "recommended: ddpm, steps 5, scale 2; classes: 3; 7 files" in shown
    assert run(["inspect", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bundle"] == str(path)
    assert result["manifest"]["network"] == UNET.to_dict()


# --- classes and counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "num", "expected"),
    [
        (None, None, [0, 1, 2]),
        (None, 5, [0, 1, 2, 0, 1]),
        (None, 1, [0]),
        ("2", None, [2]),
        ("2", 3, [2, 2, 2]),
        ("2,0", None, [2, 0]),
        ("2,0", 5, [2, 0, 2, 0, 2]),
        (" bee , 2", None, [1, 2]),
        ("0:2,2:1", None, [0, 0, 2]),
        ("ant:1,cat:2", 3, [0, 2, 2]),
        ("7", None, [7]),  # the pipeline knows the range
    ],
)
def test_requested_labels(tmp_path: Path, classes: str | None, num: int | None, expected: list[int]) -> None:
    manifest = sham_bundle(tmp_path / "bundle").manifest
    assert requested_labels(classes, num, manifest) == expected


def test_a_name_may_look_like_a_number_or_hold_a_colon(tmp_path: Path) -> None:
    names = ("2", "a:b", "0")
    manifest = sham_bundle(tmp_path / "bundle", class_names=names).manifest
    assert requested_labels("2,0,1", None, manifest) == [0, 2, 1]
    assert requested_labels("a:b:2", None, manifest) == [1, 1]
    assert requested_labels("a:b", 2, manifest) == [1, 1]


def test_a_name_may_hold_commas(tmp_path: Path) -> None:
    names = ("tench, Tinca tinca", "tench", "ant")
    manifest = sham_bundle(tmp_path / "bundle", class_names=names).manifest
    assert requested_labels("tench, Tinca tinca", None, manifest) == [0]
    assert requested_labels("ant,tench, Tinca tinca,tench", None, manifest) == [2, 0, 1]
    assert requested_labels("tench, Tinca tinca:2,tench:1", None, manifest) == [0, 0, 1]


def test_a_bundle_without_classes(tmp_path: Path) -> None:
    manifest = sham_bundle(tmp_path / "bundle", classifier=None, class_names=()).manifest
    assert requested_labels(None, 5, manifest) is None


@pytest.mark.parametrize(
    ("classes", "num", "message"),
    [
        (
            "dog",
            None,
            "class 'dog' is neither a number nor a name of the bundle; the names are ant, bee, cat",
        ),
        ("", None, "there is an empty entry in --classes ''"),
        ("0,,1", None, "there is an empty entry in --classes '0,,1'"),
        ("0:2, ,1:1", None, "there is an empty entry in --classes"),
        ("0:0", None, "'0' is no count of at least 1"),
        ("0:-1", None, "'-1' is no count"),
        ("0:", None, "'' is no count"),
        ("0:many", None, "'many' is no count"),
        ("0:²", None, "'²' is no count"),
        ("0:9999999999", None, "'9999999999' is no count"),
        ("0:2,1", None, "'1': '' is no count"),
        ("dog:2", None, "class 'dog' is neither"),
        ("0:2,1:1", 4, "--classes gives 3 samples; 4 were asked for"),
        ("0:999999999,1:999999999", None, f"gives 1999999998 samples; expected at most {MAX_SAMPLES}"),
        (None, 0, "0 samples were asked for; expected 1 to"),
        (None, -1, "-1 samples were asked for"),
        ("0", MAX_SAMPLES + 1, f"expected 1 to {MAX_SAMPLES}"),
    ],
)
def test_classes_that_cannot_be_asked_for(
    tmp_path: Path, classes: str | None, num: int | None, message: str
) -> None:
    manifest = sham_bundle(tmp_path / "bundle", classifier=CLASSIFIER).manifest
    with pytest.raises(RequestError) as caught:
        requested_labels(classes, num, manifest)
    assert message in caught.value.message
