"""Configurations: refusals with their messages, and that written files are read back."""

from __future__ import annotations

from typing import Any

import pytest

from admtrt.config import ClassifierConfig, DiffusionConfig, EdmConfig, UNetConfig
from admtrt.config_base import Config
from admtrt.errors import ConfigError
from admtrt.run_config import DataConfig, RunConfig, TrainingConfig
from admtrt.schedule.sampler import SamplerConfig, with_choices

SMALL = {
    "image_size": 8,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "attention_resolutions": [4],
    "num_head_channels": 16,
}
RUN = {"data": {"source": "digits", "image_size": 8}, "unet": SMALL}


BETAS = {"beta_start": 1e-4, "beta_end": 0.02}


def refusal(cls: type[Config], data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        cls.from_dict(data)
    assert caught.value.exit_code == 2
    return caught.value.message


def changed(cls: type[Config], **changes: Any) -> Config:
    return cls.from_dict(SMALL | ({"num_classes": 3} if cls is ClassifierConfig else {}) | changes)


# --- unknown keys and wrong types -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "data", "expected"),
    [
        (
            UNetConfig,
            {**SMALL, "model_chanels": 1},
            "unknown key 'model_chanels'; did you mean 'model_channels'?",
        ),
        (RunConfig, {**RUN, "unett": SMALL}, "unknown key 'unett'; did you mean 'unet'?"),
        (
            RunConfig,
            {**RUN, "unet": {**SMALL, "dropuot": 0.1}},
            "unknown key 'unet.dropuot'; did you mean 'dropout'?",
        ),
        (
            RunConfig,
            {**RUN, "train_classifier": {"batchsize": 1}},
            "unknown key 'train_classifier.batchsize'; did you mean 'batch_size'?",
        ),
        (
            DiffusionConfig,
            {"xyz": 1},
            "unknown key 'xyz' (known: beta_end, beta_start, kind, mean_type, rescale_timesteps, ",
        ),
    ],
)
def test_unknown_keys_name_the_nearest(cls: type[Config], data: Any, expected: str) -> None:
    assert expected in refusal(cls, data)


def test_unknown_keys_in_tables_and_lists_name_the_nearest() -> None:
    class Row(Config):
        length: int = 0

    class Table(Config):
        rows: dict[str, Row] | None = None
        listed: tuple[Row, ...] = ()

    assert "'rows.a.lenght'; did you mean 'length'?" in refusal(Table, {"rows": {"a": {"lenght": 1}}})
    assert "'listed.0.lenght'; did you mean 'length'?" in refusal(Table, {"listed": [{"lenght": 1}]})


@pytest.mark.parametrize(
    ("cls", "data", "expected"),
    [
        (UNetConfig, {}, "'image_size' is required"),
        (RunConfig, {}, "'data' is required"),
        (UNetConfig, {**SMALL, "dropout": "much"}, "'dropout' is 'much'; input should be a valid number"),
        (RunConfig, {**RUN, "data": 3}, "'data' is 3; input should be a valid dictionary"),
        (
            UNetConfig,
            {**SMALL, "channel_mult": True},
            "'channel_mult' is True; input should be a valid tuple",
        ),
        (UNetConfig, {**SMALL, "channel_mult": [1, "a"]}, "'channel_mult.1' is 'a'; "),
        (DataConfig, {"source": "x" * 100, "image_size": "8.5"}, "'image_size' is '8.5'; "),
        (DataConfig, {"source": ["x" * 100], "image_size": 8}, "'source' is ['" + "x" * 55 + "...; "),
    ],
)
def test_wrong_types_and_missing_keys_name_the_path(cls: type[Config], data: Any, expected: str) -> None:
    assert expected in refusal(cls, data)


def test_every_fault_is_named_at_once() -> None:
    message = refusal(DiffusionConfig, {"steps": 1, "schedule": "quadratic", "stps": 3})
    assert "'steps' is 1; input should be greater than or equal to 2" in message
    known = "'linear', 'cosine', 'scaled_linear' or 'sigmoid'"
    assert f"'schedule' is 'quadratic'; input should be {known}" in message
    assert "unknown key 'stps'; did you mean 'steps'?" in message


def test_the_source_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^my.toml: 'image_size' is required"):
        UNetConfig.from_dict({}, source="my.toml")


# --- ranges and combinations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        *[(UNetConfig, {name: 0}) for name in ("image_size", "model_channels", "num_res_blocks")],
        (UNetConfig, {"num_heads": 0}),
        *[(UNetConfig, {name: 2**31}) for name in ("image_size", "model_channels", "num_classes")],
        (UNetConfig, {"num_head_channels": 0}),
        (UNetConfig, {"num_classes": 0}),
        (UNetConfig, {"low_res_size": 0}),
        (UNetConfig, {"num_heads_upsample": -2}),
        (UNetConfig, {"in_channels": 0}),
        (UNetConfig, {"in_channels": 5}),
        (UNetConfig, {"attention_resolutions": [0]}),
        (UNetConfig, {"channel_mult": [1, 0]}),
        (UNetConfig, {"channel_mult": [1, 1e300]}),
        (UNetConfig, {"channel_mult": [1, float("inf")]}),
        (UNetConfig, {"dropout": 1.0}),
        (UNetConfig, {"dropout": -0.1}),
        (UNetConfig, {"dropout": float("nan")}),
        (ClassifierConfig, {"num_classes": 1}),
        (ClassifierConfig, {"pool": "max"}),
        (DiffusionConfig, {"steps": 1_000_001}),
        (DiffusionConfig, {"mean_type": "w"}),
        *[(DiffusionConfig, {"beta_start": bad, "beta_end": 0.02}) for bad in (0, 1, -0.1, "little")],
        *[(UNetConfig, {name: 0}) for name in ("norm_eps", "norm_groups")],
        (UNetConfig, {"norm_eps": 1.5}),
        (UNetConfig, {"frequency_shift": 2}),
        (UNetConfig, {"downsample_padding": "before"}),
        (DiffusionConfig, {"variance_type": "fixed"}),
        (SamplerConfig, {"method": "plms"}),
        (SamplerConfig, {"scale": float("nan")}),
        (SamplerConfig, {"scale": float("inf")}),
        (SamplerConfig, {"steps": [250]}),
        (SamplerConfig, {"eta": 1.1}),
        (SamplerConfig, {"eta": -0.1}),
        (SamplerConfig, {"eta": float("nan")}),
        (DataConfig, {"hold_out": 1.0}),
        (DataConfig, {"kind": "zip"}),
        (DataConfig, {"channels": 0}),
        (DataConfig, {"label_from": "file"}),
        (DataConfig, {"on_bad_file": "delete"}),
        *[
            (TrainingConfig, {name: 0})
            for name in (
                "steps", "batch_size", "accumulate", "lr", "grad_clip", "log_every", "checkpoint_every",
                "max_nan_steps",
            )
        ],
        *[(TrainingConfig, {name: -1}) for name in ("warmup_steps", "weight_decay", "seed", "sample_every")],
        (TrainingConfig, {"seed": 2**63}),
        (TrainingConfig, {"lr": float("nan")}),
        (TrainingConfig, {"ema_rates": []}),
        (TrainingConfig, {"ema_rates": [0.9, 1.0]}),
        (TrainingConfig, {"ema_rates": [0.0]}),
        (TrainingConfig, {"lr_schedule": "step"}),
        (TrainingConfig, {"snr_weighting": "edm"}),
        (TrainingConfig, {"precision": "fp8"}),
        (TrainingConfig, {"loss": "l1"}),
        (TrainingConfig, {"timestep_sampler": "random"}),
    ],
)  # fmt: skip
def test_values_out_of_range(cls: type[Config], changes: dict[str, Any]) -> None:
    base = {
        UNetConfig: SMALL,
        ClassifierConfig: SMALL | {"num_classes": 3},
        DataConfig: {"source": "digits", "image_size": 8},
    }.get(cls, {})
    cls.from_dict(base)
    assert f"'{next(iter(changes))}" in refusal(cls, base | changes)


@pytest.mark.parametrize(
    ("cls", "changes", "expected"),
    [
        (UNetConfig, {"channel_mult": []}, "channel_mult is empty"),
        (
            UNetConfig,
            {"image_size": 28, "channel_mult": [1, 1, 1, 1]},
            "image_size 28 cannot be halved 3 times for the 4 levels of channel_mult; use a multiple of 8",
        ),
        (UNetConfig, {"model_channels": 48}, "a level has 48 channels (model_channels 48 x channel_mult"),
        (UNetConfig, {"channel_mult": [0.01, 1]}, "a level has 0 channels"),
        (
            UNetConfig,
            {"model_channels": 33, "channel_mult": [32 / 33, 64 / 33]},
            "model_channels must be even",
        ),
        (
            UNetConfig,
            {"attention_resolutions": [16, 4]},
            "[16] are no level's size; the levels are [8, 4] pixels",
        ),
        (
            UNetConfig,
            {"num_head_channels": 48},
            "attention over 64 channels cannot be divided by num_head_channels 48",
        ),
        (
            UNetConfig,
            {"num_head_channels": None, "num_heads": 3},
            "64 channels cannot be divided by num_heads 3",
        ),
        (
            UNetConfig,
            {"num_head_channels": None, "num_heads": 4, "num_heads_upsample": 5},
            "64 channels cannot be divided by num_heads 5",
        ),
        (
            UNetConfig,
            {"attention_resolutions": [], "num_head_channels": 48},
            "over 64 channels",
        ),  # the middle
        (UNetConfig, {"low_res_size": 8}, "low_res_size 8 is not below image_size 8"),
        (ClassifierConfig, {"num_head_channels": None}, "pool 'attention' needs num_head_channels"),
        (UNetConfig, {"image_size": 6, "channel_mult": [1, 1, 1]}, "cannot be halved 2 times"),
        (ClassifierConfig, {"image_size": 3, "channel_mult": [1, 1, 1]}, "cannot be halved 2 times"),
        (DiffusionConfig, {"steps": 20}, "a linear schedule of 20 steps has beta >= 1; use 21 steps or more"),
        (
            DiffusionConfig,
            {"beta_start": 1e-4},
            "beta_start and beta_end belong together; there is no beta_end",
        ),
        (DiffusionConfig, {"beta_end": 0.02}, "there is no beta_start"),
        (DiffusionConfig, {"schedule": "cosine", **BETAS}, "a cosine schedule has no beta_start"),
        (DiffusionConfig, {"schedule": "sigmoid"}, "schedule 'sigmoid' needs beta_start and beta_end"),
        (DiffusionConfig, {"schedule": "scaled_linear"}, "schedule 'scaled_linear' needs beta_start"),
        (DiffusionConfig, {"zero_terminal_snr": True}, "zero_terminal_snr leaves nothing of x_0"),
        (UNetConfig, {"norm_groups": 48}, "group normalisation needs multiples of 48"),
        (
            UNetConfig,
            {"model_channels": 2, "norm_groups": 2, "frequency_shift": 1},
            "frequency_shift 1 leaves",
        ),
        (UNetConfig, {"downsample_padding": "after", "conv_resample": False}, "is of strided convolutions"),
        (UNetConfig, {"downsample_padding": "after", "resblock_updown": True}, "is of strided convolutions"),
        (SamplerConfig, {"eta": 0.5}, "eta belongs to ddim"),
        (SamplerConfig, {"scale": -2e6}, "'scale': -2000000.0 is out of range"),
        (
            RunConfig,
            {"unet": SMALL | {"image_size": 16, "attention_resolutions": []}},
            "unet.image_size 16 differs",
        ),
        (RunConfig, {"unet": SMALL | {"in_channels": 1}}, "unet.in_channels 1 differs from data.channels 3"),
        (
            RunConfig,
            {"classifier": SMALL | {"num_classes": 2, "in_channels": 1}},
            "classifier.in_channels 1 differs from data.channels 3",
        ),
        (
            RunConfig,
            {"diffusion": {"variance_type": "fixed_small"}},
            "unet.learn_sigma is True but diffusion.variance_type is 'fixed_small'",
        ),
        (
            RunConfig,
            {"upsampler": SMALL | {"low_res_size": 4, "learn_sigma": False}},
            "upsampler.learn_sigma is False but diffusion.variance_type is 'learned_range'",
        ),
        (
            RunConfig,
            {"unet": SMALL | {"low_res_size": 4}},
            "unet.low_res_size belongs in the section 'upsampler'",
        ),
        (RunConfig, {"upsampler": SMALL}, "upsampler.low_res_size is required"),
    ],
)
def test_impossible_combinations(cls: type[Config], changes: dict[str, Any], expected: str) -> None:
    base = {
        UNetConfig: SMALL,
        ClassifierConfig: SMALL | {"num_classes": 3},
        RunConfig: RUN,
    }.get(cls, {})
    cls.from_dict(base)
    assert expected in refusal(cls, base | changes)


def test_the_edges_of_what_is_allowed() -> None:
    DiffusionConfig(steps=21)
    DiffusionConfig(steps=2, schedule="cosine")
    SamplerConfig(method="ddim", eta=1.0)
    SamplerConfig(scale=-1e6)
    changed(UNetConfig, low_res_size=7)
    changed(ClassifierConfig, num_head_channels=None, num_heads=2, pool="adaptive")
    # 32 channels at the fine level are not attended to, so they need not be divisible.
    changed(UNetConfig, num_head_channels=64)


def test_derived_values() -> None:
    unet = UNetConfig.from_dict(SMALL | {"image_size": 16, "channel_mult": [1, 2, 3]})
    assert unet.level_channels == (32, 64, 96)
    assert unet.level_sizes == (16, 8, 4)
    assert unet.out_channels == 6
    assert UNetConfig.from_dict(SMALL | {"learn_sigma": False, "in_channels": 1}).out_channels == 1
    assert DiffusionConfig(variance_type="learned").learns_sigma
    assert not DiffusionConfig(variance_type="fixed_large").learns_sigma


def test_choices_of_a_sampler() -> None:
    ddim = SamplerConfig(method="ddim", steps="ddim25", eta=0.5, scale=3.0)
    process = DiffusionConfig()

    def chosen(sampler: SamplerConfig, **choices: Any) -> SamplerConfig:
        return with_choices(sampler, process, choices)

    methods = [chosen(ddim, steps=text).method for text in ("ddim50", " ddim50", "250", "")]
    assert methods == ["ddim", "ddim", "ddpm", "ddpm"]
    assert chosen(ddim) == ddim
    assert chosen(ddim, method="auto", steps="50") == ddim.model_copy(update={"steps": "50"})
    assert chosen(ddim, steps="250") == SamplerConfig(steps="250", scale=3.0)
    assert chosen(ddim, steps="50", method="ddim").eta == 0.5
    assert chosen(SamplerConfig(), method="ddim", eta=0.7).eta == 0.7
    assert chosen(ddim, method="unipc") == SamplerConfig(method="unipc", steps="10", scale=3.0)
    fast = SamplerConfig(method="dpmpp", steps="12", order=3)
    assert chosen(fast, method="unipc") == SamplerConfig(method="unipc", steps="12")
    assert chosen(fast, steps="10") == SamplerConfig(steps="10")
    with pytest.raises(ConfigError, match="eta belongs to ddim"):
        chosen(ddim, method="ddpm", eta=0.7)


def test_configurations_are_immutable_and_hashable() -> None:
    config = RunConfig.from_dict(RUN)
    assert hash(config) == hash(RunConfig.from_dict(RUN))
    with pytest.raises(ValueError, match="frozen"):
        config.data.image_size = 9  # type: ignore[misc]


# --- defaults ------------------------------------------------------------------------------------------


def test_a_classifiers_section_keeps_its_own_defaults() -> None:
    """Naming one key of a section leaves the others as they are without the section."""
    config = RunConfig.from_dict(RUN | {"train_classifier": {"steps": 7}, "train_unet": {"steps": 7}})
    assert (config.train_classifier.lr, config.train_classifier.weight_decay) == (3e-4, 0.05)
    assert (config.train_unet.lr, config.train_unet.weight_decay) == (1e-4, 0.0)


def test_a_short_process_is_sampled_whole_where_no_steps_are_given() -> None:
    short = RUN | {"diffusion": {"steps": 100}}
    assert RunConfig.from_dict(short).sampler.steps == "100"
    assert RunConfig.from_dict(short | {"sampler": {"scale": 2.0}}).sampler == SamplerConfig(
        steps="100", scale=2.0
    )
    assert RunConfig.from_dict(short | {"sampler": {"steps": "250"}}).sampler.steps == "250"
    assert RunConfig.from_dict(RUN | {"diffusion": {"steps": 250}}).sampler == SamplerConfig()
    fitted = RunConfig.from_dict(short).sampler
    assert RunConfig.from_dict(RUN | {"diffusion": {"steps": 1000}, "sampler": fitted}).sampler.steps == "250"
    assert RunConfig.from_dict(RUN | {"diffusion": {"steps": 50}, "sampler": fitted}).sampler.steps == "50"
    with pytest.raises(ConfigError, match=r"'diffusion.steps' is -1"):
        RunConfig.from_dict(RUN | {"diffusion": {"steps": -1}})


def test_newer_options_are_written_where_they_are_not_the_defaults() -> None:
    network, process = UNetConfig.from_dict(SMALL), DiffusionConfig()
    newer = ("downsample_padding", "frequency_shift", "norm_eps", "norm_groups")
    assert not set(newer) & network.to_dict().keys()
    assert not {"beta_start", "beta_end", "zero_terminal_snr"} & process.to_dict().keys()
    assert list(process.to_dict()) == ["steps", "schedule", "mean_type", "variance_type", "rescale_timesteps"]
    changed = {"downsample_padding": "after", "frequency_shift": 1, "norm_eps": 1e-6, "norm_groups": 16}
    other = UNetConfig.from_dict(SMALL | changed)
    assert {name: other.to_dict()[name] for name in newer} == changed
    assert UNetConfig.from_dict(other.to_dict()) == other
    scaled = DiffusionConfig.from_dict(BETAS | {"mean_type": "v", "zero_terminal_snr": True, "steps": 10})
    assert DiffusionConfig.from_dict(scaled.to_dict()) == scaled
    assert scaled.to_dict()["beta_end"] == 0.02


def test_no_name_is_both_a_network_s_and_a_process_s() -> None:
    networks = UNetConfig.model_fields.keys() | ClassifierConfig.model_fields.keys()
    assert not networks & (DiffusionConfig.model_fields.keys() | EdmConfig.model_fields.keys())
