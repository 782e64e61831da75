"""The training loop: every option, the division of batches, metrics, grids and checkpoints."""

from __future__ import annotations

import dataclasses
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_runs
from PIL import Image
from training_runs import in_python, lines, run, tiny_config, weights

from admtrt.config_files import save_config
from admtrt.errors import ConfigError, DataError, MissingDependencyError
from admtrt.models.checkpoint import load_network
from admtrt.models.layers import ResBlock
from admtrt.run_config import RunConfig, TrainingConfig
from admtrt.training import learner as learner_module
from admtrt.training import loop as loop_module
from admtrt.training.engine import Division
from admtrt.training.learner import learning_rate
from admtrt.training.metrics import MetricsLog, Window
from admtrt.training.timesteps import Drawn


def final(config: RunConfig, out, kind="unet"):
    run(config, out, kind=kind)
    return weights(out / kind / "state.safetensors")


def model_of(state):
    return torch.cat([value.flatten() for key, value in sorted(state.items()) if key.startswith("model/")])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of 12 steps that the options' runs differ from."""
    return final(tiny_config(steps=12), tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "option",
    [
        {"steps": 11},
        {"batch_size": 7},
        {"lr": 2e-3},
        {"lr_schedule": "linear"},
        {"lr_schedule": "cosine"},
        {"warmup_steps": 3},
        {"weight_decay": 0.5},
        {"grad_clip": 1e-4},
        {"precision": "bf16"},
        {"loss": "vlb"},
        {"loss": "kl"},
        {"timestep_sampler": "loss_second_moment", "batch_size": 64},
        {"timestep_sampler": "stratified"},
        {"snr_weighting": "min-snr"},
        {"snr_weighting": "p2"},
        {"seed": 1},
    ],
    ids=str,
)
def test_option_changes_the_weights(option, base, tmp_path):
    if "timestep_sampler" in option:  # its base needs the same batch, large enough to fill the history
        base = final(tiny_config(steps=12, batch_size=64), tmp_path / "base")
    changed = final(tiny_config(**{"steps": 12, **option}), tmp_path / "changed")
    assert torch.isfinite(model_of(changed)).all()
    assert (model_of(changed) - model_of(base)).abs().max() > 1e-6


def test_the_same_seed_gives_the_same_bits(base, tmp_path):
    again = final(tiny_config(steps=12), tmp_path)
    assert all(torch.equal(base[key], again[key]) for key in base)


def test_dropout_changes_the_weights(base, tmp_path):
    dropped = final(tiny_config(steps=12, unet={"dropout": 0.5}), tmp_path)
    assert (model_of(dropped) - model_of(base)).abs().max() > 1e-6


def assert_same_training(one, two):
    """The same steps, of 1e-4 at most, in another order of summation: 1e-5 is a tenth of one step.

    Biases are left out: a group norm of one channel a group cancels those before it, so that their gradient
    is nothing but rounding, which Adam enlarges to whole steps.
    """
    assert one.keys() == two.keys()
    assert not torch.equal(model_of(one), model_of(two))  # or nothing was divided
    for key in one:
        if key.startswith("model/") and key.endswith("weight"):
            torch.testing.assert_close(
                two[key], one[key], rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_the_layout_in_memory_changes_nothing_but_rounding(base, tmp_path):
    saved = final(tiny_config(steps=12, channels_last=True), tmp_path)
    torch.testing.assert_close(model_of(saved), model_of(base), rtol=0, atol=2e-3)  # two steps of Adam


def test_micro_batches_give_what_the_whole_batch_gives(tmp_path):
    whole = final(tiny_config(steps=12, lr=1e-4), tmp_path / "whole")
    parts = final(tiny_config(steps=12, lr=1e-4, accumulate=4), tmp_path / "parts")
    assert_same_training(whole, parts)


@pytest.mark.slow
def test_compiled_training_is_the_same_but_for_rounding(base, tmp_path, monkeypatch):
    saved = final(tiny_config(steps=12, compile=True), tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # noqa: SLF001 - PyTorch's own
    torch.testing.assert_close(model_of(saved), model_of(base), rtol=0, atol=2e-3)  # two steps of Adam
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"train_unet\.compile .* no C\+\+ compiler"):
        run(tiny_config(compile=True), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_gradient_checkpointing_is_on_and_changes_nothing(base, tmp_path, monkeypatch):
    seen = []
    real = ResBlock.forward

    def forward(self, *arguments):
        seen.append(self.gradient_checkpointing)
        return real(self, *arguments)

    monkeypatch.setattr(ResBlock, "forward", forward)
    saved = final(tiny_config(steps=12, gradient_checkpointing=True), tmp_path)
    assert any(seen)
    torch.testing.assert_close(model_of(saved), model_of(base), rtol=0, atol=1e-6)


def test_two_processes_give_what_one_gives(tmp_path):
    config = tiny_config(
        steps=24,
        lr=1e-4,
        accumulate=2,
        data={"hold_out": 0.2, "random_flip": True},
        timestep_sampler="loss_second_moment",
        grad_clip=0.5,
    )
    save_config(config, tmp_path / "run.toml")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    in_python(
        *("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"),
        *(training_runs.__file__, "train", tmp_path / "run.toml", tmp_path / "two"),
    )
    one = final(config, tmp_path / "one")
    two = weights(tmp_path / "two/unet/state.safetensors")
    assert_same_training(one, two)
    assert torch.equal(one["timesteps/counts"], two["timesteps/counts"])
    for first, second in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert first == pytest.approx(second, rel=1e-3)


def test_division_deals_every_place_once():
    division = Division(batch_size=24, processes=3, accumulate=2)
    dealt = [
        [division.places(shard).tolist() for shard in division.shards_of(process)] for process in range(3)
    ]
    in_order = [place for process in dealt for places in process for place in places]
    assert sorted(in_order) == list(range(24))
    assert division.gathered_places().tolist() == in_order
    assert {len(places) for process in dealt for places in process} == {4}


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"batch_size 8 cannot be divided.*3 micro-batches\n.*multiple of 3"
    ):
        run(tiny_config(accumulate=3), tmp_path)
    assert not list(tmp_path.iterdir())


def test_half_precision_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(ConfigError, match="fp16"):
        run(tiny_config(precision="fp16"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_on_a_gpu_learns_and_resumes(tmp_path, precision):
    result = run(tiny_config(steps=60, precision=precision), tmp_path)
    assert result.metrics["loss"] < 0.8
    assert run(tiny_config(steps=64, precision=precision), tmp_path, resume=True).step == 64


class FakeScaler:
    """Replaces fp16's loss scaler, with a given scale."""

    def __init__(self, scale):
        self.scale, self.updates = scale, 0

    def get_scale(self):
        return self.scale

    def update(self):
        self.updates += 1


@pytest.mark.parametrize(
    ("scale", "loss_finite", "counted"), [(65536, True, 0), (65536, False, 1), (1, True, 1)]
)
def test_overflow_while_the_loss_scale_is_searched_is_no_divergence(scale, loss_finite, counted):
    scaler = FakeScaler(scale)
    learner = learner_module.Learner.__new__(learner_module.Learner)
    learner.nan_steps, learner.window = 0, Window()
    # Half precision needs a GPU; without one, this is all of it that can be tried.
    learner._accelerator = type("Engine", (), {"scaler": scaler})()  # noqa: SLF001 - see above
    nothing = Drawn(np.zeros(0), np.zeros(0), np.zeros(0))
    changed = learner._change({}, nothing, float("inf"), losses_finite=loss_finite)  # noqa: SLF001 - see above
    assert not changed
    assert learner.nan_steps == counted
    assert scaler.updates == 1


def test_learning_rate_warms_up_and_anneals():
    settings = TrainingConfig(steps=10, lr=1.0, warmup_steps=4, lr_schedule="linear")
    rates = [learning_rate(settings, step) for step in range(10)]
    expected = [min(1, (step + 1) / 4) * (1 - step / 10) for step in range(10)]
    assert rates == pytest.approx(expected)
    assert learning_rate(TrainingConfig(steps=10, lr=0.5), 9) == 0.5
    cosine = TrainingConfig(steps=12, lr=2.0, lr_schedule="cosine")
    assert [learning_rate(cosine, step) for step in (0, 4, 6, 8)] == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_the_optimiser_uses_the_rate_of_each_step(tmp_path):
    run(tiny_config(lr=1e-3, steps=4, log_every=1, lr_schedule="linear", warmup_steps=2), tmp_path)
    assert [line["lr"] for line in lines(tmp_path)] == pytest.approx([5e-4, 7.5e-4, 5e-4, 2.5e-4])


def beginning_with(path: Path, **options: Any) -> RunConfig:
    config = tiny_config(**options)
    return config.model_copy(update={"train_unet": config.train_unet.model_copy(update={"init": str(path)})})


def test_an_unconditional_unet_begins_with_a_class_conditional_one(tmp_path):
    run(tiny_config(), tmp_path / "first")
    trained = tmp_path / "first" / "unet.safetensors"
    plain = {"unet": {"num_classes": None}, "steps": 1, "lr": 1e-9, "ema_rates": [0.9]}
    run(beginning_with(trained, **plain), tmp_path / "second")
    began, made = weights(trained), weights(tmp_path / "second" / "unet.safetensors")
    assert began.keys() - made.keys() == {"label_emb.weight"}
    for key, value in made.items():
        torch.testing.assert_close(value, began[key], rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="num_classes is 10, None in the checkpoint"):
        run(beginning_with(tmp_path / "second" / "unet.safetensors"), tmp_path / "third")


def test_each_ema_rate_is_exported_with_the_run_inside(tmp_path):
    config = tiny_config(steps=3, ema_rates=[0.5, 0.9], checkpoint_every=1)
    result = run(config, tmp_path)
    assert [path.name for path in result.weights] == ["unet.safetensors", "unet-ema-0.9.safetensors"]
    for path, rate in zip(result.weights, (0.5, 0.9), strict=True):
        loaded = load_network(path, kind="unet")
        assert (loaded.config.ema_rate, loaded.config.step) == (rate, 3)
        assert loaded.config.run == config
        assert loaded.config.unet == config.unet
        assert loaded.config.class_names == tuple("0123456789")
    state = weights(tmp_path / "unet/state.safetensors")
    for key, value in weights(result.weights[1]).items():
        assert torch.equal(value, state[f"ema-0.9/{key}"])


def test_the_average_is_that_of_the_weights_of_every_step(tmp_path):
    # A run's first steps do not depend on its length.
    first, second, third = (
        final(tiny_config(steps=n, ema_rates=[0.25]), tmp_path / str(n)) for n in (1, 2, 3)
    )
    for key in (key.removeprefix("model/") for key in third if key.startswith("model/")):
        expected = first[f"ema-0.25/{key}"].double()
        for state in (second, third):
            expected = 0.25 * expected + 0.75 * state[f"model/{key}"]
        torch.testing.assert_close(third[f"ema-0.25/{key}"], expected.float(), rtol=1e-5, atol=1e-7)


def test_metrics_of_a_unet(tmp_path):
    run(tiny_config(steps=4, batch_size=32, data={"hold_out": 0.2}), tmp_path)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [2, 4]
    line = found[-1]
    assert line["images"] == 128
    assert line["loss"] == pytest.approx(line["mse"] + line["vb"], rel=1e-5)
    for name in ("loss", "mse", "vb", "held_out_loss", "held_out_mse", "held_out_vb"):
        quartiles = [line[f"{name}_q{quartile}"] for quartile in range(4)]
        assert min(quartiles) <= line[name] <= max(quartiles)
    assert line["held_out_loss"] != line["loss"]


def test_a_classifier_learns_and_reports_its_accuracy(tmp_path):
    config = tiny_config(steps=60, batch_size=32, lr=3e-3, data={"hold_out": 0.2}, log_every=20)
    result = run(config, tmp_path, kind="classifier")
    first, *_, last = lines(tmp_path, "classifier")
    assert last["loss"] < first["loss"]
    assert last["accuracy"] > 0.16  # chance is 0.1 with a standard error of 0.012
    assert last["accuracy_q0"] > last["accuracy_q3"]  # little noise is easier than nothing but noise
    assert 0 < last["held_out_accuracy"] < 1
    assert load_network(result.weights[0], kind="classifier").config.class_names == tuple("0123456789")


def test_quartiles_and_weights_of_a_window():
    window = Window()
    weights_ = np.array([1, 3, 1, 1], dtype=np.float32)
    drawn = Drawn(np.array([0, 1, 2, 7]), weights_, quartiles=np.array([0, 0, 1, 3]))
    window.add({"loss": np.array([1, 2, 3, 4], dtype=np.float32)}, drawn)
    means = window.means()
    assert means == {"loss": (1 + 6 + 3 + 4) / 6, "loss_q0": 7 / 4, "loss_q1": 3, "loss_q3": 4}
    assert Window.from_state(window.state()).means() == means


def test_metrics_of_later_steps_and_half_a_line_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(path, 2)
    assert log.last == {"step": 2}
    log.write({"step": 3, "loss": 1.0})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 1.0}\n'


@pytest.mark.parametrize("kind", ["unet", "upsampler"])
def test_sample_grids_are_drawn_when_asked(tmp_path, kind):
    run(tiny_config(steps=4, sample_every=2), tmp_path, kind=kind)
    folder = tmp_path / kind / "samples"
    assert [path.name for path in sorted(folder.iterdir())] == ["step-000002.png", "step-000004.png"]
    first, second = (np.asarray(Image.open(path)) for path in sorted(folder.iterdir()))
    assert first.shape[1] == 8 * 66 + 2
    # The digits' labels take a line above each of the two rows.
    assert first.shape[0] == 2 * (66 + (16 if kind == "unet" else 0)) + 2
    assert (first != second).any()


def test_an_upsamplers_grid_enlarges_held_out_images_where_there_are_any(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(loop_module, "draw_grid", lambda *arguments: shown.append(arguments[3]))
    run(tiny_config(steps=2, sample_every=2), tmp_path / "all", kind="upsampler")
    run(tiny_config(steps=2, sample_every=2, data={"hold_out": 0.1}), tmp_path / "held", kind="upsampler")
    assert [round(len(images), -1) for images in shown] == [1800, 180]


def test_tensorboard_is_written_when_asked(tmp_path):
    run(tiny_config(tensorboard=True), tmp_path / "on")
    run(tiny_config(), tmp_path / "off")
    assert list((tmp_path / "on/unet/tensorboard").iterdir())
    assert not (tmp_path / "off/unet/tensorboard").exists()


def test_missing_tensorboard_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"\[tensorboard\]"):
        run(tiny_config(tensorboard=True), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_network_names_its_section(tmp_path):
    config = tiny_config().model_copy(update={"classifier": None})
    with pytest.raises(ConfigError, match=r"no section \[classifier\]"):
        run(config, tmp_path, kind="classifier")


@pytest.mark.parametrize(
    "setting",
    [
        {"sample_every": 5},
        {"timestep_sampler": "loss_second_moment"},
        {"loss": "vlb"},
        {"snr_weighting": "p2"},
    ],
    ids=str,
)
def test_settings_that_a_classifier_cannot_have_are_refused(tmp_path, setting):
    with pytest.raises(ConfigError, match=f"train_classifier.{next(iter(setting))}"):
        run(tiny_config(**setting), tmp_path, kind="classifier")


def test_data_of_other_classes_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="10 classes"):
        run(tiny_config(unet={"num_classes": 3}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unconditional_unet_carries_no_class_names(tmp_path):
    config = tiny_config(unet={"num_classes": None})
    loaded = load_network(run(config, tmp_path).weights[0], kind="unet")
    assert loaded.config.class_names == ()


def test_networks_share_a_folder(tmp_path):
    for kind in ("unet", "classifier", "upsampler"):
        run(tiny_config(), tmp_path, kind=kind)
    assert {path.name for path in tmp_path.iterdir()} == {
        name for kind in ("unet", "classifier", "upsampler") for name in (kind, f"{kind}.safetensors")
    }


def test_progress_goes_to_stderr_line_by_line_without_a_terminal(tmp_path, capsys):
    result = run(tiny_config(), tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [text.split("  ")[0] for text in captured.err.splitlines()] == ["unet: step 2/4", "unet: step 4/4"]
    assert dataclasses.is_dataclass(result)
