"""An exported gradient beside PyTorch's own, on a batch that the graph was not made with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from admtrt.errors import ExportError
from admtrt.runtime.backends.onnxruntime import import_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

_ROWS = 3  # of the batch: neither one, which broadcasts, nor the usual two of an example
_TOLERANCE = 1e-3
"""Of a sample's largest value: float32 in another order moves deep networks by 1e-6 to 1e-5; a wrong rule, or
a value that was frozen, moves them by tenths."""


def check_against_autograd(path: Path, scalar: nn.Module, inputs: Mapping[str, Tensor], wrt: str) -> None:
    """Run a written gradient graph and autograd on disturbed rows of the example.

    Nothing is said where PyTorch's own results are not finite.

    Args:
        path: the graph, with the outputs ``grad`` and ``value``.
        scalar: module whose sum over the batch is differentiated.
        inputs: the example, by name in the order of ``forward``.
        wrt: the input that is differentiated.

    Raises:
        ExportError: if ONNX Runtime refuses the graph, or the two differ.
    """
    onnxruntime = import_onnxruntime(extra="cpu", purpose="The check beside autograd")
    given = _disturbed(inputs)
    leaf = given[wrt].requires_grad_()
    with torch.enable_grad():
        value: Tensor = scalar(*given.values())
        (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    feeds = {name: tensor.detach().numpy() for name, tensor in given.items()}
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = session.run(["value", "grad"], feeds)
    except Exception as error:  # the library raises types of its own for every cause
        raise ExportError(f"ONNX Runtime does not run the exported graph: {error}") from None
    for name, expected, array in zip(("value", "grad"), (value, grad), found, strict=True):
        _compare(name, expected.detach().double(), torch.from_numpy(array).double())


def _disturbed(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows of the example in another number, the floating-point ones moved: examples are often zeros."""
    generator = torch.Generator().manual_seed(0)
    given = {}
    for name, tensor in inputs.items():
        rows = tensor.detach()[torch.arange(_ROWS) % len(tensor)]
        if rows.is_floating_point():
            rows = rows + torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        given[name] = rows.clone()
    return given


def _compare(name: str, expected: Tensor, found: Tensor) -> None:
    if not torch.isfinite(expected).all():
        return
    difference = (found - expected).abs().reshape(_ROWS, -1).amax(dim=1)
    largest = expected.abs().reshape(_ROWS, -1).amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    worst = float((difference / largest).max())
    if not worst <= _TOLERANCE:
        raise ExportError(
            f"the exported graph is not the module: '{name}' differs from PyTorch by {worst:.2g} of a "
            f"sample's largest value (allowed {_TOLERANCE:g})",
            hint="Does the module use detach(), no_grad() or randomness? Otherwise report it with the "
            "module; check=False exports it all the same.",
        )
