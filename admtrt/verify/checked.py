"""Run the bundle's graphs and check all outputs against their contract."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from admtrt.errors import AdmtrtError
from admtrt.runtime.backends.graphs import batch_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName, GraphSpec, TensorSpec
    from admtrt.runtime.backends.graphs import GraphDenoiser
    from admtrt.runtime.slots import Array

_LONGEST = 300  # characters of a backend's message, which can be pages long


class GraphRunError(AdmtrtError):
    """A graph raised an exception, broke its contract, or returned non-finite values."""


class CheckedGraphs:
    """A backend as a :class:`~admtrt.runtime.sampler.Denoiser` that raises :class:`GraphRunError`.

    Args:
        denoiser: the backend.
        bundle: the bundle of the graphs.
    """

    def __init__(self, denoiser: GraphDenoiser, bundle: Bundle) -> None:
        self._denoiser = denoiser
        self._specs = {name: entry.spec for name, entry in bundle.manifest.graphs.items()}

    def run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        with _faults_of(graph):
            outputs = self._denoiser.run(graph, feeds)
        expected = [tensor.name for tensor in self._specs[graph].outputs]
        if list(outputs) != expected:
            raise GraphRunError(
                f"{graph} has the outputs {', '.join(outputs)}; expected {', '.join(expected)}"
            )
        check_values(graph, self._specs[graph], outputs, batch_of(feeds))
        return outputs


@contextlib.contextmanager
def _faults_of(name: GraphName) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # backends raise types of their own
        message = " ".join(str(error).split())[:_LONGEST]
        raise GraphRunError(f"{name} raised {type(error).__name__}: {message}") from error


def check_values(name: GraphName, spec: GraphSpec, outputs: Mapping[str, Array], batch: int) -> None:
    """Check dtypes, then shapes, then finiteness, so that the first fault is the root cause.

    Raises:
        GraphRunError: with the first fault.
    """
    for check in (_dtype_fault, _shape_fault, _value_fault):
        for tensor in spec.outputs:
            fault = check(tensor, outputs[tensor.name], batch)
            if fault:
                raise GraphRunError(f"{name}: '{tensor.name}' {fault}")


def _dtype_fault(tensor: TensorSpec, array: Array, batch: int) -> str:  # noqa: ARG001 - one signature for all
    return "" if array.dtype == tensor.dtype else f"is {array.dtype}, expected {tensor.dtype}"


def _shape_fault(tensor: TensorSpec, array: Array, batch: int) -> str:
    expected = tensor.sized(batch)
    return "" if array.shape == expected else f"has the shape {list(array.shape)}, expected {list(expected)}"


def _value_fault(tensor: TensorSpec, array: Array, batch: int) -> str:  # noqa: ARG001 - as above
    wrong = array.size - int(np.isfinite(array).sum())
    return f"has {wrong} of {array.size} values that are not finite" if wrong else ""
