"""Files in the layouts of forks, and settings that must be given because shapes do not show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_faults
import numpy as np
import pytest
import torch
from goldens import generated_weights, relative_error
from safetensors.torch import load_file
from small_networks import PROCESS, SMALL, small, state_of
from torch import Tensor

from admtrt.bundle import Bundle, check_networks
from admtrt.cli import run
from admtrt.commands.checkpoints import load_pair
from admtrt.config import ClassifierConfig, DiffusionConfig, UNetConfig
from admtrt.config_files import save_config
from admtrt.errors import CheckpointError, ConfigError
from admtrt.models.checkpoint import LoadedNetwork, load_network, open_checkpoint, save_checkpoint
from admtrt.models.matching import config_of_tensors
from admtrt.models.option_names import OptionNames
from admtrt.models.pair import check_pair, in_units_of
from admtrt.models.settings import (
    CheckpointConfig,
    build_network,
    checkpoint_config_from_preset,
    shapes_of_network,
    with_settings,
)
from admtrt.run_config import DataConfig, RunConfig
from admtrt.schedule.process import process_from_config
from admtrt.verify.nll_images import load_images

TOLD = {"image_size": 8, "num_head_channels": 16, "new_attention_order": False} | PROCESS
SETS = [part for key, value in TOLD.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def loaded(config: CheckpointConfig) -> LoadedNetwork:
    return LoadedNetwork(generated_weights(build_network(config)), config)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return state_of(small())


@pytest.fixture(scope="module")
def averaged(plain: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value * 0.5 for key, value in plain.items()}


def file_of(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "fork.pt")
    return folder / "fork.pt"


def equal(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    return command_faults.refused(capsys, *arguments).replace("\n       ", " ")


# --- several weights in one file --------------------------------------------------------------------------


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in tensors.items()}


LAYOUTS = {
    "timm": (
        lambda p, a: {"epoch": 3, "state_dict": p, "state_dict_ema": a, "optimizer": {"state": {}}},
        "state_dict",
        "state_dict_ema",
    ),
    "lucidrains": (
        lambda p, a: {"step": 3, "model": p, "ema": {"x": 1, "shadow": a}, "opt": {"state": {"a": p}}},
        "model",
        "ema.shadow",
    ),
    "ema_pytorch": (
        lambda p, a: under("online_model.", p) | under("ema_model.", a) | {"initted": torch.ones(())},
        "online_model",
        "ema_model",
    ),
    "beside": (lambda p, a: p | under("ema.", a), "plain", "ema"),
    "in a container": (
        lambda p, a: {"ema": under("online_model.", p) | under("ema_model.", a)},
        "ema.online_model",
        "ema.ema_model",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averaged_weights_beside_plain_ones_are_chosen_by_name(
    tmp_path: Path, plain: dict[str, Tensor], averaged: dict[str, Tensor], layout: str
) -> None:
    content, first, second = LAYOUTS[layout]
    path = file_of(tmp_path, content(plain, averaged))
    with pytest.raises(CheckpointError, match="several sets of weights") as caught:
        open_checkpoint(path, options=OptionNames("--unet-"))
    assert f"{first}, {second}" in caught.value.message
    assert "--unet-weights NAME" in caught.value.hint
    assert equal(open_checkpoint(path, first).tensors, plain)
    assert equal(open_checkpoint(path, second).tensors, averaged)
    with pytest.raises(CheckpointError, match=f"no weights called 'raw'; it has {first}, {second}"):
        open_checkpoint(path, "raw")


def test_averages_without_names(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    """torch_ema stores averages as a list, without names."""
    path = file_of(tmp_path, {"model": plain, "ema": {"decay": 0.9, "shadow_params": list(plain.values())}})
    with pytest.raises(CheckpointError, match=r"several sets of weights: model, ema\.shadow_params"):
        open_checkpoint(path)
    assert equal(open_checkpoint(path, "model").tensors, plain)
    with pytest.raises(CheckpointError, match="are tensors without names"):
        open_checkpoint(path, "ema.shadow_params")


def test_one_state_dict_needs_no_name(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    for content in ({"model": plain, "step": 7}, {"state_dict": plain}, plain):
        assert equal(open_checkpoint(file_of(tmp_path, content)).tensors, plain)
    with pytest.raises(CheckpointError, match="no weights called 'ema'; all of it is one network's"):
        open_checkpoint(tmp_path / "fork.pt", "ema")


def test_the_option_of_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: dict[str, Tensor], averaged: dict[str, Tensor]
) -> None:
    path, target = file_of(tmp_path, {"model": plain, "ema": averaged}), tmp_path / "own.safetensors"
    assert "--weights NAME" in refused(capsys, "convert", path, target, *SETS)
    assert run(["convert", str(path), str(target), "--weights", "ema", *SETS]) == 0
    assert equal(load_file(target), averaged)
    for command in (
        ["export", path, "--out", tmp_path / "b"],
        ["evaluate", "nll", "--data", "x", "--unet", path],
    ):
        assert "--unet-weights NAME" in refused(capsys, *command)
    pair = ["--classifier", path]
    assert "--classifier-weights NAME" in refused(capsys, "export", target, *pair, "--out", tmp_path / "b")
    assert "none was given" in refused(
        capsys, "export", target, "--classifier-weights", "ema", "--out", tmp_path / "b"
    )


# --- prefixes, optimisers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.diffusion_model.", "denoise_fn."])
def test_a_prefix_is_left_off_and_said_and_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: dict[str, Tensor], prefix: str
) -> None:
    path, middle, back = (
        file_of(tmp_path, under(prefix, plain)),
        tmp_path / "b.safetensors",
        tmp_path / "c.pt",
    )
    assert run(["convert", str(path), str(middle), *SETS]) == 0
    assert f"'{prefix}' before every name was left off" in capsys.readouterr().err
    assert equal(load_file(middle), plain)
    assert run(["convert", str(middle), str(back)]) == 0
    assert equal(torch.load(back, weights_only=True), under(prefix, plain))


def test_a_prefix_beside_other_tensors_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: dict[str, Tensor]
) -> None:
    content = under("model.diffusion_model.", plain) | {"betas": torch.ones(3)}
    text = refused(capsys, "convert", file_of(tmp_path, content), tmp_path / "b.safetensors")
    assert "no tensor time_embed.0.weight; there are names that begin with 'model.diffusion_model.'" in text
    assert "--weights model.diffusion_model" in text
    assert equal(open_checkpoint(tmp_path / "fork.pt", "model.diffusion_model").tensors, plain)
    foreign = {"denoise_fn.downs.0.weight": torch.ones(3), "betas": torch.ones(3)}
    text = refused(capsys, "convert", file_of(tmp_path, foreign), tmp_path / "b.safetensors")
    assert "there are names that begin with 'denoise_fn.'" in text


def test_the_state_of_an_optimiser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: dict[str, Tensor]
) -> None:
    content = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    text = refused(capsys, "convert", file_of(tmp_path, content), tmp_path / "b.safetensors")
    assert "the state of an optimiser, no weights" in text
    assert "ema_*.pt" in text


# --- attention as convolutions of images ------------------------------------------------------------------


def test_attention_as_convolutions_has_the_new_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: dict[str, Tensor]
) -> None:
    convolved = {
        key: value[..., None] if key.endswith(("qkv.weight", "proj_out.weight")) else value
        for key, value in plain.items()
    }
    path, middle, back = file_of(tmp_path, convolved), tmp_path / "b.safetensors", tmp_path / "c.pt"
    sets = [part for part in SETS if "new_attention_order" not in part and part != "--set"]
    told = [part for one in sets for part in ("--set", one)]
    assert run(["convert", str(path), str(middle), *told]) == 0
    assert (
        "attention is stored as convolutions of images: new_attention_order True" in capsys.readouterr().err
    )
    found, expected = load_network(middle, kind="unet"), loaded(small(new_attention_order=True))
    x, t = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8), torch.tensor([500.0])
    assert found.config.network == expected.config.network
    # The other order is 0.3 off; the same numbers at other addresses may be summed in another order.
    assert relative_error(found.module(x, t), expected.module(x, t)) < 1e-5
    assert run(["convert", str(middle), str(back)]) == 0
    assert equal(torch.load(back, weights_only=True), convolved)
    assert "new_attention_order is True; False was given" in refused(
        capsys, "convert", path, tmp_path / "d.safetensors", *told, "--set", "new_attention_order=False"
    )
    file = tmp_path / "network.toml"
    file.write_text("[unet]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in SMALL.items()))
    text = refused(capsys, "convert", path, tmp_path / "d.safetensors", "--config", file)
    assert "heads have the new order; new_attention_order is False" in text
    convolved["middle_block.1.qkv.weight"] = plain["middle_block.1.qkv.weight"]
    text = refused(capsys, "convert", file_of(tmp_path, convolved), tmp_path / "d.safetensors")
    assert "whatever its settings" in text


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        "learn_sigma=True",
        "learn_sigma=1",
        "attention_resolutions=4",
        "attention_resolutions=[4]",
        "channel_mult=1,2",
        "channel_mult=(1, 2)",
        "num_classes=none",
        "num_classes=None",
        "num_res_blocks='1'",
        "num_heads_upsample=-1",
    ],
)
def test_equal_values_however_they_are_written(
    tmp_path: Path, plain: dict[str, Tensor], setting: str
) -> None:
    path, target = file_of(tmp_path, plain), tmp_path / "b.safetensors"
    save_checkpoint(tmp_path / "own.safetensors", plain, small())
    for source, options in ((path, SETS), (tmp_path / "own.safetensors", [])):
        assert run(["convert", str(source), str(target), "--overwrite", *options, "--set", setting]) == 0
        assert load_network(target, kind="unet").config.network == small().network


def test_other_values_however_they_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: dict[str, Tensor]
) -> None:
    path = file_of(tmp_path, plain)
    for setting, said in (
        ("learn_sigma=False", "learn_sigma is True; False was given"),
        ("channel_mult=1,3", "channel_mult is [1.0, 2.0]; 1,3 was given"),
        ("attention_resolutions=8,4", "attention_resolutions is [4]; 8,4 was given"),
        ("num_channels=64", "did you mean 'model_channels'?"),
        ("use_new_attention_order=true", "did you mean 'new_attention_order'?"),
    ):
        assert said in refused(capsys, "convert", path, tmp_path / "b.safetensors", *SETS, "--set", setting)


def test_the_training_file_describes_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: dict[str, Tensor]
) -> None:
    network = small().network
    assert isinstance(network, UNetConfig)
    config = RunConfig(data=DataConfig(source="none/such", image_size=8), unet=network)
    save_config(config, tmp_path / "train.toml")
    path, target = file_of(tmp_path, plain), tmp_path / "b.safetensors"
    assert run(["convert", str(path), str(target), "--config", str(tmp_path / "train.toml")]) == 0
    assert load_network(target, kind="unet").config.network == network
    (tmp_path / "typo.toml").write_text("[dataset]\n" + (tmp_path / "train.toml").read_text())
    text = refused(capsys, "convert", path, tmp_path / "c.safetensors", "--config", tmp_path / "typo.toml")
    assert "unknown key 'dataset'" in text


def test_a_fork_without_classes_says_so() -> None:
    fork = with_settings(checkpoint_config_from_preset("512x512_diffusion"), {"num_classes": None})
    found = config_of_tensors(shapes_of_network(fork), name="ema", given={}, options=OptionNames())
    assert "those of preset '512x512_diffusion' but for num_classes none; assumed" in found.note


# --- the unit of t ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1000, 4000, 500])
@pytest.mark.parametrize("rescaled", [True, False])
def test_each_network_is_given_its_own_t(steps: int, rescaled: bool) -> None:
    unet = small(steps=steps, rescale_timesteps=rescaled)
    guide = loaded(small("classifier", num_classes=5, steps=steps, rescale_timesteps=not rescaled))
    check_pair(unet, guide.config)
    adapted = in_units_of(unet.diffusion, guide)
    assert (adapted is guide) == (steps == 1000)
    assert in_units_of(unet.diffusion, adapted) is adapted
    own, shared = (
        torch.from_numpy(process_from_config(config.diffusion).model_t[[3, steps // 2, steps - 1]]).float()
        for config in (guide.config, unet)
    )
    x = torch.linspace(-1, 1, 3 * 192).reshape(3, 3, 8, 8)
    # The ratios here are powers of two, or halves of t are exact: the angles are the same numbers.
    assert torch.equal(adapted.module(x, shared), guide.module(x, own))
    with pytest.raises(CheckpointError, match=r"diffusion\.steps"):
        check_pair(unet, small("classifier", num_classes=5, steps=steps + 1))


def test_the_unit_is_no_fact_of_a_process_of_1000_steps(tmp_path: Path, plain: dict[str, Tensor]) -> None:
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, plain, small())
    assert load_network(path, kind="unet", settings={"rescale_timesteps": True}).config == small()
    with pytest.raises(CheckpointError, match="steps is 1000 in the file, 4000 given"):
        load_network(path, kind="unet", settings={"rescale_timesteps": True, "steps": 4000})


# --- the null class ---------------------------------------------------------------------------------------


def test_labels_skip_the_null_class() -> None:
    labels = np.arange(4)
    for null, expected in ((0, [1, 2, 3, 4]), (2, [0, 1, 3, 4]), (4, [0, 1, 2, 3]), (None, [0, 1, 2, 3])):
        network = UNetConfig.from_dict(SMALL | {"num_classes": 5, "null_class": null})
        mapped = network.own_labels(labels)
        assert mapped is not None
        assert mapped.tolist() == expected
        assert network.classes == (5 if null is None else 4)
    assert UNetConfig.from_dict(SMALL).own_labels(labels) is None
    for wrong in (5, -1):
        with pytest.raises(ConfigError, match="null_class"):
            UNetConfig.from_dict(SMALL | {"num_classes": 5, "null_class": wrong})
    with pytest.raises(ConfigError, match="training drops no labels"):
        RunConfig.from_dict(
            {
                "data": {"source": "digits", "image_size": 8},
                "unet": SMALL | {"num_classes": 5, "null_class": 1},
            }
        )


def test_a_field_at_its_later_default_is_not_written_and_is_compared(tmp_path: Path) -> None:
    network = UNetConfig.from_dict(SMALL | {"num_classes": 5})
    assert "null_class" not in network.to_dict()
    assert "null_class" in network.model_dump()
    nulled = UNetConfig.from_dict(network.to_dict() | {"null_class": 1})
    assert nulled.to_dict()["null_class"] == 1
    assert UNetConfig.from_dict(nulled.to_dict()) == nulled != network
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, state_of(small(num_classes=5)), small(num_classes=5, null_class=1))
    with pytest.raises(CheckpointError, match="null class is 1; 2 was given"):
        load_network(path, kind="unet", settings={"null_class": 2})


def test_a_null_class_is_told_and_never_guessed(tmp_path: Path) -> None:
    unet = UNetConfig.from_dict(SMALL | {"num_classes": 5})
    guide = ClassifierConfig.from_dict(SMALL | {"num_classes": 4})
    with pytest.raises(ValueError, match=r"5 classes but the classifier 4; .* means no class, say which"):
        check_networks(unet, guide, DiffusionConfig())
    named = small(num_classes=5).model_copy(update={"class_names": tuple("a-bcd")})
    save_checkpoint(tmp_path / "unet.safetensors", state_of(named), named)
    classifier = small("classifier", num_classes=4).model_copy(update={"class_names": tuple("abcd")})
    save_checkpoint(tmp_path / "guide.safetensors", state_of(classifier), classifier)
    files = {"unet": tmp_path / "unet.safetensors", "classifier": tmp_path / "guide.safetensors"}
    options = {"unet_preset": None, "classifier_preset": None, "config": None}
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_pair(**files, **options)  # type: ignore[arg-type]
    generator, _ = load_pair(**files, **options, null_class=1)  # type: ignore[arg-type]
    assert generator.config.class_names == tuple("abcd")


@pytest.mark.slow  # 20 s: two exports
def test_a_bundle_with_a_null_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet = small(num_classes=5, schedule="cosine")
    configs = {"unet": unet, "classifier": small("classifier", num_classes=4, schedule="cosine")}
    for name, config in configs.items():
        save_checkpoint(tmp_path / f"{name}.safetensors", state_of(config), config)
    files = [tmp_path / "unet.safetensors", "--classifier", tmp_path / "classifier.safetensors"]
    bundle = tmp_path / "bundle"
    export = ["export", *files, "--null-class", 0, "--out", bundle]
    assert run([str(one) for one in export]) == 0
    assert Bundle.open(bundle).manifest.num_classes == 4
    verify = ["verify", bundle, "--unet", *files, "--steps", 2]
    assert run([str(one) for one in [*verify, "--null-class", 0]]) == 0
    assert "null class of" in refused(capsys, *verify, "--null-class", 1)
    out = ["--out", tmp_path / "samples", "--steps", 2]
    assert "the classes are 0 to 3" in refused(capsys, "sample", bundle, "--classes", 4, *out)
    assert run([str(one) for one in ["sample", bundle, "--classes", "0,3", *out]]) == 0
    with np.load(tmp_path / "samples" / "samples.npz") as archive:
        assert archive["arr_1"].tolist() == [0, 3]


# --- labels by number -------------------------------------------------------------------------------------


def test_labels_in_an_npz_are_the_network_s_classes(tmp_path: Path) -> None:
    """Class names do not matter: "2" in a folder is a name, 2 in arr_1 is the third class."""
    network = UNetConfig.from_dict(SMALL | {"num_classes": 3})
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels, arr_1=np.array([2, 0]))
    config = DataConfig(source=str(tmp_path / "images.npz"), image_size=8)
    found = load_images(config, network, ("10", "2", "5"))
    assert found.labels is not None
    assert found.labels.tolist() == [2, 0]


# --- to the end -------------------------------------------------------------------------------------------


@pytest.mark.slow  # 40 s: two exports and their verification
@pytest.mark.parametrize("updown", [True, False])
def test_sizes_that_do_not_halve_and_two_units_of_t_to_the_end(tmp_path: Path, updown: bool) -> None:
    """Sizes 12, 6, 3, then 1 or, with strided convolutions, 2; only the UNet's timesteps were rescaled."""
    shape = {"image_size": 12, "steps": 4000, "schedule": "cosine"}
    unet = small(**shape, attention_resolutions=(6,), rescale_timesteps=True)
    levels = {"channel_mult": (1, 1, 1, 2), "attention_resolutions": (3,), "resblock_updown": updown}
    guide = small("classifier", **shape, **levels, num_classes=3)
    assert guide.network.level_sizes[-1] == (1 if updown else 2)
    for name, config in {"unet": unet, "guide": guide}.items():
        torch.save(state_of(config), tmp_path / f"{name}.pt")
    told = TOLD | {"image_size": 12, "steps": 4000, "schedule": "cosine"}
    options = [
        p
        for key, value in (told | {"rescale_timesteps": True}).items()
        for p in ("--unet-set", f"{key}={value}")
    ]
    own = ["num_head_channels", "new_attention_order", "schedule", "steps", "rescale_timesteps"]
    options += [p for key in own for p in ("--classifier-set", f"{key}={told[key]}")]
    files = [str(tmp_path / "unet.pt"), "--classifier", str(tmp_path / "guide.pt"), *options]
    bundle = str(tmp_path / "bundle")
    assert run(["export", *files, "--out", bundle]) == 0
    assert Bundle.open(bundle).manifest.classifier_rescale_timesteps is False
    assert run(["verify", bundle, "--unet", *files, "--steps", "3"]) == 0


def test_a_classifier_of_a_size_that_does_not_halve_is_trained(tmp_path: Path) -> None:
    network = {key: value for key, value in SMALL.items() if key != "attention_resolutions"}
    network |= {"image_size": 7, "in_channels": 1, "channel_mult": [1, 1, 1], "attention_resolutions": [3]}
    config = {
        "data": {"source": "digits", "image_size": 7, "channels": 1},
        "classifier": network | {"num_classes": 10},
        "train_classifier": {"steps": 1, "batch_size": 2},
    }
    save_config(RunConfig.from_dict(config), tmp_path / "odd.toml")
    assert run(["train", "classifier", str(tmp_path / "odd.toml"), "--out", str(tmp_path / "run")]) == 0
    trained = load_network(tmp_path / "run" / "classifier.safetensors", kind="classifier")
    assert trained.config.network.level_sizes == (7, 3, 1)
