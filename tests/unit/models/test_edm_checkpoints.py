"""Checkpoints of openai/consistency_models: found out, loaded, converted; and their presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from goldens import generated_weights
from sparse_checkpoints import zeros_file

from admtrt.cli import run
from admtrt.config import EdmConfig, UNetConfig
from admtrt.errors import CheckpointError
from admtrt.models.checkpoint import (
    build_network,
    checkpoint_config_from_preset,
    load_network,
    open_checkpoint,
)
from admtrt.models.identify import identify_checkpoint
from admtrt.models.matching import shapes_of_network
from admtrt.models.settings import CheckpointConfig
from admtrt.presets import PRESETS
from admtrt.schedule.table import sampling_schedule

BOUND = EdmConfig(boundary=True)
SHAPE = {
    "image_size": 8, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 1),
    "attention_resolutions": (4,), "num_head_channels": 16, "learn_sigma": False, "num_classes": 5,
}  # fmt: skip
UNTOLD: dict[str, Any] = {"image_size": 8, "num_head_channels": 16}
PUBLISHED = {name: preset for name, preset in PRESETS.items() if isinstance(preset.diffusion, EdmConfig)}


def stored_state() -> dict[str, torch.Tensor]:
    """A tiny network's weights as consistency_models stores them."""
    network = UNetConfig.from_dict(SHAPE | {"new_attention_order": True})
    module = build_network(CheckpointConfig(kind="unet", unet=network, diffusion=BOUND))
    generated_weights(module)
    return {
        key: value[..., None] if key.endswith((".qkv.weight", ".proj_out.weight")) else value
        for key, value in module.state_dict().items()
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cd.pt"
    torch.save(stored_state(), path)
    return path


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (UNTOLD, "do not tell kind (discrete or edm)"),
        (UNTOLD | {"kind": "edm"}, "do not tell boundary"),
        ({"kind": "edm", "boundary": True}, "do not tell image_size"),
        (UNTOLD | {"kind": "discrete"}, "do not tell schedule, steps, rescale_timesteps, mean_type"),
    ],
)
def test_kind_and_boundary_are_asked_for(file: Path, settings: dict[str, Any], missing: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_network(file, kind="unet", settings=settings)
    assert missing in caught.value.message


def test_weights_of_attention_lose_their_last_axis_and_heads_have_the_new_order(file: Path) -> None:
    loaded = load_network(file, kind="unet", settings=UNTOLD | {"kind": "edm", "boundary": True})
    assert loaded.config.diffusion == BOUND
    assert loaded.config.unet == UNetConfig.from_dict(SHAPE | {"new_attention_order": True})
    assert (loaded.config.sampler.method, loaded.config.sampler.steps) == ("consistency", "2")
    for key, value in stored_state().items():
        assert torch.equal(loaded.module.state_dict()[key].reshape(value.shape), value)


def test_another_order_of_heads_is_refused(file: Path) -> None:
    with pytest.raises(CheckpointError, match="new_attention_order is True; False was given"):
        load_network(
            file,
            kind="unet",
            settings=UNTOLD | {"kind": "edm", "boundary": True, "new_attention_order": False},
        )
    config = CheckpointConfig(kind="unet", unet=UNetConfig.from_dict(SHAPE), diffusion=BOUND)
    with pytest.raises(CheckpointError, match="heads have the new order"):
        load_network(file, kind="unet", config=config)


def test_conversion_both_ways_keeps_every_byte(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["image_size=8", "num_head_channels=16", "kind=edm", "boundary=true"]
    chosen = [part for setting in settings for part in ("--set", setting)]
    ours, back = file.with_suffix(".safetensors"), file.with_name("back.pt")
    assert run(["convert", str(file), str(ours), *chosen]) == 0
    assert run(["convert", str(ours), str(back)]) == 0
    capsys.readouterr()
    first, second = torch.load(file), torch.load(back)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert open_checkpoint(ours).embedded == load_network(ours, kind="unet").config
    with pytest.raises(CheckpointError, match="kind is edm in the file, discrete given"):
        load_network(ours, kind="unet", settings={"kind": "discrete"})
    with pytest.raises(CheckpointError, match="boundary is True in the file, False given"):
        load_network(ours, kind="unet", settings={"boundary": False})


def test_every_published_file_has_a_preset() -> None:
    images = ("imagenet64", "bedroom256", "cat256")
    names = {f"{kind}_{one}{end}" for one in images for kind, end in (
        ("edm", "_ema"), ("cd", "_l2"), ("cd", "_lpips"), ("ct", ""),
    )}  # fmt: skip
    assert set(PUBLISHED) == names
    for name, preset in PUBLISHED.items():
        assert isinstance(preset.network, UNetConfig)
        config = preset.network
        assert config.new_attention_order
        assert not config.learn_sigma
        assert config.scale_shift_norm == ("imagenet" in name)
        assert config.num_classes == (1000 if "imagenet" in name else None)
        assert config.attention_resolutions == (32, 16, 8)
        assert preset.diffusion == EdmConfig(boundary=not name.startswith("edm"))
        evaluations = len(sampling_schedule(preset.diffusion, preset.sampler))
        assert evaluations == (79 if name.startswith("edm") else 2)


@pytest.mark.parametrize(
    ("name", "levels", "of"),
    [
        ("cd_imagenet64_lpips", (0, 22, 39), 40),
        ("ct_imagenet64", (0, 106, 200), 201),
        ("cd_bedroom256_lpips", (0, 17, 39), 40),
        ("cd_bedroom256_l2", (0, 18, 39), 40),
        ("ct_bedroom256", (0, 67, 150), 151),
        ("ct_cat256", (0, 62, 150), 151),
    ],
)
def test_published_levels(name: str, levels: tuple[int, ...], of: int) -> None:
    sampler = PRESETS[name].sampler
    assert (sampler.levels, sampler.levels_of) == (levels, of)


def test_a_published_file_asks_which_it_is(tmp_path: Path) -> None:
    """Shapes and the file's own name are no evidence: a name is easily changed."""
    shapes = shapes_of_network(checkpoint_config_from_preset("cd_imagenet64_l2"))
    images = (".qkv.weight", ".proj_out.weight")
    as_published = {key: (*shape, 1) if key.endswith(images) else shape for key, shape in shapes.items()}
    stored = open_checkpoint(zeros_file(tmp_path / "cd_imagenet64_l2.safetensors", as_published))
    with pytest.raises(CheckpointError, match=r"do not tell .*kind") as caught:
        identify_checkpoint(stored, kinds=("unet",))
    assert "'edm_imagenet64_ema', 'cd_imagenet64_l2', 'cd_imagenet64_lpips', 'ct_imagenet64'" in (
        caught.value.hint
    )
    with pytest.raises(CheckpointError, match="do not tell boundary"):
        identify_checkpoint(stored, kinds=("unet",), settings={"kind": "edm"})
    preset = checkpoint_config_from_preset("cd_imagenet64_l2")
    assert identify_checkpoint(stored, kinds=("unet",), configs=[preset]).config == preset
    told = identify_checkpoint(stored, kinds=("unet",), settings={"kind": "edm", "boundary": True})
    assert told.config == preset
