"""The bundle's graphs under guard: everything that they return is held against their contract."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.errors import AdmtrtError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName, GraphSpec, TensorSpec
    from admtrt.runtime.backends.graphs import GraphDenoiser
    from admtrt.runtime.sampler import Images, Labels

_LONGEST = 300  # characters of a backend's message, which can go on for pages


class GraphRunError(AdmtrtError):
    """A graph raised, returned something else than its contract says, or values that are not finite."""


class CheckedGraphs:
    """A backend as a :class:`~admtrt.runtime.sampler.Denoiser` that raises :class:`GraphRunError`.

    Args:
        denoiser: the backend.
        bundle: whose graphs it runs.
    """

    def __init__(self, denoiser: GraphDenoiser, bundle: Bundle) -> None:
        self._denoiser = denoiser
        self._specs = {name: entry.spec for name, entry in bundle.manifest.graphs.items()}

    def unet(self, x: Images, t: NDArray[np.float32], y: Labels | None, low_res: Images | None) -> Images:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        with _faults_of("unet"):
            out = self._denoiser.unet(x, t, y, low_res)
        _check_values("unet", self._specs["unet"], {"out": out}, len(x))
        return out

    def classifier_gradient(self, x: Images, t: NDArray[np.float32], y: Labels) -> Images:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        with _faults_of("classifier_gradient"):
            grad = self._denoiser.classifier_gradient(x, t, y)
        _check_values("classifier_gradient", self._specs["classifier_gradient"], {"grad": grad}, len(x))
        return grad

    def update(
        self, x: Images, out: Images, grad: Images, noise: Images, coefficients: NDArray[np.float32]
    ) -> tuple[Images, Images]:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        with _faults_of("update"):
            x_prev, pred_x0 = self._denoiser.update(x, out, grad, noise, coefficients)
        _check_values("update", self._specs["update"], {"x_prev": x_prev, "pred_x0": pred_x0}, len(x))
        return x_prev, pred_x0

    def run(self, name: GraphName, feeds: dict[str, Any]) -> dict[str, Images]:
        """Run one graph and return all its outputs, their names checked as well."""
        with _faults_of(name):
            outputs = self._denoiser.run(name, feeds)
        expected = [tensor.name for tensor in self._specs[name].outputs]
        if list(outputs) != expected:
            raise GraphRunError(
                f"{name} has the outputs {', '.join(outputs)}; expected {', '.join(expected)}"
            )
        _check_values(name, self._specs[name], outputs, len(feeds["x"]))
        return outputs


@contextlib.contextmanager
def _faults_of(name: GraphName) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # backends raise types of their own
        message = " ".join(str(error).split())[:_LONGEST]
        raise GraphRunError(f"{name} raised {type(error).__name__}: {message}") from error


def _check_values(name: GraphName, spec: GraphSpec, outputs: Mapping[str, Images], batch: int) -> None:
    """Dtypes, then shapes, then finite values, so that the first fault is the one to look at."""
    tensors = [tensor for tensor in spec.outputs if tensor.name in outputs]
    for check in (_dtype_fault, _shape_fault, _value_fault):
        for tensor in tensors:
            fault = check(tensor, outputs[tensor.name], batch)
            if fault:
                raise GraphRunError(f"{name}: '{tensor.name}' {fault}")


def _dtype_fault(tensor: TensorSpec, array: Images, batch: int) -> str:  # noqa: ARG001 - one signature for all
    return "" if array.dtype == tensor.dtype else f"is {array.dtype}, expected {tensor.dtype}"


def _shape_fault(tensor: TensorSpec, array: Images, batch: int) -> str:
    expected = tensor.sized(batch)
    return "" if array.shape == expected else f"has the shape {list(array.shape)}, expected {list(expected)}"


def _value_fault(tensor: TensorSpec, array: Images, batch: int) -> str:  # noqa: ARG001 - as above
    wrong = array.size - int(np.isfinite(array).sum())
    return f"has {wrong} of {array.size} values that are not finite" if wrong else ""
