"""Diffusers' folders: the places of their files, the translation of every option, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers_goldens as goldens
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from admtrt.cli import run
from admtrt.config import EdmConfig
from admtrt.errors import CheckpointError, OutputError
from admtrt.models.checkpoint import convert_checkpoint, open_checkpoint
from admtrt.models.identify import identify_checkpoint
from admtrt.models.settings import CheckpointConfig
from admtrt.schedule.sampler import SamplerConfig

NAME = "classes"
UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return goldens.write_folder(tmp_path_factory.mktemp("folder") / NAME, NAME)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "folder"))


def change(folder: Path, file: str, **values: Any) -> None:
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(data | values))


def drop(folder: Path, file: str, *keys: str) -> None:
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({key: data[key] for key in data if key not in keys}))


def opened(folder: Path) -> CheckpointConfig:
    return identify_checkpoint(open_checkpoint(folder), kinds=("unet",)).config


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        goldens.load(folder)
    return f"{caught.value.message}\n{caught.value.hint}"


# --- published configurations ------------------------------------------------------------------------------

# --- where files are ---------------------------------------------------------------------------------------


def test_pipeline_folder(folder: Path) -> None:
    config = opened(folder)
    assert config.unet is not None
    assert config.unet.num_classes == 10
    assert config.unet.norm_groups == 8
    assert config.sampler == SamplerConfig(steps="1000", scale=0.0)
    note = open_checkpoint(folder).note
    assert "16 channels a head (attention_head_dim 16)" in note
    assert '[diffusion]\nsteps = 1000\nschedule = "linear"' in note


def test_missing_head_size_is_said(folder: Path) -> None:
    drop(folder, UNET, "attention_head_dim")
    assert (
        "8 channels a head (attention_head_dim 8, the default: the key is missing)"
        in open_checkpoint(folder).note
    )
    change(folder, UNET, attention_head_dim=None)
    assert "one head (attention_head_dim null)" in open_checkpoint(folder).note


def test_flat_and_bare_folders(folder: Path, tmp_path: Path) -> None:
    expected = opened(folder)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (UNET, SCHEDULER, WEIGHTS):
        shutil.copy(folder / file, flat)
    assert opened(flat) == expected
    assert opened(folder / "unet") == expected
    shutil.copytree(folder / "unet", folder / "unet_ema")
    averages = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 5, "power": 0.75}
    change(folder, "unet_ema/config.json", **averages, update_after_step=0, use_ema_warmup=True)
    assert opened(folder / "unet_ema") == expected


def test_shards_bin_and_variants(folder: Path) -> None:
    expected = goldens.load(folder)[0].state_dict()

    def same() -> bool:
        found = goldens.load(folder)[0].state_dict()
        return all(torch.equal(found[key], value) for key, value in expected.items())

    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for part, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / "unet" / part)
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    weight_map = {key: part for part, keys in parts.items() for key in keys}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert same()
    first = next(iter(parts))
    (folder / "unet" / first).rename(folder / "unet/other.safetensors")
    assert f"{first} is missing, which {index.name} lists" in refusal(folder)
    for bad in ("../other.safetensors", "/etc/other.safetensors", "a\\b.safetensors"):
        index.write_text(json.dumps({"weight_map": weight_map | {names[0]: bad}}))
        assert "which is no plain file name" in refusal(folder)
    (folder / "unet/other.safetensors").rename(folder / "unet" / first)
    index.write_text(json.dumps({"weight_map": weight_map | {names[0]: list(parts)[1]}}))
    assert f"do not agree on the tensor {names[0]}" in refusal(folder)
    index.write_text("[]")
    assert "expected a JSON object" in refusal(folder)
    index.unlink()
    torch.save(tensors, folder / "unet/diffusion_pytorch_model.bin")
    assert same()
    (folder / "unet/diffusion_pytorch_model.bin").rename(folder / "unet/diffusion_pytorch_model.fp16.bin")
    assert same()
    assert "the variant 'fp16', diffusion_pytorch_model.fp16.bin" in open_checkpoint(folder).note
    save_file(tensors, folder / "unet/diffusion_pytorch_model.non_ema.safetensors")
    assert "several variants of weights" in refusal(folder)


def test_converted_folder_is_the_same(folder: Path, tmp_path: Path) -> None:
    stored = open_checkpoint(folder)
    target = tmp_path / "unet.safetensors"
    convert_checkpoint(stored, target, opened(folder))
    back = open_checkpoint(target)
    assert back.embedded == stored.embedded
    assert all(torch.equal(back.tensors[key], value) for key, value in stored.tensors.items())
    with pytest.raises(OutputError, match="diffusers' layout"):
        convert_checkpoint(stored, tmp_path / "unet.pt", opened(folder))


def test_settings_beside_a_folder_may_not_contradict_it(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="schedule is linear in the file, cosine given"):
        identify_checkpoint(open_checkpoint(folder), kinds=("unet",), settings={"schedule": "cosine"})
    with pytest.raises(CheckpointError, match="norm_groups is 8 in the file, 16 given"):
        identify_checkpoint(open_checkpoint(folder), kinds=("unet",), settings={"norm_groups": 16})
    scaled = {"beta_start": 1e-4, "beta_end": 0.03}
    with pytest.raises(CheckpointError, match="beta_start is None in the file"):
        identify_checkpoint(open_checkpoint(folder), kinds=("unet",), settings=scaled)


# --- what becomes of options -------------------------------------------------------------------------------


def test_notes_of_schedulers(folder: Path) -> None:
    change(folder, SCHEDULER, brand_new=None)
    change(folder, UNET, another=False)
    note = open_checkpoint(folder).note
    assert "brand_new is null, a key that is not known" in note
    assert "another is false, a key that is not known" in note
    change(folder, SCHEDULER, _class_name="UniPCMultistepScheduler")
    assert "the process of UniPCMultistepScheduler is taken" in open_checkpoint(folder).note


def test_middle_norm_of_old_models(tmp_path: Path) -> None:
    folder = goldens.write_folder(tmp_path / "resnet", "resnet")
    expected = goldens.load(folder)[0].state_dict()
    change(folder, UNET, attn_norm_num_groups=None)
    unet, _ = goldens.load(folder)
    assert "the norm of the middle's attention is used" in open_checkpoint(folder).note
    assert all(torch.equal(unet.state_dict()[key], value) for key, value in expected.items())
    tensors = load_file(folder / WEIGHTS)
    kept = {key: value for key, value in tensors.items() if "mid_block.attentions.0.group_norm" not in key}
    save_file(kept, folder / WEIGHTS)
    assert "attn_norm_num_groups is null" in refusal(folder)


# --- what is refused ---------------------------------------------------------------------------------------

TWO = ["DownBlock2D", "AttnDownBlock2D"]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (UNET, {"_class_name": "UNet2DConditionModel"}, "of the class 'UNet2DConditionModel'"),
    (UNET, {"_class_name": "UNetUnconditionalModel"}, "of the class 'UNetUnconditionalModel'"),
    (UNET, {"_class_name": 7}, "of the class '7'"),
    (UNET, {"sample_size": None}, "sample_size is null"),
    (UNET, {"sample_size": [8, 16]}, "sample_size is [8, 16]"),
    (UNET, {"sample_size": 7}, "sample_size is 7; 2 levels need a multiple of 2"),
    (UNET, {"sample_size": True}, "sample_size is true"),
    (UNET, {"in_channels": 6}, "in_channels is 6"),
    (UNET, {"out_channels": 3}, "out_channels is 3"),
    (UNET, {"center_input_sample": True}, "center_input_sample is true; ADM has false alone"),
    (UNET, {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
    (UNET, {"time_embedding_type": "learned"}, "time_embedding_type is 'learned'"),
    (UNET, {"time_embedding_dim": 64}, "time_embedding_dim is 64; ADM has 4 times the first width, 128"),
    (UNET, {"freq_shift": 2}, "freq_shift is 2; ADM has 0 and 1 alone"),
    (UNET, {"flip_sin_to_cos": None}, "flip_sin_to_cos is null; expected true or false"),
    (UNET, {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "down_block_types is"),
    (UNET, {"down_block_types": ["KDownBlock2D", "AttnDownBlock2D"]}, "down_block_types is"),
    (UNET, {"down_block_types": ["DownBlock2D"]}, "expected a list of 2, as block_out_channels has"),
    (UNET, {"down_block_types": "DownBlock2D"}, "down_block_types is 'DownBlock2D'"),
    (UNET, {"down_block_types": [{}, []]}, "down_block_types is [{}, []]"),
    (UNET, {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "it attends at other levels"),
    (UNET, {"up_block_types": ["AttnUpBlock2D", "CrossAttnUpBlock2D"]}, "up_block_types is"),
    (UNET, {"down_block_types": ["ResnetDownsampleBlock2D", TWO[1]]}, "in ADM all are by one of the two"),
    (UNET, {"upsample_type": "resnet"}, "in ADM all are by one of the two"),
    (UNET, {"downsample_type": "fir"}, "downsample_type is 'fir'"),
    (UNET, {"mid_block_type": None}, "mid_block_type is null"),
    (UNET, {"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type is 'UNetMidBlock2DCrossAttn'"),
    (UNET, {"mid_block_scale_factor": 1.4142135}, "mid_block_scale_factor is 1.4142135; ADM has 1 alone"),
    (UNET, {"block_out_channels": [32, "64"]}, "block_out_channels is"),
    (UNET, {"block_out_channels": []}, "block_out_channels is []"),
    (UNET, {"block_out_channels": [32, 44]}, "attention_head_dim is 16; attention over 44 channels"),
    (UNET, {"block_out_channels": [36, 64]}, "norm_num_groups is 8; a level of 36 channels"),
    (UNET, {"layers_per_block": 0}, "layers_per_block is 0"),
    (UNET, {"layers_per_block": [1, 2]}, "layers_per_block is [1, 2]"),
    (UNET, {"downsample_padding": 2}, "downsample_padding is 2; ADM has 0 and 1 alone"),
    (UNET, {"dropout": "none"}, "dropout is 'none'; expected a number"),
    (UNET, {"dropout": 1.5}, "'dropout' is 1.5"),
    (UNET, {"act_fn": "gelu"}, "act_fn is 'gelu'; ADM has 'silu' and 'swish' alone"),
    (UNET, {"attention_head_dim": 24}, "attention_head_dim is 24; attention over 64 channels is not divided"),
    (UNET, {"attention_head_dim": 0}, "attention_head_dim is 0"),
    (UNET, {"norm_num_groups": None}, "norm_num_groups is null"),
    (UNET, {"norm_num_groups": 7}, "norm_num_groups is 7; a level of 32 channels is not divided by it"),
    (UNET, {"attn_norm_num_groups": 4}, "attn_norm_num_groups is 4; ADM has as many as elsewhere"),
    (UNET, {"norm_eps": 0}, "'norm_eps' is 0"),
    (UNET, {"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift is 'spatial'"),
    (UNET, {"resnet_time_scale_shift": []}, "resnet_time_scale_shift is []"),
    (UNET, {"add_attention": False}, "add_attention is false; ADM has true alone"),
    (UNET, {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; ADM has null alone"),
    (UNET, {"num_class_embeds": "ten"}, "num_class_embeds is 'ten'"),
    (UNET, {"brand_new": 3}, "brand_new is 3; admtrt does not know this key"),
    (SCHEDULER, {"_class_name": "ScoreSdeVeScheduler"}, "of the class 'ScoreSdeVeScheduler'"),
    (SCHEDULER, {"_class_name": "KarrasVeScheduler"}, "of the class 'KarrasVeScheduler'"),
    (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "'FlowMatchEulerDiscreteScheduler'"),
    (SCHEDULER, {"_class_name": "CogVideoXDDIMScheduler"}, "of the class 'CogVideoXDDIMScheduler'"),
    (SCHEDULER, {"_class_name": "HeunDiscreteScheduler"}, "lacks num_train_timesteps, beta_start"),
    (SCHEDULER, {"num_train_timesteps": 1}, "num_train_timesteps is 1"),
    (SCHEDULER, {"beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
    (SCHEDULER, {"beta_schedule": None}, "beta_schedule is null"),
    (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "trained_betas is [0.1, 0.2]; ADM's betas come from"),
    (SCHEDULER, {"beta_end": 1.5}, "beta_end is 1.5; expected a number between 0 and 1"),
    (SCHEDULER, {"beta_start": "0.1"}, "beta_start is '0.1'; expected a number"),
    (SCHEDULER, {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
    (SCHEDULER, {"variance_type": "learned"}, "variance_type is 'learned'"),
    (SCHEDULER, {"variance_type": "fixed_large_log"}, "write 'fixed_large'"),
    (SCHEDULER, {"variance_type": "fixed_small"}, "variance_type is 'fixed_small'; the network has variance"),
    (SCHEDULER, {"variance_type": None}, "variance_type is null"),
    (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is true"),
    (SCHEDULER, {"clip_sample": 1}, "clip_sample is 1; expected true or false"),
    (SCHEDULER, {"clip_sample_range": 0}, "clip_sample_range is 0"),
    (SCHEDULER, {"thresholding": True, "sample_max_value": 0.5}, "sample_max_value is 0.5"),
    (SCHEDULER, {"thresholding": True, "dynamic_thresholding_ratio": 1}, "dynamic_thresholding_ratio is 1"),
    (SCHEDULER, {"timestep_spacing": "karras"}, "timestep_spacing is 'karras'"),
    (SCHEDULER, {"steps_offset": -1}, "steps_offset is -1"),
    (SCHEDULER, {"_class_name": "DDIMScheduler", "steps_offset": 20}, "steps_offset is 20"),
    (SCHEDULER, {"brand_new": 3}, "brand_new is 3"),
    (SCHEDULER, {"_class_name": "CMStochasticIterativeScheduler"}, "variance_type is 'learned_range'; "),
    ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "vqvae is 'VQModel'"),
    ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "unet is ['diffusers', 'UNet2DC"),
    ("model_index.json", {"unet": "UNet2DModel"}, "unet is 'UNet2DModel'; expected a UNet2DModel"),
    ("model_index.json", {"unet": None}, "unet is null"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "values", "expected"), REFUSED)
def test_refused_options(file: str, values: dict[str, Any], expected: str, folder: Path) -> None:
    change(folder, file, **values)
    found = refusal(folder)
    assert expected in found
    assert str(folder / file) in found


def spoil_tensor(change_tensors: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change_tensors(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def with_code(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Path("x")}, folder / "unet/diffusion_pytorch_model.bin")


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["mid_block.attentions.0.to_k.bias"][0] = np.nan


FAULTS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: (f / UNET).unlink(), "without unet/config.json or config.json"),
    (lambda f: (f / UNET).write_text("[]"), "holds a list; expected a JSON object"),
    (lambda f: (f / UNET).write_text("{"), "config.json is not valid JSON"),
    (lambda f: (f / UNET).write_bytes(b"\xff{}"), "config.json is not valid JSON"),
    (lambda f: (f / UNET).write_text(json.dumps({"x": "y" * 2**21})), "larger than 1048576 bytes"),
    (lambda f: (f / SCHEDULER).unlink(), "has no scheduler_config.json, which says the process; looked for"),
    (lambda f: (f / WEIGHTS).unlink(), "has no weights"),
    (lambda f: (f / WEIGHTS).write_bytes(b"cut"), "truncated, damaged or no safetensors file"),
    (lambda f: (f / "config.json").write_text("{}"), "describe two networks"),
    (with_code, "nothing was executed"),
    (spoil_tensor(lambda t: t.pop("conv_in.bias")), "1 missing: conv_in.bias"),
    (spoil_tensor(lambda t: t.update(extra=torch.zeros(1))), "1 unexpected: extra"),
    (
        spoil_tensor(lambda t: t.update({"conv_in.bias": torch.zeros(3)})),
        "of another shape: conv_in.bias is [3], expected [32]",
    ),
    (
        spoil_tensor(lambda t: t.update({"mid_block.attentions.0.query.weight": torch.zeros(64, 64)})),
        "has attention in two spellings",
    ),
    (spoil_tensor(with_nan), "to_q.bias with mid_block.attentions.0.to_k.bias with"),
    (
        spoil_tensor(lambda t: t.update({"conv_in.bias": torch.zeros(32, dtype=torch.int64)})),
        "conv_in.bias is a torch.int64 tensor",
    ),
    (
        spoil_tensor(
            lambda t: t.update(
                {"mid_block.attentions.0.to_q.bias": torch.zeros(64).to(torch.float8_e4m3fn)}
            )
        ),
        "to_q.bias is a torch.float8_e4m3fn tensor",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "expected"), FAULTS)
def test_faulty_folders(spoil: Callable[[Path], Any], expected: str, folder: Path, tmp_path: Path) -> None:
    spoil(folder)
    assert expected in refusal(folder)
    target = tmp_path / "out.safetensors"
    assert run(["convert", str(folder), str(target)]) == 2
    assert not target.exists()


def test_depth_is_compared_before_anything_is_built(folder: Path) -> None:
    deep = {"layers_per_block": 32, "sample_size": 8192, "block_out_channels": [32] * 14}
    kinds = {"down_block_types": ["DownBlock2D"] * 14, "up_block_types": ["UpBlock2D"] * 14}
    change(folder, UNET, **deep, **kinds)
    assert "too few for 14 levels of 32 residual blocks" in refusal(folder)


def test_consistency_models(tmp_path: Path) -> None:
    said = {
        "_class_name": "CMStochasticIterativeScheduler",
        "num_train_timesteps": 151,
        "clip_denoised": False,
    }
    config = opened(goldens.write_tiny(tmp_path / "folder", scheduler=said | {"sigma_max": 60.0}))
    assert config.diffusion == EdmConfig(boundary=True, sigma_max=60.0)
    expected = {"method": "consistency", "steps": "1", "levels_of": 151, "clip": False, "scale": 0.0}
    assert config.sampler == SamplerConfig.from_dict(expected)
    change(tmp_path / "folder", SCHEDULER, s_noise=1.1)
    assert "s_noise is 1.1; ADM has 1.0 alone" in refusal(tmp_path / "folder")


def test_inspect_shows_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_checkpoint(open_checkpoint(folder), tmp_path / "a.safetensors", opened(folder))
    assert run(["inspect", str(tmp_path / "a.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["unet"]["norm_groups"] == 8
    save_file(dict(open_checkpoint(folder).tensors), tmp_path / "b.safetensors")
    assert run(["inspect", str(tmp_path / "b.safetensors")]) == 2
    assert "admtrt convert CHECKPOINT unet.safetensors --set KEY=VALUE" in capsys.readouterr().err


def test_engines_take_no_low_quantile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.5}
    changes = {"sample_size": 64, "in_channels": 3, "out_channels": 3}
    folder = goldens.write_tiny(tmp_path / "folder", scheduler=said, **changes)
    assert run(["export", str(folder), "--out", str(tmp_path / "bundle"), "--engine", "fp16"]) == 2
    assert "takes the largest 6145 of 12288 values; engines take at most 3840" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_latent_models_are_refused_from_inside(folder: Path) -> None:
    change(folder, "model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(CheckpointError, match="vqvae is 'VQModel'"):
        open_checkpoint(folder / "unet")


def test_weights_of_a_folder_have_no_names(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights are called 'ema'") as caught:
        open_checkpoint(folder, "ema")
    assert "unet_ema" in caught.value.hint


def test_inspect_shows_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["made_from"] == "diffusers"
    assert shown["config"]["unet"]["norm_groups"] == 8
    assert run(["inspect", str(folder), "--layers", "a"]) == 2
