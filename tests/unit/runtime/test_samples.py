"""What a pipeline returns: for the terminal, for notebooks, as files; bars and GIFs."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import exported_bundle, pipeline
from PIL import Image

from admtrt import Frames, Pipeline, Samples
from admtrt.cli import run
from admtrt.errors import OutputError, RequestError
from admtrt.images import to_uint8
from admtrt.runtime.bulk import GIF_LIMIT, BulkRequest, draw, sample_steps
from admtrt.schedule.sampler import SamplerConfig

PAGE = Path(__file__).parents[3] / "docs" / "python.md"


@pytest.fixture(scope="module")
def samples() -> Samples:
    return pipeline("guided")(labels=["cat", 0, 1], steps="ddim3")


def test_a_line_for_the_terminal(samples: Samples) -> None:
    assert repr(samples) == "Samples(3 of 1x8x8, classes cat, ant, bee, seeds 0, 1, 2)"
    many = Samples(np.zeros((20, 1, 8, 8), np.float32), None, tuple(range(20)))
    assert repr(many) == "Samples(20 of 1x8x8, seeds 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, and 10 more)"
    assert len(many) == 20


def test_a_pipeline_says_what_it_is() -> None:
    opened = Pipeline.from_bundle(exported_bundle("guided"))
    assert re.fullmatch(r"Pipeline\('.*': 1x8x8, 3 classes, ddpm; onnxruntime, fp32\)", repr(opened))
    assert "no classes" in repr(Pipeline.from_bundle(exported_bundle("upsampler")))


def test_images_of_pillow(samples: Samples) -> None:
    assert samples.names == ["cat", "ant", "bee"]
    for image, pixels in zip(samples.pil, samples.images, strict=True):
        np.testing.assert_array_equal(np.asarray(image), pixels[..., 0])
    assert samples.grid(columns=3).width > samples.grid(columns=1).width


def test_a_column_of_the_grid_is_a_class_where_classes_take_turns(tmp_path: Path) -> None:
    turns = Samples(np.zeros((8, 1, 8, 8), np.float32), np.arange(8) % 2, tuple(range(8)), ("ant", "bee"))
    assert turns.grid().size == turns.grid(columns=4).size
    turns.save(tmp_path / "grid.png")
    for written in (turns._repr_png_(), (tmp_path / "grid.png").read_bytes()):
        assert Image.open(io.BytesIO(written)).size == turns.grid().size


def test_a_notebook_shows_the_grid(samples: Samples) -> None:
    shown = Image.open(io.BytesIO(samples._repr_png_()))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(samples.grid()))


def test_files(samples: Samples, tmp_path: Path) -> None:
    assert samples.save(tmp_path / "grid.png") == [tmp_path / "grid.png"]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == samples.grid().size
    files = samples.save(tmp_path / "folder")
    assert [file.name for file in files] == ["2_000000.png", "0_000001.png", "1_000002.png"]
    with Image.open(files[1]) as image:
        np.testing.assert_array_equal(np.asarray(image), samples.images[1, ..., 0])


def test_a_bar_counts_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []

    class Bar:
        def __init__(self, text: str, total: int) -> None:
            counted.append(total)

        def __enter__(self) -> Any:
            return lambda count, text: counted.append(count)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("admtrt.console.progress_bar", Bar)
    seen: list[int] = []
    pipeline("guided")(
        labels=[0, 1, 2],
        steps="ddim3",
        batch_size=2,
        progress=True,
        callback=lambda step: seen.append(step.index),
    )
    assert counted == [9, 2, 2, 2, 1, 1, 1]
    assert seen == [1, 2, 3, 1, 2, 3]


def test_frames_are_the_predictions_of_each_step(tmp_path: Path) -> None:
    frames, seen = Frames(), []
    drawn = pipeline("guided")(
        labels=[0, 1, 2],
        steps="ddim3",
        batch_size=2,
        callback=lambda step: (frames(step), seen.append(step.x_0)),
    )
    assert [image.shape for image in frames.images] == [(3, 8, 8, 1)] * 3
    np.testing.assert_array_equal(frames.images[0][:2], to_uint8(seen[0]))
    np.testing.assert_array_equal(frames.images[-1], drawn.images)
    frames.save(tmp_path / "steps.gif")
    with Image.open(tmp_path / "steps.gif") as gif:
        assert (gif.format, gif.n_frames) == ("GIF", 3)


def test_frames_of_many_steps_are_few() -> None:
    frames = Frames()
    pipeline("guided")(labels=[0], steps="130", callback=frames)
    assert len(frames.images) == 44  # every third of 130, counted from the last


def test_no_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there are no frames"):
        Frames().save(tmp_path / "steps.gif")


def test_a_gif_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--num", "3", "--steps", "ddim3", "--batch-size", "2", "--threads", "1", "-f", "gif"]
    assert run(["sample", str(exported_bundle("guided")), "-o", str(tmp_path / "run"), *given]) == 0
    assert "steps.gif" in capsys.readouterr().out
    with Image.open(tmp_path / "run" / "steps.gif") as gif:
        assert gif.n_frames == 3


def test_a_gif_counts_as_work(tmp_path: Path) -> None:
    """The samples that it shows are drawn again, which a bar has to know from the start."""
    opened = pipeline("guided")
    request = BulkRequest(20, np.arange(20) % 3, 0, SamplerConfig(steps="2", scale=0.0), 8, 8)
    told: list[int] = []
    draw(opened, request, tmp_path / "run", ["grid", "gif"], progress=lambda count, _: told.append(count))
    assert sum(told) == sample_steps(opened, request, ["grid", "gif"]) == (20 + GIF_LIMIT) * 2
    assert sample_steps(opened, request, ["grid"]) == 20 * 2


def test_samples_that_cannot_be_written(samples: Samples, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        samples.save(tmp_path / "file" / "folder")


def test_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example of docs/python.md, with a bundle, an image and a mask of ours."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion.bundle").symlink_to(exported_bundle("guided"))
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), np.uint8)
    names: dict[str, Any] = {"image": images, "mask": np.eye(8, dtype=bool)}
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    code = code.replace('"Bag", 3', '"cat", 0').replace("[3, 7]", "[1, 2]").replace("[3]", "[2]")
    code = code.replace('backend="auto"', "threads=1").replace("large = TwoStage", "# large = TwoStage")
    exec(compile(code, PAGE.name, "exec", dont_inherit=True), names)
    assert Path("steps.gif").exists()
    assert names["again"].x.shape == (1, 1, 8, 8)
