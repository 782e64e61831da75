"""An exported gradient beside PyTorch's own, on rows that the graph was not made with."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from admtrt.errors import ExportError
from admtrt.export.capture import RANDOM_HINT
from admtrt.runtime.backends.onnxruntime import import_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    Draw = Callable[[Tensor, Tensor], Tensor]

_TOLERANCE = 1e-3
"""Of a sample's largest value: float32 in another order moves deep networks by 1e-6 to 1e-5; a wrong rule, or
a value that was frozen, moves them by tenths."""
_AS_FAR_AS_PYTORCH = 10.0
"""Where a gradient cancels, float32 in another order leaves another rest, of the size of PyTorch's."""
_DRAWS = 3
"""A value within rounding of a kink takes either side by chance, in few draws; a wrong rule fails in each."""
_NEIGHBOURS = 4
_ROUNDING = 1e-6
"""How far the neighbours of a row are, of its values and of 0.01: as rounding moves what is within."""
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


class _Result(NamedTuple):
    """Of a module or a graph, on the CPU in float64: the scalar [N] and its gradient [N, ...]."""

    value: Tensor
    grad: Tensor


def check_against_autograd(path: Path, scalar: nn.Module, inputs: Mapping[str, Tensor], wrt: str) -> None:
    """Run a written gradient graph and autograd on rows near the example, near 0, at 0 and far from both.

    Autograd runs in float64 where the module allows it: in float32 it loses the gradient of a log-probability
    near 0, which the graph keeps. A row on which its results are not finite says nothing. One that differs is
    forgiven where PyTorch's own float32, or PyTorch for neighbours within rounding, differs as much; then all
    rows are drawn again, and what fails in every draw is refused. Nothing is run where a type is narrower
    than float32.

    Args:
        path: the graph, with the outputs ``grad`` and ``value``.
        scalar: module whose sum over the batch is differentiated.
        inputs: the example, by name in the order of ``forward``.
        wrt: the input that is differentiated.

    Raises:
        ExportError: if ONNX Runtime refuses the graph, the two differ, the module gives another result each
            time, or no row has a finite one.
    """
    if any(t.is_floating_point() and t.dtype.itemsize < 4 for t in (*inputs.values(), *scalar.parameters())):
        return
    session = _session(path)
    reference = _reference(scalar, wrt)
    compared, fault = False, ""
    for seed in range(_DRAWS):
        rows = _drawn(inputs, wrt, seed)
        expected = reference(rows)
        if seed == 0:
            _refuse_randomness(expected, reference(rows))
        finite = torch.isfinite(_flat(expected.value)).all(1) & torch.isfinite(_flat(expected.grad)).all(1)
        found = _run(session, rows)
        compared |= bool(finite.any())
        differing = _differing(expected, found, finite, None)
        if differing:
            own = [_differentiated(scalar, rows, wrt), *map(reference, _neighbours(rows, seed))]
            differing = _differing(expected, found, finite, own)
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


def _run(session: Any, rows: Mapping[str, Tensor]) -> _Result:
    try:
        outputs = session.run(["value", "grad"], {name: given.cpu().numpy() for name, given in rows.items()})
    except Exception as error:
        raise ExportError(f"ONNX Runtime does not run the exported graph: {error}") from None
    return _Result(*(torch.from_numpy(output).double() for output in outputs))


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


def _reference(scalar: nn.Module, wrt: str) -> Callable[[Mapping[str, Tensor]], _Result]:
    """PyTorch's result, in float64 where the module allows it."""
    try:
        wide = copy.deepcopy(scalar).double()
    except Exception:  # a module may refuse to be copied
        wide = scalar

    def result(rows: Mapping[str, Tensor]) -> _Result:
        widened = {
            name: given.double() if given.is_floating_point() else given for name, given in rows.items()
        }
        try:
            return _differentiated(wide, widened, wrt)
        except Exception:  # or hold anything to float32
            return _differentiated(scalar, rows, wrt)

    return result


def _differentiated(scalar: nn.Module, rows: Mapping[str, Tensor], wrt: str) -> _Result:
    leaf = rows[wrt].clone().requires_grad_()
    with torch.enable_grad():
        value: Tensor = scalar(*(leaf if name == wrt else given for name, given in rows.items()))
        if not value.requires_grad:
            raise ExportError("in PyTorch the scalar has no gradient: it is held back", hint=_HINT)
        (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)
    return _Result(value.detach().cpu().double(), grad.cpu().double())


def _refuse_randomness(first: _Result, second: _Result) -> None:
    for one, other in zip(first, second, strict=True):
        difference, largest = _flat(one - other).abs().amax(1), _flat(one).abs().amax(1)
        if (difference > _REPEATED * largest).any():  # never so where they are not finite
            raise ExportError(
                "the module gives another result each time for the same inputs", hint=RANDOM_HINT
            )


def _differing(expected: _Result, found: _Result, finite: Tensor, own: Sequence[_Result] | None) -> str:
    """Say which output differs by more than is allowed on a row; empty where none does.

    Args:
        expected: of PyTorch.
        found: of the graph.
        finite: the rows to compare, [N].
        own: further results of PyTorch, as far from ``expected`` as rounding moves them.
    """
    # A log-probability near 0 is a difference of numbers near 1: float32 rounds it to 1e-7 of these. What is
    # left of a gradient that cancels is noise, far below what float32 can tell of the value.
    seen = expected.value.abs().nan_to_num(0, 0).clamp_min(1e-2)
    for name, least in (("value", seen), ("grad", 1e-7 * seen)):
        right, made = getattr(expected, name), getattr(found, name)
        if right.shape != made.shape:
            return f"'{name}' has shape {[*made.shape]}, PyTorch's has {[*right.shape]}"
        difference = _flat(made - right).abs().amax(1).nan_to_num(torch.inf)
        largest = torch.maximum(_flat(right).abs().amax(1), least)
        allowed = _TOLERANCE * largest
        for other in own or ():
            moved = _flat(getattr(other, name) - right).abs().amax(1).nan_to_num(torch.inf)
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
