"""Training that starts from a checkpoint, and the targets of networks that predict v."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers_goldens as goldens
import pytest
import torch
from training_runs import run

from admtrt.cli import run as run_command
from admtrt.config import DiffusionConfig
from admtrt.errors import CheckpointError, ConfigError
from admtrt.models.checkpoint import convert_checkpoint, load_network, open_checkpoint
from admtrt.models.diffusion import Diffusion
from admtrt.run_config import RunConfig
from admtrt.schedule.process import process_from_config
from admtrt.training.losses import training_loss

DATA = {"source": "digits", "image_size": 8, "channels": 1}
STEPS = {"steps": 2, "batch_size": 4, "log_every": 1, "checkpoint_every": 1, "ema_rates": [0.5]}
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample_range": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return goldens.write_tiny(tmp_path_factory.mktemp("start") / "folder", scheduler=V)


def config(init: Path, *, unet: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    sections = {"data": DATA, "train_unet": STEPS | {"init": str(init)} | training}
    return RunConfig.from_dict(sections if unet is None else sections | {"unet": unet})


def test_weights_network_and_process_are_taken(folder: Path, tmp_path: Path) -> None:
    expected, said = goldens.load(folder)
    file = tmp_path / "start.safetensors"
    convert_checkpoint(open_checkpoint(folder), file, said)
    results = []
    for place, start in enumerate((folder, file)):
        run(config(start, lr=1e-12), tmp_path / f"{place}")
        trained = load_network(tmp_path / f"{place}" / "unet.safetensors", kind="unet")
        assert trained.config.unet == said.unet
        assert trained.config.diffusion == said.diffusion
        assert trained.config.sampler == said.sampler
        results.append(trained.module.state_dict())
        for key, value in expected.state_dict().items():
            assert torch.allclose(results[-1][key], value, atol=1e-6, rtol=0), key
    assert all(torch.equal(results[0][key], value) for key, value in results[1].items())


def test_a_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    run(config(folder, lr=1e-3), tmp_path / "whole")
    run(config(folder, lr=1e-3, steps=1), tmp_path / "parts")
    run(config(folder, lr=1e-3), tmp_path / "parts", resume=True)
    whole, parts = (
        load_network(tmp_path / name / "unet.safetensors", kind="unet") for name in ("whole", "parts")
    )
    start = goldens.load(folder)[0].state_dict()
    for key, value in whole.module.state_dict().items():
        assert torch.equal(parts.module.state_dict()[key], value)
    assert any(not torch.equal(start[key], value) for key, value in whole.module.state_dict().items())


def test_a_network_that_is_given_must_be_the_same(folder: Path, tmp_path: Path) -> None:
    _, said = goldens.load(folder)
    assert said.unet is not None
    same = said.unet.to_dict()
    process = {"diffusion": said.diffusion.to_dict()}
    sections = config(folder).model_dump(exclude_unset=True) | process
    run(RunConfig.from_dict(sections | {"unet": same | {"dropout": 0.1}}), tmp_path / "out")
    for key, value in (("norm_eps", 1e-5), ("downsample_padding", "both"), ("num_res_blocks", 2)):
        with pytest.raises(ConfigError, match=f"unet.{key} is {value}"):
            run(RunConfig.from_dict(sections | {"unet": same | {key: value}}), tmp_path / key)


def test_what_cannot_be_a_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        run(config(tmp_path / "nothing.safetensors"), tmp_path / "out")
    sections = config(folder).model_dump(exclude_unset=True)
    with pytest.raises(ConfigError, match=r"unet.image_size 8 differs from data.image_size 16"):
        run(RunConfig.from_dict(sections | {"data": DATA | {"image_size": 16}}), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"unknown key 'train_classifier.init'"):
        RunConfig.from_dict({"data": DATA, "train_classifier": {"init": "a"}})
    assert not (tmp_path / "out").exists()


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[data]\nsource = "digits"\nimage_size = 8\nchannels = 1\n')
    arguments = ["train", "unet", str(file), "--out", str(tmp_path / "out"), "--steps", "1"]
    assert run_command([*arguments, "--init", str(folder), "--json", "--batch-size", "2"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["step"] == 1
    assert "8 channels a head" in shown.err
    assert f'init = "{folder}"' in (tmp_path / "out/unet/config.toml").read_text()


@pytest.mark.parametrize("zero", [False, True])
def test_the_target_of_v(zero: bool) -> None:
    process = DiffusionConfig.from_dict(
        {"mean_type": "v", "variance_type": "fixed_small", "zero_terminal_snr": zero}
    )
    diffusion = Diffusion(process, process_from_config(process), torch.float64)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 3, 1, 4, 4, generator=generator, dtype=torch.float64)
    step = torch.tensor([0, 500, 999])
    alpha_bar = diffusion.process.alpha_bar
    alpha, sigma = diffusion.at(alpha_bar**0.5, step), diffusion.at((1 - alpha_bar) ** 0.5, step)
    v = alpha * eps - sigma * x_0

    def exact(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.tolist() == [0, 500, 999]
        torch.testing.assert_close(x_t, alpha * x_0 + sigma * eps)
        return v

    assert training_loss(diffusion, exact, x_0, step, eps, kind="simple").total.max() < 1e-24
    zeros = training_loss(diffusion, lambda x, _: torch.zeros_like(x), x_0, step, eps, kind="simple")
    torch.testing.assert_close(zeros.total, v.square().flatten(1).mean(1))
    x_t = alpha * x_0 + sigma * eps
    torch.testing.assert_close(diffusion.predict(v, x_t, step).x_0, x_0)
    torch.testing.assert_close(diffusion.eps_from_x_0(x_t, step, x_0), eps)
