"""Images as a start and as a constraint on the command line: effects, continued runs, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import exported_bundle, pipeline
from PIL import Image

from admtrt import Known, Latents
from admtrt.cli import run
from admtrt.runtime.images_in import as_states
from admtrt.runtime.latents import slerp
from admtrt.runtime.low_pass import low_pass_matrix
from admtrt.runtime.noise import initial_noise

RNG = np.random.default_rng(8)
IMAGES = RNG.integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
MASK = np.zeros((8, 8), bool)
MASK[2:6, 1:5] = True
FIXED = ["--threads", "1", "--steps", "6"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with every kind of input."""
    np.savez(tmp_path / "images.npz", IMAGES)
    np.savez(tmp_path / "labelled.npz", arr_0=IMAGES, arr_1=np.array([2, 1]))
    np.savez(tmp_path / "float.npz", as_states(IMAGES))
    np.savez(tmp_path / "too-large.npz", as_states(IMAGES) * 2)
    np.savez(tmp_path / "wide.npz", IMAGES.repeat(2, 2))
    np.savez(tmp_path / "mask.npz", MASK)
    np.savez(tmp_path / "soft.npz", MASK * 0.5)
    np.savez(tmp_path / "all.npz", MASK | True)
    np.savez(tmp_path / "latents.npz", latents=initial_noise([1, 2], (1, 8, 8)))
    Image.fromarray(MASK.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    (tmp_path / "folder").mkdir()
    for index, image in enumerate(IMAGES):
        Image.fromarray(image[..., 0]).save(tmp_path / "folder" / f"{index}.png")
    return tmp_path


def command(name: str, files: Path, *options: Any) -> list[str]:
    """A command line; options that name a file of the fixture become its path."""
    named = [
        str(files / one) if isinstance(one, str) and one and (files / one).exists() else str(one)
        for one in options
    ]
    return [name, str(exported_bundle("guided")), *named]


def sample(capsys: pytest.CaptureFixture[str], files: Path, *options: Any) -> Any:
    code = run([*command("sample", files, *FIXED, *options), "--out", str(files / "run"), "--json"])
    shown, complaint = capsys.readouterr()
    assert code == 0, complaint
    result = json.loads(shown)
    with np.load(files / "run" / "samples.npz") as archive:
        result["images"] = archive["arr_0"]
        result["labels"] = archive["arr_1"].tolist()
    result["notes"] = complaint
    return result


def refused(capsys: pytest.CaptureFixture[str], files: Path, *options: Any) -> str:
    code = run([*command("sample", files, *FIXED, *options), "--out", str(files / "run")])
    shown, complaint = capsys.readouterr()
    assert code == 2, shown
    assert "Traceback" not in complaint
    assert not (files / "run").exists()
    return complaint


KNOWN = ["--known", "images.npz", "--mask", "mask.png"]


@pytest.mark.parametrize(
    ("options", "request_"),
    [
        (["--init", "images.npz", "--strength", 0.5], {"init": IMAGES, "strength": 0.5}),
        (["--init", "folder", "--strength", 0.5], {"init": IMAGES, "strength": 0.5}),
        (["--init", "float.npz", "--strength", 0.7], {"init": IMAGES, "strength": 0.7}),
        (KNOWN, {"known": Known(IMAGES, MASK)}),
        (
            ["--known", "folder", "--mask", "mask.npz", "--jump", "2:2"],
            {"known": Known(IMAGES, MASK), "jump": (2, 2)},
        ),
        ([*KNOWN, "--known-as-sampled"], {"known": Known(IMAGES, MASK, as_sampled=True)}),
        (["--reference", "images.npz", "--low-pass", 4], {"reference": IMAGES, "low_pass": 4}),
        (["--reference", "folder", "--low-pass", "4:3"], {"reference": IMAGES, "low_pass": (4, 3)}),
        (["--latents", "latents.npz"], {"latents": initial_noise([1, 2], (1, 8, 8))}),
    ],
    ids=lambda one: " ".join(map(str, one)) if isinstance(one, list) else "",
)
def test_every_option_reaches_the_images(
    capsys: pytest.CaptureFixture[str], files: Path, options: list[Any], request_: dict[str, Any]
) -> None:
    result = sample(capsys, files, "--classes", "2,1", *options)
    plain, expected = (pipeline("guided")([2, 1], [0, 1], steps="6", **one).images for one in ({}, request_))
    assert np.abs(result["images"].astype(int) - expected).max() <= 1
    assert (expected != plain).any()
    assert result["samples"] == 2
    if "known" in request_:
        assert f"{MASK.mean():.1%} of the pixels are known and kept" in result["notes"]


def test_labels_of_the_file_and_one_image_for_all(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    start = ["--strength", 0.5, "--init"]
    assert sample(capsys, files, *start, "labelled.npz")["labels"] == [2, 1]
    single = files / "folder" / "0.png"
    (files / "run").rename(files / "first")
    assert sample(capsys, files, *start, single, "--classes", "0:2,2:1")["labels"] == [0, 0, 2]


def test_a_run_goes_on_with_its_images_alone(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    request = ["--classes", "2,1", "--init", "images.npz", "--strength", 0.5, "--shard-size", 1]
    first = sample(capsys, files, *request)
    (files / "run" / "shards" / "00000001.npz").unlink()
    again = sample(capsys, files, *request)
    assert again["continued_from"] == 1
    np.testing.assert_array_equal(first["images"], again["images"])
    before = {path: path.read_bytes() for path in (files / "run").rglob("*") if path.is_file()}
    for changed in (
        [*request[:-4], "--strength", 0.7, "--shard-size", 1],
        ["--classes", "2,1", "--shard-size", 1],
        [*request, *KNOWN],
    ):
        assert run([*command("sample", files, *FIXED, *changed), "--out", str(files / "run")]) == 2
        assert "holds another run" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (files / "run").rglob("*") if path.is_file()}


def test_the_way_between_two_seeds(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    way = sample(capsys, files, "--interpolate", "7:3", "--num", 5, "--classes", 1, "--method", "ddim")
    assert way["samples"] == 5
    assert (
        np.abs(
            way["images"][[0, -1]].astype(int)
            - pipeline("guided")([1, 1], [7, 3], steps="6", method="ddim").images
        )
        <= 1
    ).all()
    middle = slerp(*initial_noise([7, 3], (1, 8, 8)), 5)[2:3]
    expected = pipeline("guided")([1], latents=middle, steps="6", method="ddim").images
    assert np.abs(way["images"][2].astype(int) - expected[0]).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "images.npz"], "there is no strength"),
        (["--strength", 0.5], "there is no init"),
        *[
            (["--init", "images.npz", "--strength", value], "above 0, up to 1")
            for value in (0, -1, 1.5, "nan", "inf")
        ],
        (["--init", "images.npz", "--strength", 0.01], "strength 0.01 of 6 evaluations is none"),
        (["--init", "wide.npz", "--strength", 0.5], "is uint8 [N, 8, 16, 1]"),
        (["--init", "too-large.npz", "--strength", 0.5], "expected -1 to 1"),
        (["--init", "absent.npz", "--strength", 0.5], "No such file"),
        (["--init", "mask.npz", "--strength", 0.5], "is bool [N, 8]"),
        (["--init", "images.npz", "--strength", 0.5, "--num", 3], "there are 2 images, --num says 3"),
        (["--init", "images.npz", "--strength", 0.5, "--classes", "0:3"], "3 samples"),
        (["--init", "images.npz", "--strength", 0.5], "labels are needed"),
        (["--init", "images.npz", "--strength", 0.5, "--latents", "latents.npz"], "exclude each other"),
        (["--known", "images.npz"], "there is no --mask"),
        (["--mask", "mask.png"], "there is no --known"),
        (["--known-as-sampled"], "is of known pixels"),
        (["--known", "images.npz", "--mask", "soft.npz"], "values other than 0 and 1"),
        (["--known", "images.npz", "--mask", "all.npz"], "knows every pixel"),
        (["--known", "images.npz", "--mask", "images.npz"], "the mask is uint8 [2, 8, 8, 1]"),
        ([*KNOWN, "--reference", "images.npz", "--low-pass", 4], "exclude each other"),
        (["--jump", "2:2"], "there are none"),
        *[
            ([*KNOWN, "--jump", text], "is not of the form L:N")
            for text in ("2", "2:", ":2", "a:b", "2:2:2", "-2:2", "2:²", "")
        ],
        ([*KNOWN, "--jump", "6:2"], "do not fit in 6 evaluations"),
        ([*KNOWN, "--jump", "2:1"], "jump is 2:1"),
        ([*KNOWN, "--jump", "0:2"], "jump is 0:2"),
        ([*KNOWN, "--jump", "1:999999999999"], "at most 100000 are possible"),
        ([*KNOWN, "--method", "unipc"], "not with unipc"),
        (["--reference", "images.npz"], "there is no low_pass"),
        (["--low-pass", 4], "there is no reference"),
        (["--reference", "images.npz", "--low-pass", "x"], "not of the form N[:UNTIL]"),
        (["--reference", "images.npz", "--low-pass", 3], "a divisor of 8x8"),
        (["--reference", "images.npz", "--low-pass", "4:5"], "holds in none of 6"),
        (["--latents", "images.npz"], "has no latents"),
        (["--latents", "latents.npz", "--interpolate", "0:2", "--method", "ddim"], "there are no latents 2"),
        (["--interpolate", "0"], "is not of the form A:B"),
        (["--interpolate", "0:1", "--num", 1], "expected at least 2"),
        (["--interpolate", f"0:{2**64}"], "out of range"),
        (["--interpolate", "0:1", "--classes", 1], "ddpm adds noise of each seed"),
        (["--interpolate", "0:1", "--init", "images.npz", "--strength", 0.5], "exclude each other"),
        (["--difference"], "--difference compares samples with"),
        (["--difference", "--latents", "latents.npz"], "--difference compares samples with"),
    ],
    ids=str,
)
def test_what_is_refused_leaves_nothing(
    capsys: pytest.CaptureFixture[str], files: Path, options: list[Any], message: str
) -> None:
    few = [] if "--classes" in options or message == "labels are needed" else ["--classes", "1:2"]
    if "--num" in options or "--interpolate" in options:
        few = few and ["--classes", "1"]
    assert message in refused(capsys, files, *options, *few)


# --- inversion -------------------------------------------------------------------------------------------


def invert(capsys: pytest.CaptureFixture[str], files: Path, *options: Any) -> Any:
    line = command("invert", files, "--images", "labelled.npz", "--threads", 1, *options)
    code = run([*line, "--out", str(files / "inverted"), "--json"])
    shown, complaint = capsys.readouterr()
    assert code == 0, complaint
    return json.loads(shown)


def test_inversion_goes_on_and_comes_back(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    options = ["--steps", "ddim50", "--levels", 8]
    result = invert(capsys, files, *options, "--batch-size", 1)
    assert (result["levels"], result["steps"], result["clip"]) == (8, "ddim50", False)
    file = files / "inverted" / "latents.npz"
    latents = Latents.read(file, (1, 8, 8))
    assert latents.labels is not None
    assert latents.labels.tolist() == [2, 1]
    np.testing.assert_array_equal(latents.images, IMAGES)
    (files / "inverted" / "shards" / "00000001.npz").unlink()
    file.unlink()
    again = invert(capsys, files, *options)
    assert again["continued_from"] == 1
    np.testing.assert_array_equal(Latents.read(file, (1, 8, 8)).x, latents.x)
    for other in (["--steps", "ddim50", "--levels", 9], [*options, "--clip"], [*options, "--classes", "0,1"]):
        line = command("invert", files, "--images", "labelled.npz", *other)
        assert run([*line, "--out", str(files / "inverted")]) == 2
        assert "holds another run" in capsys.readouterr().err
    out = str(files / "inverted")
    assert run([*command("sample", files, "--classes", "0:2"), "--out", out]) == 2
    assert "holds a run of inversion" in capsys.readouterr().err

    # And back, unguided: the error is the one that was reported.
    line = command("sample", files, "--latents", file, "--scale", 0, "--difference")
    assert run([*line, "--out", str(files / "back"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["sampler"]["method"], shown["sampler"]["steps"]) == ("ddim", "ddim50")
    assert shown["sampler"]["clip"] is False
    names = ["samples.npz", "grid.png", "difference.npz", "difference.png"]
    assert [Path(path).name for path in shown["files"]] == names
    with np.load(files / "back" / "samples.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    with np.load(files / "back" / "difference.npz") as archive:
        difference = archive["arr_0"]
    assert labels.tolist() == [2, 1]
    assert difference.dtype == np.float32
    np.testing.assert_array_equal(difference, np.abs(images.astype(np.float32) - IMAGES).mean(axis=-1))
    assert abs(difference.mean() - result["round_trip"]["mean"] * 127.5) < 1.5  # uint8 cuts, and bounds

    # Guided: an anomaly map.
    line = command(
        "sample", files, "--latents", file, "--classes", "1", "--scale", 30, "--difference", "--num", 2
    )
    assert run([*line, "--out", str(files / "map"), "--json"]) == 0
    with np.load(files / "map" / "difference.npz") as archive:
        assert archive["arr_0"].mean() > difference.mean()


def test_a_damaged_shard_of_an_inversion_is_named(capsys: pytest.CaptureFixture[str], files: Path) -> None:
    invert(capsys, files, "--steps", "ddim10", "--levels", 2)
    (shard,) = (files / "inverted" / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:100])
    line = command("invert", files, "--images", "labelled.npz", "--steps", "ddim10", "--levels", 2)
    assert run([*line, "--out", str(files / "inverted")]) == 2
    assert f"cannot read the shard {shard}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", 0], "0 levels of noise are out of range"),
        (["--levels", 100], "100 levels of noise are out of range; steps 'ddim100' have 99"),
        (["--steps", "ddim300"], "no integer stride"),
        (["--steps", ""], "it is empty"),
        (["--images", "wide.npz"], "is uint8 [N, 8, 16, 1]"),
        (["--images", "absent.png"], "No such file"),
        (["--classes", "0:3"], "--classes gives 3 samples"),
        (["--batch-size", 0], "batch_size is 0"),
    ],
    ids=str,
)
def test_inversions_that_are_refused(
    capsys: pytest.CaptureFixture[str], files: Path, options: list[Any], message: str
) -> None:
    line = command("invert", files, "--images", "images.npz", *options)
    assert run([*line, "--out", str(files / "inverted")]) == 2
    assert message in capsys.readouterr().err
    assert not (files / "inverted").exists()


def test_low_pass_matrices_keep_what_is_constant() -> None:
    for size, factor in ((8, 2), (8, 8), (12, 3), (64, 16)):
        matrix = low_pass_matrix(size, factor)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=0, atol=1e-12)
        fast = np.cos(np.pi * np.arange(size))
        assert np.abs(matrix @ fast).mean() < 0.2  # at the borders it is 0.3
