"""Graphs of guides against autograd in float64: built-in losses, ONNX files, normalisations, precisions."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import guide_goldens
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from bundles import CLASSIFIER, UNET, network
from goldens import relative_error
from guide_goldens import normal
from onnx_graphs import proto, session
from torch import Tensor, nn

from admtrt.contract import guide_spec
from admtrt.errors import ExportError
from admtrt.export import write
from admtrt.export.capture import graph_from_module
from admtrt.export.check import check_graph
from admtrt.export.cost import operations, peak_bytes
from admtrt.export.cpu_form import cpu_form
from admtrt.export.engine_form import engine_form
from admtrt.export.graphs import EXAMPLE_BATCH, unet_graph
from admtrt.export.guides import losses
from admtrt.export.guides.check import check_loss
from admtrt.export.guides.classifiers import AtZero, classifier, noisy
from admtrt.export.guides.encoders import Prepared, cosine
from admtrt.export.guides.graphs import guide_graph
from admtrt.export.guides.guide import Guide
from admtrt.export.inside import OnnxFile
from admtrt.export.nodes import LOSS
from admtrt.export.precision import lower
from admtrt.export.shared import SharedWeights
from admtrt.onnx_wire import external_locations
from admtrt.runtime.example import example_targets
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.sampler import advance
from admtrt.runtime.slots import Slots, slots_for
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import sampling_schedule
from admtrt.verify.guides import TorchGuides

SHAPE = (1, 8, 8)
LOADED = network(UNET)
CLOSE = 2e-5
"""Of a sample's largest value: float32 through some sixty layers and back; 1e-6 to 8e-6 seen."""


class _Asking(nn.Module):
    """Crowson's estimate of x_0, which needs the state and the noise level."""

    def forward(self, x0: Tensor, x_t: Tensor, sqrt_one_minus_alpha_bar: Tensor, level: Tensor) -> Tensor:
        seen = x0 * (fraction := sqrt_one_minus_alpha_bar[:, None, None, None]) + x_t * (1 - fraction)
        return (seen.mean((1, 2, 3)) - level[:, 0]).square() + seen.square().mean((1, 2, 3))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.LayerNorm(8 * 36), nn.Linear(8 * 36, 5))
    return nn.Sequential(*layers).eval().requires_grad_(False)


def encoder_file(folder: Path, *, batch: bool = True) -> Path:
    path = folder / "encoder.onnx"
    free = ({0: torch.export.Dim("batch")},) if batch else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own parts
        torch.onnx.export(
            encoder(), (torch.zeros(2, 3, 12, 12),), path, input_names=["image"],
            output_names=["features"], dynamic_shapes=free, dynamo=True, verbose=False,
        )  # fmt: skip
    return path


def guides(which: str, folder: Path) -> Guide:
    kernel = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    noisy_classifier = network(CLASSIFIER).module
    made = {
        "linear": lambda: losses.linear(SHAPE),
        "convolution": lambda: losses.convolution(SHAPE, kernel / kernel.sum()),
        "fourier": lambda: losses.fourier(SHAPE),
        "tv": lambda: losses.total_variation(SHAPE),
        "range": lambda: losses.value_range(SHAPE),
        "classifier": lambda: classifier([AtZero(noisy_classifier)], 3),
        "noisy": lambda: noisy([noisy_classifier], 3),
        "module": lambda: cosine(Prepared(encoder(), SHAPE, (12, 12)), 5),
        "file": lambda: cosine(Prepared(OnnxFile(encoder_file(folder)), SHAPE, (12, 12)), 5),
        "asking": lambda: Guide("asking", _Asking(), {"level": (1,)}, normalise="eps"),
        "unit": lambda: Guide("unit", _Asking(), {"level": (1,)}, normalise="unit"),
        "cap": lambda: Guide("cap", _Asking(), {"level": (1,)}, normalise="cap:1e-4"),
    }
    return made[which]()


def feeds_for(guide: Guide, batch: int = 3) -> dict[str, np.ndarray]:
    """Other noise levels, images and a batch size than those of the captured example."""
    spec = guide_spec(UNET, guide.config)
    generator = np.random.default_rng(batch)
    alpha_bar = np.array([0.9, 0.3, 0.05])[:batch]
    numbers = {
        "t": np.array([20.0, 413.5, 800.0])[:batch],
        "x0_from_x": 1 / np.sqrt(alpha_bar),
        "x0_from_out": -np.sqrt(1 / alpha_bar - 1),
        "guide_clip": np.full(batch, 3e38),
        "sqrt_one_minus_alpha_bar": np.sqrt(1 - alpha_bar),
    }
    feeds = {
        "x": generator.standard_normal((batch, *SHAPE)),
        **example_targets(guide.config, batch),
        **numbers,
    }
    return {tensor.name: feeds[tensor.name].astype(np.float32) for tensor in spec.inputs}


SLOW = (
    "linear",
    "tv",
    "range",
    "fourier",
    "convolution",
    "classifier",
    "noisy",
    "module",
    "file",
    "unit",
    "cap",
)


@pytest.mark.parametrize("which", ["asking", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_gradients_are_those_of_autograd(which: str, tmp_path: Path) -> None:
    guide = guides(which, tmp_path)
    model = proto(cpu_form(guide_graph(LOADED.module, guide)))
    feeds = feeds_for(guide)
    names = [tensor.name for tensor in guide_spec(UNET, guide.config).outputs]
    found = dict(zip(names, session(model).run(names, feeds), strict=True))
    # A file is run in float32 on both sides.
    exact = TorchGuides(
        LOADED.module,
        LOADED.module.config,
        {"one": guide},
        torch.float32 if which == "file" else torch.float64,
    )
    expected = exact.run("one", feeds)
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert relative_error(found[name], values) <= CLOSE, name
    alone = session(model).run(["grad"], {name: values[1:2] for name, values in feeds.items()})[0]
    assert relative_error(alone, found["grad"][1:2]) <= CLOSE  # no number is of the batch


def test_a_file_s_gradient_is_that_of_its_function(tmp_path: Path) -> None:
    """The gradient of an ONNX file, which PyTorch cannot compute, against that of its original module."""
    file, module = OnnxFile(encoder_file(tmp_path)), encoder()
    assert (file.image, file.result) == ((3, 12, 12), (5,))
    x, cotangent = torch.randn(4, 3, 12, 12), torch.randn(4, 5)
    gradients = []
    for one in (file, module):
        leaf = x.clone().requires_grad_()
        gradients += torch.autograd.grad((one(leaf) * cotangent).sum(), leaf)
    assert relative_error(*(one.numpy() for one in gradients)) <= CLOSE
    for _ in range(2):  # a second graph of the same file, and the file itself behind both
        model = graph_from_module(file.eval(), {"x": x}, ["features"])
        np.testing.assert_allclose(session(proto(model)).run(None, {"x": x.numpy()})[0], module(x), atol=1e-5)
        assert torch.allclose(file(x), module(x), atol=1e-5)


def test_files_that_cannot_be_inside_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="fixed to a batch of 2"):
        OnnxFile(encoder_file(tmp_path, batch=False))
    (tmp_path / "text.onnx").write_text("none")
    with pytest.raises(ExportError, match="as an ONNX file"):
        OnnxFile(tmp_path / "text.onnx")
    with pytest.raises(ExportError, match="as an ONNX file"):
        OnnxFile(tmp_path / "missing.onnx")
    two = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["": 18]>
        two (float[N,3,4,4] a, float[N,3,4,4] b) => (float[N,3,4,4] c) { c = Add(a, b) }
    """)
    onnx.save(two, tmp_path / "two.onnx")
    with pytest.raises(ExportError, match="takes a, b; expected one image"):
        OnnxFile(tmp_path / "two.onnx")


@pytest.mark.slow
def test_the_loss_stays_in_float32_and_its_cotangent_within_fp16() -> None:
    guide = losses.linear(SHAPE)
    model = engine_form(guide_graph(LOADED.module, guide, conv_backward="transposed", boosted=True))
    lower(model, "fp16")
    marked = [node for node in model.graph if LOSS in node.metadata_props]
    types = {str(value.dtype) for node in marked for value in node.outputs if node.op_type != "Cast"}
    assert len(marked) > 20
    assert "FLOAT16" not in types
    assert any(str(value.dtype) == "FLOAT16" for node in model.graph for value in node.outputs)
    feeds = feeds_for(guide)
    names = ["grad", "value"]
    found = session(proto(model)).run(names, feeds)
    expected = TorchGuides(LOADED.module, LOADED.module.config, {"one": guide}).run("one", feeds)
    for name, values in zip(names, found, strict=True):
        a, b = (one.reshape(3, -1).astype(np.float64) for one in (values, expected[name]))
        error = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
        assert error.max() < 16 * 2.0**-11, (name, error)  # as of other graphs in fp16


@pytest.mark.slow
def test_weights_are_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "EXTERNAL_THRESHOLD", 0)
    guide, shared = losses.linear(SHAPE), SharedWeights()
    graphs = {"unet": unet_graph(LOADED.module), "guide": guide_graph(LOADED.module, guide)}
    for name, model in graphs.items():
        write.write_graph(cpu_form(model), tmp_path / f"{name}.onnx", shared=shared)
    check_graph(tmp_path / "guide.onnx", guide_spec(UNET, guide.config), example_batch=EXAMPLE_BATCH)
    assert external_locations(tmp_path / "guide.onnx") == {"unet.onnx.data", "guide.onnx.data"}
    sizes = [(tmp_path / f"{name}.onnx.data").stat().st_size for name in graphs]
    assert sizes[1] < 1.1 * sizes[0]  # the flipped convolutions, and little else
    feeds = feeds_for(guide)
    whole = session(proto(cpu_form(graphs["guide"]))).run(["grad"], feeds)[0]
    stored = ort.InferenceSession(tmp_path / "guide.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(stored.run(["grad"], feeds)[0], whole)


@pytest.mark.slow
def test_costs_are_counted() -> None:
    guided = cpu_form(guide_graph(LOADED.module, losses.linear(SHAPE)))
    plain = cpu_form(unet_graph(LOADED.module))
    assert 1.8 < operations(guided) / operations(plain) < 2.2
    assert peak_bytes(guided) > 2 * peak_bytes(plain)


@cache
def pipeline() -> Pipeline:
    return Pipeline.from_bundle(guide_goldens.bundle("plain"), threads=1)


@pytest.mark.slow
def test_a_batch_may_mix_guides() -> None:
    """In a mixed batch, rows with several guides, with and without memory equal the same rows alone."""
    manifest, denoiser = pipeline().bundle.manifest, pipeline().denoiser

    def slots(seed: int, *names: str, **choices: Any) -> Slots:
        sampler = SamplerConfig(scale=0.0, guided_by=pipeline().guide_choices(names), **choices)
        return slots_for(
            manifest.network, None, [sampling_schedule(manifest.diffusion, sampler)], [seed], guided=False,
            guides=manifest.guides,
            targets={name: example_targets(manifest.guides[name], 1, seed) for name in names},
        )  # fmt: skip

    def parts() -> list[Slots]:
        return [
            slots(1, "linear", method="ddpm", steps="5"),
            slots(2, method="dpmpp", steps="5"),
            slots(3, "pooled", "linear", method="ddim", steps="5"),
            slots(4, method="ddim", steps="5"),
            slots(5, "pooled", method="ddim", steps="5"),
        ]

    joined, alone = Slots.join(parts()), parts()
    for _ in range(5):
        advance(joined, denoiser)
        for one in alone:
            advance(one, denoiser)
    for row, one in enumerate(alone):
        assert relative_error(joined.x[row : row + 1], one.x) <= 1e-4, row
    plain = slots(1, method="ddpm", steps="5")
    for _ in range(5):
        advance(plain, denoiser)
    assert relative_error(plain.x, alone[0].x) > 1e-2


@pytest.mark.slow
def test_a_guide_without_effect_changes_nothing() -> None:
    """With scale 0 the guide has no effect; with another, samples approach the measurement."""
    measurement = normal("op.x")[:1].clip(-1, 1)
    given: dict[str, Any] = {
        "seeds": [1],
        "steps": "ddim4",
        "guides": {"linear": {"measurement": measurement}},
    }
    plain = pipeline()(seeds=[1], steps="ddim4")
    assert relative_error(pipeline()(**given, guide_scale={"linear": 0.0}).x, plain.x) <= 1e-5
    led = pipeline()(**given, guide_scale={"linear": 0.5})
    closer = [np.linalg.norm(one.x - measurement) for one in (led, plain)]
    assert closer[0] < closer[1]


@pytest.mark.slow
def test_loss_checks_take_files(tmp_path: Path) -> None:
    check_loss(guides("file", tmp_path), SHAPE)
