"""The choice of rows, simulated without a clock: order, fairness, classes, the static server."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from admtrt.serve.costs import Costs, best_size
from admtrt.serve.flight import Flight
from admtrt.serve.policy import BATCH_SHARE, QUANTUM, StaticPolicy, StepPolicy, policy_named


def flight(steps: int = 10, rows: int = 1, *, settings: Any = 0, **fields: Any) -> Flight:
    class Draw(SimpleNamespace):
        def __len__(self) -> int:
            return rows

    return Flight(Draw(steps=(steps,), settings=settings), lambda _: None, **fields)  # type: ignore[arg-type]


def simulate(policy: Any, arrivals: dict[int, list[Flight]], cap: int) -> dict[Flight, int]:
    """The step after which each request was done; requests come before the step of their number."""
    flights: list[Flight] = []
    running: list[Any] = []
    ended: dict[Flight, int] = {}
    for step in range(100_000):
        flights += arrivals.pop(step, [])
        if not flights and not arrivals:
            return ended
        running = policy.choose(flights, [row for row in running if row.to_go], 0, cap)
        assert len(running) <= cap
        assert len(set(map(id, running))) == len(running)
        policy.charge(running)
        for row in running:
            row.to_go -= 1
            row.done += 1
        for one in [one for one in flights if not any(row.to_go for row in one.rows)]:
            ended[one] = step
            flights.remove(one)
    raise AssertionError("somebody starves")


def test_one_client_is_served_in_order() -> None:
    first, second, third = flight(10), flight(10), flight(3)
    ended = simulate(StepPolicy(), {0: [first, second, third]}, cap=2)
    assert ended == {first: 9, second: 9, third: 12}


def test_a_large_request_is_split_and_blocks_nobody() -> None:
    large, small = flight(10, rows=9, client="a"), flight(10, client="b")
    ended = simulate(StepPolicy(), {0: [large], 3: [small]}, cap=4)
    assert ended[small] == 12  # a place at once, and every step
    assert ended[large] == 25  # hardly a place was ever empty: 100 row-steps by 4


def test_a_client_with_one_request_does_not_wait_for_one_with_many() -> None:
    many = [flight(10, client="many") for _ in range(200)]
    one = flight(10, client="one")
    ended = simulate(StepPolicy(), {0: many, 100: [one]}, cap=4)
    assert ended[one] == 109


def test_clients_have_equal_shares_whatever_they_ask_for() -> None:
    policy, served = StepPolicy(), Counter[str]()
    flights = [flight(10_000, rows=rows, client=name) for name, rows in (("a", 1), ("b", 8), ("c", 40))]
    for _ in range(600):
        rows = policy.choose(flights, [], 0, 4)
        policy.charge(rows)
        served.update(row.flight.client for row in rows)
    assert served["a"] == 600  # one row, at every step
    assert abs(served["b"] - served["c"]) <= 4


def test_who_was_away_is_owed_nothing() -> None:
    policy = StepPolicy()
    here = flight(10_000, rows=4, client="here")
    for _ in range(500):
        policy.charge(policy.choose([here], [], 0, 4))
    came = flight(10_000, rows=4, client="came")
    served = Counter[str]()
    for _ in range(20):
        rows = policy.choose([here, came], [], 0, 4)
        policy.charge(rows)
        served.update(row.flight.client for row in rows)
    assert abs(served["here"] - served["came"]) <= 4


@pytest.mark.parametrize("cap", [1, 3, 16])
def test_the_class_batch_gets_a_tenth(cap: int) -> None:
    policy, served, running = StepPolicy(), Counter[str](), []
    urgent = [flight(10**6, client=str(index)) for index in range(20)]
    patient = flight(10**6, rows=20, priority="batch")
    for _ in range(3000):
        running = policy.choose([*urgent, patient], running, 0, cap)
        policy.charge(running)
        served.update(row.flight.priority for row in running)
    assert BATCH_SHARE * 0.9 < served["batch"] / served.total() < BATCH_SHARE * 1.2


def test_the_class_batch_takes_what_is_free() -> None:
    urgent, patient = flight(10), flight(10, rows=8, priority="batch")
    ended = simulate(StepPolicy(), {0: [patient], 2: [urgent]}, cap=8)
    assert ended[urgent] == 11
    assert ended[patient] <= 20


def test_shortest_first() -> None:
    long, short = flight(50), flight(5)
    assert simulate(policy_named("shortest"), {0: [long], 10: [short]}, cap=1) == {short: 14, long: 54}
    assert simulate(policy_named("fair"), {0: [flight(50)], 10: [short := flight(5)]}, cap=1)[short] == 54


def test_the_static_server_batches_equal_settings_and_lets_nobody_in() -> None:
    a, b, other, late = (
        flight(10, settings=1),
        flight(10, settings=1),
        flight(5, settings=2),
        flight(10, settings=1),
    )
    ended = simulate(StaticPolicy(), {0: [a, other, b], 1: [late]}, cap=4)
    assert ended == {a: 9, b: 9, other: 14, late: 24}
    a, other, late = flight(10, settings=1), flight(5, settings=2), flight(10)
    ended = simulate(StaticPolicy(any_settings=True), {0: [a, other], 1: [late]}, cap=4)
    assert ended == {a: 9, other: 4, late: 19}


def test_the_rows_of_a_request_go_on_together() -> None:
    policy, one, running = StepPolicy(), flight(100, rows=16), []
    for _ in range(200):
        running = policy.choose([one], running, 0, 4)
        for row in running:
            row.done += 1
            row.to_go -= 1
        assert max(row.done for row in one.rows) - min(row.done for row in one.rows) <= QUANTUM


def test_previews_are_due_by_the_mean_of_the_rows() -> None:
    one = flight(10, rows=2, preview_every=4)
    one.rows[0].done = 7
    assert not one.preview_is_due()
    one.rows[1].done = 2
    assert one.preview_is_due()
    assert not one.preview_is_due()
    one.rows[1].done = 9
    assert one.preview_is_due()
    one.rows[0].done = one.rows[1].done = 10
    assert not one.preview_is_due()  # the end is no preview


def test_the_best_size_is_the_smallest_within_5_percent() -> None:
    assert best_size({1: 1.0, 2: 1.2, 4: 2.3, 8: 4.5}) == 4
    assert best_size({1: 1.0, 2: 2.0}) == 1
    assert best_size({1: 1.0, 16: 1.0}) == 16


def test_costs_follow_the_machine() -> None:
    costs = Costs()
    assert costs.seconds("unet", 4) == 0
    costs.record("unet", 1, 1.0)
    costs.record("unet", 5, 2.0)
    assert costs.seconds("unet", 3) == pytest.approx(1.5)
    assert costs.seconds("unet", 10) == pytest.approx(4.0)
    for _ in range(20):
        costs.record("unet", 1, 3.0)
    assert costs.seconds("unet", 1) == 3.0
