"""The networks in PyTorch as the runtime's denoiser: ours, compiled, or the original implementation's."""

from __future__ import annotations

import contextlib
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from admtrt.bench.rows import COMPILED, ORIGINAL
from admtrt.errors import RequestError
from admtrt.runtime.sampler import Slots, step_inputs
from admtrt.schedule import COEFFICIENTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from admtrt.bench.rows import Device, Row
    from admtrt.bench.subject import Subject
    from admtrt.config import BackboneConfig, ClassifierConfig, UNetConfig
    from admtrt.contract import Precision
    from admtrt.models.classifier import Classifier
    from admtrt.models.unet import UNet
    from admtrt.runtime.sampler import HeldSlots, Images, Labels

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""What a precision is called in PyTorch."""


class TorchDenoiser:
    """Networks in PyTorch as a :class:`~admtrt.runtime.sampler.Denoiser`; float32 in and out.

    Args:
        unet: called with x, t and, where conditioned, ``y`` and ``low_res``.
        classifier: called with x and t, gives logits; None without guidance.
        device: on which they run.
        dtype: of the computation; others than float32 by autocast.
    """

    def __init__(
        self, unet: nn.Module, classifier: nn.Module | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._unet = unet.eval().to(device)
        self._classifier = None if classifier is None else classifier.eval().to(device)
        self._device = device
        self._dtype = dtype

    def unet(self, x: Images, t: NDArray[np.float32], y: Labels | None, low_res: Images | None) -> Images:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        return _array(self.evaluate(*map(self.tensor, (x, t, y, low_res))))

    def classifier_gradient(self, x: Images, t: NDArray[np.float32], y: Labels) -> Images:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        return _array(self.gradient(*map(self.tensor, (x, t, y))))

    def update(
        self, x: Images, out: Images, grad: Images, noise: Images, coefficients: NDArray[np.float32]
    ) -> tuple[Images, Images]:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        x_prev, x_0 = update(*map(self.tensor, (x, out, grad, noise, coefficients)))
        return _array(x_prev), _array(x_0)

    @torch.no_grad()
    def evaluate(self, x: Tensor, t: Tensor, y: Tensor | None, low_res: Tensor | None) -> Tensor:
        """The UNet's output as float32 on the device."""
        given = {name: value for name, value in (("y", y), ("low_res", low_res)) if value is not None}
        with self._cast():
            out: Tensor = self._unet(x, t, **given)
        # A compiled network's output lies where the next compiled network's graph may write.
        return out.float().clone()

    @torch.enable_grad()
    def gradient(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """d log p(y | x_t) / dx_t by autograd, on the device."""
        assert self._classifier is not None
        x = x.detach().requires_grad_()
        with self._cast():
            logits = self._classifier(x, t)
        log_prob = torch.log_softmax(logits.float(), dim=-1).gather(1, y[:, None])
        return torch.autograd.grad(log_prob.sum(), x)[0].clone()

    def tensor(self, array: Any) -> Any:
        """An array on the device; None stays None. An accelerator copies while the host goes on."""
        if array is None:
            return None
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _cast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)


class DeviceDenoiser(TorchDenoiser):
    """The same, keeping x on an accelerator between the steps."""

    @contextlib.contextmanager
    def hold(self, slots: Slots) -> Iterator[HeldSlots]:
        """See :class:`~admtrt.runtime.sampler.ResidentDenoiser`."""
        yield _DeviceSlots(slots, self)


class _DeviceSlots:
    def __init__(self, slots: Slots, denoiser: DeviceDenoiser) -> None:
        self._slots = slots
        self._denoiser = denoiser
        arrays = (slots.x, slots.x_0, slots.unet_y, slots.guide_y, slots.low_res)
        self._x, self._x_0, self._unet_y, self._guide_y, self._low_res = map(denoiser.tensor, arrays)

    def advance(self) -> None:
        """The noise is PyTorch's own, drawn on the device: the fastest there is, and unlike ours no array."""
        inputs, x = step_inputs(self._slots), self._x
        t, coefficients = map(self._denoiser.tensor, (inputs.t, inputs.coefficients))
        noise = None if inputs.noise_steps is None else torch.randn_like(x)
        out = self._denoiser.evaluate(x, t, self._unet_y, self._low_res)
        zeros = torch.zeros_like(x)
        grad = self._denoiser.gradient(x, t, self._guide_y) if inputs.guided else zeros
        self._x, self._x_0 = update(x, out, grad, zeros if noise is None else noise, coefficients)
        self._slots.position += 1

    def read(self) -> None:
        self._slots.x, self._slots.x_0 = _array(self._x), _array(self._x_0)


def update(
    x: Tensor, out: Tensor, grad: Tensor, noise: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """x_{t-1} and the predicted x_0, as :func:`admtrt.schedule.step_coefficients` documents."""
    c = {name: coefficients[:, i, None, None, None] for i, name in enumerate(COEFFICIENTS)}
    value, *learned = torch.split(out, x.shape[1], dim=1)
    x_0 = torch.clamp(c["x0_from_x"] * x + c["x0_from_out"] * value, -c["clip"], c["clip"])
    log_weight = c["log_weight"] + (c["log_weight_from_v"] * learned[0] if learned else 0)
    x_prev = c["prev_from_x0"] * x_0 + c["prev_from_x"] * x + c["prev_from_out"] * value
    x_prev = x_prev + c["guidance"] * log_weight.exp() * grad + c["noise"] * (log_weight / 2).exp() * noise
    return x_prev, x_0 + c["x0_shift"] * grad


def open_torch_row(row: Row, subject: Subject, device: Device, threads: int) -> TorchDenoiser:
    """The denoiser of a row of PyTorch.

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
        # On an accelerator the best that the compiler has; its default on a CPU is that already.
        options: dict[str, Any] = {"mode": "max-autotune"} if device == "cuda" else {}
        unet.compile(dynamic=False, **options)
        if classifier is not None:
            classifier.compile(dynamic=False, **options)
    made = DeviceDenoiser if device == "cuda" else TorchDenoiser
    return made(unet, classifier, torch.device(device), DTYPES[row.precision])


def configure_torch(threads: int) -> None:
    """Set the threads of this process, and make float32 mean float32 on accelerators too."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _original_networks(subject: Subject) -> tuple[nn.Module, nn.Module | None]:
    """The networks of the original checkout with the subject's weights, as its sampling script has them."""
    if subject.original is None:
        raise RequestError("there is no original implementation", hint="Give its checkout with --original.")
    ours = subject.networks()
    original = _import_original(subject.original)
    unet = _with_weights(_original_unet(original, ours[0].config), ours[0])
    guide = ours[1]
    return unet, None if guide is None else _with_weights(_original_classifier(original, guide.config), guide)


def _import_original(path: Path) -> Any:
    sys.path.insert(0, str(path))
    try:
        return import_module("guided_diffusion.unet")
    finally:
        sys.path.remove(str(path))


def _original_unet(original: Any, config: UNetConfig) -> nn.Module:
    kind = original.UNetModel if config.low_res_size is None else original.SuperResModel
    heads = config.num_heads_upsample
    made: nn.Module = kind(
        **_shared(config),
        out_channels=config.out_channels,
        num_classes=config.num_classes,
        num_heads_upsample=-1 if heads is None else heads,
    )
    return made


def _original_classifier(original: Any, config: ClassifierConfig) -> nn.Module:
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
    """Load our weights; they take gradients, as the original's do: its checkpointing asks for theirs."""
    weights = {key: nn.Parameter(value) for key, value in ours.state_dict().items()}
    network.load_state_dict(weights, assign=True)
    return network


def _array(tensor: Tensor) -> Images:
    made: Images = tensor.cpu().numpy()
    return made
