"""Compare exported derivatives with PyTorch's autograd, on inputs other than the example."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from admtrt.errors import ExportError
from admtrt.export.capture import RANDOM_HINT
from admtrt.runtime.backends.onnxruntime import import_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    Draw = Callable[[Tensor, Tensor], Tensor]
    _Results = dict[str, Tensor]  # by output, on the CPU in float64

_TOLERANCE = 1e-3
"""Relative to a sample's largest value. Another order of float32 sums changes deep networks by 1e-6 to 1e-5;
a wrong rule or a frozen value changes them by tenths."""
_AS_FAR_AS_PYTORCH = 10.0
"""Factor on PyTorch's own float32 error: if a gradient cancels, the order of sums determines what remains."""
_DRAWS = 3
"""A value within rounding of a kink falls on the wrong side in a few draws; a wrong rule fails in all."""
_NEIGHBOURS = 4
_ROUNDING = 1e-6
"""Distance of a row's neighbours, relative to its values and to 0.01: the size of rounding errors."""
_REPEATED = 1e-6
"""Relative to a sample's largest value: allowed between two runs of a module; a GPU may reorder sums."""
_ROWS: tuple[Draw, ...] = (  # functions of the example x and of normal numbers z
    lambda x, z: x + z,
    lambda x, z: x + z.abs(),
    lambda x, z: x * torch.exp(-z.abs() / 10),  # stays in most domains that contain x
    lambda _, z: z * 1e-5,  # so small that an epsilon matters
    lambda x, _: torch.zeros_like(x),
    lambda _, z: z * 30,
)
_OTHER_ROWS = (*_ROWS[:3], *[_ROWS[1]] * 3)  # for inputs that are not differentiated
_HINT = (
    "Does the module use detach() or no_grad()? Otherwise report it with the module; check=False exports it "
    "all the same."
)


@dataclass(frozen=True)
class Derivative:
    """The derivative outputs that a graph has beside its module's outputs, by name.

    Attributes:
        wrt: the input to differentiate by.
        outputs: the module's outputs, in order.
        of: the output to differentiate.
        cotangent: the input that weighs the elements of ``of``; None weighs each by 1.
        vector: the input that the Hessian is multiplied by; None without second derivatives.
    """

    wrt: str
    outputs: tuple[str, ...] = ("value",)
    of: str = "value"
    cotangent: str | None = None
    vector: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Outputs of the graph, in order."""
        return (*(() if self.vector is None else ("product",)), "grad", *self.outputs)


def check_against_autograd(
    path: Path, module: nn.Module, inputs: Mapping[str, Tensor], derivative: Derivative
) -> None:
    """Compare a written graph with autograd on rows near the example, near 0, at 0 and far from both.

    Autograd runs in float64 if the module allows it: in float32 it loses the gradient of a log-probability
    near 0, which the graph keeps. Rows on which autograd is not finite are ignored. A row may differ as much
    as PyTorch's own float32 differs, or PyTorch for neighbours within rounding. If a row differs by more, all
    rows are drawn again; a graph that fails in every draw is refused. Graphs with types narrower than float32
    are not checked.

    Args:
        path: the graph.
        module: returns a tuple of the tensors in ``derivative.outputs``; it takes the inputs except the
            cotangent and the vector.
        inputs: the example, by name, in the order of the graph.
        derivative: which derivative the graph computes.

    Raises:
        ExportError: if ONNX Runtime refuses the graph, graph and autograd differ, the module is not
            deterministic, or no row has a finite result.
    """
    if any(t.is_floating_point() and t.dtype.itemsize < 4 for t in (*inputs.values(), *module.parameters())):
        return
    session = _session(path)
    reference = _reference(module, derivative)
    compared, fault = False, ""
    for seed in range(_DRAWS):
        rows = _drawn(inputs, derivative.wrt, seed)
        expected = reference(rows)
        if seed == 0:
            _refuse_randomness(expected, reference(rows))
        finite = torch.stack([torch.isfinite(_flat(part)).all(1) for part in expected.values()]).all(0)
        found = _run(session, rows, derivative)
        compared |= bool(finite.any())
        differing = _differing(derivative, expected, found, finite, None)
        if differing:
            own = [_differentiated(module, rows, derivative), *map(reference, _neighbours(rows, seed))]
            differing = _differing(derivative, expected, found, finite, own)
        if compared and not differing:
            return
        fault = differing
    if not compared:
        raise ExportError(
            "the gradient cannot be compared with PyTorch's, which is not finite on any row near the example",
            hint="Give an example from the module's domain. check=False exports the graph unchecked.",
        )
    raise ExportError(f"the exported graph is not the module: {fault}", hint=_HINT)


def _session(path: Path) -> Any:
    onnxruntime = import_onnxruntime(extra="cpu", purpose="The check beside autograd")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library raises types of its own
        raise ExportError(f"ONNX Runtime does not run the exported graph: {error}") from None


def _run(session: Any, rows: Mapping[str, Tensor], derivative: Derivative) -> _Results:
    names = list(derivative.names)
    try:
        outputs = session.run(names, {name: given.cpu().numpy() for name, given in rows.items()})
    except Exception as error:
        raise ExportError(f"ONNX Runtime does not run the exported graph: {error}") from None
    return {name: torch.from_numpy(made).double() for name, made in zip(names, outputs, strict=True)}


def _drawn(inputs: Mapping[str, Tensor], wrt: str, seed: int) -> dict[str, Tensor]:
    """A batch with one row of ``wrt`` of each kind, and other inputs perturbed; rarely the example's size."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, tensor in inputs.items():
        rows = tensor.detach()[torch.arange(len(_ROWS)) % len(tensor)].clone()
        if rows.is_floating_point():
            noise = torch.randn(rows.shape, generator=generator, dtype=rows.dtype).to(rows.device)
            kinds = _ROWS if name == wrt else _OTHER_ROWS
            rows = torch.stack([kind(x, z) for kind, x, z in zip(kinds, rows, noise, strict=True)])
        drawn[name] = rows
    return drawn


def _neighbours(rows: Mapping[str, Tensor], seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_NEIGHBOURS):
        moved = {}
        for name, values in rows.items():
            if values.is_floating_point():
                noise = torch.randn(values.shape, generator=generator, dtype=values.dtype).to(values.device)
                values = values + noise * (_ROUNDING * (values.abs() + 0.01))
            moved[name] = values
        yield moved


def _reference(module: nn.Module, derivative: Derivative) -> Callable[[Mapping[str, Tensor]], _Results]:
    """PyTorch's result, in float64 if the module allows it."""
    try:
        wide = copy.deepcopy(module).double()
    except Exception:  # some modules cannot be copied
        wide = module

    def result(rows: Mapping[str, Tensor]) -> _Results:
        widened = {
            name: given.double() if given.is_floating_point() else given for name, given in rows.items()
        }
        try:
            return _differentiated(wide, widened, derivative)
        except Exception:  # or insist on float32
            try:
                return _differentiated(module, rows, derivative)
            except RuntimeError as error:  # a function without a second derivative, for instance
                raise ExportError(
                    f"PyTorch cannot differentiate the module: {error}",
                    hint="There is nothing to compare with; check=False exports the graph unchecked.",
                ) from None

    return result


def _differentiated(module: nn.Module, rows: Mapping[str, Tensor], derivative: Derivative) -> _Results:
    leaf = rows[derivative.wrt].clone().requires_grad_()
    given = dict(rows) | {derivative.wrt: leaf}
    cotangent, vector = (
        None if name is None else given.pop(name) for name in (derivative.cotangent, derivative.vector)
    )
    # PyTorch's fused attention has no second derivative on a CPU.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        results = dict(zip(derivative.outputs, module(*given.values()), strict=True))
        target = results[derivative.of]
        if not target.requires_grad:
            raise ExportError(
                f"in PyTorch the output '{derivative.of}' has no gradient: it is held back", hint=_HINT
            )
        grad = _gradient(target, leaf, cotangent, again=vector is not None)
        if vector is not None:
            results["product"] = _gradient(grad, leaf, vector)
    results["grad"] = grad
    return {name: results[name].detach().cpu().double() for name in derivative.names}


def _gradient(of: Tensor, leaf: Tensor, weights: Tensor | None, *, again: bool = False) -> Tensor:
    if not of.requires_grad:
        return torch.zeros_like(leaf)
    weights = torch.ones_like(of) if weights is None else weights
    (grad,) = torch.autograd.grad(
        of, leaf, weights, create_graph=again, allow_unused=True, materialize_grads=True
    )
    return grad


def _refuse_randomness(first: _Results, second: _Results) -> None:
    for name, one in first.items():
        other = second[name]
        difference, largest = _flat(one - other).abs().amax(1), _flat(one).abs().amax(1)
        if (difference > _REPEATED * largest).any():  # False for NaN
            raise ExportError(
                "the module gives another result each time for the same inputs", hint=RANDOM_HINT
            )


def _differing(
    derivative: Derivative,
    expected: _Results,
    found: _Results,
    finite: Tensor,
    own: Sequence[_Results] | None,
) -> str:
    """Say which output differs by more than the tolerance on a row; empty if none does.

    Args:
        derivative: which derivative the graph computes.
        expected: PyTorch's results.
        found: the graph's results.
        finite: the rows to compare, [N].
        own: further results of PyTorch that differ from ``expected`` by rounding.
    """
    # A log-probability near 0 is a difference of numbers near 1, which float32 rounds by 1e-7. A gradient
    # that cancels leaves rounding noise, far below float32's resolution of the value.
    seen = _flat(expected[derivative.of]).abs().amax(1).nan_to_num(0, 0).clamp_min(1e-2)
    for name in reversed(derivative.names):  # outputs first: a wrong one makes its derivatives wrong
        right, made = expected[name], found[name]
        if right.shape != made.shape:
            return f"'{name}' has shape {[*made.shape]}, PyTorch's has {[*right.shape]}"
        difference = _flat(made - right).abs().amax(1).nan_to_num(torch.inf)
        least = torch.full_like(seen, 1e-2) if name in derivative.outputs else 1e-7 * seen
        largest = torch.maximum(_flat(right).abs().amax(1), least)
        allowed = _TOLERANCE * largest
        for other in own or ():
            moved = _flat(other[name] - right).abs().amax(1).nan_to_num(torch.inf)
            allowed = torch.maximum(allowed, _AS_FAR_AS_PYTORCH * moved)
        bad = finite & ~(difference <= allowed)
        if bad.any():
            worst = float((difference / largest)[bad].max())
            return (
                f"'{name}' differs from PyTorch by {worst:.2g} of a sample's largest value "
                f"(allowed {_TOLERANCE:g})"
            )
    return ""


def _flat(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)
