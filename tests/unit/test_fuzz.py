"""Fuzzed files cause no traceback, no hang and bounded memory; see :mod:`fuzzing`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from fuzzing import Kinds
from limited import Worker

SHARE = {
    "pt bytes": 2000,
    "pt pickle": 1500,
    "pt opcodes": 1500,
    "safetensors bytes": 1000,
    "safetensors header": 1000,
    "manifest": 1000,
    "graph": 400,
    "npz bytes": 300,
    "npz header": 300,
    "train toml": 500,
    "settings toml": 500,
}
"""Of 10,000 files: those most read from strangers have the larger part."""
PRELOADED = (
    "torch",
    "safetensors.torch",
    "onnxruntime",
    "admtrt.commands.checkpoints",
    "admtrt.models.checkpoint",
    "admtrt.runtime.bulk",
    "admtrt.runtime.two_stage",
    "admtrt.training.loop",
)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    return Kinds(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(*PRELOADED) as made:
        yield made


def fuzz(worker: Worker, kinds: Kinds, kind: str, numbers: range) -> None:
    codes: Counter[int | str] = Counter()
    for number in numbers:
        outcome = worker.run(kinds.make(kind, number), seconds=30)
        assert outcome.sound, f"{kind} {number}: {outcome}"
        assert outcome.grown < 300 << 20, f"{kind} {number}: {outcome}"
        assert len(outcome.err) < 10_000, f"{kind} {number}: {outcome}"
        codes[outcome.code] += 1
    assert codes[2], f"nothing was refused, so that nothing was tried: {codes}"


@pytest.mark.parametrize("kind", SHARE)
def test_some_broken_files(worker: Worker, kinds: Kinds, kind: str) -> None:
    fuzz(worker, kinds, kind, range(SHARE[kind] // 100))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARE)
def test_thousands_of_broken_files(worker: Worker, kinds: Kinds, kind: str) -> None:
    fuzz(worker, kinds, kind, range(10_000, 10_000 + SHARE[kind]))


def test_every_kind_has_its_share(kinds: Kinds) -> None:
    assert set(SHARE) == set(kinds.makers)
    assert sum(SHARE.values()) == 10_000


def test_the_harness_notices() -> None:
    """It detects a hang, a crash and a traceback, and continues after each."""
    with Worker("fuzz_faults") as worker:
        assert worker.run(["hang"], seconds=1).code == "hang"
        assert worker.run(["die"]).code == "crash"
        assert worker.run(["raise"]).code == "traceback"
        grown = worker.run(["grow"])
        assert grown.grown > 300 << 20
        assert worker.run(["anything"]).sound
