"""Configurations from state dicts alone: of every published model, of random ones, of forks."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_networks import PROCESS
from sparse_checkpoints import zeros_file

from admtrt.config import DiffusionConfig, UNetConfig
from admtrt.errors import CheckpointError, ConfigError
from admtrt.models.checkpoint import load_network, open_checkpoint
from admtrt.models.identify import identify_checkpoint
from admtrt.models.infer import UNTOLD, UntoldSettingError, infer_config, traits_of
from admtrt.models.matching import config_of_tensors, shapes_of_network
from admtrt.models.option_names import OptionNames
from admtrt.models.settings import (
    CheckpointConfig,
    checkpoint_config_from_preset,
    checkpoint_config_from_settings,
    with_settings,
)
from admtrt.presets import PRESETS
from admtrt.schedule.sampler import SamplerConfig

if TYPE_CHECKING:
    from admtrt.models.infer import Shapes

PUBLISHED = json.loads(
    gzip.decompress((Path(__file__).parents[2] / "data" / "published.json.gz").read_bytes())
)
SMALL = {
    "image_size": 16,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (8,),
    "num_heads": 2,
}
TELLABLE = {
    "image_size": 16,
    "num_heads": 2,
    "num_heads_upsample": None,
    "new_attention_order": False,
} | PROCESS

OF_UNET = OptionNames("--unet-")
DISCRETE = [name for name, preset in PRESETS.items() if preset.diffusion.kind == "discrete"]


def published_shapes(name: str) -> Shapes:
    return {key: tuple(shape) for key, shape in PUBLISHED[name]["params"].items()}


def untold_of(config: CheckpointConfig) -> dict[str, Any]:
    """The settings that must be given for a network; they can be given for any."""
    told = traits_of(shapes_of_network(config), flat(config)).settings
    return {key: value for key, value in flat(config).items() if key in UNTOLD and key not in told}


def flat(config: CheckpointConfig) -> dict[str, Any]:
    return config.network.model_dump() | config.diffusion.model_dump()


def small_shapes(kind: str = "unet", **changes: Any) -> Shapes:
    return shapes_of_network(checkpoint_config_from_settings(kind, SMALL | changes))  # type: ignore[arg-type]


# --- published models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISCRETE)
def test_every_published_model_from_its_shapes_and_what_they_do_not_tell(name: str) -> None:
    expected = checkpoint_config_from_preset(name)
    found = infer_config(published_shapes(name), given=untold_of(expected))
    assert (found.kind, found.network, found.diffusion) == (
        expected.kind,
        expected.network,
        expected.diffusion,
    )


@pytest.mark.parametrize("name", DISCRETE)
def test_every_published_model_from_its_file_alone(name: str) -> None:
    found = config_of_tensors(published_shapes(name), name=name, given={}, options=OF_UNET)
    assert found.config == checkpoint_config_from_preset(name)
    assert f"those of preset '{name}'; assumed from there: " in found.note
    assert "Say otherwise with --unet-preset or --unet-set." in found.note


def test_models_of_equal_shapes_under_another_name() -> None:
    found = config_of_tensors(published_shapes("lsun_cat"), name="ema", given={}, options=OF_UNET)
    assert "presets '256x256_diffusion_uncond', 'lsun_bedroom', 'lsun_cat', 'lsun_horse'," in found.note
    assert "different samplers" in found.note
    expected = checkpoint_config_from_preset("lsun_horse_nodropout")
    assert (found.config.network, found.config.diffusion) == (expected.network, expected.diffusion)
    assert found.config.sampler == SamplerConfig()


def test_what_shapes_tell_is_not_called_assumed() -> None:
    note = config_of_tensors(
        published_shapes("64x64_classifier"), name="", given={}, options=OptionNames()
    ).note
    assert "in_channels" not in note
    assert (
        "assumed from there: image_size 64, num_head_channels 64, new_attention_order False, schedule cosine"
        in note
    )


# --- any model --------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> CheckpointConfig:
    levels = draw(st.integers(1, 4))
    size = (1 << (levels - 1)) * draw(st.integers(1, 3))
    sizes = [size >> level for level in range(levels)]
    backbone = {
        "image_size": size,
        "in_channels": draw(st.integers(1, 4)),
        "model_channels": draw(st.sampled_from([32, 64, 96])),
        "num_res_blocks": draw(st.integers(1, 3)),
        "attention_resolutions": [one for one in sizes if draw(st.booleans())],
        "resblock_updown": draw(st.booleans()),
        "conv_resample": draw(st.booleans()),
        "scale_shift_norm": draw(st.booleans()),
        "new_attention_order": draw(st.booleans()),
    }
    widths = draw(st.lists(st.sampled_from([32, 64, 96]), min_size=levels, max_size=levels))
    backbone["channel_mult"] = [width / backbone["model_channels"] for width in widths]
    if draw(st.booleans()):
        backbone["num_head_channels"] = draw(st.sampled_from([8, 16, 32]))
    else:
        backbone |= {"num_heads": draw(st.sampled_from([1, 2, 4])), "num_head_channels": None}
    process: dict[str, Any] = {
        "schedule": draw(st.sampled_from(["linear", "cosine"])),
        "steps": draw(st.sampled_from([100, 1000, 4000])),
        "rescale_timesteps": draw(st.booleans()),
    }
    kind = draw(st.sampled_from(["unet", "upsampler", "classifier"]))
    if kind == "classifier":
        pools = ["attention", "adaptive", "spatial", "spatial_v2"]
        pools = pools if backbone["num_head_channels"] else pools[1:]
        head = {"pool": draw(st.sampled_from(pools)), "num_classes": draw(st.integers(2, 9))}
    else:
        head = {"num_classes": draw(st.sampled_from([None, 1, 7])), "learn_sigma": draw(st.booleans())}
        types = ["learned", "learned_range"] if head["learn_sigma"] else ["fixed_small", "fixed_large"]
        process |= {
            "variance_type": draw(st.sampled_from(types)),
            "mean_type": draw(st.sampled_from(["eps", "x_0", "previous_x"])),
        }
        if kind == "upsampler":
            assume(size > 1)
            head["low_res_size"] = draw(st.integers(1, size - 1))
    return checkpoint_config_from_settings(kind, backbone | head | process)


@settings(max_examples=60)
@given(configs())
def test_any_model_is_built_again_from_its_shapes(config: CheckpointConfig) -> None:
    shapes = shapes_of_network(config)
    known = untold_of(config) | choices(config, shapes)
    found = infer_config(shapes, given=known)
    assert shapes_of_network(found) == shapes
    assert (found.kind, found.diffusion) == (config.kind, config.diffusion)
    # Depth 1 has nothing to resample, and blocks that resample leave no other choice.
    free = {"resblock_updown", "conv_resample"}
    for key, value in config.network.model_dump().items():
        if key == "attention_resolutions":
            assert set(found.network.attention_resolutions) == set(value)
        elif key not in free:
            assert getattr(found.network, key) == value, key
    if len(config.network.channel_mult) > 1:
        assert found.network.resblock_updown == config.network.resblock_updown


def choices(config: CheckpointConfig, shapes: Shapes) -> dict[str, Any]:
    """Settings for which the shapes allow several values; each must be given by name."""
    known: dict[str, Any] = {}
    for _ in range(2):
        try:
            traits_of(shapes, known)
        except UntoldSettingError as error:
            name = "learn_sigma" if "learn_sigma" in error.message else "num_res_blocks"
            known[name] = flat(config)[name]
    return known


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_pooling_heads(pool: str) -> None:
    shapes = small_shapes("classifier", pool=pool, num_classes=5, num_head_channels=32)
    traits = traits_of(shapes)
    assert (traits.kind, traits.settings["pool"], traits.settings["num_classes"]) == ("classifier", pool, 5)
    assert traits.image_sizes == ((16, 17) if pool == "attention" else None)


def test_two_depths_that_look_alike() -> None:
    """Blocks of one width without attention: only the encoder is there, and it may be cut in many ways."""
    network = {
        "channel_mult": (1, 1, 1),
        "attention_resolutions": (),
        "num_res_blocks": 3,
        "pool": "adaptive",
        "num_head_channels": None,
    }
    shapes = small_shapes("classifier", num_classes=5, **network)
    with pytest.raises(UntoldSettingError, match="do not tell num_res_blocks: it may be 1, 2, 3, 5, 11"):
        traits_of(shapes)
    assert len(traits_of(shapes, {"num_res_blocks": 3}).settings["channel_mult"]) == 3
    assert len(traits_of(shapes, {"num_res_blocks": 11}).attends) == 1


def test_the_decoder_tells_the_depth_of_a_unet() -> None:
    shapes = small_shapes(
        channel_mult=(1, 1, 1), attention_resolutions=(), num_res_blocks=3, resblock_updown=True
    )
    assert traits_of(shapes).settings["num_res_blocks"] == 3


@pytest.mark.parametrize(
    "extra", [{"learn_sigma": True}, {"in_channels": 1}, {"low_res_size": 4}], ids=lambda one: next(iter(one))
)
def test_two_channels_in_and_out(extra: dict[str, Any]) -> None:
    shapes = small_shapes("upsampler", in_channels=1, low_res_size=4)
    with pytest.raises(UntoldSettingError, match="do not tell learn_sigma"):
        traits_of(shapes)
    assert traits_of(shapes, extra).kind == "upsampler"
    plain = small_shapes(in_channels=2, learn_sigma=False, variance_type="fixed_large")
    assert plain.keys() == shapes.keys()
    assert traits_of(plain, {"learn_sigma": False}).kind == "unet"
    assert traits_of(plain, {"low_res_size": None}).kind == "unet"


# --- what must be given -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TELLABLE)
def test_each_missing_setting_is_named(name: str) -> None:
    known = {key: value for key, value in TELLABLE.items() if key != name}
    asked = "num_heads with num_heads_upsample, or num_head_channels" if name == "num_heads" else name
    with pytest.raises(UntoldSettingError, match=rf"do not tell {asked}$"):
        infer_config(small_shapes(), given=known)


def test_nothing_given() -> None:
    with pytest.raises(UntoldSettingError) as caught:
        infer_config(small_shapes("upsampler", low_res_size=4), given={})
    assert caught.value.message.endswith(
        "do not tell image_size, low_res_size, new_attention_order, schedule, steps, rescale_timesteps, "
        "mean_type, variance_type, num_heads with num_heads_upsample, or num_head_channels"
    )
    with pytest.raises(UntoldSettingError) as caught:
        infer_config(small_shapes("classifier", num_classes=5, num_head_channels=32), given={"num_heads": 2})
    assert caught.value.message.endswith(
        "do not tell image_size (16 to 17), new_attention_order, schedule, steps, rescale_timesteps, "
        "num_head_channels"
    )


def test_a_setting_that_contradicts_the_shapes() -> None:
    for key, value, said in (
        ("num_classes", 10, "num_classes is None; 10 was given"),
        ("channel_mult", [1, 3], r"channel_mult is \[1.0, 2.0\]; \[1, 3\] was given"),
        ("attention_resolutions", [16], r"attention_resolutions is \[8\]; \[16\] was given"),
        ("attention_resolutions", [8, "4"], r"attention_resolutions is \[8\]; \[8, '4'\] was given"),
        ("num_res_blocks", 2, "num_res_blocks is 1; 2 was given"),
    ):
        with pytest.raises(CheckpointError, match=said):
            infer_config(small_shapes(), given=TELLABLE | {key: value})
    same = {"channel_mult": [1, 2], "attention_resolutions": [8], "in_channels": 3}
    assert infer_config(small_shapes(), given=TELLABLE | same).network.image_size == 16


def test_settings_that_no_reading_has() -> None:
    """Two channels in and out are a UNet's of two, or an upsampler's of one; never of three."""
    shapes = small_shapes("upsampler", in_channels=1, low_res_size=4)
    with pytest.raises(CheckpointError, match="do not tell learn_sigma"):
        config_of_tensors(shapes, name="", given={"in_channels": 3}, options=OptionNames())
    with pytest.raises(CheckpointError, match="in_channels is 1; 3 was given"):
        config_of_tensors(
            shapes,
            name="",
            given={"in_channels": 3, "low_res_size": 4, "image_size": 16},
            options=OptionNames(),
        )


def test_an_unknown_setting_and_impossible_values() -> None:
    with pytest.raises(ConfigError, match="no setting 'imagesize'; did you mean 'image_size'"):
        infer_config(small_shapes(), given={"imagesize": 16})
    for key, value in (
        ("image_size", "big"),
        ("image_size", 15),
        ("num_heads", 3),
        ("schedule", "quadratic"),
    ):
        with pytest.raises(ConfigError, match=str(value)):
            infer_config(small_shapes(), given=TELLABLE | {key: value})


def test_fewer_steps_than_are_usually_sampled() -> None:
    assert infer_config(small_shapes(), given=TELLABLE | {"steps": 100}).sampler.steps == "100"
    assert infer_config(small_shapes(), given=TELLABLE).sampler == SamplerConfig()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"time_embed.0.weight": None}, "no tensor time_embed.0.weight"),
        ({"time_embed.0.weight": (128,)}, r"a tensor of shape \[128\] as time_embed.0.weight"),
        ({"input_blocks.0.0.weight": None}, "no tensor input_blocks.0.0.weight"),
        ({"input_blocks.9.0.in_layers.0.weight": (32,)}, "no tensor input_blocks.9.0.out_layers.0.weight"),
        ({"input_blocks.4.0.op.weight": (32, 32, 3, 3)}, "do not form levels"),
        (
            {"input_blocks.2.1.qkv.weight": (96, 32, 1), "input_blocks.2.0.op.weight": None},
            "no tensor|levels",
        ),
        ({"out.2.weight": (7, 32, 3, 3)}, "takes 3 channels and the last gives 7"),
    ],
)
def test_tensors_of_something_else(change: dict[str, Any], said: str) -> None:
    shapes = dict(small_shapes(channel_mult=(1, 2, 2), attention_resolutions=(), num_res_blocks=1))
    shapes |= change
    shapes = {key: shape for key, shape in shapes.items() if shape is not None}
    with pytest.raises(CheckpointError, match=said):
        infer_config(shapes, given=TELLABLE)
    with pytest.raises(CheckpointError, match="no tensor time_embed"):
        infer_config({}, given={})


# --- forks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("64x64_diffusion", {"num_classes": 10}),
        ("64x64_diffusion", {"num_classes": None, "in_channels": 1}),
        ("64x64_classifier", {"num_classes": 10, "image_size": 32, "attention_resolutions": (16, 8, 4)}),
        ("64_256_upsampler", {"in_channels": 4}),
    ],
)
def test_a_fork_takes_from_its_ancestor_what_shapes_do_not_tell(name: str, changes: dict[str, Any]) -> None:
    expected = with_settings(checkpoint_config_from_preset(name), changes)
    size = {"image_size": changes["image_size"]} if "image_size" in changes else {}
    found = config_of_tensors(shapes_of_network(expected), name="ema", given=size, options=OF_UNET)
    assert (found.config.network, found.config.diffusion) == (expected.network, expected.diffusion)
    for key in set(changes) - {"attention_resolutions"}:
        assert f"{key} {'none' if changes[key] is None else changes[key]}" in found.note


def test_a_fork_with_another_image_size_says_so() -> None:
    shapes = published_shapes("256x256_diffusion")
    found = config_of_tensors(shapes, name="ema", given={"image_size": 128}, options=OptionNames()).config
    assert isinstance(found.network, UNetConfig)
    assert (found.network.image_size, found.network.attention_resolutions) == (128, (16, 8, 4))
    assert shapes_of_network(found) == shapes


def test_what_is_given_stands_above_what_is_assumed() -> None:
    shapes = published_shapes("64x64_diffusion")
    known = {"num_heads": 4, "num_heads_upsample": -1, "schedule": "linear", "rescale_timesteps": True}
    found = config_of_tensors(shapes, name="64x64_diffusion", given=known, options=OptionNames())
    assert found.config.network.num_heads == 4
    assert found.config.network.num_head_channels is None
    assert found.config.diffusion == DiffusionConfig(rescale_timesteps=True)
    assert "num_head" not in found.note
    assert "schedule" not in found.note


def test_another_architecture_takes_nothing() -> None:
    network = checkpoint_config_from_preset("64x64_classifier")
    for changes in ({"num_res_blocks": 3}, {"pool": "adaptive"}, {"attention_resolutions": (16, 8)}):
        shapes = shapes_of_network(with_settings(network, changes))
        with pytest.raises(CheckpointError, match="do not tell") as caught:
            config_of_tensors(shapes, name="", given={}, options=OptionNames("--classifier-"))
        assert "--classifier-set KEY=VALUE" in caught.value.hint


def test_fixed_variance_is_asked_for() -> None:
    fork = with_settings(
        checkpoint_config_from_preset("64x64_diffusion"),
        {"learn_sigma": False, "variance_type": "fixed_small"},
    )
    with pytest.raises(CheckpointError, match="variance_type"):
        config_of_tensors(shapes_of_network(fork), name="", given={}, options=OptionNames())


# --- files ------------------------------------------------------------------------------------------------


def test_loading_a_file_that_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ema_0.9999_010000.pt"
    torch.save({key: torch.ones(shape) for key, shape in small_shapes().items()}, path)
    loaded = load_network(path, kind="unet", settings=TELLABLE)
    assert loaded.config.network == UNetConfig.from_dict(SMALL)
    with pytest.raises(CheckpointError, match=rf"^{path}: .* do not tell new_attention_order"):
        load_network(path, kind="unet", settings={"image_size": 16})
    with pytest.raises(CheckpointError, match="kind 'unet'; expected 'classifier'"):
        load_network(path, kind="classifier")


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    shapes = {**small_shapes(), "extra.weight": (3,), "input_blocks.1.0.emb_layers.1.bias": (7,)}
    torch.save({key: torch.ones(shape) for key, shape in shapes.items()}, path)
    with pytest.raises(CheckpointError) as caught:
        load_network(path, kind="unet", settings=TELLABLE)
    assert "unexpected: extra.weight [3]" in caught.value.message
    assert "input_blocks.1.0.emb_layers.1.bias is [7], expected [64]" in caught.value.message


def test_settings_replace_those_of_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    shapes = small_shapes(num_classes=7)
    torch.save({key: torch.ones(shape) for key, shape in shapes.items()}, path)
    stored = open_checkpoint(path)
    config = CheckpointConfig(kind="unet", unet=UNetConfig.from_dict(SMALL), diffusion=DiffusionConfig())
    with pytest.raises(CheckpointError, match="unexpected: label_emb"):
        identify_checkpoint(stored, kinds=("unet",), configs=[config])
    changes = {"num_classes": 7, "schedule": "cosine", "num_heads": 1}
    found = identify_checkpoint(stored, kinds=("unet",), configs=[config], settings=changes).config
    assert (found.diffusion.schedule, found.network.num_heads) == ("cosine", 1)
    assert isinstance(found.network, UNetConfig)
    assert found.network.num_classes == 7


def test_heads_given_replace_the_preset_s_channels_of_a_head() -> None:
    changed = with_settings(checkpoint_config_from_preset("64x64_diffusion"), {"num_heads": 2})
    assert (changed.network.num_heads, changed.network.num_head_channels) == (2, None)


def test_where_settings_come_from(tmp_path: Path) -> None:
    """Settings come from the file, from the caller or from the tensors; one call tells which."""
    config = checkpoint_config_from_preset("64x64_classifier")
    shapes = shapes_of_network(config)
    bare = open_checkpoint(zeros_file(tmp_path / "64x64_classifier.safetensors", shapes))
    kinds = ("unet", "classifier")
    told = identify_checkpoint(bare, kinds=kinds)
    given = identify_checkpoint(bare, kinds=kinds, configs=[config])
    said = identify_checkpoint(replace(bare, embedded=config), kinds=kinds)
    assert [found.source for found in (told, given, said)] == ["tensors", "given", "file"]
    assert {found.kind for found in (told, given, said)} == {"classifier"}
    assert all(found.config.network == config.network for found in (told, given, said))
    other = checkpoint_config_from_preset("64x64_diffusion")
    assert identify_checkpoint(bare, kinds=kinds, configs=[other, config]).config == config  # of its kind
