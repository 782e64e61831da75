"""Small versions of every published model: exported, checked, compared with PyTorch, built as engines.

A small version has its preset's levels, attention levels, heads (by number or by width), order of attention,
resizing, dropout, classes, learned sigma, pooling and conditioning, at a quarter of the image size, with one
residual block a level and as few channels as group normalisation allows. The last level has 2x2 pixels or
more: over a single one, attention does nothing and a group of one channel is always 0.
"""

from __future__ import annotations

import gc
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from goldens import generated_weights, relative_error
from onnx_graphs import LogProb, run

from admtrt.config import ClassifierConfig, UNetConfig
from admtrt.contract import classifier_gradient_spec, unet_spec
from admtrt.export.capture import graph_from_module
from admtrt.export.check import check_graph
from admtrt.export.cpu_form import cpu_form
from admtrt.export.differentiate import add_input_gradient
from admtrt.export.engine_form import engine_form
from admtrt.export.graphs import EXAMPLE_BATCH, example_inputs, unet_graph
from admtrt.export.write import write_graph
from admtrt.models.classifier import Classifier, log_prob, log_prob_gradient
from admtrt.models.unet import UNet
from admtrt.presets import PRESETS
from admtrt.runtime.engines.builder import build_plan
from admtrt.runtime.engines.library import find_library
from admtrt.runtime.engines.options import BatchProfile, BuildOptions
from admtrt.runtime.engines.sources import GraphSource

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx_ir as ir

    from admtrt.contract import GraphSpec

TOLERANCE = 1e-4  # the deployment bar; measured values are near 1e-6
BATCH = 2
SHRINK = 4


def small(network: UNetConfig | ClassifierConfig) -> UNetConfig | ClassifierConfig:
    """A preset's configuration with fewer channels, blocks and pixels."""
    changes = {
        "image_size": network.image_size // SHRINK,
        "attention_resolutions": [size // SHRINK for size in network.attention_resolutions],
        "model_channels": int(32 / min(network.channel_mult)),
        "num_res_blocks": 1,
    }
    if network.num_head_channels is not None:
        changes["num_head_channels"] = 16
    if isinstance(network, UNetConfig) and network.low_res_size is not None:
        changes["low_res_size"] = network.low_res_size // SHRINK
    return type(network).from_dict(network.model_dump(exclude_unset=True) | changes)


def names_by_config() -> dict[UNetConfig | ClassifierConfig, str]:
    """Every distinct small configuration, with the presets that it represents."""
    found: dict[UNetConfig | ClassifierConfig, list[str]] = {}
    for name, preset in PRESETS.items():
        found.setdefault(small(preset.network), []).append(name)
    return {config: "=".join(names) for config, names in found.items()}


def test_small_versions_keep_the_settings_of_their_presets() -> None:
    """Unshrunk settings are equal, and presets share a small version only if they share the network."""
    shrunk = {
        "image_size", "low_res_size", "attention_resolutions", "model_channels", "num_res_blocks",
        "num_head_channels",
    }  # fmt: skip
    for preset in PRESETS.values():
        ours, theirs = small(preset.network), preset.network
        assert ours.model_dump(exclude=shrunk) == theirs.model_dump(exclude=shrunk)
        assert (ours.num_head_channels is None) == (theirs.num_head_channels is None)
        assert [size in ours.attention_resolutions for size in ours.level_sizes] == [
            size in theirs.attention_resolutions for size in theirs.level_sizes
        ]
        assert ours.level_sizes[-1] >= 2
    assert len(names_by_config()) == len({preset.network for preset in PRESETS.values()}) == 12 + 4


def traits(config: UNetConfig | ClassifierConfig) -> set[tuple[str, object]]:
    """Settings that make a graph another one, beside its sizes; other tests export upsamplers."""
    return {
        ("kind", type(config)),
        ("heads by width", config.num_head_channels is not None),
        ("scale and shift", config.scale_shift_norm),
        ("num_classes", getattr(config, "num_classes", None) is None),
        ("learn_sigma", getattr(config, "learn_sigma", None)),
    }


def cases() -> Iterator[object]:
    """All small versions; those that bring no trait which earlier ones have not are slow tests."""
    left = names_by_config()
    seen: set[tuple[str, object]] = set()
    while left:
        config = min(left, key=lambda config: (-len(traits(config) - seen), config.image_size))
        slow = [] if traits(config) - seen else [pytest.mark.slow]
        seen |= traits(config)
        yield pytest.param(config, id=left.pop(config), marks=slow)


def test_every_trait_is_exported_by_default() -> None:
    default = [case.values[0] for case in cases() if not case.marks]  # type: ignore[attr-defined]
    assert {trait for config in default for trait in traits(config)} == {
        trait for config in names_by_config() for trait in traits(config)
    }
    assert len(default) < 6


@pytest.fixture
def _no_collection() -> Iterator[None]:
    """PyTorch's exporter makes millions of objects; looking for garbage takes a fifth of its time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("config", list(cases()))
def test_small_version(config: UNetConfig | ClassifierConfig, tmp_path: Path) -> None:
    """The form for CPUs and the form for engines, both against PyTorch; the latter also becomes an engine."""
    spec = unet_spec(config) if isinstance(config, UNetConfig) else classifier_gradient_spec(config)
    network = generated_weights(UNet(config) if isinstance(config, UNetConfig) else Classifier(config))
    feeds = inputs(spec)
    expected = reference(network, feeds)
    for output, values in expected.items():
        # With layers of zeros, all samples would be equal and parity would prove nothing.
        assert relative_error(values[:1], values[1:]) > 10 * TOLERANCE, output
    for form, model in forms(network, spec).items():
        path = tmp_path / f"{form}.onnx"
        write_graph(model, path)
        check_graph(path, spec, example_batch=EXAMPLE_BATCH)
        got = run(onnx.load(path), **feeds)
        assert set(got) == set(expected)
        for output, values in expected.items():
            assert relative_error(got[output], values) < TOLERANCE, (form, output)
    check_engine(spec, tmp_path / "engine.onnx")


def inputs(spec: GraphSpec) -> dict[str, np.ndarray]:
    """Another batch size than the captured one, two timesteps and the last of a thousand classes."""
    rng = np.random.default_rng(0)
    special = {"t": np.array([3, 987], np.float32), "y": np.array([7, 999])}
    return {
        tensor.name: special[tensor.name]
        if tensor.name in special
        else rng.uniform(-1, 1, tensor.sized(BATCH)).astype(np.float32)
        for tensor in spec.inputs
    }


def reference(network: UNet | Classifier, feeds: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(feed) for name, feed in feeds.items()}
    if isinstance(network, Classifier):
        gradient = log_prob_gradient(network, **tensors)
        return {"grad": gradient, "log_prob": log_prob(network, **tensors)}
    return {"out": network(**tensors)}


def forms(network: UNet | Classifier, spec: GraphSpec) -> dict[str, ir.Model]:
    """The graph for CPUs and the fp32 graph for engines, as a bundle has them; captured once."""
    if isinstance(network, UNet):
        model = unet_graph(network)
        return {"cpu": cpu_form(model), "engine": engine_form(model)}
    forward = graph_from_module(LogProb(network).eval(), example_inputs(spec), ["log_prob"])
    found = {}
    for form, conv_backward in (("cpu", "flipped"), ("engine", "transposed")):
        found[form] = forward.clone()
        add_input_gradient(found[form], wrt="x", of="log_prob", name="grad", conv_backward=conv_backward)
    return {"cpu": cpu_form(found["cpu"]), "engine": engine_form(found["engine"])}


def check_engine(spec: GraphSpec, path: Path) -> None:
    """Build a graph for an absent GPU; the library checks its inputs and outputs against the contract."""
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("no engine built: tensorrt_rtx is not installed (pip install '.[rtx]')")
    source = GraphSource("unet", "fp32", path=path, spec=spec, digest="", engine_form=True)
    options = BuildOptions(profiles=(BatchProfile(smallest=1, best=1, largest=BATCH),), targets=(89,))
    weights = sum(onnx.numpy_helper.to_array(value).nbytes for value in onnx.load(path).graph.initializer)
    assert len(build_plan(find_library("rtx"), source, options).plan) > weights
