"""The page of the demo: a single file, with the verdict first, and its numbers."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

import admtrt
from admtrt.demo.judge import Verdict
from admtrt.demo.report import sweep_figure, write_report
from admtrt.demo.run import SAMPLERS, SCALES, DemoResult, SweepPoint
from admtrt.errors import OutputError
from admtrt.evaluate.compare import Value
from admtrt.evaluate.judging import Judged
from admtrt.evaluate.sweep import Point
from admtrt.evaluate.sweep import Row as SweepRow
from admtrt.images import save_grid
from admtrt.installing import version_of
from admtrt.schedule.sampler import SamplerConfig
from admtrt.verify.report import Place, Row, VerificationReport

if TYPE_CHECKING:
    from pathlib import Path

DISTANCES = {"fd": Value(1.5, 0.1, 200, 1000), "kid": Value(0.01, None, 200, 1000)}


def point(method: str, scale: float, accuracy: float) -> SweepPoint:
    sampler = SamplerConfig(method=method, steps=SAMPLERS[method], scale=scale)
    chosen = Point(method, SAMPLERS[method], scale, "fp32", None)
    judged = Judged("judge", {}, DISTANCES, DISTANCES, None, [], None)
    evaluations = {"ddpm": 50, "ddim": 25}[method]
    return SweepPoint(
        SweepRow(chosen, sampler, evaluations, evaluations, [judged]), Verdict(accuracy, 1 / (1 + scale))
    )


def result(status: str = "pass", best: float = 0.97) -> DemoResult:
    rows = (
        Row("graph", "unet: out", "pass", 3e-5, 1e-4, Place(1.0, None, 3)),
        Row("trajectory", "ddim: x", status, 2e-6, 1e-4, Place(1.0, 3, 3)),  # type: ignore[arg-type]
    )
    accuracies = (0.1, 0.4, 0.8, 0.9, best, best)
    return DemoResult(
        seconds={"train unet": 100.0},
        judge_accuracy=0.991,
        judge_images=700,
        points=tuple(
            point(method, scale, accuracy)
            for method in SAMPLERS
            for scale, accuracy in zip(SCALES, accuracies, strict=True)
        ),
        floor=DISTANCES,
        verification=VerificationReport("bundle", rows, {"ddim": (1e-7, 1e-6)}),
    )


def written(found: DemoResult, out: Path) -> str:
    for place, each in enumerate(found.points):
        images = np.full((10, 8, 8, 1), 20 * place, np.uint8)
        save_grid(images, out / each.grid, columns=10)
    return write_report(found, out).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags with their attributes, and the text before the first picture and in the footer."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.before_pictures = self.footer = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "footer" in self.open:
            self.footer += data
        if "body" in self.open and "img" not in dict(self.tags):
            self.before_pictures += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_is_one_file(tmp_path: Path) -> None:
    text = written(result(), tmp_path)
    page = Page(text)
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("link", "script", "iframe", "object", "a")
        for name in ("src", "href", "srcset", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:")
    for outside in ("url(", "@import", "http:", "https:", "file:", str(tmp_path)):
        assert outside not in text
    embedded = {base64.b64decode((image["src"] or "").partition(",")[2]) for image in page.all("img")}
    assert embedded == {picture.read_bytes() for picture in tmp_path.glob("*.png")}
    assert len(embedded) == len(page.all("img")) == len(SAMPLERS) * len(SCALES) + 3
    assert all(image["alt"] for image in page.all("img"))


def test_a_phone_shows_it_at_its_own_width(tmp_path: Path) -> None:
    page = Page(written(result(), tmp_path))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert "color-scheme: light dark" in (tmp_path / "report.html").read_text()


def test_the_verdict_stands_before_the_pictures(tmp_path: Path) -> None:
    seen = " ".join(Page(written(result(), tmp_path)).before_pictures.split())
    assert seen.startswith("admtrt demo: passed")
    for part in (
        "DDPM, 50 steps 97.0%",
        "DDIM, 25 steps 97.0%",
        "at scale 4; target 95%",
        "2 of 2",
        "2.0e-06",
    ):
        assert part.replace(" ", "") in seen.replace(" ", "")


@pytest.mark.parametrize(
    ("found", "passing"),
    [
        (result(status="compare"), ["97.0%", "97.0%"]),
        (result(best=0.94), ["2 of 2"]),
    ],
)
def test_a_failure_says_what_failed(found: DemoResult, passing: list[str], tmp_path: Path) -> None:
    text = written(found, tmp_path)
    assert '<span class="fail">failed</span>' in text
    assert text.count('class="pass"') == len(passing)
    assert all(f'<span class="pass">{each}</span>' in text for each in passing)
    assert ("<details open>" in text) == bool(found.verification.failures)


def test_the_best_grids_come_first(tmp_path: Path) -> None:
    captions = [image["alt"] for image in Page(written(result(), tmp_path)).all("img")]
    assert captions[:2] == [
        "DDPM, 50 steps, scale 4: 97.0% judged their class",
        "DDIM, 25 steps, scale 4: 97.0% judged their class",
    ]


def test_samplers_are_named_in_words(tmp_path: Path) -> None:
    text = written(result(), tmp_path)
    assert "ddim25" not in text
    assert "<td>DDIM, 25 steps</td>" in text
    legend = sweep_figure(result()).axes[0].get_legend()
    assert legend is not None
    assert [each.get_text() for each in legend.get_texts()] == ["DDPM, 50 steps", "DDIM, 25 steps", "target"]


def test_the_footer_has_versions_and_the_device(tmp_path: Path) -> None:
    footer = Page(written(result(), tmp_path)).footer
    for part in (f"admtrt {admtrt.__version__}", f"PyTorch {version_of('torch')}", "ONNX Runtime 1."):
        assert part in footer
    assert "Trained on: " in footer


def test_numbers_beside_the_page(tmp_path: Path) -> None:
    written(result(), tmp_path)
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["passed"] is True
    assert numbers["best"]["ddim"] == {
        "scale": 4.0,
        "accuracy": 0.97,
        "diversity": 0.2,
        "fd": 1.5,
        "kid": 0.01,
    }
    assert numbers["sweep"][-1]["steps"] == "ddim25"


def test_a_report_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    before = written(result(), tmp_path)
    (tmp_path / result().points[0].grid).unlink()
    with pytest.raises(OutputError):
        write_report(replace(result(), judge_images=1), tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert {path.suffix for path in tmp_path.iterdir()} == {".html", ".json", ".png"}


def test_two_metrics_leave_no_empty_panel(tmp_path: Path) -> None:
    written(result(), tmp_path)
    with Image.open(tmp_path / "quality.png") as picture:
        assert picture.width == pytest.approx(2 * 3.6 * 120, abs=1)  # inches a panel, dots an inch
