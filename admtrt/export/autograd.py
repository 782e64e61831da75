"""An exported gradient beside PyTorch's own, on a batch that the graph was not made with."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING

import torch

from admtrt.errors import ExportError
from admtrt.runtime.backends.onnxruntime import import_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor, nn

_ROWS = 3  # of the batch: neither one, which broadcasts, nor the usual two of an example
_TOLERANCE = 1e-3
"""Of a sample's largest value: float32 in another order moves deep networks by 1e-6 to 1e-5; a wrong rule, or
a value that was frozen, moves them by tenths."""
_AS_FAR_AS_PYTORCH = 10.0
"""Where a gradient cancels, float32 in another order leaves another rest, of the size of PyTorch's."""
_HINT = (
    "Does the module use detach(), no_grad() or randomness? Otherwise report it with the module; check=False "
    "exports it all the same."
)


def check_against_autograd(path: Path, scalar: nn.Module, inputs: Mapping[str, Tensor], wrt: str) -> None:
    """Run a written gradient graph and autograd on disturbed rows of the example.

    Autograd runs in float64 where the module allows it: in float32 it loses the gradient of a log-probability
    near 0, which the graph keeps. Nothing is said where its results are not finite, or where a type is
    narrower than float32.

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
    if any(t.is_floating_point() and t.dtype.itemsize < 4 for t in (*given.values(), *scalar.parameters())):
        return
    expected = _expected(scalar, given, wrt)

    @functools.cache
    def narrow() -> tuple[Tensor, Tensor]:
        return _differentiated(scalar, given, wrt)

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    feeds = {name: tensor.cpu().numpy() for name, tensor in given.items()}
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        value, grad = session.run(["value", "grad"], feeds)
    except Exception as error:  # the library raises types of its own for every cause
        raise ExportError(f"ONNX Runtime does not run the exported graph: {error}") from None
    # A log-probability near 0 is a difference of numbers near 1: float32 rounds it to 1e-7 of these.
    _compare("value", expected[0], torch.from_numpy(value), lambda: narrow()[0], least=1e-2)
    tiny = torch.finfo(torch.float32).tiny
    _compare("grad", expected[1], torch.from_numpy(grad), lambda: narrow()[1], least=tiny)


def _disturbed(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows of the example in another number, the floating-point ones moved: examples are often zeros."""
    generator = torch.Generator().manual_seed(0)
    given = {}
    for name, tensor in inputs.items():
        rows = tensor.detach()[torch.arange(_ROWS) % len(tensor)]
        if rows.is_floating_point():
            rows = rows + torch.randn(rows.shape, generator=generator, dtype=rows.dtype).to(rows.device)
        given[name] = rows.clone()
    return given


def _expected(scalar: nn.Module, given: Mapping[str, Tensor], wrt: str) -> tuple[Tensor, Tensor]:
    try:
        wide = {name: rows.double() if rows.is_floating_point() else rows for name, rows in given.items()}
        return _differentiated(copy.deepcopy(scalar).double(), wide, wrt)
    except Exception:  # a module may hold anything to float32, or refuse to be copied
        return _differentiated(scalar, given, wrt)


def _differentiated(scalar: nn.Module, given: Mapping[str, Tensor], wrt: str) -> tuple[Tensor, Tensor]:
    """The scalar [N] and its gradient, on the CPU in float64."""
    leaf = given[wrt].clone().requires_grad_()
    with torch.enable_grad():
        value: Tensor = scalar(*(leaf if name == wrt else rows for name, rows in given.items()))
        if not value.requires_grad:
            raise ExportError("in PyTorch the scalar has no gradient: it is held back", hint=_HINT)
        (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)
    return value.detach().cpu().double(), grad.cpu().double()


def _compare(
    name: str, expected: Tensor, found: Tensor, narrow: Callable[[], Tensor], *, least: float
) -> None:
    """Refuse what is further from float64 than the tolerance, and than PyTorch's own float32 by far."""
    if not torch.isfinite(expected).all():
        return
    difference = (found.double() - expected).abs().reshape(_ROWS, -1).amax(dim=1)
    largest = expected.abs().reshape(_ROWS, -1).amax(dim=1).clamp_min(least)
    if (difference <= _TOLERANCE * largest).all():
        return
    own = (narrow() - expected).abs().reshape(_ROWS, -1).amax(dim=1)
    allowed = torch.maximum(_TOLERANCE * largest, _AS_FAR_AS_PYTORCH * own.nan_to_num(0, 0, 0))
    worst = float((difference / largest).max())
    if not (difference <= allowed).all():
        raise ExportError(
            f"the exported graph is not the module: '{name}' differs from PyTorch by {worst:.2g} of a "
            f"sample's largest value (allowed {_TOLERANCE:g})",
            hint=_HINT,
        )
