"""The error measure, the verdict, the tolerances and the contract's guard of a verification."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from admtrt.contract import GraphSpec, TensorSpec
from admtrt.errors import MissingDependencyError, OutputError
from admtrt.verify.checked import GraphRunError, check_values
from admtrt.verify.inputs import BATCHES, chosen_steps, step_batches
from admtrt.verify.plot import plot_drift, require_plotting
from admtrt.verify.report import Place, Row, Tally, VerificationReport, sample_errors
from admtrt.verify.tolerances import judged_by_float64

SPEC = GraphSpec(
    inputs=(TensorSpec(name="x", dtype="float32", shape=("N", 2)),),
    outputs=(
        TensorSpec(name="a", dtype="float32", shape=("N", 2)),
        TensorSpec(name="b", dtype="float32", shape=("N",)),
    ),
)


def places(count: int) -> list[Place]:
    return [Place(t=float(index), y=index, batch=count) for index in range(count)]


def report(*rows: Row, drift: dict[str, tuple[float, ...]] | None = None) -> VerificationReport:
    return VerificationReport("bundle", rows, drift or {})


def test_error_is_relative_to_each_sample_alone() -> None:
    expected = np.array([[[100.0, -200.0]], [[0.01, 0.0]]], np.float32)
    actual = expected + np.array([[[0.0, 2.0]], [[0.001, 0.0]]], np.float32)
    # Pooled, the second sample's error of 10% would vanish behind the first one's size.
    np.testing.assert_allclose(sample_errors(actual, expected), [0.01, 0.1], rtol=1e-4)


def test_error_where_the_reference_is_zero() -> None:
    zeros = np.zeros((1, 3), np.float32)
    assert sample_errors(zeros, zeros) == 0
    assert sample_errors(zeros + 1e-6, zeros) > 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_error_is_not_finite_where_a_side_is_not(value: float, side: int) -> None:
    pair = [np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)]
    pair[side][1, 0] = value
    errors = sample_errors(*pair)
    assert errors[0] == 0
    assert not np.isfinite(errors[1])


def test_tally_keeps_the_worst_sample() -> None:
    tally = Tally("graph", "unet: out", 0.5)
    tally.add(np.array([0.1, 0.4]), places(2))
    tally.add(np.array([0.2, 0.3, 0.1]), places(3))
    assert tally.row() == Row("graph", "unet: out", "pass", 0.4, 0.5, Place(t=1.0, y=1, batch=2))


@pytest.mark.parametrize(("error", "status"), [(0.5, "pass"), (0.5000001, "compare")])
def test_tally_compares_with_its_tolerance(error: float, status: str) -> None:
    tally = Tally("graph", "unet: out", 0.5)
    tally.add(np.array([error]), places(1))
    assert tally.row().status == status


def test_tally_fails_where_the_reference_is_not_finite() -> None:
    tally = Tally("graph", "unet: out", 0.5)
    tally.add(np.array([np.nan, 0.1]), places(2))
    row = tally.row()
    assert row.status == "compare"
    assert row.error == 0.1
    assert "t=0 y=0 N=2" in row.detail


def test_tally_reports_the_first_fault() -> None:
    tally = Tally("step", "ddpm", 0.5)
    tally.fail("run", "first")
    tally.fail("run", "second")
    tally.add(np.array([9.0]), places(1))
    row = tally.row()
    assert (row.status, row.detail, row.error) == ("run", "first", 9.0)


@pytest.mark.parametrize(
    ("statuses", "outcome", "code"),
    [
        ([], "pass", 0),
        (["pass", "pass"], "pass", 0),
        (["pass", "compare"], "compare", 1),
        (["compare", "run"], "run", 4),
        (["run", "build", "compare"], "build", 3),
    ],
)
def test_gravest_failure_decides(statuses: list[Any], outcome: str, code: int) -> None:
    made = report(*(Row("graph", str(index), status) for index, status in enumerate(statuses)))
    assert (made.outcome, made.exit_code, made.passed) == (outcome, code, code == 0)
    assert len(made.failures) == sum(status != "pass" for status in statuses)


def test_report_is_valid_json_even_with_values_that_are_not_finite() -> None:
    row = Row("graph", "unet: out", "pass", 0.1, 0.5, Place(t=1.0, y=None, batch=3))
    data = report(row, drift={"ddpm": (0.5, float("inf"))}).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["drift"] == {"ddpm": [0.5, None]}
    assert data["rows"][0]["where"] == {"t": 1.0, "y": None, "batch": 3}


@pytest.mark.parametrize(
    ("reach", "bound"),
    [(0.0, 1e-4), (1e-5, 1e-4), (1e-3, 1e-3), (1.0, 2e-2)],  # the stage's, what rounding makes, the ceiling
)
def test_float64_judges_by_the_reach_of_rounding(reach: float, bound: float) -> None:
    for stage in ("step", "trajectory"):
        assert judged_by_float64(stage, reach) == bound


@pytest.mark.parametrize(("length", "steps"), [(1000, [0, 20, 500, 999]), (10, [0, 1, 5, 9]), (2, [0, 1])])
def test_chosen_steps(length: int, steps: list[int]) -> None:
    assert chosen_steps(length) == steps
    batches = step_batches(length)
    assert {len(batch) for batch in batches} == set(BATCHES)
    assert {step for batch in batches for step in batch.tolist()} == set(steps)
    assert len(set(batches[-1].tolist())) > 1


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        # Each case also breaks what is checked later: the first fault is the one named.
        (np.full((3, 2), np.nan), np.zeros(2, np.float32), "'a' is float64, expected float32"),
        (
            np.full((3, 2), np.nan, np.float32),
            np.zeros(2, np.float32),
            r"'b' has the shape \[2\], expected \[3\]",
        ),
        (np.array([[0, np.inf]] * 3, np.float32), np.zeros(3, np.float32), "'a' has 3 of 6 values"),
    ],
)
def test_outputs_are_checked_in_order(a: Any, b: Any, message: str) -> None:
    with pytest.raises(GraphRunError, match=message):
        check_values("update", SPEC, {"a": a, "b": b}, 3)


def test_plot(tmp_path: Path) -> None:
    row = Row("trajectory", "ddpm", "pass", 1e-6, 1e-4, Place(t=1.0, y=None, batch=3))
    made = report(row, drift={"ddpm": (0.0, 1e-7, 1e-6), "ddim": ()})
    plot_drift(made, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        plot_drift(made, tmp_path / "file" / "drift.png")


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_plotting(tmp_path / "drift.PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"\[plot\]"):
        require_plotting(tmp_path / "drift.png")


def test_places_of_a_plot_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("drift.jpg", "a plot is a PNG"),
        ("file/drift.png", "cannot write"),
        ("folder.png", "it is a folder"),
    ):
        with pytest.raises(OutputError, match=message):
            require_plotting(tmp_path / name)
