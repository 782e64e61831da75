"""The engine of a model: one thread that steps all requests; they join and leave at any step."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

from admtrt.errors import AdmtrtError, RequestError
from admtrt.serve.admission import Bounds, RefusedError, admit
from admtrt.serve.costs import Costs
from admtrt.serve.flight import Done, Failed, Preview
from admtrt.serve.policy import QUANTUM, StepPolicy
from admtrt.serve.sizes import prepare
from admtrt.serve.station import Station

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from admtrt.runtime.slots import Images
    from admtrt.serve.flight import Event, Flight, Reason, Row
    from admtrt.serve.model import Model
    from admtrt.serve.policy import Policy

_MOST_FAULTS = 3  # consecutive failed steps after which the library or the device is to blame, not a request


class Engine(threading.Thread):
    """Draws the requests of one model.

    Call :meth:`warm`, then :meth:`start`. Requests are notified of events from the engine's thread.

    Args:
        model: the model to serve.
        policy: chooses the rows of each step; by default requests join and leave at every step.
        bounds: limits of admission.
        max_rows: the largest batch to try.
        memory: bytes available for copies of the weights.
        sizes: batch sizes to prepare; None lets :meth:`warm` choose.
        clock: returns seconds; replaced in tests.

    Attributes:
        counts: counters by name, since the start.
        busy: seconds spent in steps.
        stations: the stations of the model's stages, once warm.
        step_seconds: called after each step with its seconds, its batch size and its number of real rows.
    """

    def __init__(
        self,
        model: Model,
        *,
        policy: Policy | None = None,
        bounds: Bounds | None = None,
        max_rows: int = 16,
        memory: int = 2**63,
        sizes: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(daemon=True, name=f"engine {model.name}")
        self.model = model
        self.bounds = bounds or Bounds()
        self.counts: Counter[str] = Counter()
        self.busy = 0.0
        self.stations: list[Station] = []
        self.step_seconds: Callable[[float, int, int], None] = lambda *_: None
        self._policy = policy or StepPolicy()
        self._max_rows, self._memory, self._sizes = max_rows, memory, sizes
        self._clock = clock
        self._changed = threading.Condition(threading.RLock())
        self._flights: dict[int, Flight] = {}
        self._arrived = False  # set by new requests, cancellation and shutdown
        self._draining = self._aborting = False
        self._stale: set[int] = set()  # stages whose rows have to be chosen again
        self._turn = 0
        self._since_choice: Counter[int] = Counter()
        self._faults = 0
        self.fault = ""

    def warm(self, note: Callable[[str], None] = lambda _: None) -> None:
        """Measure and compile the graphs.

        Raises:
            RequestError, EngineError: as :func:`~admtrt.serve.sizes.prepare`.
        """
        for stage, pipeline in enumerate(self.model.pipelines):
            costs = Costs()
            sizes = prepare(
                pipeline,
                costs,
                max_rows=self._max_rows,
                memory=self._memory // len(self.model.pipelines),
                sizes=self._sizes,
                note=note,
            )
            self.stations.append(Station(stage, pipeline, sizes, costs))

    @property
    def ready(self) -> bool:
        """True if requests are accepted."""
        return self.is_alive() and not self._draining and not self.fault

    @property
    def draining(self) -> bool:
        """True if the engine stops once its requests are done."""
        return self._draining

    @property
    def flights(self) -> list[Flight]:
        """Number of admitted requests."""
        with self._changed:
            return list(self._flights.values())

    @property
    def graph_seconds(self) -> float:
        """Seconds spent in graphs; 0 if the steps stay on a device."""
        return sum(station.measured.busy for station in self.stations if station.measured is not None)

    def submit(self, flight: Flight) -> float:
        """Admit a request. Returns the seconds after which it is expected to be done.

        Raises:
            RefusedError: if it cannot be admitted now.
        """
        with self._changed:
            try:
                if self._draining or not self.is_alive():
                    reason = "draining" if self._draining else "not_ready"
                    raise RefusedError(
                        reason, f"model '{self.model.name}' is {reason.replace('_', ' ')}", 5.0
                    )
                now = self._clock()
                if flight.deadline is None:
                    flight.deadline = now + self.bounds.timeout
                expected = admit(flight, list(self._flights.values()), self.stations, self.bounds, now)
            except RefusedError as refusal:
                self.counts[f"refused_{refusal.reason}"] += 1
                raise
            self.let_in(flight)
        return expected

    def let_in(self, flight: Flight) -> None:
        """Take a request without admission control."""
        with self._changed:
            flight.arrived = self._clock()
            self._flights[flight.id] = flight
            self.counts["accepted"] += 1
            self._wake()

    def cancel(self, flight: Flight) -> None:
        """Cancel an unfinished request: its rows leave before the next step."""
        flight.cancelled = True
        with self._changed:
            self._wake()

    def drain(self) -> None:
        """Accept no more requests, finish the admitted ones, then stop."""
        with self._changed:
            self._draining = True
            self._wake()

    def abort(self) -> None:
        """Stop after the current step; unfinished requests fail."""
        with self._changed:
            self._draining = self._aborting = True
            self._wake()

    def _wake(self) -> None:
        self._arrived = True
        self._changed.notify()

    def run(self) -> None:
        """Step until drained."""
        try:
            while self._await_work():
                self.turn()
        except Exception as error:  # a bug must not leave clients waiting
            self.fault = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._draining = True
            why = "the engine has stopped" if self.fault else "the server was stopped before this was done"
            for flight in self.flights:
                self._fail(flight, "fault" if self.fault else "cut", why)
            for station in self.stations:
                station.close()

    def _await_work(self) -> bool:
        with self._changed:
            while not self._flights and not self._draining:
                self._changed.wait()
            if self._aborting or (self._draining and not self._flights) or self.fault:
                return False
        return True

    def turn(self) -> None:
        """Take one step of the admitted requests."""
        with self._changed:
            if self._arrived:
                self._arrived = False
                self._stale.update(range(len(self.stations)))
        self._sweep()
        flights = self.flights
        began = time.perf_counter()
        station = self._next_station(flights)
        if station is None:
            return
        for row in station.rows:
            if row.flight.started is None:
                row.flight.started = self._clock()
        failed = station.step()
        rows, size = list(station.rows), station.size
        self._policy.charge(rows)
        self._faults = self._faults + 1 if failed else 0
        if failed:
            self._stale.add(station.stage)
        for row, error in failed.items():
            self._fail(row.flight, "fault", error.message, error.hint)
        if self._faults >= _MOST_FAULTS:
            self.fault = f"{_MOST_FAULTS} steps in a row failed"
        self._after_step(station, rows)
        seconds = time.perf_counter() - began
        self.busy += seconds
        self.counts.update(steps=1, rows=len(rows), padded_rows=size - len(rows))
        self.step_seconds(seconds, size, len(rows))

    def _sweep(self) -> None:
        """End cancelled requests and those past their deadline."""
        now = self._clock()
        for flight in self.flights:
            if flight.cancelled:
                self._fail(flight, "cancelled", "the client has left")
            elif flight.deadline is not None and now > flight.deadline:
                begun = "it was drawn" if flight.started is not None else "it waited"
                self._fail(flight, "expired", f"its time was over while {begun}")

    def _next_station(self, flights: Sequence[Flight]) -> Station | None:
        """Pick the next stage, in turn. Stages whose rows may have changed choose them first."""
        for _ in self.stations:
            station = self.stations[self._turn % len(self.stations)]
            self._turn += 1
            stage = station.stage
            if stage in self._stale or self._since_choice[stage] >= QUANTUM:
                running = [row for row in station.rows if row.to_go and row.stage == stage]
                running = [row for row in running if row.flight.id in self._flights]
                chosen = self._policy.choose(flights, running, stage, station.sizes.cap)
                station.change(self._begun(chosen, station))
                self._stale.discard(stage)
                self._since_choice[stage] = 0
            if station.rows:
                self._since_choice[stage] += 1
                return station
        return None

    def _begun(self, rows: Sequence[Row], station: Station) -> list[Row]:
        """Create the state of rows. If that fails, only the row's request fails."""
        running, begun = set(station.rows), []
        for row in rows:
            if row.slots is None and row not in running:
                small = row.x_0 if row.stage else None
                try:
                    row.slots = row.flight.draw.slots(station.stage, row.index, small)
                except (ValueError, MemoryError, AdmtrtError) as error:
                    self._fail(row.flight, "fault", f"it cannot begin: {error}")
                    continue
            begun.append(row)
        return begun

    def _after_step(self, station: Station, rows: Sequence[Row]) -> None:
        ended = [row for row in rows if not row.to_go]
        due = {row.flight for row in rows if row.flight.preview_is_due()}
        if not ended and not due:
            return
        station.read()
        for row in ended:
            self._stale.add(station.stage)
            self._end_stage(row, station.x(row).copy())
        for flight in due:
            if flight.id in self._flights:
                self._show(flight, station)
        over = dict.fromkeys(row.flight for row in ended)
        if self._policy.whole_batches:
            over = {} if any(row.to_go for row in rows) else dict.fromkeys(self.flights)
        for flight in over:
            if flight.drawn and flight.id in self._flights:
                self._finish(flight)

    def _end_stage(self, row: Row, x: Images) -> None:
        try:
            x = row.flight.draw.finished(row.stage, row.index, x)
        except RequestError as error:
            self._fail(row.flight, "refused", error.message, error.hint)
            return
        row.x_0 = x
        if row.stage + 1 == len(row.flight.draw.steps):
            row.result = x
            return
        row.stage += 1
        row.to_go = row.flight.draw.steps[row.stage]
        self._stale.add(row.stage)

    def _show(self, flight: Flight, station: Station) -> None:
        for row in station.rows:
            if row.flight is flight and row.to_go and row.stage == station.stage:
                row.x_0 = station.x_0(row).copy()
        self.counts["previews"] += 1
        flight.notify(Preview(flight.step, [row.x_0 for row in flight.rows]))

    def _finish(self, flight: Flight) -> None:
        images = [row.result for row in flight.rows if row.result is not None]
        now = self._clock()
        started = flight.arrived if flight.started is None else flight.started
        self._end(flight, "done", Done(images, started - flight.arrived, now - started))

    def _fail(self, flight: Flight, reason: Reason, message: str, hint: str = "") -> None:
        self._end(flight, reason, Failed(reason, message, hint))

    def _end(self, flight: Flight, kind: str, event: Event) -> None:
        with self._changed:
            if self._flights.pop(flight.id, None) is None:
                return
            self._stale.update(range(len(self.stations)))
        self.counts[kind] += 1
        flight.notify(event)
