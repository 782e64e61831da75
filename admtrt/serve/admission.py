"""Admission control: by the amount of queued work, the number of requests, and deadlines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.serve.flight import Flight, Row
    from admtrt.serve.station import Station


class RefusedError(Exception):
    """The request is refused for now.

    Attributes:
        reason: ``draining``, ``not_ready``, ``queue_full``, ``client_share`` or ``deadline``.
        message: for people.
        retry_after: seconds after which to retry.
    """

    def __init__(self, reason: str, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after = max(1.0, retry_after)


@dataclass(frozen=True)
class Bounds:
    """Limits on the admitted requests.

    Attributes:
        requests: most at once: each holds memory and usually a connection.
        timeout: default time limit of a request, in seconds.
        client_share: the largest fraction of the work that fits into ``timeout`` that one client may have
            queued.
    """

    requests: int = 256
    timeout: float = 300.0
    client_share: float = 0.5


def row_seconds(stations: Sequence[Station], row: Row) -> float:
    """Machine time that a row still needs: its share of full steps."""
    draw, seconds = row.flight.draw, 0.0
    for stage in range(row.stage, len(draw.steps)):
        cap, costs, steps = stations[stage].sizes.cap, stations[stage].costs, draw.steps[stage]
        left = row.to_go if stage == row.stage else steps
        share = left / steps if steps else 0.0
        seconds += share * costs.of(draw.runs[stage], cap) / cap
    return seconds


def own_seconds(stations: Sequence[Station], flight: Flight, beside: int) -> float:
    """Time from a request's first step to its last, beside ``others`` other rows."""
    seconds, draw = 0.0, flight.draw
    for stage, runs in enumerate(draw.runs):
        cap, costs = stations[stage].sizes.cap, stations[stage].costs
        rows = min(beside + len(flight.rows), cap)
        waves = -(-len(flight.rows) // cap)
        seconds += waves * costs.of(runs, rows)
    return seconds


def admit(
    flight: Flight, flights: Sequence[Flight], stations: Sequence[Station], bounds: Bounds, now: float
) -> float:
    """Admit a request and return the seconds after which it is expected to be done.

    Args:
        flight: the new request.
        flights: the admitted requests.
        stations: the model's stations.
        bounds: the server's limits.
        now: in the engine's clock.

    A request without a deadline (a job) is refused only for the number of admitted requests.

    Raises:
        RefusedError: if the queue or the client's share of it is full, or the deadline cannot be met.
    """
    work = {one: sum(row_seconds(stations, row) for row in one.rows if row.result is None) for one in flights}
    before = [one for one in flights if flight.priority == "batch" or one.priority == "interactive"]
    ahead = sum(work[one] for one in before)
    if len(flights) >= bounds.requests:
        first = min(work.values()) if work else 1.0
        raise RefusedError("queue_full", f"{len(flights)} requests are in work; try again later", first)
    total = sum(row_seconds(stations, row) for row in flight.rows)
    if total > bounds.timeout and flight.deadline != math.inf:
        raise RefusedError(
            "queue_full",
            f"the request needs about {total:.0f} s of this machine; {bounds.timeout:.0f} s are allowed",
            total,
        )
    theirs = sum(work[one] for one in flights if one.client == flight.client)
    if theirs and theirs + total > bounds.client_share * bounds.timeout:
        raise RefusedError(
            "client_share",
            f"this client has {theirs:.0f} s of work waiting, and {bounds.client_share:.0%} of "
            f"{bounds.timeout:.0f} s is one client's share",
            theirs + total - bounds.client_share * bounds.timeout,
        )
    beside = sum(len(one.rows) for one in flights)
    expected = ahead + own_seconds(stations, flight, beside)
    if flight.deadline is not None and now + expected > flight.deadline:
        raise RefusedError(
            "deadline",
            f"the request would be done in about {expected:.1f} s, and was to be done in "
            f"{flight.deadline - now:.1f} s",
            now + expected - flight.deadline,
        )
    return expected
