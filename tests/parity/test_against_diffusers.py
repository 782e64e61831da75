"""Random networks of diffusers itself, saved by it and read here."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import diffusers_goldens as goldens
import numpy as np
import pytest
import torch
from goldens import relative_error

from admtrt.errors import CheckpointError
from admtrt.models.denoiser import TorchDenoiser
from admtrt.runtime import sampler as step_core
from admtrt.runtime.sampler import advance
from admtrt.runtime.slots import Slots
from admtrt.schedule.process import betas, retained_timesteps
from admtrt.schedule.table import sampling_schedule

if TYPE_CHECKING:
    from pathlib import Path

diffusers = pytest.importorskip("diffusers")


def drawn_config(seed: int) -> dict[str, Any]:
    """A random network with options that ADM has."""
    rng = random.Random(seed)
    levels = rng.choice([1, 2, 3])
    attends = [rng.random() < 0.5 for _ in range(levels)]
    blocks = rng.random() < 0.4

    def kind(base: str, resampling: str, attending: bool, last: bool) -> str:
        if attending:
            return f"Attn{base}"
        resnet = rng.random() < 0.5 if last else blocks
        return f"Resnet{resampling}Block2D" if resnet else base

    down = [kind("DownBlock2D", "Downsample", one, level == levels - 1) for level, one in enumerate(attends)]
    up = [kind("UpBlock2D", "Upsample", one, level == 0) for level, one in enumerate(attends)][::-1]
    channels = rng.choice([1, 3])
    scale_shift = rng.random() < 0.4
    groups = rng.choice([4, 8])
    config = {
        "sample_size": rng.choice([8, 16]),
        "in_channels": channels,
        "out_channels": channels * rng.choice([1, 2]),
        "layers_per_block": rng.choice([1, 2]),
        "block_out_channels": [rng.choice([16, 24, 32]) for _ in range(levels)],
        "down_block_types": down,
        "up_block_types": up,
        "downsample_type": "resnet" if blocks else rng.choice(["conv", None]),
        "upsample_type": "resnet" if blocks else rng.choice(["conv", None]),
        "downsample_padding": rng.choice([0, 1]),
        "freq_shift": rng.choice([0, 1]),
        "flip_sin_to_cos": rng.random() < 0.5,
        "norm_eps": rng.choice([1e-6, 1e-5, 1e-3]),
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if scale_shift else rng.choice([None, groups]),
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "act_fn": rng.choice(["silu", "swish"]),
        "num_class_embeds": rng.choice([None, 5]),
        "dropout": rng.choice([0.0, 0.1]),
    }
    head = rng.choice([None, 8, 4, "missing"])
    return config if head == "missing" else config | {"attention_head_dim": head}


def saved(path: Path, config: dict[str, Any]) -> Any:
    """Diffusers' network with weights in which no layer is small, written by itself."""
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) / max(parameter[0].numel(), 1) ** 0.5)
    learned = config["out_channels"] == 2 * config["in_channels"]
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range" if learned else "fixed_large")
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(path)
    return network


@pytest.mark.parametrize("seed", range(24))
def test_random_networks(seed: int, tmp_path: Path) -> None:
    config = drawn_config(seed)
    theirs = saved(tmp_path / "folder", config)
    ours, found = goldens.load(tmp_path / "folder")
    assert found.unet is not None
    shape = (3, config["in_channels"], config["sample_size"], config["sample_size"])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.tensor([1.0, 1.0, 0.01]).view(3, 1, 1, 1)
    t = torch.tensor([0, 421, 999])
    y = None if config["num_class_embeds"] is None else torch.tensor([0, 4, 2])
    with torch.no_grad():
        expected = theirs(x, t, class_labels=y).sample
    assert relative_error(ours(x, t.float(), y).numpy(), expected.numpy()) < 2e-5


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_number_of_timesteps(spacing: str) -> None:
    for total in (400, 1000):
        scheduler = diffusers.DDPMScheduler(total, timestep_spacing=spacing)
        for count in (*range(1, 120), *range(120, total + 1, 7), total):
            scheduler.set_timesteps(count)
            expected = scheduler.timesteps.tolist()[::-1]
            if spacing == "trailing":  # rounding can add one more, of timestep -1
                expected = [timestep for timestep in expected if timestep >= 0]
            assert list(retained_timesteps(total, f"{spacing}:{count}")) == expected, (total, count)


def test_ddim_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--direction network`` gives DDIMPipeline's samples, here with a schedule of float64."""
    config = goldens.TINY | {"in_channels": 3, "out_channels": 3}
    network = saved(tmp_path / "folder", config)
    # From v no small weight divides the network's rounding, as from eps of an untrained network.
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path / "folder/scheduler")
    unet, found = goldens.load(tmp_path / "folder")
    assert found.sampler.steps == "leading:50"
    start = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas(found.diffusion)))
    scheduler.set_timesteps(50)
    x = start
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    sampler = type(found.sampler).from_dict(found.sampler.to_dict() | {"direction": "network"})
    schedule = sampling_schedule(found.diffusion, sampler)
    slots = Slots(
        x=start.numpy(),
        schedules=[schedule] * 2,
        position=np.zeros(2, dtype=np.int64),
        seeds=[0, 1],
        conditions={"unet": {}},
    )
    monkeypatch.setattr(step_core, "draw_noise", lambda *_: None)
    for _ in range(50):
        advance(slots, TorchDenoiser(unet))
    assert relative_error(slots.x, x.numpy()) < 1e-4


def test_consistency_pipeline(tmp_path: Path) -> None:
    network = saved(tmp_path / "folder", goldens.TINY)
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40)
    scheduler.save_pretrained(tmp_path / "folder/scheduler")
    unet, found = goldens.load(tmp_path / "folder")
    x = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    scheduler.set_timesteps(1)
    given, t = x * scheduler.init_noise_sigma, scheduler.timesteps[0]
    with torch.no_grad():
        out = network(scheduler.scale_model_input(given, t), t).sample
        expected = scheduler.step(out, t, given).prev_sample
    schedule = sampling_schedule(found.diffusion, found.sampler)
    slots = Slots(
        x=(schedule.init_scale * x).numpy().astype(np.float32),
        schedules=[schedule] * 2,
        position=np.zeros(2, dtype=np.int64),
        seeds=[0, 1],
        conditions={"unet": {}},
    )
    advance(slots, TorchDenoiser(unet))
    assert slots.finished.all()
    assert relative_error(slots.x, expected.numpy()) < 2e-5


def test_what_diffusers_builds_and_adm_is_not(tmp_path: Path) -> None:
    """Silence would be a wrong image: diffusers itself builds every one of these."""
    for place, change in enumerate(
        (
            {"center_input_sample": True},
            {"act_fn": "gelu"},
            {"mid_block_scale_factor": 1.4},
            {"add_attention": False},
            {"down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"]},
            {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]},
            {"class_embed_type": "timestep"},
            {"attention_head_dim": 12},
            {"time_embedding_dim": 64},
            {"downsample_padding": 2},
            {"resnet_time_scale_shift": "scale_shift"},
        )
    ):
        folder = tmp_path / f"{place}"
        saved(folder, goldens.TINY | {"norm_num_groups": 4, "block_out_channels": [32, 64]} | change)
        with pytest.raises(CheckpointError, match=next(iter(change))):
            goldens.load(folder)
