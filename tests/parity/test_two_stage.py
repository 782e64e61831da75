"""Two stages: each equals the stage run separately, each has its own noise, and runs can be interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from bundles import CLASS_NAMES, CLASSIFIER, UNET, network, sham_bundle

import admtrt
from admtrt.bundle import Bundle
from admtrt.cli import run
from admtrt.config import UNetConfig
from admtrt.errors import BundleError, OutputError, RequestError
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.runtime.bulk import BulkRequest
from admtrt.runtime.noise import initial_noise, step_noise
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.two_stage import TwoStage, draw_two_stage, second_request

STEPS = "3"
SMALL = {"image_size": 4}
UPSAMPLER = {"low_res_size": 4}
PLAIN: dict[str, Any] = {"classifier": None, "class_names": ()}


class Fake:
    """A denoiser that computes simple arithmetic and records its inputs."""

    def __init__(self) -> None:
        self.noise: list[np.ndarray] = []
        self.labels: list[Any] = []
        self.guided = 0
        self.seen = 0
        self.fails_at: int | None = None

    def run(self, graph: str, feeds: Any) -> dict[str, Any]:
        x = feeds["x"]
        if graph == "classifier_gradient":
            self.guided += 1
            return {"grad": np.ones_like(x)}
        if graph == "update":
            self.noise.append(feeds["noise"])
            return {"x_prev": x, "pred_x0": 0.1 * feeds["out"][:, :1] + feeds["grad"]}
        self.seen += len(x)
        if self.fails_at is not None and self.seen >= self.fails_at:
            raise KeyboardInterrupt
        if not self.noise:
            self.noise.append(x)
        self.labels.append(feeds["y"].tolist() if "y" in feeds else None)
        given = feeds["low_res"].repeat(2, axis=2).repeat(2, axis=3) if "low_res" in feeds else 0
        return {"out": np.concatenate([x + given, x], axis=1)}


def fake(path: Path, **fields: Any) -> Pipeline:
    """A pipeline over a sham bundle; ``unet`` are the changes of its network's configuration."""
    changed = UNET.model_copy(update=fields.pop("unet", {}))
    classifier = fields.pop("classifier", CLASSIFIER)
    if classifier is not None:
        classifier = classifier.model_copy(update={"image_size": changed.image_size})
    return Pipeline(sham_bundle(path, network=changed, classifier=classifier, **fields), Fake())


def denoiser(of: Pipeline) -> Fake:
    assert isinstance(of.denoiser, Fake)
    return of.denoiser


@pytest.fixture
def stages(tmp_path: Path) -> TwoStage:
    """A guided first stage and a class-conditional upsampler with a classifier, three classes each."""
    low = fake(tmp_path / "low.bundle", unet=SMALL)
    return TwoStage(low, fake(tmp_path / "high.bundle", unet=UPSAMPLER | {"num_classes": 3}))


def exported(path: Path, **fields: Any) -> Path:
    """A class-conditional bundle."""
    config = UNetConfig.from_dict(UNET.to_dict() | {"num_classes": 3} | fields)
    bundle_from_checkpoints(network(config, class_names=CLASS_NAMES), None, path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("small") / "bundle", **SMALL)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("large") / "bundle", **UPSAMPLER)


# --- both stages are what they are alone ----------------------------------------------------------------


def test_the_second_stage_enlarges_the_levels_of_the_first(small: Path, large: Path) -> None:
    both = TwoStage.from_bundles(small, str(large), threads=1)
    calls: list[tuple[int, ...]] = []
    drawn = both(
        [0, 2, 1], [5, 6, 9], steps="4", upsample_steps="ddim5", callback=lambda s: calls.append(s.x.shape)
    )
    first = Pipeline.from_bundle(small, threads=1)([0, 2, 1], [5, 6, 9], steps="4")
    alone = Pipeline.from_bundle(large, threads=1)
    second = alone([0, 2, 1], [5, 6, 9], steps="ddim5", low_res=first.images)
    np.testing.assert_array_equal(drawn.low.x, first.x)
    np.testing.assert_array_equal(drawn.high.x, second.x)
    np.testing.assert_array_equal(drawn.images, second.images)
    assert drawn.images.shape == (3, 8, 8, 1)
    assert drawn.high.seeds == drawn.low.seeds == drawn.seeds == (5, 6, 9)
    np.testing.assert_array_equal(drawn.labels, [0, 2, 1])
    assert calls == [(3, 1, 4, 4)] * 4 + [(3, 1, 8, 8)] * 5
    assert len(both([0, 1, 2], upsample_steps="2", steps="2", batch_size=2).images) == 3


def sample(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    code = run([str(part) for part in ("sample", *arguments, "--threads", 1, "--json")])
    shown, complaint = capsys.readouterr()
    assert code == 0, complaint
    result: dict[str, Any] = json.loads(shown)
    return result


def test_one_command_equals_two(
    small: Path, large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the labels in the file in between."""
    both, low, high = (tmp_path / name for name in ("both", "low", "high"))
    first = ["--classes", "2,cat,ant", "--num", 5, "--seed", 3, "--shard-size", 2]
    first += ["--method", "unipc", "--steps", 10]
    second = ["--low-res", low / "samples.npz", "--shard-size", 2, "--seed", 3, "--steps", "ddim5"]
    result = sample(capsys, small, "--out", both, *first, "--upsample", large, "--upsample-steps", "ddim5")
    sample(capsys, small, "--out", low, *first)
    sample(capsys, large, "--out", high, *second)
    for ours, theirs in ((both / "low", low), (both, high)):
        with np.load(ours / "samples.npz") as a, np.load(theirs / "samples.npz") as b:
            assert a.files == b.files == ["arr_0", "arr_1"]
            np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
            assert a["arr_1"].tolist() == b["arr_1"].tolist() == [2, 2, 0, 2, 2]
            assert len(np.unique(a["arr_0"].reshape(5, -1), axis=0)) == 5
    names = ("samples.npz", "grid.png")
    assert result["files"] == [str(both / name) for name in names]
    assert result["first_stage"]["files"] == [str(both / "low" / name) for name in names]
    assert all((both / name).is_file() and (both / "low" / name).is_file() for name in names)
    assert result["sampler"]["steps"] == "ddim5"
    assert result["first_stage"]["sampler"]["steps"] == "10"


def test_the_first_stage_may_start_at_images(
    small: Path, large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(4).integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images)
    start = ["--classes", "2,0", "--steps", 4, "--init", tmp_path / "images.npz", "--strength", 0.5]
    both, low = tmp_path / "both", tmp_path / "low"
    stages = ["--upsample", large, "--upsample-steps", "ddim5", "--difference"]
    result = sample(capsys, small, "--out", both, *start, *stages)
    sample(capsys, small, "--out", low, *start)
    with np.load(both / "low" / "samples.npz") as ours, np.load(low / "samples.npz") as theirs:
        np.testing.assert_array_equal(ours["arr_0"], theirs["arr_0"])
        difference = np.abs(ours["arr_0"].astype(np.float32) - images).mean(axis=-1)
    with np.load(both / "low" / "difference.npz") as written:
        np.testing.assert_array_equal(written["arr_0"], difference)
    assert str(both / "low" / "difference.png") in result["files"]


# --- noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 4, 2**31 - 1])
def test_a_stage_has_noise_of_its_own(stage: int) -> None:
    shape, seeds, steps = (1, 64, 64), [0, 7, 2**64 - 1], [0, 999, 999_999]
    kinds = (
        lambda **of: initial_noise(seeds, shape, **of),
        lambda **of: step_noise(seeds, steps, shape, **of),
    )
    for kind in kinds:
        np.testing.assert_array_equal(kind(), kind(stage=0))
        np.testing.assert_array_equal(kind(stage=stage), kind(stage=stage))
        for a, b in zip(kind(stage=stage), kind(), strict=True):
            # The correlation of 4096 independent pairs has a standard deviation of 1/64.
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / 64
    assert (initial_noise([0], shape, stage=stage) != step_noise([0], [0], shape, stage=stage)).any()


def test_the_upsampler_draws_the_noise_of_its_stage(stages: TwoStage) -> None:
    seeds = [3, 8]
    stages([0, 1], seeds, steps=STEPS, upsample_steps=STEPS)
    for of, stage in ((stages.low, 0), (stages.high, 4)):
        size = of.bundle.manifest.network.image_size
        start, *drawn = denoiser(of).noise
        np.testing.assert_array_equal(start, initial_noise(seeds, (1, size, size), stage=stage))
        for step, z in zip((2, 1), drawn[:2], strict=True):
            np.testing.assert_array_equal(z, step_noise(seeds, [step] * 2, (1, size, size), stage=stage))


# --- labels and guidance --------------------------------------------------------------------------------


def test_only_the_first_stage_is_guided_unless_asked(stages: TwoStage) -> None:
    assert stages.high.bundle.manifest.sampler.scale == 2.0
    stages([0, 1], steps=STEPS, upsample_steps=STEPS)
    assert (denoiser(stages.low).guided, denoiser(stages.high).guided) == (3, 0)
    stages([0, 1], steps=STEPS, scale=0.0, upsample_steps=STEPS, upsample_scale=1.5)
    assert (denoiser(stages.low).guided, denoiser(stages.high).guided) == (3, 3)


def test_labels_go_to_every_stage_that_takes_them(stages: TwoStage, tmp_path: Path) -> None:
    drawn = stages([2, 0], steps=STEPS, upsample_steps=STEPS)
    assert denoiser(stages.low).labels == [None] * 3  # its classifier takes them
    assert denoiser(stages.high).labels == [[2, 0]] * 3
    assert drawn.high.labels is not None
    plain = TwoStage(stages.low, fake(tmp_path / "plain", unet=UPSAMPLER, **PLAIN))
    drawn = plain([2, 0], steps=STEPS, upsample_steps=STEPS)
    assert drawn.low.labels is not None
    assert drawn.high.labels is None


def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command draw from sham bundles."""

    def opened(source: Bundle, *_: Any, **__: Any) -> Pipeline:
        return Pipeline(source, Fake())

    monkeypatch.setattr(Pipeline, "open", opened)


def test_the_labels_of_the_small_images_are_used(
    stages: TwoStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``arr_1`` has the labels unless ``--classes`` gives others; a bundle without classes passes them on."""
    faked(monkeypatch)
    fake(tmp_path / "plain", unet=UPSAMPLER, **PLAIN)
    images = np.full((3, 4, 4, 1), 100, np.uint8)
    np.savez(tmp_path / "labelled.npz", arr_0=images, arr_1=np.array([2, 0, 0], np.int32))
    np.savez(tmp_path / "bare.npz", arr_0=images)

    def draw(bundle: Path, source: str, *options: Any) -> list[int] | None:
        out = tmp_path / "run" / f"{bundle.name} {source} {options}"
        sample(capsys, bundle, "--out", out, "--low-res", tmp_path / source, *options)
        with np.load(out / "samples.npz") as archive:
            return archive["arr_1"].tolist() if "arr_1" in archive else None

    high = stages.high.bundle.path
    assert draw(high, "labelled.npz", "--scale", 0) == [2, 0, 0]
    assert draw(high, "labelled.npz", "--classes", 1) == [1, 1, 1]
    assert draw(high, "bare.npz", "--classes", "2,0") == [2, 0, 2]
    assert draw(tmp_path / "plain", "labelled.npz", "--format", "npz") == [2, 0, 0]
    assert draw(tmp_path / "plain", "bare.npz") is None
    command = ["sample", str(high), "--out", str(tmp_path / "no"), "--low-res"]
    assert run([*command, str(tmp_path / "bare.npz"), "--scale", "0"]) == 2
    assert "labels are needed: the bundle has 3 classes" in capsys.readouterr().err
    np.savez(tmp_path / "other.npz", arr_0=images, arr_1=np.array([2, 0, 3]))
    assert run([*command, str(tmp_path / "other.npz")]) == 2
    assert "class 3 is out of range" in capsys.readouterr().err


def test_the_labels_reach_the_results_of_a_classless_upsampler(
    stages: TwoStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faked(monkeypatch)
    fake(tmp_path / "plain", unet=UPSAMPLER, **PLAIN)
    out = tmp_path / "run"
    options = [
        "--classes",
        "cat:2,ant:1",
        "--upsample",
        tmp_path / "plain",
        "--format",
        "npz",
        "--format",
        "png",
    ]
    sample(capsys, stages.low.bundle.path, "--out", out, *options)
    with np.load(out / "samples.npz") as archive:
        assert archive["arr_1"].tolist() == [2, 2, 0]
    assert sorted(path.name for path in (out / "png").iterdir()) == [
        "0_000002.png",
        "2_000000.png",
        "2_000001.png",
    ]


# --- what does not fit ----------------------------------------------------------------------------------

CLASSES = {"class_names": tuple("abcd"), "classifier": CLASSIFIER.model_copy(update={"num_classes": 4})}


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ({"unet": {}}, {}, "low.bundle draws images of 8x8 pixels; .*high.bundle enlarges images of 4x4"),
        ({"unet": SMALL}, {"unet": UPSAMPLER | {"low_res_size": 2}}, "4x4 pixels; .* enlarges images of 2x2"),
        (
            {"unet": SMALL | {"in_channels": 3}, **PLAIN},
            {**PLAIN},
            "draws 3 channels; .*high.bundle enlarges 1 channels",
        ),
        ({}, {"unet": UPSAMPLER | {"num_classes": 4}, **PLAIN}, "draws 3 classes; .* enlarges 4 classes"),
        ({}, CLASSES, "draws 3 classes; .* enlarges 4 classes"),
        (
            {},
            {"class_names": ("bee", "ant", "cat")},
            "draws the classes 0 ant, 1 bee; .* enlarges the classes 0 bee, 1 ant",
        ),
        ({}, {"unet": {}}, "high.bundle is no upsampler"),
        ({"unet": SMALL | {"low_res_size": 2}, **PLAIN}, {}, "low.bundle is an upsampler itself"),
        (PLAIN, {"unet": UPSAMPLER | {"num_classes": 3}}, "low.bundle knows no classes"),
    ],
)
def test_bundles_that_do_not_fit(
    tmp_path: Path, low: dict[str, Any], high: dict[str, Any], message: str
) -> None:
    first = fake(tmp_path / "low.bundle", **{"unet": SMALL} | low)
    second = fake(tmp_path / "high.bundle", **{"unet": UPSAMPLER} | high)
    with pytest.raises(RequestError, match=message) as caught:
        TwoStage(first, second)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"labels": [3]}, "class 3 is out of range"),
        ({"labels": None, "scale": 0.0}, "labels are needed"),
        ({"upsample_steps": "some"}, "'some' is not a positive whole number"),
        ({"upsample_scale": 1e9}, "out of range"),
        ({"steps": "1001"}, "cannot give 1001"),
    ],
)
def test_impossible_requests_before_any_work(
    stages: TwoStage, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        stages(**{"labels": [0], "steps": STEPS, "upsample_steps": STEPS} | request_)
    assert denoiser(stages.low).seen == 0


def test_an_unguided_upsampler_needs_no_classifier(stages: TwoStage, tmp_path: Path) -> None:
    both = TwoStage(stages.low, fake(tmp_path / "plain", unet=UPSAMPLER, **PLAIN))
    assert both([0], steps=STEPS, upsample_steps=STEPS).images.shape == (1, 8, 8, 1)
    with pytest.raises(RequestError, match=r"scale 2.0 asks for guidance, but .*plain holds no classifier"):
        both([0], steps=STEPS, upsample_steps=STEPS, upsample_scale=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--upsample-steps", "5"], "belong to a second stage"),
        (["--upsample-scale", "0"], "belong to a second stage"),
        (["--upsample", "{small}"], "is no upsampler"),
        (["--upsample", "{large}", "--upsample-scale", "1"], "holds no classifier"),
        (["--upsample", "{large}", "--upsample-steps", "ddim300"], "no integer stride"),
        (["--upsample", "absent"], "absent does not exist"),
        (["--low-res", "{odd}"], "arr_1 is float64 [1]; expected 1 labels, whole numbers"),
        (["--low-res", "{many}"], "arr_1 is int64 [2]; expected 1 labels"),
    ],
)
def test_bad_options(
    small: Path,
    large: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    image = np.zeros((1, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "odd.npz", arr_0=image, arr_1=np.zeros(1))
    np.savez(tmp_path / "many.npz", arr_0=image, arr_1=np.zeros(2, np.int64))
    places = {"small": small, "large": large}
    places |= {name: tmp_path / f"{name}.npz" for name in ("odd", "many")}
    given = [option.format(**places) for option in options]
    assert run(["sample", str(small), "--out", str(tmp_path / "run"), *given]) == 2
    shown, complaint = capsys.readouterr()
    assert message in complaint
    assert shown == ""
    assert not (tmp_path / "run").exists()


# --- long runs ------------------------------------------------------------------------------------------


def requests(stages: TwoStage, out: Path, *, upsampler: str = STEPS) -> tuple[BulkRequest, BulkRequest]:
    low = BulkRequest(
        count=7,
        labels=np.arange(7) % 3,
        first_seed=4,
        sampler=stages.low.sampler(steps=STEPS),
        batch_size=2,
        shard_size=3,
    )
    return low, second_request(stages, low, stages.high.sampler(steps=upsampler, scale=0.0), out)


def images_in(path: Path) -> np.ndarray:
    with np.load(path) as archive:
        images: np.ndarray = archive["arr_0"]
    return images


def test_a_run_cut_off_in_either_stage_goes_on(stages: TwoStage, tmp_path: Path) -> None:
    out = tmp_path / "run"
    low, high = denoiser(stages.low), denoiser(stages.high)
    for of, seen in ((low, 3 * 3 + 1), (high, 6 * 3 + 1)):  # within the second and the third shard
        of.fails_at = seen
        with pytest.raises(KeyboardInterrupt):
            draw_two_stage(stages, *requests(stages, out), out, ["npz"])
        of.fails_at, low.seen, high.seen = None, 0, 0
        assert not (out / "samples.npz").exists()
    texts: list[tuple[int, str]] = []
    first, second = draw_two_stage(
        stages, *requests(stages, out), out, ["npz"], progress=lambda count, text: texts.append((count, text))
    )
    assert (low.seen, high.seen) == (0, 1 * 3)  # the last shard of the second stage alone
    assert texts == [(1, f"second stage, step {step}/3") for step in (1, 2, 3)]
    assert (first, second) == ([out / "low" / "samples.npz"], [out / "samples.npz"])
    labels = [0, 1, 2, 0, 1, 2, 0]
    expected = stages(labels, range(4, 11), steps=STEPS, upsample_steps=STEPS)
    np.testing.assert_array_equal(images_in(out / "low" / "samples.npz"), expected.low.images)
    np.testing.assert_array_equal(images_in(out / "samples.npz"), expected.images)


def test_other_requests_are_refused_before_the_first_stage(stages: TwoStage, tmp_path: Path) -> None:
    out = tmp_path / "run"
    draw_two_stage(stages, *requests(stages, out), out, [])
    for shard in (out / "low" / "shards").iterdir():
        shard.unlink()
    denoiser(stages.low).seen = 0
    with pytest.raises(OutputError, match="another run: steps is '3' there and '4' now"):
        draw_two_stage(stages, *requests(stages, out, upsampler="4"), out, [])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="holds no sampling run"):
        draw_two_stage(stages, *requests(stages, tmp_path / "taken"), tmp_path / "taken", [])
    assert denoiser(stages.low).seen == 0
    draw_two_stage(stages, *requests(stages, out), out, [])  # the same small images come again


def test_a_graph_of_the_second_stage_is_refused_before_the_first(
    stages: TwoStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.high, "open_graphs", Mock(side_effect=BundleError("no such operator")))
    with pytest.raises(BundleError, match="no such operator"):
        draw_two_stage(stages, *requests(stages, tmp_path / "run"), tmp_path / "run", [])
    assert not (tmp_path / "run").exists()


def test_small_images_that_changed_are_noticed(stages: TwoStage, tmp_path: Path) -> None:
    out = tmp_path / "run"
    draw_two_stage(stages, *requests(stages, out), out, [])
    shard = out / "low" / "shards" / "00000003.npz"
    with np.load(shard) as archive:
        changed = {name: archive[name] for name in archive.files}
    changed["images"][1, 2, 3, 0] ^= 1
    np.savez(shard, **changed)
    with pytest.raises(OutputError, match="another run: low_res differ"):
        draw_two_stage(stages, *requests(stages, out), out, [])


def test_both_stages_under_kill_9(small: Path, large: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        options = {
            "--out": out, "--num": 30, "--steps": "25", "--shard-size": 2, "--batch-size": 2,
            "--format": "npz", "--upsample": large, "--upsample-steps": "25", "--threads": 1,
        }  # fmt: skip
        flat = [str(part) for pair in options.items() for part in pair]
        return [sys.executable, "-m", "admtrt", "sample", str(small), *flat, "--json"]

    environment = os.environ | {"PYTHONPATH": str(Path(admtrt.__file__).parents[1])}
    out = tmp_path / "killed"
    for folder in (out / "low", out):
        with subprocess.Popen(command(out), env=environment, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 180
            while len(list((folder / "shards").glob("0*.npz"))) < 3:
                assert process.poll() is None, "the run ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
    assert not (out / "samples.npz").exists()
    done = subprocess.run(
        command(out), env=environment, capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["first_stage"]["continued_from"] == 30
    assert 6 <= result["continued_from"] < 30
    labels = [index % 3 for index in range(30)]
    both = TwoStage.from_bundles(small, large, threads=1)
    expected = both(labels, steps="25", upsample_steps="25", batch_size=2)
    np.testing.assert_array_equal(images_in(out / "low" / "samples.npz"), expected.low.images)
    np.testing.assert_array_equal(images_in(out / "samples.npz"), expected.images)
