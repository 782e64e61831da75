"""The bench: rows, processes, taking turns, what a row computes, and its reports."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from bundles import exported_bundle

import admtrt
from admtrt.bench.chart import plot_steps
from admtrt.bench.contender import Contender, Prepared, StepTime
from admtrt.bench.machine import describe_machine
from admtrt.bench.measure import Bench
from admtrt.bench.remote import Remote, RemoteError, run_remotely
from admtrt.bench.report import COST_COLUMNS, SPEED_COLUMNS, BenchReport, Measurement, spread_of
from admtrt.bench.rows import PEERS, Row, default_rows, parse_rows
from admtrt.bench.startup import measure_startup
from admtrt.bench.subject import Subject
from admtrt.bundle import Bundle
from admtrt.errors import RequestError
from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser
from admtrt.runtime.example import example_slots
from admtrt.runtime.sampler import advance

if TYPE_CHECKING:
    from collections.abc import Mapping

FAST, SLOW, REFERENCE = Row("onnxruntime"), Row("openvino"), Row("torch")


# --- rows -----------------------------------------------------------------------------------------------


def test_rows_are_named_with_their_precision() -> None:
    assert parse_rows(["openvino:bf16", "torch"]) == (Row("openvino", "bf16"), Row("torch", "fp32"))
    assert str(Row("openvino", "bf16")) == "openvino bf16"


@pytest.mark.parametrize(
    ("items", "complaint"),
    [
        (["tensorflow"], "there is no backend 'tensorflow'"),
        (["onnxruntime:bf16"], "onnxruntime has no precision 'bf16'; it has fp32"),
        (["torch", "torch:fp32"], "torch:fp32 comes twice"),
    ],
)
def test_other_rows_are_refused(items: list[str], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        parse_rows(items)


def test_what_is_measured_if_nothing_is_named() -> None:
    rows = default_rows("cpu", original=False)
    assert {Row("torch"), Row("torch-compile"), Row("plain-onnx"), Row("onnxruntime"), Row("auto")} <= set(
        rows
    )
    assert Row("original") not in rows
    assert default_rows("cpu", original=True) == (Row("original"), *rows)
    assert not any(row.name in PEERS and row.precision != "fp32" for row in rows)
    assert Row("torch", "bf16") in default_rows("cuda", original=False)


# --- processes ------------------------------------------------------------------------------------------


class Counter:
    """Something to keep elsewhere."""

    def __init__(self, start: int) -> None:
        if start < 0:
            raise RequestError(f"start is {start}", hint="Begin at 0.")
        self.count = start

    def add(self, number: int) -> int:
        print("adding", number, flush=True)
        self.count += number
        return self.count

    def fail(self) -> None:
        try:
            raise ZeroDivisionError("\n \x1b[96mfirst\x1b[0m line\nsecond line")
        except ZeroDivisionError as error:
            raise RuntimeError("a page of advice") from error

    def die(self, by: int) -> None:
        os.kill(os.getpid(), by)

    def process(self) -> int:
        return os.getpid()


def test_an_object_in_a_process_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    remote = Remote(Counter, 3, log=log)
    assert remote.call("add", 4) == 7
    assert remote.call("process") != os.getpid()
    with pytest.raises(RemoteError, match=r"^ZeroDivisionError: first line$"):
        remote.call("fail")
    assert remote.call("add", 1) == 8  # a failure is not its end
    with pytest.raises(RemoteError, match="ended by SIGKILL, as when memory runs out"):
        remote.call("die", signal.SIGKILL)
    with pytest.raises(RemoteError, match="SIGKILL"):  # nor does asking again hang
        remote.call("add", 1)
    remote.close()
    assert "adding 4" in log.read_text()
    assert "Traceback" in log.read_text()


def test_an_object_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"^start is -1\. Begin at 0\.$"):
        Remote(Counter, -1, log=tmp_path / "log")


def test_a_function_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert run_remotely(os.getpid, log=tmp_path / "log") != os.getpid()


# --- taking turns ---------------------------------------------------------------------------------------


class Pretender:
    """A row that only reports its times."""

    diary: list[str]

    def __init__(self, name: str, diary: list[str], seconds: float = 1.0, **outputs: Any) -> None:
        self.name, self.diary, self.seconds = name, diary, seconds
        self.outputs = {key: np.asarray(value, np.float32) for key, value in outputs.items()}
        self.failing: set[str] = set()

    def call(self, method: str, *arguments: Any) -> Any:
        if method in self.failing:
            raise RemoteError(f"{self.name} cannot {method}")
        if method == "prepare":
            return Prepared(ready=9.0, outputs=self.outputs, notes=())
        if method == "step":
            self.diary.append(self.name)
            return StepTime(self.seconds, self.seconds / 2, self.seconds / 4, outside=self.seconds / 8)
        return {"sample": 7.0, "memory": 2**30, "measure": 4e9}[method]


def bench_of(
    rows: Mapping[Row, Pretender | str],
    yardstick: Pretender | None = None,
    *,
    repeat: int = 3,
    batch: int = 2,
) -> tuple[Measurement, ...]:
    bench = Bench(rows, yardstick, operations=10**9, note=lambda _: None)
    return bench.run(batch, repeat, sampling_steps=None).measurements


def test_rows_take_turns_and_each_begins_once() -> None:
    diary: list[str] = []
    bench_of({row: Pretender(row.name, diary) for row in (FAST, SLOW, REFERENCE)})
    a, b, c = "onnxruntime", "openvino", "torch"
    assert diary == [a, b, c, b, c, a, c, a, b]


def test_a_slow_row_is_slower() -> None:
    fast, slow, eager = bench_of(
        {
            FAST: Pretender("fast", [], 1.0),
            SLOW: Pretender("slow", [], 8.0),
            REFERENCE: Pretender("eager", [], 2.0),
        }
    )
    report = report_of(fast, slow, eager)
    assert [report.ratio(m) for m in (fast, slow, eager)] == [2.0, 0.25, 1.0]
    assert fast.speed == 2e9  # two images in a second
    assert report.of_peak(fast) == 0.5
    assert fast.outside == 0.125
    assert fast.memory == 2**30


def test_errors_are_those_of_the_worst_sample() -> None:
    expected = [[1.0, -2.0], [100.0, 0.0]]
    measured = bench_of(
        {
            REFERENCE: Pretender("eager", [], out=expected, grad=expected),
            FAST: Pretender("fast", [], out=[[1.0, -2.5], [101.0, 0.0]], grad=[[np.nan, 0], [0, 0]]),
        }
    )
    assert measured[0].errors == {}
    assert measured[1].errors == {"out": 0.25, "grad": None}


def test_a_row_that_fails_loses_nothing_else() -> None:
    unready, dying, unrecorded = (Pretender(name, []) for name in ("unready", "dying", "unrecorded"))
    unready.failing, dying.failing, unrecorded.failing = {"prepare"}, {"step"}, {"memory"}
    rows: dict[Row, Pretender | str] = {
        FAST: unready,
        SLOW: dying,
        Row("auto"): unrecorded,
        Row("plain-onnx"): "not installed",
        REFERENCE: Pretender("eager", []),
    }
    measured = {m.row: m for m in bench_of(rows)}
    assert list(measured) == list(rows)
    assert measured[FAST].reason == "unready cannot prepare"
    assert measured[SLOW].reason == "dying cannot step"
    assert measured[Row("plain-onnx")].reason == "not installed"
    assert measured[Row("auto")].step is not None
    assert measured[Row("auto")].notes == ("unrecorded cannot memory",)
    assert measured[REFERENCE].step is not None


def test_the_best_peak_counts_and_a_missing_one_is_no_fault() -> None:
    yardstick = Pretender("yardstick", [])
    bench = Bench({FAST: Pretender("fast", [])}, yardstick, None, note=lambda _: None)
    assert bench.run(1, 1, None).measurements[0].speed is None
    yardstick.failing = {"measure"}
    bench.run(1, 1, sampling_steps=5)
    assert bench.peaks == {"fp32": 4e9}


# --- reports --------------------------------------------------------------------------------------------


def report_of(*measurements: Measurement, **fields: Any) -> BenchReport:
    given: dict[str, Any] = {
        "subject": "a model",
        "machine": describe_machine(2, "a GPU"),
        "reference": {2: "torch fp32"},
        "nodes": {"bundle": {"unet": 1337}},
        "operations": {"unet": 10**9},
        "peaks": {"fp32": 4e9},
        "startup": {"import admtrt": 0.1},
    }
    return BenchReport(measurements=measurements, **given | fields)


def test_spread() -> None:
    spread = spread_of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.minimum, spread.lower, spread.median, spread.upper, spread.count) == (1, 2, 3, 4, 5)


def test_tables_and_json_say_the_same() -> None:
    fast, failed = bench_of({FAST: Pretender("fast", [], 0.5), SLOW: "no library"}, Pretender("y", []))
    report = report_of(fast, failed, sampling_steps=5)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["rows"][0]["name"] == "onnxruntime"
    assert data["rows"][0]["step"]["median"] == 0.5
    assert data["rows"][0]["operations_per_second"] == 4e9
    assert data["rows"][0]["ratio"] is None  # neither the original nor PyTorch was measured
    assert data["rows"][1]["reason"] == "no library"
    assert data["baseline"] == {"2": None}
    assert all(len(row) == 1 + len(SPEED_COLUMNS) for row in report.speed_cells(2))
    assert report.cost_columns() == (*COST_COLUMNS, "5 steps s")
    assert all(len(row) == 1 + len(report.cost_columns()) for row in report.cost_cells(2))
    shown = dict(zip(SPEED_COLUMNS, report.speed_cells(2)[0][1:], strict=True))
    assert shown["UNet"] == "250"
    assert shown["step"] == "500"
    assert shown["peak"] == "100%"
    (slow,) = report_of(*bench_of({FAST: Pretender("slow", [], 25.56)})).speed_cells(2)
    assert slow[1:4] == ["12780", "6390", "25560"]
    assert report.cost_cells(2)[0] == ["onnxruntime fp32", "4", "1.00", "9.0", ""]
    assert report.remarks(2) == ["openvino fp32: no library"]
    text = report.markdown()
    assert "| onnxruntime fp32 | 250 | 125 | 500 |" in text
    assert "openvino fp32: no library" in text
    assert "unet 1,337" in text
    assert "a GPU, " in text
    assert f"admtrt {admtrt.__version__}" in text


def test_the_chart_is_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    report = report_of(*bench_of({REFERENCE: Pretender("eager", [])}), *bench_of({FAST: "failed"}, batch=4))
    plot_steps(report, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        assert image.format == "PNG"


# --- one row --------------------------------------------------------------------------------------------


def subject(name: str, scratch: Path) -> Subject:
    return Subject(name, exported_bundle(name), None, None, None, scratch)


@pytest.mark.parametrize("name", ["guided", "conditional", "upsampler"])
def test_a_row_steps_from_the_same_place_every_time(name: str, tmp_path: Path) -> None:
    contender = Contender(FAST, subject(name, tmp_path), "cpu", 1, {})
    prepared = contender.prepare(3)
    times = [contender.step(), contender.step()]
    again = contender.prepare(3)
    bundle = Bundle.open(exported_bundle(name))
    slots = example_slots(bundle.manifest, 3)
    assert len(set(slots.position.tolist())) > 1
    for key, value in prepared.outputs.items():
        np.testing.assert_array_equal(again.outputs[key], value)
    assert set(prepared.outputs) == ({"out", "grad"} if name == "guided" else {"out"})
    for taken in times:
        assert 0 < taken.unet < taken.step
        assert taken.outside is not None
        assert 0 < taken.outside < taken.step
        assert (taken.classifier_gradient is not None) == (name == "guided")
    assert contender.sample(2) > 0
    assert contender.memory() > 2**20


def test_the_plain_route_runs_no_guides(tmp_path: Path) -> None:
    plain = Contender(Row("plain-onnx"), subject("guided", tmp_path), "cpu", 1, {})
    assert plain._guide_inputs(2) == {}  # noqa: SLF001 - a step would take its exports, which take minutes


def test_a_guide_has_a_column_and_its_part_of_the_peak() -> None:
    half = spread_of([0.5])
    errors = {"guide.mine": 2e-6}
    measured = Measurement(
        FAST,
        2,
        step=half,
        guides={"linear": half, "mine": half},
        errors=errors,
        guide_memory={"linear": 3 * 2**29},
    )
    report = report_of(measured, Measurement(SLOW, 2, step=half), operations={"guide.linear": 10**8})
    assert report.cost_columns() == (*COST_COLUMNS, "guide.linear", "guide.mine")
    assert [cells[-2:] for cells in report.cost_cells(2)] == [
        ["500 (10%, 1.50 GiB)", "500 (2e-06)"],
        ["", ""],
    ]
    assert report.to_dict()["rows"][0]["guides"]["linear"]["median"] == 0.5


class Resident(OnnxRuntimeDenoiser):
    """Keeps x as an accelerator does; counts its steps."""

    steps = 0

    def hold(self, slots: Any) -> Any:
        from contextlib import nullcontext

        self.slots = slots
        return nullcontext(self)

    def advance(self) -> None:
        advance(self.slots, self)
        self.steps += 1

    def read(self) -> None: ...


def test_a_row_that_keeps_x_is_timed_over_several_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = Resident(Bundle.open(exported_bundle("guided")), threads=1)
    monkeypatch.setattr("admtrt.bench.contender.open_denoiser", lambda *_, **__: denoiser)
    contender = Contender(Row("tensorrt"), subject("guided", tmp_path), "cpu", 1, {})
    contender.prepare(2)
    before = denoiser.steps
    taken = contender.step()
    assert taken.outside is None
    assert taken.step > 0
    assert denoiser.steps - before == 4  # of 5; the second sample stands at its second


def test_startup_figures() -> None:
    seconds = measure_startup(exported_bundle("guided"))
    assert list(seconds) == ["import admtrt", "admtrt --help", "open the bundle", "open it again"]
    assert all(0 < value < 60 for value in seconds.values())
