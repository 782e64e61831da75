"""Runs that are killed, resumed, refused or diverge."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Container
from pathlib import Path

import pytest
import torch
import training_runs
from training_runs import in_python, lines, run, same, tiny_config, weights

from admtrt.config_files import save_config
from admtrt.errors import CheckpointError, ConfigError, OutputError, TrainingDivergedError
from admtrt.training import learner as learner_module

STATE = "unet/state.safetensors"


def test_a_run_killed_again_and_again_gives_the_same_bits(tmp_path):
    config = tiny_config(
        unet={"dropout": 0.3},
        data={"hold_out": 0.1},
        steps=13,
        checkpoint_every=3,
        sample_every=4,
        ema_rates=[0.5, 0.9],
        timestep_sampler="loss_second_moment",
        lr_schedule="linear",
        accumulate=2,
    )
    save_config(config, tmp_path / "run.toml")
    fired = in_python(training_runs.__file__, "fire", tmp_path / "run.toml", tmp_path, 20)
    had_state = json.loads(fired)
    assert len(had_state) == 20
    assert any(had_state), "no kill came after a checkpoint: the test shows nothing"
    for name in (STATE, "unet.safetensors", "unet-ema-0.9.safetensors"):
        assert same(tmp_path / "killed" / name, tmp_path / "whole" / name), name
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "whole")] == [2, 4, 6, 8, 10, 12, 13]
    files = [
        sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("killed", "whole")
    ]
    assert files[0] == files[1]  # nothing half-written is left


WRITER_THAT_DIES = """
import os, sys
from pathlib import Path
sys.path.append(sys.argv[4])
from admtrt.config_files import load_config
from admtrt.run_config import RunConfig
from admtrt.models import weights
from training_runs import run

def save_file(tensors, file, metadata):
    (Path(file).parent / ".tmpAbCdEf").write_bytes(b"half")
    if file.name == sys.argv[3]:
        os._exit(0)
    really(tensors, file, metadata=metadata)
    (Path(file).parent / ".tmpAbCdEf").unlink()

really, weights.save_file = weights.save_file, save_file
run(load_config(RunConfig, Path(sys.argv[1])), Path(sys.argv[2]))
raise SystemExit("the file was never written")
"""


@pytest.mark.parametrize("name", ["unet.safetensors", "unet-ema-0.9.safetensors", "state.safetensors"])
def test_what_a_writer_killed_midway_leaves_is_removed(tmp_path, name):
    config = tiny_config(steps=2, ema_rates=[0.5, 0.9])
    save_config(config, tmp_path / "run.toml")
    in_python(
        "-c", WRITER_THAT_DIES, tmp_path / "run.toml", tmp_path / "out", name, Path(__file__).parents[2]
    )
    assert any(path.name == ".tmpAbCdEf" for path in tmp_path.rglob("*"))
    run(config, tmp_path / "out", resume=True)
    assert not [path for path in (tmp_path / "out").rglob("*") if "tmp" in path.name]


def test_more_steps_go_on_as_if_never_stopped(tmp_path):
    run(tiny_config(unet={"dropout": 0.3}, steps=4), tmp_path / "parts")
    result = run(tiny_config(unet={"dropout": 0.3}, steps=8), tmp_path / "parts", resume=True)
    run(tiny_config(unet={"dropout": 0.3}, steps=8), tmp_path / "whole")
    assert result.step == 8
    assert same(tmp_path / "parts" / STATE, tmp_path / "whole" / STATE)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_resuming_a_finished_run_restores_its_weights(tmp_path):
    run(tiny_config(), tmp_path)
    before = weights(tmp_path / "unet.safetensors")
    (tmp_path / "unet.safetensors").unlink()
    result = run(tiny_config(), tmp_path, resume=True)
    assert result.step == 4
    assert result.metrics["step"] == 4
    after = weights(tmp_path / "unet.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_fewer_steps_than_were_taken_are_refused_and_nothing_changes(tmp_path):
    run(tiny_config(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"train_unet\.steps is 2.*step 4"):
        run(tiny_config(steps=2), tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_existing_run_is_neither_continued_nor_replaced_unasked(tmp_path):
    run(tiny_config(), tmp_path)
    before = (tmp_path / STATE).read_bytes()
    with pytest.raises(OutputError, match=r"already exists.*\n.*--resume.*--overwrite"):
        run(tiny_config(), tmp_path)
    assert (tmp_path / STATE).read_bytes() == before


def test_overwrite_begins_anew_and_leaves_other_files_alone(tmp_path):
    run(tiny_config(steps=6, ema_rates=[0.5, 0.9], sample_every=3), tmp_path)
    (tmp_path / "unet" / "mine.txt").touch()
    (tmp_path / "classifier.safetensors").touch()
    result = run(tiny_config(seed=1), tmp_path, overwrite=True)
    assert result.step == 4
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]
    assert not (tmp_path / "unet-ema-0.9.safetensors").exists()
    assert not (tmp_path / "unet/samples").exists()
    assert (tmp_path / "unet" / "mine.txt").exists()
    assert (tmp_path / "classifier.safetensors").exists()


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(OutputError, match="both"):
        run(tiny_config(), tmp_path, resume=True, overwrite=True)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (tiny_config(lr=2e-3), "train_unet.lr is 0.001 there and 0.002 now"),
        (tiny_config(unet={"dropout": 0.5}), r"unet\.dropout"),
        (tiny_config(data={"random_flip": True}), r"data\.random_flip"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, changed, key):
    run(tiny_config(), tmp_path)
    with pytest.raises(OutputError, match=key):
        run(changed, tmp_path, resume=True)


def test_settings_that_change_no_step_may_change(tmp_path):
    run(tiny_config(), tmp_path)
    changed = tiny_config(steps=5, log_every=1, checkpoint_every=5, sample_every=5, max_nan_steps=2)
    assert run(changed, tmp_path, resume=True).step == 5
    assert (tmp_path / "unet/samples/step-000005.png").exists()


def test_a_run_without_its_configuration_is_not_recognised(tmp_path):
    run(tiny_config(), tmp_path)
    (tmp_path / "unet/config.toml").unlink()
    with pytest.raises(OutputError, match=r"config\.toml is missing"):
        run(tiny_config(), tmp_path, resume=True)


def test_a_damaged_state_is_the_users_error(tmp_path):
    run(tiny_config(), tmp_path)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot read the training state"):
        run(tiny_config(), tmp_path, resume=True)


def test_a_state_of_another_version_is_refused(tmp_path, monkeypatch):
    run(tiny_config(), tmp_path)
    monkeypatch.setattr("admtrt.training.state._VERSION", 99)
    with pytest.raises(CheckpointError, match="version 99"):
        run(tiny_config(), tmp_path, resume=True)


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        run(tiny_config(), tmp_path / "file")


def poison(monkeypatch, steps: Container[int]) -> None:
    """Give NaN losses in the given steps, counted from 0."""
    real = learner_module.Learner.values

    def values(self, *arguments):
        found = real(self, *arguments)
        return {k: v * float("nan") for k, v in found.items()} if self.step in steps else found

    monkeypatch.setattr(learner_module.Learner, "values", values)


def test_a_few_nan_steps_are_skipped(tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3})
    assert run(tiny_config(steps=6, max_nan_steps=3), tmp_path).step == 6
    before, during, after = lines(tmp_path)
    assert (before["skipped"], during["skipped"], after["skipped"]) == (0, 1, 0)
    assert "loss" not in during
    assert after["loss"] > 0


def test_nan_again_and_again_stops_the_run_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    run(tiny_config(steps=4), tmp_path / "good")
    poison(monkeypatch, range(4, 1000))
    with pytest.raises(TrainingDivergedError, match="3 steps in a row, up to step 7") as error:
        run(tiny_config(steps=12, max_nan_steps=3), tmp_path / "nan")
    assert str(tmp_path / "nan" / STATE) in error.value.hint
    assert "of step 4, is kept in" in error.value.hint
    assert same(tmp_path / "good" / STATE, tmp_path / "nan" / STATE)


def test_nan_that_ends_in_time_does_not_stop_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2, 4, 5})
    assert run(tiny_config(steps=8, max_nan_steps=3), tmp_path).step == 8


def test_nan_before_the_first_state_says_that_nothing_is_kept(tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2, 3})
    with pytest.raises(TrainingDivergedError, match="No state had been saved"):
        run(tiny_config(steps=6, max_nan_steps=3, checkpoint_every=6), tmp_path)


def test_a_gradient_that_is_not_finite_skips_the_step_too(tmp_path, monkeypatch):
    real = learner_module.Learner.values

    def values(self, *arguments):
        found = real(self, *arguments)
        # sqrt has an infinite slope at 0: the loss is finite, its gradient is not.
        return found | {"loss": found["loss"] + (found["loss"] - found["loss"]).sqrt()}

    monkeypatch.setattr(learner_module.Learner, "values", values)
    with pytest.raises(TrainingDivergedError):
        run(tiny_config(max_nan_steps=2), tmp_path)


# --- signals ----------------------------------------------------------------------------------------------


def interrupted_after(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, steps: int, *, times: int = 1
) -> None:
    """Send a signal in the middle of a step."""
    really = learner_module.Learner.update

    def update(self, data):
        if self.step == steps - 1:
            for _ in range(times):
                signal.raise_signal(number)
        really(self, data)

    monkeypatch.setattr(learner_module.Learner, "update", update)


@pytest.fixture
def terminable():
    """Signals raise, as on the command line: one with its default effect would end the tests."""

    def stop(number, _):
        raise SystemExit(128 + number)

    handlers = {signal.SIGTERM: stop, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    left = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert left == handlers, "a handler was not put back"


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
@pytest.mark.usefixtures("terminable")
def test_a_signal_is_heard_at_the_end_of_the_step_and_its_state_kept(
    tmp_path, monkeypatch, capsys, number, error
):
    config = tiny_config(steps=5, checkpoint_every=1000, unet={"dropout": 0.3})
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupted_after(patched, number, 3)
        with pytest.raises(error):
            run(config, tmp_path / "stopped")
    said = capsys.readouterr().err
    assert "unet: stopped after step 3: the state of step 3 is kept; go on with --resume" in said
    assert (tmp_path / "stopped" / "unet.safetensors").exists()
    assert run(config, tmp_path / "stopped", resume=True).step == 5
    for name in (STATE, "unet.safetensors"):
        assert same(tmp_path / "stopped" / name, tmp_path / "whole" / name)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


@pytest.mark.usefixtures("terminable")
@pytest.mark.parametrize(("every", "kept"), [(1000, "no state is kept"), (2, "the state of step 2 is kept")])
def test_a_second_signal_stops_at_once_and_says_what_is_kept(tmp_path, monkeypatch, capsys, every, kept):
    interrupted_after(monkeypatch, signal.SIGINT, 3, times=2)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(checkpoint_every=every), tmp_path)
    assert f"unet: stopped after step 2: {kept}" in capsys.readouterr().err
    assert (tmp_path / STATE).exists() == (every == 2)


@pytest.mark.usefixtures("terminable")
def test_a_signal_in_the_last_step_ends_nothing_early(tmp_path, monkeypatch):
    interrupted_after(monkeypatch, signal.SIGTERM, 4)
    assert run(tiny_config(), tmp_path).step == 4
    assert (tmp_path / "unet.safetensors").exists()


@pytest.mark.usefixtures("terminable")
def test_a_signal_among_skipped_steps_keeps_the_state_of_before(tmp_path, monkeypatch, capsys):
    config = tiny_config(steps=9, lr=1e30, log_every=1, checkpoint_every=1, max_nan_steps=8)
    interrupted_after(monkeypatch, signal.SIGINT, 6)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path)
    kept = int(capsys.readouterr().err.split("the state of step ")[1].split()[0])
    assert 0 < kept < 6


@pytest.mark.parametrize("damage", ["[" * 100_000, "3", "[]", '{"step": "2"}', '{"loss": 1}', "\xff"])
def test_damaged_metrics_are_cut_where_the_damage_begins(tmp_path, damage):
    run(tiny_config(steps=2), tmp_path)
    kept = lines(tmp_path)
    with (tmp_path / "unet" / "metrics.jsonl").open("a", encoding="latin-1") as opened:
        opened.write(f"{damage}\n")
    run(tiny_config(steps=4), tmp_path, resume=True)
    assert lines(tmp_path)[:1] == kept
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]


def test_a_pipe_in_place_of_the_state(tmp_path):
    run(tiny_config(), tmp_path)
    (tmp_path / STATE).unlink()
    os.mkfifo(tmp_path / STATE)
    with pytest.raises(CheckpointError, match="it is no regular file"):
        run(tiny_config(), tmp_path, resume=True)
