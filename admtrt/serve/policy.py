"""Policies that choose the rows of the next step. Pure: no clock, no thread."""

from __future__ import annotations

import heapq
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from admtrt.serve.flight import Flight, Row

Order = Literal["fair", "shortest", "static", "static-any"]
QUANTUM = 8
"""Steps after which rows are chosen again even if no request came or went."""
BATCH_SHARE = 0.1
"""Minimum fraction of row-steps for requests of the class ``batch``."""


class Policy(Protocol):
    """Chooses rows.

    Attributes:
        whole_batches: whether requests end only when their whole batch ends.
    """

    whole_batches: bool

    def choose(self, flights: Sequence[Flight], running: Sequence[Row], stage: int, cap: int) -> list[Row]:
        """Choose at most ``cap`` unfinished rows of a stage.

        Args:
            flights: the requests in order of arrival.
            running: unfinished rows of the last step of this stage.
            stage: number of the stage.
            cap: the most rows of a step.
        """
        ...

    def charge(self, rows: Sequence[Row]) -> None:
        """Note that these rows took a step."""
        ...


class StepPolicy:
    """Rows join and leave at every step.

    Two classes, ``interactive`` before ``batch``. Within a class, the client with the fewest row-steps so far
    comes next (start-time fair queueing). Within a client: first come, first served. The rows of a request
    advance together, so that previews show all of them.

    Args:
        shortest: instead take rows with the fewest evaluations left first: faster for most requests, slower
            for the longest.
    """

    whole_batches = False

    def __init__(self, *, shortest: bool = False) -> None:
        self._shortest = shortest
        self._served: dict[str, float] = {}
        self._owed = 0.0  # row-steps owed to the class ``batch``
        self._contended = False

    def choose(self, flights: Sequence[Flight], running: Sequence[Row], stage: int, cap: int) -> list[Row]:
        """See :class:`Policy`."""
        self._meet(flights)
        urgent, patient = (
            list(islice(self._ordered([one for one in flights if one.priority == name], stage), cap))
            for name in ("interactive", "batch")
        )
        self._contended = bool(urgent and patient)
        beside = sum(row.flight.priority == "batch" for row in running)
        owed = -int(-self._owed // QUANTUM) if self._owed >= QUANTUM or (beside and self._owed > 0) else 0
        patient = patient[: max(cap - len(urgent), min(owed, cap))]
        return urgent[: cap - len(patient)] + patient

    def charge(self, rows: Sequence[Row]) -> None:
        """See :class:`Policy`."""
        for row in rows:
            client = row.flight.client
            self._served[client] = self._served.get(client, 0.0) + 1
        if self._contended:
            patient = sum(row.flight.priority == "batch" for row in rows)
            self._owed = max(0.0, self._owed + BATCH_SHARE * len(rows) - patient)
        else:
            self._owed = 0.0

    def _meet(self, flights: Sequence[Flight]) -> None:
        """Start new clients at the smallest count of the others: they have no claim to past steps."""
        here = dict.fromkeys(flight.client for flight in flights)
        least = min((self._served[client] for client in here if client in self._served), default=0.0)
        self._served = {client: self._served.get(client, least) for client in here}

    def _ordered(self, flights: Sequence[Flight], stage: int) -> Iterator[Row]:
        queues: dict[str, deque[Row]] = {}
        for flight in flights:
            # Keeps rows at similar steps, though rows are chosen only every QUANTUM steps.
            for row in sorted(flight.rows, key=lambda row: row.done // QUANTUM):
                if row.stage == stage and row.to_go:
                    queues.setdefault(flight.client, deque()).append(row)
        if self._shortest:
            rows = [row for queue in queues.values() for row in queue]
            yield from sorted(rows, key=lambda row: (row.flight.total - row.done, row.flight.arrived))
            return
        heap = [(self._served[client], place, client) for place, client in enumerate(queues)]
        heapq.heapify(heap)
        while heap:
            served, place, client = heap[0]
            yield queues[client].popleft()
            if queues[client]:
                heapq.heapreplace(heap, (served + 1, place, client))
            else:
                heapq.heappop(heap)


class StaticPolicy:
    """Static batching, for comparison: a batch of waiting requests runs to its end before the next begins.

    Args:
        any_settings: also batch requests with different settings; they are answered when the batch ends.
    """

    def __init__(self, *, any_settings: bool = False) -> None:
        self.whole_batches = True
        self._any = any_settings

    def choose(self, flights: Sequence[Flight], running: Sequence[Row], stage: int, cap: int) -> list[Row]:
        """See :class:`Policy`."""
        if running:
            return list(running)
        waiting = [row for flight in flights for row in flight.rows if row.stage == stage and row.to_go]
        same = [
            row for row in waiting if self._any or row.flight.draw.settings == waiting[0].flight.draw.settings
        ]
        return same[:cap]

    def charge(self, rows: Sequence[Row]) -> None:
        """Do nothing: static batching keeps no account."""


def policy_named(name: Order) -> Policy:
    """The policy of this name."""
    if name.startswith("static"):
        return StaticPolicy(any_settings=name == "static-any")
    return StepPolicy(shortest=name == "shortest")
