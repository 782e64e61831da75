"""Measure the peak speed of the machine, and count the operations of the networks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - it has no public name
from torch.utils.flop_counter import flop_registry

from admtrt.bench.torch_rows import DTYPES, configure_torch
from admtrt.config import UNetConfig
from admtrt.contract import unet_spec
from admtrt.models.classifier import Classifier
from admtrt.models.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable

    from admtrt.bench.rows import Device
    from admtrt.config import ClassifierConfig
    from admtrt.contract import Precision

_SIZES: dict[Device, tuple[int, tuple[int, int, int]]] = {
    "cpu": (2048, (8, 256, 32)),
    "cuda": (8192, (32, 512, 64)),
}
"""Sizes: rows and columns of the matrices; batch, channels, height and width of the convolution."""


class Yardstick:
    """Times large operations in PyTorch.

    Args:
        device: device of the operations.
        threads: CPU threads.
    """

    def __init__(self, device: Device, threads: int) -> None:
        configure_torch(threads)
        self._device: Device = device
        self._operations: dict[Precision, list[tuple[int, Callable[[], object]]]] = {}

    @torch.no_grad()
    def measure(self, precision: Precision) -> float:
        """Run a matrix product and a 3x3 convolution once; operations per second of the faster."""
        if precision not in self._operations:
            self._operations[precision] = self._large_operations(precision)
            self.measure(precision)  # warms up
        return max(flops / self._seconds(run) for flops, run in self._operations[precision])

    def count_operations(self, unet: UNetConfig, classifier: ClassifierConfig | None) -> dict[str, int]:
        """See :func:`count_operations`."""
        return count_operations(unet, classifier)

    def count_training(self, network: UNetConfig | ClassifierConfig) -> int:
        """See :func:`count_training`."""
        return count_training(network)

    def gpu(self) -> str | None:
        """The name of the accelerator, None on a CPU."""
        return torch.cuda.get_device_name() if self._device == "cuda" else None

    def _large_operations(self, precision: Precision) -> list[tuple[int, Callable[[], object]]]:
        size, (batch, channels, side) = _SIZES[self._device]
        options: dict[str, Any] = {"device": self._device, "dtype": DTYPES[precision]}
        a, b = torch.randn(size, size, **options), torch.randn(size, size, **options)
        x = torch.randn(batch, channels, side, side, **options).to(memory_format=torch.channels_last)
        kernel = torch.randn(channels, channels, 3, 3, **options).to(memory_format=torch.channels_last)
        return [
            (2 * size**3, lambda: a @ b),
            (
                2 * 9 * batch * channels**2 * side**2,
                lambda: torch.nn.functional.conv2d(x, kernel, padding=1),
            ),
        ]

    def _seconds(self, run: Callable[[], object]) -> float:
        began = time.perf_counter()
        run()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts with PyTorch's formulas, but without ``FlopCounterMode``, whose module hooks break autograd."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count_operations(unet: UNetConfig, classifier: ClassifierConfig | None) -> dict[str, int]:
    """Operations of ``unet`` and ``classifier_gradient`` for one image; a multiply-add counts as two.

    Counts convolutions, linear layers and attention, on tensors without memory.
    """
    spec = unet_spec(unet)
    with torch.device("meta"):
        given = {
            tensor.name: torch.zeros(tensor.sized(1), dtype=getattr(torch, tensor.dtype))
            for tensor in spec.inputs
        }
        with torch.no_grad(), OperationCounter() as counted:
            UNet(unet).to("meta")(**given)
        counts = {"unet": counted.total}
        if classifier is not None:
            network = Classifier(classifier).to("meta").requires_grad_(False)
            x = given["x"].requires_grad_()
            with OperationCounter() as counted:
                torch.autograd.grad(network(x, given["t"]).sum(), x)
            counts["classifier_gradient"] = counted.total
    return counts


def count_training(config: UNetConfig | ClassifierConfig) -> int:
    """Operations per image in a training step, forward and backward, counted likewise."""
    with torch.device("meta"):
        network: UNet | Classifier
        if isinstance(config, UNetConfig):
            network = UNet(config).to("meta")
            given = {
                tensor.name: torch.zeros(tensor.sized(1), dtype=getattr(torch, tensor.dtype))
                for tensor in unet_spec(config).inputs
            }
        else:
            network = Classifier(config).to("meta")
            size = config.image_size
            given = {"x": torch.zeros((1, config.in_channels, size, size)), "t": torch.zeros(1)}
        with OperationCounter() as counted:
            torch.autograd.grad(network(**given).sum(), list(network.parameters()))
        total: int = counted.total
    return total
