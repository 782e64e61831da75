"""A whole run of the bench: processes, measurements, report."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from admtrt.bench.contender import Contender, measure_guide_memory
from admtrt.bench.machine import describe_machine
from admtrt.bench.measure import Bench
from admtrt.bench.remote import Remote, RemoteError, run_remotely
from admtrt.bench.report import BenchReport
from admtrt.bench.rows import PLAIN
from admtrt.bench.startup import measure_startup
from admtrt.errors import MissingDependencyError
from admtrt.schedule.guides import GUIDE_GRAPH
from admtrt.schedule.sampler import with_choices
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from admtrt.bench.measure import RemoteRow
    from admtrt.bench.plain import PlainExport
    from admtrt.bench.report import Measurement
    from admtrt.bench.rows import Device, Row
    from admtrt.bench.subject import Subject


def run_bench(
    subject: Subject,
    rows: Sequence[Row],
    *,
    batches: Sequence[int],
    repeat: int,
    device: Device,
    threads: int,
    sampling_steps: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> BenchReport:
    """Measure rows on a checked subject.

    Args:
        subject: the subject.
        rows: in the order of the tables.
        batches: batch sizes, one after the other.
        repeat: number of timed steps per row and batch size.
        device: device of PyTorch's rows and of the peak.
        threads: CPU threads of every library.
        sampling_steps: number of steps of a whole run to time once, or None.
        note: called with progress messages.

    Raises:
        UserError: if the subject cannot be used, or the process does not have that many steps.
    """
    manifest = subject.check()
    if sampling_steps is not None:
        asked = with_choices(manifest.sampler, manifest.diffusion, {"steps": sampling_steps})
        sampling_schedule(manifest.diffusion, asked.unguided)  # raises now if impossible
    nodes = {"bundle": {name: graph.nodes for name, graph in manifest.graphs.items()}}
    note("measuring the start-up")
    startup = measure_startup(subject.bundle)
    with contextlib.ExitStack() as stack:
        yardstick, operations, gpu = None, dict[str, int](), None
        if find_spec("torch") is not None:
            from admtrt.bench.yardstick import Yardstick

            try:
                yardstick = Remote(Yardstick, device, threads, log=subject.scratch / "yardstick.log")
                stack.callback(yardstick.close)
                operations = yardstick.call("count_operations", manifest.network, manifest.classifier)
                gpu = yardstick.call("gpu")
            except RemoteError as error:
                yardstick = None
                note(f"no peak and no operations: PyTorch fails here ({error})")
        exports: dict[int, PlainExport] = {}
        faults = _missing_packages(rows)
        if any(row.name == PLAIN for row in rows) and PLAIN not in faults:
            exports, fault = _plain_exports(subject, batches, note)
            faults |= {PLAIN: fault} if fault else {}
            nodes.update({f"{PLAIN}, batch {batch}": dict(made.nodes) for batch, made in exports.items()})
        contenders: dict[Row, RemoteRow | str] = {}
        for row in rows:
            if row.name in faults:
                contenders[row] = faults[row.name]
                continue
            note(f"opening {row}")
            log = subject.scratch / f"{row.name}-{row.precision}.log"
            try:
                remote = Remote(Contender, row, subject, device, threads, exports, log=log)
            except RemoteError as error:
                contenders[row] = str(error)
                continue
            stack.callback(remote.close)
            contenders[row] = remote
        bench = Bench(contenders, yardstick, sum(operations.values()) or None, note)
        guides = {f"{GUIDE_GRAPH}{name}" for name in manifest.guides}
        operations |= {
            name: graph.operations
            for name, graph in manifest.graphs.items()
            if name in guides and graph.operations is not None
        }
        rounds = {batch: bench.run(batch, repeat, sampling_steps) for batch in batches}
    if manifest.guides:
        note("measuring the memory of guided runs")
    measurements = tuple(
        replace(m, guide_memory=_guide_memory(m, subject, device, threads))
        for made in rounds.values()
        for m in made.measurements
    )
    return BenchReport(
        subject=subject.name,
        machine=describe_machine(threads, gpu),
        measurements=measurements,
        reference={batch: made.reference for batch, made in rounds.items() if made.reference},
        nodes=nodes,
        operations=operations,
        peaks=dict(bench.peaks),
        startup=startup,
        sampling_steps=sampling_steps,
    )


def _guide_memory(m: Measurement, subject: Subject, device: Device, threads: int) -> dict[str, int]:
    """Peak memory of a process of its own for each guide of a row; without those that fail."""
    found = {}
    for guide in m.guides:
        log = subject.scratch / f"{m.row.name}-{m.row.precision}-{guide}.log"
        with contextlib.suppress(RemoteError):
            found[guide] = run_remotely(
                measure_guide_memory, m.row, subject, device, threads, guide, m.batch, log=log
            )
    return found


def _missing_packages(rows: Sequence[Row]) -> dict[str, str]:
    """Reasons why rows cannot be measured here, by name."""
    faults = {}
    for row in rows:
        try:
            row.require()
        except MissingDependencyError as error:
            faults[row.name] = f"{error.message}. {error.hint}"
    return faults


def _plain_exports(
    subject: Subject, batches: Sequence[int], note: Callable[[str], None]
) -> tuple[dict[int, PlainExport], str]:
    """PyTorch's own exports, one a batch size, in processes that take their memory with them; or why not."""
    from admtrt.bench.plain import export_plain

    exports = {}
    for batch in batches:
        note(f"exporting by PyTorch alone, batch {batch}")
        try:
            exports[batch] = run_remotely(export_plain, subject, batch, log=subject.scratch / "plain.log")
        except RemoteError as error:
            return {}, str(error)
    return exports, ""
