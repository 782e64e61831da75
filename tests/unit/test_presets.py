"""The presets against the published checkpoints, and how a file without a configuration finds its preset."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_checkpoints import zeros_file
from torch.utils.flop_counter import FlopCounterMode

from admtrt.bench.yardstick import OperationCounter
from admtrt.config import ClassifierConfig, UNetConfig
from admtrt.errors import CheckpointError, ConfigError
from admtrt.models.checkpoint import (
    build_network,
    checkpoint_config_from_preset,
    load_network,
)
from admtrt.models.classifier import Classifier, log_prob_gradient
from admtrt.models.matching import nearest_preset
from admtrt.models.unet import UNet
from admtrt.presets import PRESETS
from admtrt.schedule.process import retained_timesteps

PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "data" / "published.json.gz").read_bytes())
)
KINDS = {"unet": "unet", "classifier": "classifier", "superres": "upsampler"}
SCALES = {
    "64x64_diffusion": 1.0,
    "128x128_diffusion": 0.5,
    "256x256_diffusion": 1.0,
    "512x512_diffusion": 4.0,
    "256x256_diffusion_uncond": 10.0,
}
FAST_SCALES = {"128x128_diffusion": 1.25, "256x256_diffusion": 2.5, "512x512_diffusion": 9.0}


@cache
def published_network(name: str) -> UNet | Classifier:
    with torch.device("meta"):
        return build_network(checkpoint_config_from_preset(name)).eval().to("meta")


def test_every_published_checkpoint_has_a_preset() -> None:
    discrete = {name for name, preset in PRESETS.items() if preset.diffusion.kind == "discrete"}
    assert discrete == set(PUBLISHED)
    assert all(preset.name == name for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_shapes_and_parameter_count(name: str) -> None:
    shapes = {key: list(value.shape) for key, value in published_network(name).state_dict().items()}
    assert shapes == PUBLISHED[name]["params"]
    assert sum(math.prod(shape) for shape in shapes.values()) == PUBLISHED[name]["num_params"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_that_leave_no_trace_in_the_shapes(name: str) -> None:
    preset, settings = PRESETS[name], PUBLISHED[name]["defaults_resolved"]
    assert preset.kind == KINDS[PUBLISHED[name]["kind"]]
    network = preset.network
    if isinstance(network, ClassifierConfig):
        assert network.image_size == settings["image_size"]
        assert (network.num_head_channels, network.pool) == (64, settings["classifier_pool"])
        assert network.scale_shift_norm == settings["classifier_use_scale_shift_norm"]
        assert not network.new_attention_order
        return
    assert isinstance(network, UNetConfig)
    assert network.image_size == settings.get("image_size", settings.get("large_size"))
    assert network.low_res_size == settings.get("small_size")
    assert (network.num_head_channels or -1) == settings["num_head_channels"]
    assert network.num_heads == settings["num_heads"]
    assert network.num_heads_upsample is None
    assert ",".join(str(size) for size in network.attention_resolutions) == settings["attention_resolutions"]
    assert network.new_attention_order == settings.get("use_new_attention_order", False)
    assert network.scale_shift_norm == settings["use_scale_shift_norm"]
    assert network.dropout == settings["dropout"]
    assert preset.diffusion.steps == settings["diffusion_steps"]
    assert preset.diffusion.schedule == settings["noise_schedule"]
    assert (preset.diffusion.variance_type == "learned_range") == settings["learn_sigma"]
    assert not preset.diffusion.rescale_timesteps


@pytest.mark.parametrize("name", PUBLISHED)
def test_recommended_sampler(name: str) -> None:
    preset = PRESETS[name]
    if preset.kind == "classifier":
        guided = PRESETS[name.replace("classifier", "diffusion")]
        assert guided.guided_by == name
        assert (preset.diffusion, preset.sampler) == (guided.diffusion, guided.sampler)
        assert (preset.fast_sampler, preset.guided_by) == (guided.fast_sampler, None)
        return
    steps = len(retained_timesteps(preset.diffusion.steps, preset.sampler.steps))
    assert (steps, preset.sampler.scale) == (1000 if name.startswith("lsun") else 250, SCALES.get(name, 0.0))
    assert (preset.guided_by is None) == (preset.sampler.scale == 0)
    fast = preset.fast_sampler
    assert (None if fast is None else fast.scale) == FAST_SCALES.get(name)
    if fast is not None:
        assert (fast.method, len(retained_timesteps(preset.diffusion.steps, fast.steps))) == ("ddim", 25)


def test_a_scale_on_which_the_sources_differ_is_said() -> None:
    assert "1.0" in PRESETS["128x128_diffusion"].note
    assert "1.25" in PRESETS["128x128_diffusion"].note
    assert all("1000" in preset.note for name, preset in PRESETS.items() if name.startswith("lsun"))


@pytest.mark.parametrize("name", [*PUBLISHED, "ct_imagenet64", "edm_cat256_ema"])
def test_costs(name: str) -> None:
    preset, network = PRESETS[name], published_network(name)
    config = network.config
    with torch.device("meta"):
        size, channels = config.image_size, config.in_channels
        inputs = [torch.zeros(1, channels, size, size), torch.zeros(1)]
        if isinstance(config, UNetConfig):
            small = config.low_res_size
            inputs.append(None if config.num_classes is None else torch.zeros(1, dtype=torch.int64))
            inputs.append(None if small is None else torch.zeros(1, channels, small, small))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(*inputs)
    by_operation = {str(key): value for key, value in counter.get_flop_counts()["Global"].items()}
    forward = sum(by_operation.values())
    gradient = by_operation["aten.convolution"] + 2 * by_operation["aten.bmm"]
    assert preset.parameters == sum(value.numel() for value in network.state_dict().values())
    assert preset.weight_bytes == sum(value.nbytes for value in network.state_dict().values())
    assert preset.forward_flops == forward
    assert preset.step_flops == forward + (gradient if preset.kind == "classifier" else 0)
    assert preset.file == f"{name}.pt"


def test_the_cost_of_an_input_gradient_is_that_of_autograd() -> None:
    """The gradient's operations as :func:`test_costs` counts them, against those that autograd runs."""
    config = ClassifierConfig(
        image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1, 2), num_classes=10,
        attention_resolutions=(4,), num_head_channels=32,
    )  # fmt: skip
    network = Classifier(config).eval().requires_grad_(False)
    x, t, y = torch.randn(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, t)
    by_operation = {str(key): value for key, value in counter.get_flop_counts()["Global"].items()}
    with OperationCounter() as real:
        log_prob_gradient(network, x, t, y)
    gradient = by_operation["aten.convolution"] + 2 * by_operation["aten.bmm"]
    assert real.total == sum(by_operation.values()) + gradient


def test_presets_do_not_load_torch() -> None:
    code = "import sys, admtrt.presets; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in published_network(name).state_dict().items()}


def test_a_better_fitting_preset_is_named(tmp_path: Path) -> None:
    path = zeros_file(tmp_path / "a.safetensors", published_shapes("128x128_diffusion"))
    with pytest.raises(CheckpointError) as caught:
        load_network(path, kind="unet", config=checkpoint_config_from_preset("256x256_diffusion"))
    assert "input_blocks.1.0" not in caught.value.message  # equal in both
    assert "of another shape: input_blocks.10.0." in caught.value.message
    assert (
        caught.value.hint
        == "These are the keys of preset '128x128_diffusion': pass --unet-preset 128x128_diffusion."
    )


def test_a_variant_of_a_published_model_is_not_called_that_model(tmp_path: Path) -> None:
    shapes = published_shapes("64x64_classifier") | {
        "out.2.c_proj.weight": (10, 512, 1),
        "out.2.c_proj.bias": (10,),
    }
    path = zeros_file(tmp_path / "a.safetensors", shapes)
    with pytest.raises(CheckpointError) as caught:
        load_network(path, kind="classifier", config=checkpoint_config_from_preset("128x128_classifier"))
    assert "99% of the keys are those of preset '64x64_classifier'" in caught.value.hint
    assert "--preset" not in caught.value.hint


def test_nearest_preset() -> None:
    for name in ("64x64_diffusion", "512x512_classifier", "64_256_upsampler"):
        assert nearest_preset(published_shapes(name)) == (name, 1.0)
    shapes = published_shapes("512x512_diffusion")
    shapes.popitem()
    assert nearest_preset(shapes) == ("512x512_diffusion", len(shapes) / (len(shapes) + 1))
    assert nearest_preset({"a": (1,)}) is None
    assert nearest_preset({}) is None


def test_presets_load(tmp_path: Path) -> None:
    path = zeros_file(tmp_path / "64x64_classifier.safetensors", published_shapes("64x64_classifier"))
    loaded = load_network(path, kind="classifier", config=checkpoint_config_from_preset("64x64_classifier"))
    assert loaded.config.network == PRESETS["64x64_classifier"].network


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="no preset '64x64_difusion'; did you mean '64x64_diffusion'"
    ) as caught:
        checkpoint_config_from_preset("64x64_difusion")
    assert "lsun_bedroom" in caught.value.hint


def test_a_published_classifier_where_a_unet_is_expected(tmp_path: Path) -> None:
    path = zeros_file(tmp_path / "a.safetensors", published_shapes("64x64_classifier"))
    with pytest.raises(
        CheckpointError, match="keys of preset '64x64_classifier', of kind 'classifier'; expected 'unet'"
    ):
        load_network(path, kind="unet", config=checkpoint_config_from_preset("64x64_diffusion"))
