"""PyTorch's rows, the plain export, and the measurement of the machine's peak."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
import torch
from bundles import CLASSIFIER, SAMPLER, UNET, exported_bundle, network
from onnx_graphs import small_classifier
from opened_sessions import opened_sessions

from admtrt.bench import plain
from admtrt.bench.contender import Contender, measure_guide_memory
from admtrt.bench.rows import Row
from admtrt.bench.subject import Subject, subject_from_preset
from admtrt.bench.torch_rows import DeviceDenoiser, open_torch_row
from admtrt.bench.yardstick import Yardstick, count_operations
from admtrt.bundle import Bundle
from admtrt.config import DiffusionConfig
from admtrt.contract import classifier_gradient_spec
from admtrt.errors import CheckpointError, RequestError
from admtrt.export.graphs import example_inputs
from admtrt.export.guides.losses import linear
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import save_checkpoint
from admtrt.models.classifier import log_prob_gradient
from admtrt.models.denoiser import TorchDenoiser
from admtrt.presets import PRESETS, Preset
from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser
from admtrt.runtime.example import example_slots
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.sampler import advance
from admtrt.verify.report import sample_errors

if TYPE_CHECKING:
    from admtrt.config import ClassifierConfig, UNetConfig

CLOSE = 1e-5  # float32 summed in another order, on tiny networks


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, config in (("unet", UNET), ("classifier", CLASSIFIER)):
        loaded = network(config)
        save_checkpoint(folder / f"{name}.safetensors", loaded.module.state_dict(), loaded.config)
    return folder


def subject(checkpoints: Path, scratch: Path, original: Path | None = None) -> Subject:
    return Subject(
        name="tiny",
        bundle=exported_bundle("guided"),
        unet=checkpoints / "unet.safetensors",
        classifier=checkpoints / "classifier.safetensors",
        original=original,
        scratch=scratch,
    )


def modules() -> tuple[torch.nn.Module, torch.nn.Module]:
    return network(UNET).module, network(CLASSIFIER).module


def denoiser_of(dtype: torch.dtype) -> TorchDenoiser:
    return TorchDenoiser(*modules(), torch.device("cpu"), dtype)


def stepped(denoiser: TorchDenoiser | OnnxRuntimeDenoiser, steps: int = 1) -> np.ndarray:
    slots = example_slots(Bundle.open(exported_bundle("guided")).manifest, 3)
    for _ in range(steps):
        advance(slots, denoiser)
    return slots.x


def test_pytorch_and_the_bundle_take_the_same_step() -> None:
    expected = stepped(OnnxRuntimeDenoiser(Bundle.open(exported_bundle("guided")), threads=1))
    assert sample_errors(stepped(denoiser_of(torch.float32)), expected).max() < CLOSE


def test_bf16_is_not_fp32() -> None:
    error = sample_errors(stepped(denoiser_of(torch.bfloat16)), stepped(denoiser_of(torch.float32))).max()
    assert CLOSE < error < 0.2


ORIGINAL = """
from admtrt.config import ClassifierConfig, UNetConfig
from admtrt.models.classifier import Classifier
from admtrt.models.unet import UNet

given = {}

def ours(kind, config, options, **other):
    given[kind] = options
    size = options["image_size"]
    return {"unet": UNet, "classifier": Classifier}[kind](config.from_dict({
        "image_size": size, "in_channels": options["in_channels"],
        "model_channels": options["model_channels"], "num_res_blocks": options["num_res_blocks"],
        "channel_mult": options["channel_mult"], "num_heads": options["num_heads"],
        "attention_resolutions": [size // rate for rate in options["attention_resolutions"]],
        "resblock_updown": options["resblock_updown"], **other,
    }))

def UNetModel(**options):
    return ours("unet", UNetConfig, options)

def EncoderUNetModel(**options):
    return ours("classifier", ClassifierConfig, options, num_classes=options["out_channels"],
                pool=options["pool"], num_head_channels=options["num_head_channels"])
"""


def test_the_original_gets_the_settings_and_the_weights(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "guided_diffusion"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "unet.py").write_text(ORIGINAL)
    path = list(sys.path)
    denoiser = open_torch_row(Row("original"), subject(checkpoints, tmp_path, tmp_path), "cpu", 1)
    made = sys.modules.pop("guided_diffusion.unet")
    del sys.modules["guided_diffusion"]
    assert sys.path == path
    assert made.given["unet"]["out_channels"] == UNET.out_channels
    assert made.given["unet"]["num_head_channels"] == -1
    assert made.given["classifier"]["attention_resolutions"] == ()
    np.testing.assert_array_equal(stepped(denoiser), stepped(denoiser_of(torch.float32)))


def test_pytorch_without_checkpoints_says_so(tmp_path: Path) -> None:
    bare = Subject("bare", exported_bundle("guided"), None, None, None, tmp_path)
    with pytest.raises(CheckpointError, match="PyTorch needs the checkpoints"):
        open_torch_row(Row("torch"), bare, "cpu", 1)
    with pytest.raises(RequestError, match="there is no original implementation"):
        open_torch_row(Row("original"), bare, "cpu", 1)


def test_guides_are_timed_beside_the_step_and_differentiated_by_pytorch(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle"
    bundle_from_checkpoints(network(UNET), None, path, guides=[linear((1, 8, 8))])
    led = Subject("led", path, checkpoints / "unet.safetensors", None, None, tmp_path)
    torch_row, onnx_row = (Contender(Row(name), led, "cpu", 1, {}) for name in ("torch", "onnxruntime"))
    found, expected = torch_row.prepare(3).outputs, onnx_row.prepare(3).outputs
    assert set(found) == {"out", "guide.linear"} == set(expected)
    for name, values in expected.items():
        assert values.any(axis=(1, 2, 3)).all(), "of a gradient of 0 an error says nothing"
        assert sample_errors(found[name], values).max() < CLOSE
    for row in (torch_row, onnx_row):
        taken = row.step()
        assert list(taken.guides) == ["linear"]
        assert taken.guides["linear"] > 0
    assert not Contender(Row("torch", "bf16"), led, "cpu", 1, {}).prepare(1).outputs.keys() - {"out"}
    opened = opened_sessions(monkeypatch)
    for name in ("torch", "onnxruntime"):
        assert measure_guide_memory(Row(name), led, "cpu", 1, "linear", 3) > 2**20
    assert opened == ["guide.linear"]


@pytest.mark.parametrize(("stride", "size"), [(1, 8), (2, 8), (2, 7)])
def test_the_decomposition_that_pytorch_lacks(stride: int, size: int) -> None:
    x, weight = torch.randn(2, 3, size, size, requires_grad=True), torch.randn(4, 3, 3, 3)
    out = torch.nn.functional.conv2d(x, weight, stride=stride, padding=1)
    grad = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, x, grad)
    options = ([stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [True, False, False])
    found, *_ = plain.convolution_backward(grad, x, weight, None, *options)
    torch.testing.assert_close(found, expected)


def test_the_plain_gradient_is_exact_in_operators_that_onnx_has() -> None:
    """Of a classifier with residual downsampling, whose pooling the tiny one lacks."""
    classifier = small_classifier("attention")
    spec = classifier_gradient_spec(classifier.config)
    traced = plain.traced_gradient(classifier, tuple(example_inputs(spec, 2).values()))
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([4, 1])
    torch.testing.assert_close(traced(x, t, y), log_prob_gradient(classifier, x, t, y), rtol=1e-4, atol=1e-6)
    assert not [node.target for node in traced.graph.nodes if "backward" in str(node.target)]


def test_a_row_that_keeps_x_on_its_device(checkpoints: Path, tmp_path: Path) -> None:
    """Its noise is its own, so steps without noise are compared; the device is the CPU."""
    tiny = subject(checkpoints, tmp_path)
    bundle = Bundle.open(tiny.bundle)
    held = DeviceDenoiser(*tiny.networks(), torch.device("cpu"), torch.float32)
    given = {"steps": "ddim4", "scale": 2.0}
    expected = Pipeline(bundle, OnnxRuntimeDenoiser(bundle, threads=1))([0, 1], **given)
    assert sample_errors(Pipeline(bundle, held)([0, 1], **given).x, expected.x).max() < CLOSE
    noisy = Pipeline(bundle, held)([0, 1], steps=4)
    assert np.isfinite(noisy.x).all()


@pytest.mark.slow
def test_the_plain_export(checkpoints: Path, tmp_path: Path) -> None:
    tiny = subject(checkpoints, tmp_path)
    exported = plain.export_plain(tiny, 3)
    bundle = Bundle.open(tiny.bundle)
    expected = stepped(OnnxRuntimeDenoiser(bundle, threads=1))
    assert sample_errors(stepped(plain.PlainDenoiser(bundle, exported, 1)), expected).max() < CLOSE
    for name, nodes in exported.nodes.items():
        assert nodes > bundle.manifest.graphs[name].nodes
    session = onnxruntime.InferenceSession(exported.paths["unet"], providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[0] == 3


@pytest.mark.parametrize("name", ["64x64_diffusion", "64_256_upsampler"])
def test_operations_are_those_of_the_presets(name: str) -> None:
    unet: UNetConfig = PRESETS[name].network
    guide: ClassifierConfig | None = None if "upsampler" in name else PRESETS["64x64_classifier"].network
    counted = count_operations(unet, guide)
    assert counted["unet"] == PRESETS[name].step_flops
    assert guide is None or counted["classifier_gradient"] == PRESETS["64x64_classifier"].step_flops


def test_the_peak_is_the_better_of_two_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("admtrt.bench.yardstick._SIZES", {"cpu": (64, (1, 8, 8))})
    yardstick = Yardstick("cpu", 1)
    assert yardstick.gpu() is None
    monkeypatch.setattr(yardstick, "_seconds", lambda run: 1e-6 if run() is not None else 0)
    assert yardstick.measure("fp32") == pytest.approx(2 * 64**3 / 1e-6)
    assert yardstick.measure("bf16") > 0


@pytest.mark.slow
def test_a_preset_becomes_checkpoints_and_a_bundle_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small model replaces the published ones; this process replaces the other processes."""
    shared = {"diffusion": DiffusionConfig(), "sampler": SAMPLER}
    small = {
        "small": Preset("small", UNET, guided_by="small_classifier", **shared),
        "small_classifier": Preset("small_classifier", CLASSIFIER, **shared),
    }
    for module in ("admtrt.bench.subject", "admtrt.models.settings"):
        monkeypatch.setattr(f"{module}.PRESETS", small)
    monkeypatch.setattr("admtrt.bench.subject.run_remotely", lambda function, *given, log: function(*given))
    said: list[str] = []
    made = subject_from_preset("small", tmp_path, None, said.append, engines=("fp16",))
    assert set(made.check().engine_graphs) == {"fp16"}
    assert made.unet is not None
    names = [made.unet, tmp_path / "small_classifier.safetensors", made.bundle]
    assert said == [f"generating {names[0]}", f"generating {names[1]}", f"exporting {names[2]}"]
    bundle = Bundle.open(made.bundle)
    unet, classifier = made.networks()
    expected = stepped(TorchDenoiser(unet, classifier, torch.device("cpu"), torch.float32))
    assert sample_errors(stepped(OnnxRuntimeDenoiser(bundle, threads=1)), expected).max() < CLOSE
    said.clear()
    assert subject_from_preset("small", tmp_path, None, said.append) == made
    assert said == [f"using {made.bundle} as it stands"]
