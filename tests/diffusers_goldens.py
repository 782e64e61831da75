"""Goldens of diffusers: its networks as folders, its trajectories as our schedules."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from goldens import arrays, metadata
from safetensors.torch import save_file

from admtrt.config import DiffusionConfig
from admtrt.models.checkpoint import CheckpointConfig, load_identified, open_checkpoint
from admtrt.models.diffusers.keys import named_sources, shape_of_part
from admtrt.models.diffusers.network import MIDDLE_NORM, read_network
from admtrt.models.diffusers.scheduler import read_scheduler
from admtrt.models.generated import generated_weight, standard_normal
from admtrt.models.identify import identify_checkpoint
from admtrt.models.settings import shapes_of_network
from admtrt.models.unet import UNet
from admtrt.schedule.levels import levels_of
from admtrt.schedule.process import betas, process_from_config
from admtrt.schedule.solvers import SOLVERS
from admtrt.schedule.solvers.ddim import ddim_rows
from admtrt.schedule.spacing import spaced_timesteps

if TYPE_CHECKING:
    from admtrt.schedule.rows import Rows
    from admtrt.schedule.sampler import SamplerConfig

META = metadata("hfddpm")
NETWORKS: dict[str, dict[str, Any]] = META["networks"]
TRAJECTORIES: dict[str, dict[str, Any]] = META["trajectories"]
TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "norm_eps": 1e-6,
}
OLD_SPELLING = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def given(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return standard_normal(f"input:{name}", shape, META["salt"])


def stored(name: str) -> np.ndarray:
    array: np.ndarray = arrays("hfddpm")[name]
    return array


def event(network: str) -> tuple[int, int, int]:
    config = NETWORKS[network]["config"]
    return config["in_channels"], config["sample_size"], config["sample_size"]


def weights(network: str, *, old: bool = False) -> dict[str, torch.Tensor]:
    """A golden network's tensors by diffusers' names; with ``old``, attention's names before v0.17."""
    made = {}
    for key, shape in NETWORKS[network]["keys"].items():
        drawn = torch.from_numpy(generated_weight(f"{network}:{key}", tuple(shape), META["salt"]))
        for new, spelled in OLD_SPELLING.items() if old and ".attentions." in key else ():
            key = key.replace(f".{new}.", f".{spelled}.")
        made[key] = drawn
    return made


def scheduler_of(network: str) -> dict[str, Any]:
    learned = {"variance_type": "learned_range"} if network == "classes" else {}
    return {"_class_name": "DDPMScheduler", "_diffusers_version": "0.42.1", **learned}


def write_folder(path: Path, network: str, *, old: bool = False) -> Path:
    """Write a golden network's folder in the form of ``DDPMPipeline.save_pretrained``."""
    for name, config in (
        ("unet/config", {"_class_name": "UNet2DModel", **NETWORKS[network]["config"]}),
        ("scheduler/scheduler_config", scheduler_of(network)),
        (
            "model_index",
            {
                "_class_name": "DDPMPipeline",
                "scheduler": ["diffusers", "DDPMScheduler"],
                "unet": ["diffusers", "UNet2DModel"],
            },
        ),
    ):
        file = path / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config))
    save_file(weights(network, old=old), path / "unet/diffusion_pytorch_model.safetensors")
    return path


def write_tiny(path: Path, *, scheduler: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write the folder of a tiny, fast network with generated weights."""
    config = TINY | changes
    network = read_network(path, config, (MIDDLE_NORM,)).config
    variance = "learned_range" if network.learn_sigma else "fixed_small"
    process = DiffusionConfig.from_dict({"variance_type": variance})
    shapes = shapes_of_network(CheckpointConfig(kind="unet", unet=network, diffusion=process))
    tensors = {
        name: torch.from_numpy(generated_weight(name, shape_of_part(shapes[key], len(names))))
        for key, names in named_sources(network, shapes)
        for name in names
    }
    for folder, name, data in (
        ("unet", "config", {"_class_name": "UNet2DModel", **config}),
        ("scheduler", "scheduler_config", {"_class_name": "DDPMScheduler", **(scheduler or {})}),
    ):
        (path / folder).mkdir(parents=True)
        (path / folder / f"{name}.json").write_text(json.dumps(data))
    save_file(tensors, path / "unet/diffusion_pytorch_model.safetensors")
    return path


def load(folder: Path) -> tuple[UNet, CheckpointConfig]:
    opened = open_checkpoint(folder)
    loaded = load_identified(identify_checkpoint(opened, kinds=("unet",)))
    assert isinstance(loaded.module, UNet)
    return loaded.module, loaded.config


def in_float64(unet: UNet) -> UNet:
    """The network in float64, including the frequencies of its time embedding."""
    half, shift = unet.config.model_channels // 2, unet.config.frequency_shift
    made = unet.double()
    made.timestep_embedding.frequencies = 10_000.0 ** -(torch.arange(half).double() / (half - shift))
    return made


def inputs_of(network: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x, t and labels. The last sample of x is small, so that the normalisations' epsilon has an effect."""
    golden = NETWORKS[network]
    scale = np.array(META["input_scale"], np.float32)[:, None, None, None]
    x = torch.from_numpy(given(network, (3, *event(network))) * scale)
    y = None if golden["labels"] is None else torch.tensor(golden["labels"])
    return x, torch.tensor(golden["t"], dtype=torch.float32), y


@cache
def process_and_sampler(name: str) -> tuple[DiffusionConfig, SamplerConfig, float | None]:
    """Process, sampler and threshold quantile of a trajectory, read from its scheduler's configuration."""
    golden = TRAJECTORIES[name]
    network = golden["network"]
    keys = NETWORKS[network]["keys"]
    config = read_network(Path("config.json"), NETWORKS[network]["config"], keys).config
    said = {"_class_name": f"{golden['method'].upper()}Scheduler", **golden["scheduler"]}
    read = read_scheduler(Path("scheduler_config.json"), said, config)
    spacing = golden["scheduler"].get("timestep_spacing", "leading")
    offset = golden["scheduler"].get("steps_offset", 0)
    chosen: dict[str, Any] = {"method": golden["method"], "steps": f"{spacing}:{golden['steps']}"}
    chosen["steps"] += f"+{offset}" if offset else ""
    if golden["method"] == "ddim":
        direction = "clipped" if golden.get("use_clipped_model_output") else "network"
        chosen |= {"eta": golden.get("eta", 0.0), "direction": direction}
    sampler = type(read.sampler).from_dict(read.sampler.to_dict() | chosen)
    assert spaced_timesteps(read.process.steps, chosen["steps"]) == tuple(golden["timesteps"][::-1])
    return read.process, sampler, read.quantile


def rows_of(name: str) -> Rows:
    """Rows of a trajectory; DDIM steps to t - floor(T / N), as in diffusers, whatever the list contains."""
    golden = TRAJECTORIES[name]
    process, sampler, _ = process_and_sampler(name)
    if golden["method"] == "ddpm":
        return SOLVERS["ddpm"].rows(levels_of(process), sampler, None)
    alpha_bar = np.cumprod(1 - betas(process))
    last = 1.0 if golden["scheduler"].get("set_alpha_to_one", True) else alpha_bar[0]
    before = np.array(golden["timesteps"][::-1]) - process.steps // golden["steps"]
    levels = np.where(before >= 0, alpha_bar[np.maximum(before, 0)], last)
    spaced = replace(process_from_config(process, sampler.steps), alpha_bar_prev=levels)
    return ddim_rows(process, spaced, sampler)


def last_noise(name: str) -> np.ndarray | float:
    """The noise that diffusers' DDPM, unlike ours, adds after a last step that is not timestep 0."""
    golden = TRAJECTORIES[name]
    last = golden["timesteps"][-1]
    if golden["method"] == "ddim" or last == 0:
        return 0.0
    assert golden["scheduler"]["variance_type"] == "fixed_large"
    process, _, _ = process_and_sampler(name)
    deviation: float = np.sqrt(1 - np.cumprod(1 - betas(process))[last])
    return deviation * noise(name, golden["steps"] - 1).astype(np.float64)


def noise(name: str, evaluation: int) -> np.ndarray:
    return given(f"noise.{name}.{evaluation}", (2, *event(TRAJECTORIES[name]["network"])))


def start(name: str) -> np.ndarray:
    return given(f"xT.{name}", (2, *event(TRAJECTORIES[name]["network"])))


def labels(name: str) -> np.ndarray | None:
    found = TRAJECTORIES[name]["labels"]
    return None if found is None else np.array(found, dtype=np.int64)


def probes(name: str, x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)[:, META[f"probes_{TRAJECTORIES[name]['network']}"]]
