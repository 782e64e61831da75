"""`admtrt evaluate reference` and `samples` on tiny networks: numbers, warnings, refusals, kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_faults import refused
from evaluator_cases import GOLD, feature_sets, logit_sets
from feature_networks import features_folder, pictures, run_folder, write_graph

from admtrt.cli import run
from admtrt.evaluate.extract import Extractor
from admtrt.evaluate.network import open_network

Evaluated = dict[str, Any]


def samples(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Evaluated:
    """The JSON of `admtrt evaluate samples`."""
    assert run(["evaluate", "samples", *map(str, arguments), "--json"]) == code
    shown = capsys.readouterr()
    assert "NaN" not in shown.out
    return json.loads(shown.out)  # type: ignore[no-any-return]


def codes(result: Evaluated) -> list[str]:
    return [warned["code"] for warned in result["features"][0]["warnings"]]


def values(result: Evaluated) -> dict[str, float | None]:
    return {name: metric["value"] for name, metric in result["features"][0]["metrics"].items()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Features, samples, a reference and a separate cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    features_folder(tmp_path / "inception")
    np.savez(tmp_path / "s.npz", arr_0=pictures(300, 1), arr_1=np.arange(300) % 10)
    np.savez(tmp_path / "r.npz", arr_0=pictures(400, 2))
    return tmp_path


# --- features that are given: the goldens through the whole command -----------------------------------------


@pytest.fixture(scope="module")
def feature_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    for name, (reference, own) in feature_sets().items():
        if name != "main":
            np.savez(folder / f"{name}.ref.npz", pool=reference)
            np.savez(folder / f"{name}.npz", pool=own)
    return folder


@pytest.mark.parametrize("name", [name for name in GOLD["metrics"] if name != "main"])
def test_every_case_is_a_number_null_or_a_sentence(
    feature_files: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    files = (feature_files / f"{name}.npz", "--reference", feature_files / f"{name}.ref.npz")
    case = GOLD["metrics"][name]
    if case["fid_exact"] is None:
        said = refused(capsys, "evaluate", "samples", *files)
        assert (
            "image 17 is NaN or infinite" if name != "one_sample" else "the samples has one image"
        ) in said
        return
    found = samples(capsys, *files)
    got = values(found)
    if name == "identical":
        assert 0 <= got["fd"] < 1e-9  # type: ignore[operator]
    else:
        assert got["fd"] == pytest.approx(case["fid_exact"], rel=1e-6)
    if "exact" in case:
        assert (got["precision"], got["recall"]) == (case["exact"]["precision"], case["exact"]["recall"])
    else:
        assert (got["precision"], got["recall"]) == (None, None)
    if "exact_k5" in case:
        assert got["coverage"] == case["exact_k5"]["coverage"]
        assert got["density"] == pytest.approx(case["exact_k5"]["density"], abs=1e-12)
    assert ("too-few" in codes(found)) == (len(feature_sets()[name][1]) <= 5)
    assert ("singular" in codes(found)) == (name in ("few", "four_samples", "three_samples"))
    assert ("duplicates" in codes(found)) == (name in ("repeated", "one_dimension"))
    for metric in found["features"][0]["metrics"].values():
        assert metric["error"] is None or metric["error"] >= 0


def test_what_was_asked_for_by_name_must_be_there(
    feature_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (feature_files / "three_samples.npz", "--reference", feature_files / "small.ref.npz")
    evaluate = ("evaluate", "samples", *files, "--metrics")
    assert "precision cannot be formed from 3 samples" in refused(capsys, *evaluate, "precision")
    assert "the features have no 'logits'" in refused(capsys, *evaluate, "fid,is")
    assert "metric 'fod' is unknown" in refused(capsys, *evaluate, "fod")
    assert [*values(samples(capsys, *files, "--metrics", "fd,kid"))] == ["fd", "kid"]


@pytest.mark.parametrize("scale", [1e37, 1e-40, 0.0])
def test_features_at_the_ends_of_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scale: float
) -> None:
    """A metric that overflows float64 is null, with a warning of ours; no NaN, and no warnings of NumPy."""
    rng = np.random.default_rng(0)
    for name in ("s", "r"):
        np.savez(tmp_path / f"{name}.npz", pool=(rng.standard_normal((40, 6)) * scale).astype(np.float32))
    found = samples(capsys, tmp_path / "s.npz", "--reference", tmp_path / "r.npz")
    assert values(found)["fd"] == pytest.approx(6 * scale**2, rel=1)
    assert (None in values(found).values()) == ("overflow" in codes(found))


def test_statistics_at_the_end_of_float64(
    feature_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.full(64, 1e200), sigma=np.eye(64) * 1e308)
    found = samples(capsys, feature_files / "small.npz", "--reference", tmp_path / "ref.npz")
    assert values(found) == {"fd": None}
    assert "overflow" in codes(found)


def test_inception_score_by_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = GOLD["inception_score"]["one_image_over"]
    logits = logit_sets()["one_image_over"]
    np.savez(tmp_path / "s.npz", pool=logits, logits=logits)
    files = (tmp_path / "s.npz", "--reference", tmp_path / "s.npz", "--metrics", "is")
    found = samples(capsys, *files)
    assert values(found)["score"] == pytest.approx(case["exact"], rel=1e-6)
    assert "short-part" in codes(found)
    found = samples(capsys, *files, "--parts", "1")
    assert values(found)["score"] == pytest.approx(case["exact_one_part"], rel=1e-6)
    assert "short-part" not in codes(found)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(64), "sigma": np.eye(63)}, "a covariance of shape"),
        ({"mu": np.zeros(64), "sigma": -np.eye(64)}, "has the eigenvalue -1"),
        ({"mu": np.zeros(64), "sigma": np.triu(np.ones((64, 64)))}, "not symmetric"),
        ({"mu": np.full(64, np.inf), "sigma": np.eye(64)}, "NaN or infinity"),
        ({"mu": np.zeros(64)}, "has mu but no sigma"),
        ({"mu": np.zeros(63), "sigma": np.eye(63)}, "'pool' has 64 features for the samples and 63"),
        ({"mu": np.zeros(64, np.complex128), "sigma": np.eye(64)}, "floating-point"),
        ({"mu": np.float64(3), "sigma": np.eye(64)}, "mu is a single number"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"expected [D] and [D, D]"),
    ],
)
def test_statistics_that_are_none(
    feature_files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arrays: dict[str, np.ndarray],
    message: str,
) -> None:
    np.savez(tmp_path / "ref.npz", **arrays)
    reference = ("--reference", tmp_path / "ref.npz")
    assert message in refused(capsys, "evaluate", "samples", feature_files / "small.npz", *reference)


# --- images -------------------------------------------------------------------------------------------------


def test_reference_file_gives_what_the_images_give(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ("--features", place / "inception", "--out", place / "ref.npz", "--keep", "400")
    assert run([str(one) for one in ("evaluate", "reference", place / "r.npz", *made)]) == 0
    capsys.readouterr()
    with np.load(place / "ref.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], pictures(400, 2))
        assert file["mu"].shape == (12,)
        assert file["sigma_s"].shape == (8, 8)
        assert file["mu"].dtype == np.float64
    features = ("--features", place / "inception")
    stored = samples(capsys, place / "s.npz", "--reference", place / "ref.npz", *features)
    direct = samples(capsys, place / "s.npz", "--reference", place / "r.npz", *features)
    assert values(stored) == pytest.approx(values(direct), rel=1e-9)
    assert [*values(stored)] == [
        "fid", "sfid", "inception_score", "precision", "recall", "kid", "density", "coverage",
    ]  # fmt: skip
    assert stored["features"][0]["metrics"]["precision"]["reference"] == 400
    assert codes(stored) == ["not-comparable", "count"]


def test_diversity_against_a_reference_with_labels(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The labels are those that the reference file keeps; half the samples are equal within their class."""
    labels = np.arange(400) % 10
    np.savez(place / "r.npz", arr_0=pictures(400, 2), arr_1=labels)
    made = ("--features", place / "inception", "--out", place / "ref.npz", "--keep", "350")
    assert run([str(one) for one in ("evaluate", "reference", place / "r.npz", *made)]) == 0
    capsys.readouterr()
    features, found = ("--features", place / "inception"), {}
    for reference in ("r.npz", "ref.npz"):
        found[reference] = values(
            samples(capsys, place / "s.npz", "--reference", place / reference, *features)
        )["diversity"]
    assert found["r.npz"] == pytest.approx(1, abs=0.15)
    assert found["ref.npz"] == pytest.approx(found["r.npz"], abs=0.05)
    alike = pictures(300, 1)
    alike[150:] = alike[np.arange(150) % 10]
    np.savez(place / "s.npz", arr_0=alike, arr_1=np.arange(300) % 10)
    fewer = values(samples(capsys, place / "s.npz", "--reference", place / "r.npz", *features))["diversity"]
    assert fewer is not None
    assert fewer < 0.9 * (found["r.npz"] or 0)


def test_statistics_of_other_features_are_not_taken(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ("--features", place / "inception", "--out", place / "ref.npz")
    assert run([str(one) for one in ("evaluate", "reference", place / "r.npz", *made)]) == 0
    capsys.readouterr()
    write_graph(place / "other.onnx", classes=3)
    other = ("--features", f"other={place / 'other.onnx'}")
    found = samples(capsys, place / "s.npz", "--reference", place / "ref.npz", *other)
    assert "other-statistics" in codes(found)
    assert found["features"][0]["metrics"]["fd"]["reference"] == 400
    with np.load(place / "ref.npz") as file:
        np.savez(place / "only.npz", **{name: file[name] for name in ("mu", "sigma", "features")})
    told = refused(capsys, "evaluate", "samples", place / "s.npz", "--reference", place / "only.npz", *other)
    assert "statistics of other features" in told


def test_published_layout_and_protocol(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored statistics without a name are Inception's; the protocol's name needs every condition."""
    monkeypatch.setattr("admtrt.evaluate.judging.USUAL_SAMPLES", 300)
    known = features_folder(place / "known", known=True)
    made = ("--features", known, "--out", place / "ref.npz")
    assert run([str(one) for one in ("evaluate", "reference", place / "r.npz", *made)]) == 0
    capsys.readouterr()
    with np.load(place / "ref.npz") as file:
        np.savez(place / "VIRTUAL.npz", **{name: file[name] for name in file if name != "features"})
    files = (place / "s.npz", "--reference", place / "VIRTUAL.npz", "--features")
    assert samples(capsys, *files, known)["features"][0]["protocol"] == "adm-2021"
    for changed in (["--count", "299"], ["--parts", "1"]):
        assert samples(capsys, *files, known, *changed)["features"][0]["protocol"] is None
    assert samples(capsys, *files, place / "inception")["features"][0]["protocol"] is None
    images = (place / "s.npz", "--reference", place / "r.npz", "--features", known)
    assert samples(capsys, *images)["features"][0]["protocol"] is None


def test_every_backend_and_batch_size_agrees(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """float32 in another order: 1e-6 of the features, 1e-4 of distances that are differences of them."""
    files = (place / "s.npz", "--reference", place / "r.npz", "--features", place / "inception", "--no-error")
    first = values(samples(capsys, *files))
    os.environ["XDG_CACHE_HOME"] = str(place / "another")  # else the first one's features are taken
    for options in (["--backend", "openvino"], ["--batch-size", "7"], ["--backend", "auto"]):
        assert values(samples(capsys, *files, *options)) == pytest.approx(first, rel=1e-4, abs=1e-6)


def test_floor_nearest_and_their_picture(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copied training image is found; honest samples lie no nearer than real ones do."""
    copied = pictures(300, 1)
    copied[5] = pictures(400, 2)[123]
    np.savez(place / "s.npz", arr_0=copied)
    np.savez(place / "f.npz", arr_0=pictures(350, 3))
    found = samples(
        capsys, place / "s.npz", "--reference", place / "r.npz", "--features", place / "inception",
        "--floor", place / "f.npz", "--nearest", place / "r.npz", "--plot", place / "plots",
    )  # fmt: skip
    result = found["features"][0]
    assert result["floor"]["precision"]["samples"] == 300  # as many as there are samples
    assert result["nearest"]["worst"][0] == {"sample": 5, "training": 123, "distance": 0.0}
    assert result["nearest"]["equal"] == 1
    assert result["nearest"]["share_below"] < 0.05
    assert (place / "plots" / "nearest.png").stat().st_size > 1000


def test_judge_knows_the_classes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = features_folder(place / "judge", "judge")
    extractor = Extractor(open_network(str(judge)))
    labels = extractor(pictures(300, 1))["logits"].argmax(axis=1)
    labels[:30] = (labels[:30] + 1) % 10
    np.savez(place / "s.npz", arr_0=pictures(300, 1), arr_1=labels)
    np.save(judge / "seen.npy", np.zeros(0, np.uint64))
    found = samples(capsys, place / "s.npz", "--reference", place / "r.npz", "--features", judge)
    assert values(found)["accuracy"] == 0.9
    assert "judge_score" in values(found)
    assert "fd" in values(found)


def test_judge_that_saw_the_floor(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from admtrt.evaluate.kept import row_hashes

    judge, real = features_folder(place / "judge", "judge"), pictures(300, 3)
    np.savez(place / "f.npz", arr_0=real)
    np.save(judge / "seen.npy", row_hashes(real[:40].reshape(40, -1)))
    files = (place / "s.npz", "--reference", place / "r.npz", "--features", judge, "--floor", place / "f.npz")
    found = samples(capsys, *files)["features"][0]["warnings"]
    assert {
        "code": "judge-saw-floor",
        "text": "the judge learned from 40 of the 300 real images of the floor",
    } in found


def test_a_graph_of_fixed_size_gets_resized_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = write_graph(place / "dino.onnx", size=11)
    files = (place / "s.npz", "--reference", place / "r.npz", "--features", f"dino={graph}")
    found = samples(capsys, *files)["features"][0]
    assert found["name"] == "dino"
    assert found["resize"] == "Pillow bicubic, where the size differs"


def test_one_channel_is_repeated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = pictures(300, 1, channels=1)
    np.savez(place / "grey.npz", arr_0=grey)
    np.savez(place / "rgb.npz", arr_0=np.repeat(grey, 3, axis=3))
    files = ("--reference", place / "r.npz", "--features", place / "inception")
    one, three = (values(samples(capsys, place / f"{name}.npz", *files)) for name in ("grey", "rgb"))
    assert one == three


@pytest.mark.parametrize(("images", "code"), [("equal", "all-equal"), ("twice", "duplicates")])
def test_equal_images_are_told(
    place: Path, capsys: pytest.CaptureFixture[str], images: str, code: str
) -> None:
    one = pictures(300, 1)
    np.savez(
        place / "s.npz", arr_0=np.tile(one[:1], (300, 1, 1, 1)) if images == "equal" else np.r_[one, one[:9]]
    )
    files = (place / "s.npz", "--reference", place / "r.npz", "--features", place / "inception")
    found = samples(capsys, *files)
    assert code in codes(found)
    assert None not in values(found).values()


def test_features_that_are_not_finite(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = pictures(300, 1)
    images[270] = 255
    np.savez(place / "s.npz", arr_0=images)
    graph = write_graph(place / "bad.onnx", poison=True)
    files = (place / "s.npz", "--reference", place / "r.npz", "--features", f"bad={graph}")
    assert "samples: 'pool' of image 270 is NaN or infinite" in refused(capsys, "evaluate", "samples", *files)


def test_self_check(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    files = (place / "s.npz", "--reference", place / "r.npz", "--features", place / "inception")
    found = samples(capsys, *files, "--self-check", code=1)
    assert not found["self_check"]["passed"]
    from admtrt.evaluate.published import PUBLISHED, Expected

    own = {name: Expected(value, 0.01) for name, value in values(found).items() if name in PUBLISHED}
    monkeypatch.setattr("admtrt.evaluate.published.PUBLISHED", own)
    assert samples(capsys, *files, "--self-check")["self_check"]["passed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--features", "nothing"], "no folder of features"),
        (["--features", "FOLDER/features.onnx"], "a file without a name"),
        (["--features", "a b=FOLDER/features.onnx"], "signs other than letters"),
        (["--features", "x=FOLDER/manifest.json"], "x=|no ONNX graph|is not an ONNX graph|refuses"),
        (["--features", "x=missing.onnx"], "there is no file"),
        (["--features", "FOLDER", "--features", "FOLDER"], "two features are called 'inception'"),
        ([], "no features to see them with"),
        (["--features", "FOLDER", "--backend", "tensorflow"], "'tensorflow' is none of them"),
        (["--features", "FOLDER", "--precision", "bf16"], "not in bf16"),
        (["--features", "FOLDER", "--precision", "fp8"], "precision 'fp8' is unknown"),
        (["--features", "FOLDER", "--count", "301"], "301 images were asked for; there are 300"),
        (["--features", "FOLDER", "--plot", "x"], "--plot shows the nearest pairs"),
        (["--features", "FOLDER", "--metrics", "accuracy"], "accuracy needs a judge"),
        (["--features", "FOLDER", "--metrics", "diversity"], "diversity needs samples and reference images"),
    ],
)
def test_requests_that_cannot_be(
    place: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    import re

    options = [option.replace("FOLDER", str(place / "inception")) for option in options]
    files = (place / "s.npz", "--reference", place / "r.npz")
    assert re.search(message, refused(capsys, "evaluate", "samples", *files, *options))


def test_an_altered_graph_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_graph(place / "inception" / "features.onnx", classes=4)
    files = (place / "s.npz", "--reference", place / "r.npz", "--features", place / "inception")
    assert "is not the file that" in refused(capsys, "evaluate", "samples", *files)


# --- what is kept -------------------------------------------------------------------------------------------


def test_a_killed_evaluation_goes_on_and_says_the_same(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at each block in turn: no features are computed twice, and the JSON is the same."""
    monkeypatch.setattr("admtrt.evaluate.kept.BLOCK", 64)
    arguments = ["evaluate", "samples", str(place / "s.npz"), "--reference", str(place / "r.npz")]
    arguments += ["--features", str(place / "inception"), "--json"]
    assert run(arguments) == 0
    whole = capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "second"))
    computed, original = 0, Extractor.__call__

    def counted(self: Extractor, images: np.ndarray) -> Any:
        nonlocal computed
        if computed >= 64:
            raise KeyboardInterrupt
        computed += len(images)
        return original(self, images)

    monkeypatch.setattr(Extractor, "__call__", counted)
    for kept in range(1, 12):  # 5 blocks of the samples, 7 of the reference
        computed = 0
        assert run(arguments) == 130
        assert not capsys.readouterr().out
        assert len([*(place / "second").rglob("*.npz")]) == kept
    computed = 0
    assert run(arguments) == 0
    assert capsys.readouterr().out == whole


def test_a_damaged_block_is_computed_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = (place / "s.npz", "--reference", place / "r.npz", "--features", place / "inception")
    first = samples(capsys, *files)
    for index, file in enumerate(sorted((place / "cache").rglob("*.npz"))):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] if index % 2 else b"")
    assert samples(capsys, *files) == first


def test_features_of_a_run_are_kept_beside_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = pictures(300, 1)
    folder = run_folder(place / "run", images, asked=400, labelled=False)
    files = (folder, "--reference", place / "r.npz", "--features", place / "inception")
    found = samples(capsys, *files)
    assert found["samples"]["count"] == 300
    assert "unfinished" in codes(found)
    assert len([*folder.glob("features/*/*.npz")]) == 2
    assert {**values(found)} == values(samples(capsys, place / "s.npz", *files[1:]))


@pytest.mark.slow
def test_a_hundred_kills(place: Path) -> None:
    """SIGKILL at any moment: the same JSON in the end, byte for byte."""
    np.savez(place / "s.npz", arr_0=pictures(3000, 1, size=64))
    np.savez(place / "r.npz", arr_0=pictures(3000, 2, size=64))
    command = [sys.executable, "-m", "admtrt", "evaluate", "samples", str(place / "s.npz"), "--json"]
    command += ["--reference", str(place / "r.npz"), "--features", str(place / "inception"), "--threads", "1"]

    def surroundings(cache: str) -> dict[str, str]:
        return os.environ | {"XDG_CACHE_HOME": str(place / cache), "OMP_NUM_THREADS": "1"}

    start = time.monotonic()
    whole = subprocess.run(command, env=surroundings("one"), check=True, capture_output=True).stdout
    span = time.monotonic() - start
    rng = np.random.default_rng(0)
    for kill in range(100):
        if kill % 10 == 0:  # all over again
            cache = f"cut{kill}"
        started = subprocess.Popen(
            command, env=surroundings(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(float(rng.uniform(0, span)))
        started.send_signal(signal.SIGKILL)
        started.wait()
        if kill % 10 == 9:
            again = subprocess.run(command, env=surroundings(cache), check=True, capture_output=True).stdout
            assert again == whole
