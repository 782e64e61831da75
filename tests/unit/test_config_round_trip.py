"""Configurations that are written are read back, and no value anywhere is more than a configuration error."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admtrt.config_files import load_config, save_config
from admtrt.errors import ConfigError
from admtrt.run_config import RunConfig

UNET = {
    "image_size": 8,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "attention_resolutions": [4],
    "num_head_channels": 16,
}
ENDS = {"beta_start": 1e-4, "beta_end": 0.02}
RUN = {"data": {"source": "digits", "image_size": 8}, "unet": UNET}


def fractions(**bounds: Any) -> st.SearchStrategy[float]:
    return st.floats(0.0, 1.0, exclude_max=True, **bounds)


@st.composite
def backbones(draw: st.DrawFn) -> dict[str, Any]:
    levels = draw(st.integers(1, 3))
    sizes = [8 >> level for level in range(levels)]
    return {
        "image_size": 8,
        "in_channels": 2,
        "model_channels": draw(st.sampled_from([32, 64])),
        "num_res_blocks": draw(st.integers(1, 3)),
        "channel_mult": draw(st.lists(st.sampled_from([1, 2, 3.0]), min_size=levels, max_size=levels)),
        "attention_resolutions": draw(st.lists(st.sampled_from(sizes))),
        "num_heads": draw(st.sampled_from([1, 2, 4])),
        "num_head_channels": draw(st.sampled_from([None, 8, 16])),
        "dropout": draw(fractions()),
        "frequency_shift": draw(st.sampled_from([0, 1])),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        "norm_groups": draw(st.sampled_from([8, 16, 32])),
        **draw(
            st.fixed_dictionaries(
                {
                    name: st.booleans()
                    for name in (
                        "new_attention_order",
                        "conv_resample",
                        "resblock_updown",
                        "scale_shift_norm",
                    )
                }
            )
        ),
    }


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    positive = st.floats(0, exclude_min=True, allow_infinity=False)
    training = st.fixed_dictionaries(
        {},
        optional={
            "lr": positive,
            "weight_decay": positive,
            "grad_clip": positive,
            "ema_rates": st.lists(fractions(exclude_min=True), min_size=1, max_size=3),
            "seed": st.integers(0, 2**63 - 1),
            "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
            "tensorboard": st.booleans(),
        },
    )
    learned = draw(st.booleans())
    networks = {
        "unet": draw(st.none() | backbones()),
        "classifier": draw(st.none() | backbones()),
        "upsampler": draw(st.none() | backbones()),
    }
    if networks["classifier"] is not None:
        pools = ["adaptive", "spatial", "spatial_v2"]
        if networks["classifier"]["num_head_channels"] is not None:
            pools.append("attention")
        networks["classifier"] |= {"num_classes": 5, "pool": draw(st.sampled_from(pools))}
    for name in ("unet", "upsampler"):
        if networks[name] is not None:
            networks[name] |= {"learn_sigma": learned}
    if networks["upsampler"] is not None:
        networks["upsampler"]["low_res_size"] = draw(st.integers(1, 7))
    eta = draw(st.none() | fractions())
    return RunConfig.from_dict(
        {
            "data": {
                "source": draw(st.text(st.characters(exclude_categories=["Cs"]))),
                "image_size": 8,
                "channels": 2,
                "hold_out": draw(fractions()),
            },
            "diffusion": {
                "steps": draw(st.integers(21, 10**6)),
                **draw(st.sampled_from([{}, ENDS, {"schedule": "sigmoid", **ENDS}, {"schedule": "cosine"}])),
                **draw(st.sampled_from([{}, {"mean_type": "v", "zero_terminal_snr": True}])),
                "variance_type": draw(
                    st.sampled_from(
                        ["learned", "learned_range"] if learned else ["fixed_small", "fixed_large"]
                    )
                ),
            },
            "sampler": {
                "method": "ddpm" if eta is None else "ddim",
                "eta": eta or 0.0,
                "scale": draw(st.floats(-1e6, 1e6)),
                "clip": draw(st.booleans() | st.floats(0.01, 9)),
                "steps": draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=10)),
            },
            **{f"train_{name}": draw(training) for name in networks},
            **networks,
        }
    )


@given(runs())
@settings(max_examples=50)
def test_plain_data_round_trip(config: RunConfig) -> None:
    assert RunConfig.from_dict(config.to_dict()) == config


_counter = itertools.count()


@given(config=runs())
@settings(max_examples=50)
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    path = tmp_path_factory.getbasetemp() / f"round-trip-{next(_counter)}.toml"
    save_config(config, path)
    assert load_config(RunConfig, path) == config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=100)
def test_any_value_anywhere_is_accepted_or_a_config_error(data: st.DataObject) -> None:
    plain: dict[str, Any] = RunConfig.from_dict(RUN).to_dict()
    section = data.draw(st.sampled_from(sorted(name for name in plain if isinstance(plain[name], dict))))
    key = data.draw(st.sampled_from([None, *plain[section]]))
    value = data.draw(JSON | st.integers(10**30, 10**40) | st.floats(1e300))
    if key is None:
        plain[section] = value
    else:
        plain[section][key] = value
    try:
        config = RunConfig.from_dict(plain)
    except ConfigError:
        return
    assert RunConfig.from_dict(config.to_dict()) == config
