"""The runtime's denoiser on PyTorch networks: admtrt's, compiled, or the original implementation's."""

from __future__ import annotations

import contextlib
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from admtrt.bench.rows import COMPILED, ORIGINAL
from admtrt.bundle import Bundle
from admtrt.contract import CLASSIFIER_GRADIENT
from admtrt.errors import RequestError
from admtrt.models.denoiser import TorchDenoiser, to_array, update
from admtrt.runtime.sampler import step_inputs
from admtrt.schedule.guides import GUIDE_GRAPH
from admtrt.verify.guides import TorchGuides

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from admtrt.bench.rows import Device, Row
    from admtrt.bench.subject import Subject
    from admtrt.config import BackboneConfig, ClassifierConfig, UNetConfig
    from admtrt.contract import GraphName, Precision
    from admtrt.export.guides.guide import AnyGuide
    from admtrt.models.classifier import Classifier
    from admtrt.models.unet import UNet
    from admtrt.runtime.sampler import HeldSlots
    from admtrt.runtime.slots import Array, Slots

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""Names of precisions in PyTorch."""


class GuidedDenoiser(TorchDenoiser):
    """The same with the graphs of guides, whose gradients are autograd's through the UNet.

    Args:
        unet, classifier: of a :class:`~admtrt.models.denoiser.TorchDenoiser`.
        config: of the UNet.
        guides: by name.

    Attributes:
        guides: their names.
    """

    def __init__(
        self,
        unet: nn.Module,
        classifier: nn.Module | None,
        config: UNetConfig,
        guides: Mapping[str, AnyGuide],
    ) -> None:
        super().__init__(unet, classifier)
        self.guides = frozenset(guides)
        self._guides = TorchGuides(unet, config, guides)

    def run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        if graph.startswith(GUIDE_GRAPH):
            return dict(self._guides.run(graph.removeprefix(GUIDE_GRAPH), feeds))
        return super().run(graph, feeds)


class DeviceDenoiser(TorchDenoiser):
    """A PyTorch denoiser that keeps x on an accelerator between steps."""

    @contextlib.contextmanager
    def hold(self, slots: Slots) -> Iterator[HeldSlots]:
        """See :class:`~admtrt.runtime.sampler.ResidentDenoiser`."""
        yield _DeviceSlots(slots, self)


class _DeviceSlots:
    def __init__(self, slots: Slots, denoiser: DeviceDenoiser) -> None:
        self._slots = slots
        self._denoiser = denoiser
        self._upload()

    def _upload(self) -> None:
        tensor = self._denoiser.tensor
        self._x, self._x_0 = tensor(self._slots.x), tensor(self._slots.x_0)
        self._conditions = {
            graph: {name: tensor(values) for name, values in given.items()}
            for graph, given in self._slots.conditions.items()
        }

    def advance(self) -> None:
        """Use PyTorch's noise, drawn on the device, which is the fastest way."""
        inputs, x, compute = step_inputs(self._slots), self._x, self._denoiser.compute
        t, coefficients = map(self._denoiser.tensor, (inputs.t, inputs.coefficients))
        zeros = torch.zeros_like(x)
        noise = zeros if inputs.noise_steps is None else torch.randn_like(x)
        out = compute("unet", {"x": x, "t": t, **self._conditions["unet"]})["out"]
        grad = zeros
        if inputs.guided.any():
            grad = compute(CLASSIFIER_GRADIENT, {"x": x, "t": t, **self._conditions[CLASSIFIER_GRADIENT]})[
                "grad"
            ]
        results = update(x, out, grad, noise, coefficients)
        self._x, self._x_0 = results["x_prev"], results["pred_x0"]
        self._slots.position += 1

    def read(self) -> None:
        self._slots.x, self._slots.x_0 = to_array(self._x), to_array(self._x_0)

    def replace(self, rows: Sequence[int], slots: Slots) -> None:
        self.read()
        self._slots.replace(rows, slots)
        self._upload()


def open_torch_row(row: Row, subject: Subject, device: Device, threads: int) -> TorchDenoiser:
    """Open the denoiser of a PyTorch row.

    Raises:
        UserError: if the row cannot run, for instance without checkpoints.
    """
    configure_torch(threads)
    unet: nn.Module
    classifier: nn.Module | None
    if row.name == ORIGINAL:
        unet, classifier = _original_networks(subject)
    else:
        unet, classifier = subject.networks()
    if row.name == COMPILED:
        # On an accelerator, the compiler's best mode; on a CPU the default is already the best.
        options: dict[str, Any] = {"mode": "max-autotune"} if device == "cuda" else {}
        unet.compile(dynamic=False, **options)
        if classifier is not None:
            classifier.compile(dynamic=False, **options)
    if device == "cpu" and row.precision == "fp32" and (guides := subject.guides()):
        config = Bundle.open(subject.bundle).manifest.network
        return GuidedDenoiser(unet, classifier, config, guides)
    made = DeviceDenoiser if device == "cuda" else TorchDenoiser
    return made(unet, classifier, torch.device(device), DTYPES[row.precision])


def configure_torch(threads: int) -> None:
    """Set the threads of this process, and disable TF32 on accelerators."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _original_networks(subject: Subject) -> tuple[nn.Module, nn.Module | None]:
    """The networks of the original checkout with the subject's weights, set up like its sampling script."""
    if subject.original is None:
        raise RequestError("there is no original implementation", hint="Give its checkout with --original.")
    ours = subject.networks()
    with importing_from(subject.original):
        original = import_module("guided_diffusion.unet")
    unet = _with_weights(original_unet(original, ours[0].config), ours[0])
    guide = ours[1]
    return unet, None if guide is None else _with_weights(original_classifier(original, guide.config), guide)


@contextlib.contextmanager
def importing_from(checkout: Path) -> Iterator[None]:
    """Make the modules of a checkout importable in this block."""
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))


def original_unet(original: Any, config: UNetConfig) -> nn.Module:
    """Build a network with the checkout's module ``unet``, with its own initial weights."""
    kind = original.UNetModel if config.low_res_size is None else original.SuperResModel
    heads = config.num_heads_upsample
    made: nn.Module = kind(
        **_shared(config),
        out_channels=config.out_channels,
        num_classes=config.num_classes,
        num_heads_upsample=-1 if heads is None else heads,
    )
    return made


def original_classifier(original: Any, config: ClassifierConfig) -> nn.Module:
    """The same for a classifier."""
    made: nn.Module = original.EncoderUNetModel(
        **_shared(config), out_channels=config.num_classes, pool=config.pool
    )
    return made


def _shared(config: BackboneConfig) -> dict[str, Any]:
    if config.rescale_residuals:
        raise RequestError("the original implementation has no rescale_residuals")
    return {
        "image_size": config.image_size,
        "in_channels": config.in_channels,
        "model_channels": config.model_channels,
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": tuple(config.image_size // size for size in config.attention_resolutions),
        "channel_mult": config.channel_mult,
        "conv_resample": config.conv_resample,
        "num_heads": config.num_heads,
        "num_head_channels": -1 if config.num_head_channels is None else config.num_head_channels,
        "use_scale_shift_norm": config.scale_shift_norm,
        "resblock_updown": config.resblock_updown,
        "use_new_attention_order": config.new_attention_order,
    }


def _with_weights(network: nn.Module, ours: UNet | Classifier) -> nn.Module:
    """Load our weights with requires_grad, which the original's gradient checkpointing needs."""
    weights = {key: nn.Parameter(value) for key, value in ours.state_dict().items()}
    network.load_state_dict(weights, assign=True)
    return network
