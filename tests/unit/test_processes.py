"""The kinds of process in configurations: error messages, and the fitted samplers."""

from __future__ import annotations

from typing import Any

import pytest

from admtrt.bundle import check_networks
from admtrt.config import ClassifierConfig, DiffusionConfig, EdmConfig, UNetConfig
from admtrt.errors import ConfigError, RequestError
from admtrt.models.settings import PROCESS_FIELDS, CheckpointConfig, checkpoint_config_from_settings
from admtrt.run_config import RunConfig, sampler_for
from admtrt.schedule.sampler import SamplerConfig, with_choices
from admtrt.schedule.table import sampling_schedule

DATA = {"source": "digits", "image_size": 8, "channels": 1}
PLAIN, BOUND = EdmConfig(boundary=False), EdmConfig(boundary=True)


@pytest.mark.parametrize(
    ("diffusion", "message"),
    [
        ({"stepz": 5}, "unknown key 'diffusion.stepz'; did you mean 'steps'?"),
        (
            {"sigma_min": 1},
            "unknown key 'diffusion.sigma_min' (known: beta_end, beta_start, kind, mean_type, ",
        ),
        ({"steps": "many"}, "'diffusion.steps' is 'many'; input should be a valid integer"),
        ({"steps": 4}, "'diffusion': a linear schedule of 4 steps"),
        ({"kind": "edm"}, "'diffusion.boundary' is required"),
        (
            {"kind": "edm", "boundary": True, "sigma_mim": 1},
            "unknown key 'diffusion.sigma_mim'; did you mean 'sigma_min'?",
        ),
        (
            {"kind": "edm", "boundary": True, "schedule": "linear"},
            "unknown key 'diffusion.schedule' (known: boundary, kind, rho, sigma_data, sigma_max, sigma_min)",
        ),
        (
            {"kind": "edm", "boundary": True, "sigma_min": 90},
            "'diffusion': sigma_min 90 is not below sigma_max 80",
        ),
        (
            {"kind": "emd", "boundary": True},
            "'diffusion.kind' is 'emd'; expected one of 'discrete', 'edm'; did you mean 'edm'?",
        ),
        ({"kind": "flow"}, "'diffusion.kind' is 'flow'; expected one of 'discrete', 'edm'"),
        ({"kind": None}, "'diffusion.kind' is None; expected one of 'discrete', 'edm'"),
        ({"kind": ["edm"]}, "'diffusion.kind' is ['edm']; expected one of"),
        (5, "'diffusion' is 5; input should be a table"),
        (None, "'diffusion' is None; input should be a table"),
    ],
)
def test_a_mistake_is_named_as_it_was_written(diffusion: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict({"data": DATA, "diffusion": diffusion})
    assert message in caught.value.message
    assert ".discrete" not in caught.value.message
    assert ".edm" not in caught.value.message


def test_a_process_without_a_kind_is_discrete_and_stays_without() -> None:
    config = RunConfig.from_dict({"data": DATA, "diffusion": {"schedule": "cosine"}})
    assert config.diffusion == DiffusionConfig(schedule="cosine")
    assert "kind" not in config.to_dict()["diffusion"]
    assert RunConfig.from_dict({"data": DATA, "diffusion": PLAIN.to_dict()}).diffusion == PLAIN


def test_no_setting_is_both_a_networks_and_a_processs() -> None:
    assert not set(PROCESS_FIELDS) & {*UNetConfig.model_fields, *ClassifierConfig.model_fields}


@pytest.mark.parametrize(
    ("process", "given", "expected"),
    [
        (BOUND, {}, ("consistency", "2", 0.0)),
        (PLAIN, {}, ("heun", "35", 0.0)),
        (BOUND, {"method": "heun"}, ("heun", "35", 0.0)),
        (PLAIN, {"steps": "11"}, ("heun", "11", 0.0)),
        (PLAIN, {"method": "dpmpp"}, ("dpmpp", "10", 0.0)),
        (BOUND, {"method": "consistency", "levels": [0, 9, 20, 39]}, ("consistency", "3", 0.0)),
        (DiffusionConfig(schedule="cosine", steps=8), {}, ("ddpm", "8", 1.0)),
        (DiffusionConfig(), {"method": "ddim"}, ("ddim", "250", 1.0)),
        (DiffusionConfig(), {"method": "dpmpp"}, ("dpmpp", "10", 1.0)),
    ],
)
def test_what_was_not_given_of_a_sampler_fits_the_process(
    process: DiffusionConfig | EdmConfig, given: dict[str, Any], expected: tuple[str, str, float]
) -> None:
    sampler = sampler_for(process, SamplerConfig.from_dict(given))
    assert (sampler.method, sampler.steps, sampler.scale) == expected
    sampling_schedule(process, sampler.unguided)
    # Fitted again where the process is another.
    again = sampler_for(BOUND if process == PLAIN else PLAIN, sampler)
    assert again == sampler_for(BOUND if process == PLAIN else PLAIN, SamplerConfig.from_dict(given))


def test_a_checkpoints_sampler_is_fitted() -> None:
    unet = UNetConfig(
        image_size=8, model_channels=32, channel_mult=(1,), attention_resolutions=(), learn_sigma=False
    )
    made = CheckpointConfig.from_dict({"kind": "unet", "unet": unet, "diffusion": BOUND})
    assert (made.sampler.method, made.sampler.steps) == ("consistency", "2")
    again = CheckpointConfig.from_dict(made.to_dict())
    assert again == made
    with pytest.raises(ConfigError, match=r"diffusion.kind 'edm' has no variance channels"):
        CheckpointConfig.from_dict(
            {"kind": "unet", "unet": unet.model_copy(update={"learn_sigma": True}), "diffusion": BOUND}
        )


def test_settings_of_one_flat_table() -> None:
    shape = {"image_size": 8, "model_channels": 32, "channel_mult": (1,), "attention_resolutions": ()}
    made = checkpoint_config_from_settings(
        "unet", shape | {"learn_sigma": False, "kind": "edm", "boundary": True, "sigma_max": 20}
    )
    assert made.diffusion == EdmConfig(boundary=True, sigma_max=20)
    with pytest.raises(ConfigError, match=r"unknown key 'diffusion.boundary'"):
        checkpoint_config_from_settings("unet", shape | {"boundary": True})
    with pytest.raises(ConfigError, match="no setting 'bondary'; did you mean 'boundary'"):
        checkpoint_config_from_settings("unet", shape | {"bondary": True})


def test_other_numbers_of_evaluations_than_recommended_levels() -> None:
    recommended = SamplerConfig(
        method="consistency", steps="2", scale=0.0, levels=(0, 106, 200), levels_of=201
    )
    assert with_choices(recommended, BOUND, {}) == recommended
    assert with_choices(recommended, BOUND, {"steps": 2}).levels == (0, 106, 200)
    for steps in (1, 3):
        chosen = with_choices(recommended, BOUND, {"steps": steps})
        assert (chosen.levels, chosen.levels_of) == (None, 201)
        assert len(sampling_schedule(BOUND, chosen)) == steps
    chosen = with_choices(recommended, BOUND, {"levels": (0, 50, 100, 200)})
    assert len(sampling_schedule(BOUND, chosen)) == 3


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"method": "ddpm", "steps": 10}, "method 'ddpm' samples no process of kind 'edm'"),
        ({"method": "ddim", "steps": "ddim25"}, "method 'ddim' samples no process of kind 'edm'"),
        ({"scale": 2.0}, "no noisy classifier fits a process of kind 'edm'"),
    ],
)
def test_what_no_edm_process_can(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        sampling_schedule(BOUND, with_choices(sampler_for(BOUND), BOUND, choices))


def test_a_classifier_beside_an_edm_process() -> None:
    shape: dict[str, Any] = {
        "image_size": 8, "model_channels": 32, "channel_mult": (1,), "attention_resolutions": (),
    }  # fmt: skip
    unet = UNetConfig(learn_sigma=False, **shape)
    guide = ClassifierConfig(num_classes=3, num_head_channels=16, **shape)
    with pytest.raises(ValueError, match="a process of kind 'edm' takes no noisy classifier"):
        check_networks(unet, guide, BOUND)
