"""Exported derivatives beside PyTorch's own, on rows that the graph was not made with."""

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
"""Of a sample's largest value: float32 in another order moves deep networks by 1e-6 to 1e-5; a wrong rule, or
a value that was frozen, moves them by tenths."""
_AS_FAR_AS_PYTORCH = 10.0
"""Times PyTorch's own float32 error: where a gradient cancels, another order of sums leaves another rest."""
_DRAWS = 3
"""A value within rounding of a kink takes either side by chance, in few draws; a wrong rule fails in each."""
_NEIGHBOURS = 4
_ROUNDING = 1e-6
"""Distance of a row's neighbours, relative to its values and to 0.01: as far as rounding moves them."""
_REPEATED = 1e-6
"""Of a sample's largest value: a module run twice in one type, even if a GPU adds up in another order."""
_ROWS: tuple[Draw, ...] = (  # of the example x and of normal numbers z
    lambda x, z: x + z,
    lambda x, z: x + z.abs(),
    lambda x, z: x * torch.exp(-z.abs() / 10),  # within most domains that the example keeps to
    lambda _, z: z * 1e-5,  # where an epsilon counts
    lambda x, _: torch.zeros_like(x),
    lambda _, z: z * 30,
)
_OTHER_ROWS = (*_ROWS[:3], *[_ROWS[1]] * 3)  # of the inputs that are not differentiated
_HINT = (
    "Does the module use detach() or no_grad()? Otherwise report it with the module; check=False exports it "
    "all the same."
)


@dataclass(frozen=True)
class Derivative:
    """Outputs that a graph adds to those of its module, by name.

    Attributes:
        wrt: the input that is differentiated.
        outputs: of the module, in order.
        of: the output that is differentiated.
        cotangent: the input that weighs the elements of ``of``; None where each counts once.
        vector: the input that the second derivative is multiplied by; None where there is none.
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
    """Run a written graph and autograd on rows near the example, near 0, at 0 and far from both.

    Autograd runs in float64 where the module allows it: in float32 it loses the gradient of a log-probability
    near 0, which the graph keeps. A row on which its results are not finite says nothing. One that differs is
    forgiven where PyTorch's own float32, or PyTorch for neighbours within rounding, differs as much; then all
    rows are drawn again, and what fails in every draw is refused. Nothing is run where a type is narrower
    than float32.

    Args:
        path: the graph.
        module: returns a tuple of the tensors that ``derivative`` names; it is given the inputs but for the
            cotangent and the vector.
        inputs: the example, by name, in the order of the graph.
        derivative: what is differentiated.

    Raises:
        ExportError: if ONNX Runtime refuses the graph, the two differ, the module gives another result each
            time, or no row has a finite one.
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
    except Exception as error:  # the library raises types of its own for every cause
        raise ExportError(f"ONNX Runtime does not run the exported graph: {error}") from None


def _run(session: Any, rows: Mapping[str, Tensor], derivative: Derivative) -> _Results:
    names = list(derivative.names)
    try:
        outputs = session.run(names, {name: given.cpu().numpy() for name, given in rows.items()})
    except Exception as error:
        raise ExportError(f"ONNX Runtime does not run the exported graph: {error}") from None
    return {name: torch.from_numpy(made).double() for name, made in zip(names, outputs, strict=True)}


def _drawn(inputs: Mapping[str, Tensor], wrt: str, seed: int) -> dict[str, Tensor]:
    """A batch of another size than most examples: a row of ``wrt`` of each kind, other inputs disturbed."""
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
    """PyTorch's result, in float64 where the module allows it."""
    try:
        wide = copy.deepcopy(module).double()
    except Exception:  # a module may refuse to be copied
        wide = module

    def result(rows: Mapping[str, Tensor]) -> _Results:
        widened = {
            name: given.double() if given.is_floating_point() else given for name, given in rows.items()
        }
        try:
            return _differentiated(wide, widened, derivative)
        except Exception:  # or hold anything to float32
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
        if (difference > _REPEATED * largest).any():  # never so where they are not finite
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
    """Say which output differs by more than is allowed on a row; empty where none does.

    Args:
        derivative: what was differentiated.
        expected: of PyTorch.
        found: of the graph.
        finite: the rows to compare, [N].
        own: further results of PyTorch, as far from ``expected`` as rounding moves them.
    """
    # A log-probability near 0 is a difference of numbers near 1: float32 rounds it to 1e-7 of these. What is
    # left of a gradient that cancels is noise, far below what float32 can tell of the value.
    seen = _flat(expected[derivative.of]).abs().amax(1).nan_to_num(0, 0).clamp_min(1e-2)
    for name in reversed(derivative.names):  # derivatives of what is wrong are wrong, too
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
