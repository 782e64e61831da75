"""The bench explains itself: a legend below its tables, and one in its chart."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import pytest

from admtrt.bench.chart import plot_steps, steps_figure
from admtrt.bench.machine import describe_machine
from admtrt.bench.report import LEGEND, SPEED_COLUMNS, BenchReport, Measurement, spread_of
from admtrt.bench.rows import Row

if TYPE_CHECKING:
    from pathlib import Path


def _report(*rows: Row) -> BenchReport:
    times = [0.01, 0.011, 0.02]
    return BenchReport(
        subject="a bundle",
        machine=describe_machine(1, None),
        measurements=tuple(Measurement(row, 1, step=spread_of(times)) for row in rows),
        reference={},
        nodes={},
        operations={},
        peaks={},
        startup={},
    )


def test_every_column_is_explained() -> None:
    report = _report(Row("torch"))
    assert report.footnotes()[0] == LEGEND
    assert LEGEND in report.markdown()
    for column in SPEED_COLUMNS:
        assert column.removeprefix("error ") in LEGEND or column.startswith("error"), column
    for word in ("spread", "speed", "peak", "rest", "errors"):
        assert f"{word}, " in LEGEND
    assert len(textwrap.wrap(LEGEND, 80)) <= 5


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        ([Row("torch"), Row("openvino", "bf16")], ["fp32", "bf16", "quartiles"]),
        ([Row("onnxruntime")], ["fp32", "quartiles"]),
    ],
)
def test_the_chart_has_a_legend_and_the_machine(rows: list[Row], shown: list[str], tmp_path: Path) -> None:
    report = _report(*rows)
    figure = steps_figure(report)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == shown
    assert report.machine["processor"] in legend.get_title().get_text()
    title = figure.axes[0].get_title()
    assert title == ("batch 1, x: speed of torch fp32 = 1" if rows[0].name == "torch" else "batch 1")
    plot_steps(report, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_has_a_chart(tmp_path: Path) -> None:
    empty = _report()
    absent = Measurement(Row("original"), 1, reason="no checkout")
    report = BenchReport(**{**vars(empty), "measurements": (absent,)})
    plot_steps(report, tmp_path / "bench.png")
