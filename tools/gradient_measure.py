"""One case of gradient_table.py: its graph is exported and compared with PyTorch."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest import mock

import onnxruntime
import torch
from gradient_cases import EXAMPLE, Case
from torch import nn

from admtrt import export_input_gradient
from admtrt.errors import ExportError

if TYPE_CHECKING:
    from gradient_cases import Factory
    from torch import Tensor

BATCHES, DRAWS = (3, 1, 5), 5
TOLERANCE, AS_FAR_AS_PYTORCH = 1e-4, 4.0
"""Right: at most so far from float64 autograd, or at most so many times as far as PyTorch's own float32."""


def measure(factory: Factory) -> dict[str, Any]:
    """The outcome of a case, with its errors at every batch, or the reason why there is none."""
    started = time.perf_counter()
    try:
        torch.manual_seed(0)  # of the weights
        case = factory()
    except ImportError as error:
        return {"outcome": "not installed", "reason": str(error)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gradient.onnx"
        try:
            made = export_input_gradient(
                case.module, case.inputs(EXAMPLE, 0), path, wrt=case.wrt, scalar=case.scalar
            )
        except ExportError as error:
            return {"outcome": _kind(str(error)), "reason": str(error)}
        exported = time.perf_counter()
        distances = {str(batch): _distances(case, path, batch) for batch in BATCHES}
    right = all(
        graph <= TOLERANCE or graph <= AS_FAR_AS_PYTORCH * own[0] for graph, *own in distances.values()
    )
    return {
        "outcome": "right" if right else "WRONG",
        "distances": distances,
        "nodes": made.nodes,
        "seconds": [round(exported - started, 1), round(time.perf_counter() - exported, 1)],
    }


def _kind(message: str) -> str:
    if "PyTorch cannot export" in message or "PyTorch fixed the input" in message:
        return "cannot be captured"
    if "no gradient rule" in message or "have no gradient" in message:
        return "no rule"
    return "refused"


def _distances(case: Case, path: Path, batch: int) -> list[float]:
    """The graph's distance from float64 autograd, in the median of the draws.

    If it is more than the tolerance, PyTorch's own distance in float32 follows.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wide = copy.deepcopy(case.module).double()
    _widen(wide)
    draws = [case.inputs(batch, 100 * batch + draw) for draw in range(DRAWS)]
    expected, found = [], []
    for inputs in draws:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            expected.append(_autograd(wide, case, {name: _double(x) for name, x in inputs.items()}))
        (grad,) = session.run(["grad"], {name: values.numpy() for name, values in inputs.items()})
        found.append(torch.from_numpy(grad))
    distances = [median(map(_distance, found, expected))]
    if distances[0] > TOLERANCE:
        own = [_autograd(case.module, case, inputs) for inputs in draws]
        distances.append(median(map(_distance, own, expected)))
    return distances


def _widen(module: nn.Module) -> None:
    """Let modules compute in float64 that keep their type as an attribute or tensors outside of buffers."""
    for part in module.modules():
        for name, value in vars(part).items():
            if value is torch.float32:
                setattr(part, name, torch.float64)
            elif isinstance(value, torch.Tensor):
                setattr(part, name, _double(value))


def _double(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values


def _autograd(module: nn.Module, case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """The gradient. A batch of one is doubled if there are batch norms.

    In evaluation mode PyTorch's gradient of a batch norm is wrong for some layouts of a batch of one.
    """
    batch = len(inputs[case.wrt])
    doubled = batch == 1 and any(
        isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in module.modules()
    )
    given = {name: x.repeat(2, *[1] * (x.dim() - 1)) if doubled else x for name, x in inputs.items()}
    leaf = given[case.wrt] = given[case.wrt].clone().requires_grad_()
    out = module(*given.values())
    scalar = out if case.scalar is None else case.scalar(out, *given.values())
    (grad,) = torch.autograd.grad(scalar.sum(), leaf)
    return grad[:batch].double()


def _distance(found: Tensor, right: Tensor) -> float:
    """The largest difference over a sample's largest value, of the worst sample."""
    difference = (found.double() - right).flatten(1).abs().amax(1).nan_to_num(torch.inf)
    return float((difference / right.flatten(1).abs().amax(1).clamp_min(1e-30)).max())
