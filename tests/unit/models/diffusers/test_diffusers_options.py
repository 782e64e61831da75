"""Diffusers' configurations: the published ones, and the translation of every option."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_goldens import META
from hypothesis import given
from hypothesis import strategies as st

from admtrt.config import EdmConfig
from admtrt.errors import CheckpointError
from admtrt.models.checkpoint import build_network
from admtrt.models.diffusers import network as network_module
from admtrt.models.diffusers import scheduler as scheduler_module
from admtrt.models.diffusers.keys import adm_tensors
from admtrt.models.diffusers.network import read_network
from admtrt.models.diffusers.scheduler import read_scheduler
from admtrt.models.settings import CheckpointConfig, shapes_of_network
from admtrt.schedule.sampler import SamplerConfig

ENDS = {"beta_start": 1e-4, "beta_end": 0.02}


@pytest.mark.parametrize("name", META["published"])
def test_published_configurations(name: str) -> None:
    golden = META["published"][name]
    said = golden["scheduler"]
    levels = said["num_train_timesteps"]
    schedulers = [
        said | {"num_train_timesteps": n} for n in (levels if isinstance(levels, list) else [levels])
    ]
    network = read_network(Path("config.json"), golden["config"], ()).config
    for scheduler in schedulers:
        read = read_scheduler(Path("scheduler_config.json"), scheduler, network)
        config = CheckpointConfig(kind="unet", unet=network, diffusion=read.process, sampler=read.sampler)
        with torch.device("meta"):
            parameters = sum(value.numel() for value in build_network(config).parameters())
        assert parameters == golden["parameters"]
        shapes = shapes_of_network(config)
        assert len(shapes) == golden["tensors_adm"]
        # Their tensors, from the expected shapes: each is taken once.
        given = theirs(network, shapes)
        assert len(given) == golden["tensors"]
        made, _ = adm_tensors(Path("config.json"), given, network, shapes, sines_first=True)
        assert {key: tuple(value.shape) for key, value in made.items()} == shapes
        if isinstance(levels, list):
            assert read.process == EdmConfig(boundary=True)
            assert read.sampler.levels_of == scheduler["num_train_timesteps"]
        else:
            assert read.sampler == SamplerConfig(steps="1000", scale=0.0)


def theirs(network: Any, shapes: Any) -> dict[str, torch.Tensor]:
    from admtrt.models.diffusers.keys import named_sources, shape_of_part

    made: dict[str, torch.Tensor] = {}
    for key, names in named_sources(network, shapes):
        for name in names:
            assert name not in made
            made[name] = torch.empty(shape_of_part(shapes[key], len(names)), device="meta")
    return made


@pytest.mark.parametrize(
    ("given", "process", "sampler"),
    [
        ({}, {}, {}),
        ({"beta_schedule": "squaredcos_cap_v2"}, {"schedule": "cosine"}, {}),
        ({"num_train_timesteps": 400}, {"steps": 400, **ENDS}, {"steps": "400"}),
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            {},
        ),
        ({"beta_schedule": "sigmoid"}, {"schedule": "sigmoid", **ENDS}, {}),
        ({"prediction_type": "sample"}, {"mean_type": "x_0"}, {}),
        ({"predict_epsilon": False}, {"mean_type": "x_0"}, {}),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"mean_type": "v", "zero_terminal_snr": True, "beta_start": None},
            {},
        ),
        ({"variance_type": "fixed_large"}, {"variance_type": "fixed_large"}, {}),
        ({"variance_type": "fixed_small_log"}, {"variance_type": "fixed_small"}, {}),
        ({"clip_sample": False}, {}, {"clip": False}),
        ({"clip_sample_range": 0.5}, {}, {"clip": 0.5}),
        ({"thresholding": True}, {}, {"clip": True}),
        (
            {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
            {},
            {"threshold": "dynamic", "threshold_max": 1.5},
        ),
        ({"_class_name": "DDIMScheduler"}, {}, {"method": "ddim", "steps": "leading:50"}),
        (
            {"_class_name": "DDIMScheduler", "steps_offset": 1, "set_alpha_to_one": False},
            {},
            {"method": "ddim", "steps": "leading:50+1"},
        ),
        (
            {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"},
            {},
            {"method": "ddim", "steps": "trailing:50"},
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2}, {}, {}),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, {}, {}),
        ({"tensor_format": "pt", "timestep_values": None, "brand_new": None}, {}, {}),
    ],
)  # fmt: skip
def test_schedulers(given: dict[str, Any], process: dict[str, Any], sampler: dict[str, Any]) -> None:
    network = read_network(Path("c.json"), META["networks"]["cifar"]["config"], ()).config
    read = read_scheduler(Path("s.json"), {"_class_name": "DDPMScheduler"} | given, network)
    usual = {"steps": 1000, "schedule": "linear", "mean_type": "eps", "variance_type": "fixed_small"}
    assert read.process.model_dump() == read.process.model_dump() | usual | process
    expected = SamplerConfig.from_dict({"steps": "1000", "scale": 0.0} | sampler)
    assert read.sampler == expected
    assert read.quantile == (given.get("dynamic_thresholding_ratio") if "threshold" in sampler else None)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["linear", "DownBlock2D", "AttnUpBlock2D", "DDIMScheduler", "learned_range"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip


@given(data=st.data())
def test_any_value_is_taken_or_refused(data: st.DataObject) -> None:
    """No content of the two files is more than an error of ours."""
    network = META["networks"]["classes"]["config"] | {"_class_name": "UNet2DModel"}
    scheduler = dict.fromkeys([*network_module.DEFAULTS, *scheduler_module.DEFAULTS, "_class_name", "new"])
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(scheduler)), ANYTHING, max_size=3))
    config = read_network(Path("c.json"), network, ()).config
    for read in (
        lambda: read_network(Path("c.json"), network | changes, ()),
        lambda: read_scheduler(Path("s.json"), changes, config),
        lambda: read_scheduler(Path("s.json"), {"variance_type": "learned_range"} | changes, config),
    ):
        with contextlib.suppress(CheckpointError):
            read()
