"""``bench --against``: two versions, interleaved."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bundles import CLASSIFIER, UNET, exported_bundle, network

import admtrt
from admtrt.bench.against import PAIRS_PER_PROCESS, Comparison, interleaved
from admtrt.cli import run
from admtrt.models.checkpoint import save_checkpoint

ROOT = Path(admtrt.__file__).parents[1]


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[str]:
    given = []
    for name, config in (("unet", UNET), ("classifier", CLASSIFIER)):
        loaded = network(config)
        save_checkpoint(tmp_path / f"{name}.safetensors", loaded.module.state_dict(), loaded.config)
        given += [f"--{name}", str(tmp_path / f"{name}.safetensors")]
    return given


def test_pairs_are_taken_in_the_order_abba_by_processes_started_anew() -> None:
    """The start of a process is a capital letter, its end a full stop."""
    taken: list[str] = []

    @contextlib.contextmanager
    def process(name: str, seconds: float) -> Iterator[Callable[[], float]]:
        def draw() -> float:
            taken.append(name)
            return seconds

        taken.append(name.upper())
        yield draw
        taken.append(".")

    openings = [functools.partial(process, "a", 1.0), functools.partial(process, "b", 2.0)]
    assert interleaved(openings, PAIRS_PER_PROCESS + 2) == [[1.0] * 7, [2.0] * 7]
    assert "".join(taken) == "ABabbaabbaab..BAbaab.."


def test_the_ratio_is_the_median_of_the_pairs() -> None:
    found = Comparison("row", 1, "5", ours=(1.0, 1.0, 9.0), theirs=(1.0, 0.5, 1.0))
    assert found.ratio == 2.0
    assert found.to_dict()["ratio"] == 2.0


def test_what_cannot_be_compared(
    tmp_path: Path, checkpoints: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(exported_bundle("guided"))
    for options, complaint in (
        ([*checkpoints, "--against", str(tmp_path)], "has no environment"),
        (["--against", str(ROOT)], "needs the checkpoints"),
        (["--against", str(ROOT), "--backend", "torch"], "row 'torch fp32' is no backend"),
    ):
        assert run(["bench", bundle, *options]) == 2
        assert complaint in capsys.readouterr().err


def test_steps_that_a_process_has_not_are_refused_before_anything_is_timed(
    tmp_path: Path, checkpoints: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "other" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    command = ["bench", str(exported_bundle("guided")), *checkpoints, "--against", str(tmp_path / "other")]
    work = tmp_path / "work"
    assert run([*command, "--backend", "onnxruntime", "--sampling", "60", "--work", str(work)]) == 2
    assert "steps 'ddim60'" in capsys.readouterr().err
    assert [path.name for path in work.iterdir()] == ["ours.bundle"]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="this checkout has no environment of its own")
def test_a_version_against_itself(
    tmp_path: Path, checkpoints: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", str(exported_bundle("guided")), *checkpoints, "--against", str(ROOT), "--json"]
    code = run([*command, "--backend", "onnxruntime", "--repeat", "3", "--work", str(tmp_path / "work")])
    compared = json.loads(capsys.readouterr().out)["comparisons"]
    assert [(one["row"], one["steps"], len(one["ours"])) for one in compared] == [
        ("onnxruntime fp32", "5", 3), ("onnxruntime fp32", "ddim5", 3),
    ]  # fmt: skip
    assert code == int(any(one["ratio"] > 1.01 for one in compared))
