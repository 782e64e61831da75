"""Training that diverges, settings that contradict each other, bad files, several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from training_runs import NETWORK, TRAINING, lines, run, tiny_config, weights

import admtrt
from admtrt.config_files import load_config, save_config
from admtrt.errors import ConfigError, OutputError, TrainingDivergedError
from admtrt.run_config import RunConfig
from admtrt.training import metrics as metrics_module
from admtrt.training.learner import Learner
from admtrt.training.metrics import MetricsLog

STATE = "unet/state.safetensors"


def poison(monkeypatch, steps):
    """Give NaN losses in the given steps, counted from 0."""
    real = Learner.values

    def values(self, *arguments):
        found = real(self, *arguments)
        return {k: v * float("nan") for k, v in found.items()} if self.step in steps else found

    monkeypatch.setattr(Learner, "values", values)


# --- divergence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensorboard", [False, True])
def test_divergence_with_images_held_out_ends_in_the_error(tmp_path, tensorboard):
    config = tiny_config(
        steps=20, lr=1e30, log_every=1, max_nan_steps=3, tensorboard=tensorboard, data={"hold_out": 0.1}
    )
    with pytest.raises(TrainingDivergedError, match="3 steps in a row"):
        run(config, tmp_path)
    assert lines(tmp_path)[-1]["held_out_loss"] is None
    assert lines(tmp_path)[-1]["skipped"] == 1


def test_values_that_are_not_finite_are_null_and_not_on_the_board(tmp_path, monkeypatch):
    shown = []

    class Board:
        def __init__(self, *_, **__):
            pass

        def add_scalar(self, *arguments):
            shown.append(arguments)

    monkeypatch.setattr(metrics_module, "summary_writer", lambda: Board)
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, tensorboard=tmp_path)
    log.write({"step": 1, "a": float("nan"), "b": float("inf"), "c": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": 2.0}\n'
    assert log.last == {"step": 1, "a": None, "b": None, "c": 2.0}
    assert shown == [("c", 2.0, 1)]


def test_a_run_that_ends_in_skipped_steps_fails_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    run(tiny_config(steps=4), tmp_path / "good")
    poison(monkeypatch, {4, 5})
    with pytest.raises(
        TrainingDivergedError, match=r"2 steps in a row, up to step 6[\s\S]*of step 4, is kept"
    ):
        run(tiny_config(steps=6), tmp_path / "nan")
    for name in (STATE, "unet.safetensors"):
        good, kept = weights(tmp_path / "good" / name), weights(tmp_path / "nan" / name)
        assert good.keys() == kept.keys()
        assert all(torch.equal(good[key], kept[key]) for key in good)


def test_a_run_of_nothing_but_skipped_steps_exports_nothing(tmp_path, monkeypatch):
    poison(monkeypatch, range(4))
    with pytest.raises(TrainingDivergedError, match="No state had been saved"):
        run(tiny_config(steps=4), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_run_whose_last_step_counts_again_is_exported(tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2})
    assert run(tiny_config(steps=4), tmp_path).weights[0].exists()


# --- settings that contradict each other -------------------------------------------------------------------


def fixed_variance(**training):
    """UNet and upsampler without variance channels."""
    data = tiny_config().model_dump(mode="json", exclude_unset=True)
    data["diffusion"]["variance_type"] = "fixed_small"
    data["unet"] = NETWORK | {"learn_sigma": False}
    data["upsampler"] = NETWORK | {"learn_sigma": False, "low_res_size": 4}
    data["train_unet"] = data["train_upsampler"] = TRAINING | training
    return RunConfig.from_dict(data)


@pytest.mark.parametrize("kind", ["unet", "upsampler"])
def test_a_loss_that_leaves_a_learned_variance_untrained_is_refused(tmp_path, kind):
    with pytest.raises(
        ConfigError, match=rf"train_{kind}\.loss is 'simple'[\s\S]*'learned_range'\n.*'hybrid'"
    ):
        run(tiny_config(loss="simple"), tmp_path, kind=kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["unet", "upsampler"])
def test_a_loss_for_a_variance_that_is_fixed_is_refused(tmp_path, kind):
    with pytest.raises(ConfigError, match=rf"train_{kind}\.loss is 'hybrid'[\s\S]*'fixed_small'\n.*'simple'"):
        run(fixed_variance(loss="hybrid"), tmp_path, kind=kind)
    assert not list(tmp_path.iterdir())


def test_a_fixed_variance_is_trained_with_the_simple_loss_unless_another_is_set(tmp_path):
    unset, simple, kl = (
        run(fixed_variance(**settings), tmp_path / str(settings)).weights[0]
        for settings in ({}, {"loss": "simple"}, {"loss": "kl"})
    )
    assert all(torch.equal(value, weights(simple)[key]) for key, value in weights(unset).items())
    assert any(not torch.equal(value, weights(kl)[key]) for key, value in weights(unset).items())


def test_the_resolved_configuration_of_a_fixed_variance_trains_again(tmp_path):
    run(fixed_variance(), tmp_path / "first")
    resolved = load_config(RunConfig, tmp_path / "first/unet/config.toml")
    assert resolved.train_unet.loss == "simple"
    run(resolved, tmp_path / "second")
    run(resolved, tmp_path / "second", kind="upsampler")
    assert run(fixed_variance(steps=5), tmp_path / "first", resume=True).step == 5


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    (tmp_path / "unet").mkdir()
    with FileLock(tmp_path / "unet/.lock"):
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(OutputError, match=r"another process is training the unet.*\n.*another --out"):
                run(tiny_config(), tmp_path, **options)
        assert [path.name for path in (tmp_path / "unet").iterdir()] == [".lock"]
    assert run(tiny_config(), tmp_path).step == 4


@pytest.mark.parametrize("steps", ["9", "ddim7", "nonsense"])
def test_a_respacing_that_the_process_cannot_have_is_refused_before_training(tmp_path, steps):
    config = tiny_config()
    sampler = config.sampler.model_copy(update={"steps": steps})
    with pytest.raises(ConfigError, match=rf"\[sampler\] cannot be used: steps '{steps}'"):
        run(config.model_copy(update={"sampler": sampler}), tmp_path)
    assert not list(tmp_path.iterdir())
    assert run(
        tiny_config(steps=1).model_copy(update={"sampler": sampler.model_copy(update={"steps": "8"})}),
        tmp_path,
    )


@pytest.mark.parametrize("steps", [3, 6])
def test_an_annealed_run_is_resumed_for_the_same_steps_only(tmp_path, steps):
    run(tiny_config(lr_schedule="linear"), tmp_path)
    with pytest.raises(OutputError, match=rf"train_unet\.steps is 4 there and {steps} now"):
        run(tiny_config(lr_schedule="linear", steps=steps), tmp_path, resume=True)
    assert run(tiny_config(lr_schedule="linear"), tmp_path, resume=True).step == 4


# --- bad files ---------------------------------------------------------------------------------------------


def folder_of_images(folder, bad):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(4):
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{'ab'[index % 2]}_{index}.png")
    for index in range(bad):
        (folder / f"a_bad{index}.png").write_text("no image")
    Image.new("L", (9, 8)).save(folder / "b_odd.png")
    return {"source": str(folder), "on_bad_file": "skip", "resize": False}


def test_files_left_out_are_named_on_stderr_and_all_of_them_in_a_file(tmp_path, capsys):
    data = folder_of_images(tmp_path / "images", bad=6)
    run(tiny_config(unet={"num_classes": None}, data=data), tmp_path / "out")
    listing = tmp_path / "out/unet/skipped.txt"
    expected = [f"{tmp_path}/images/a_bad{index}.png: not an image" for index in range(6)]
    expected.append(f"{tmp_path}/images/b_odd.png: 9x8 pixels, not 8x8")
    assert listing.read_text().splitlines() == expected
    assert capsys.readouterr().err.splitlines()[:7] == [
        f"left out 7 of 11 files, all named in {listing}:",
        *(f"  {line}" for line in expected[:5]),
        "  and 2 more",
    ]


def test_a_few_files_left_out_need_no_pointer(tmp_path, capsys):
    data = folder_of_images(tmp_path / "images", bad=0)
    config = tiny_config(unet={"num_classes": None}, data=data)
    run(config, tmp_path / "out")
    shown = capsys.readouterr().err
    assert f"left out 1 of 5 files:\n  {tmp_path}/images/b_odd.png: 9x8 pixels, not 8x8\n" in shown
    assert "more" not in shown
    (tmp_path / "images/b_odd.png").unlink()
    run(config, tmp_path / "out", resume=True)
    assert not (tmp_path / "out/unet/skipped.txt").exists()


# --- several processes -------------------------------------------------------------------------------------


def test_a_folder_refused_by_the_main_process_ends_the_others_quietly(tmp_path):
    save_config(tiny_config(), tmp_path / "run.toml")
    (tmp_path / "out/unet").mkdir(parents=True)
    (tmp_path / "out/unet/metrics.jsonl").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(Path(admtrt.__file__).parents[1]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = (
        sys.executable,
        "-m",
        "admtrt",
        "train",
        "unet",
        tmp_path / "run.toml",
        "--out",
        tmp_path / "out",
    )
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    main, other = (process.communicate(timeout=300)[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2], main + other
    assert "already exists" in main
    assert "Traceback" not in main
    assert "Traceback" not in other
    assert not any(line.startswith("error:") for line in other.splitlines())
