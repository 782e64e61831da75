"""A request for a backend: one object, checked where it is made and carried whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from admtrt.contract import Precision, precision_named
from admtrt.errors import RequestError
from admtrt.runtime.backends.default import DEFAULT_BACKEND
from admtrt.runtime.backends.registry import BACKENDS, PLAN_BACKENDS
from admtrt.runtime.request import whole_number

AUTO = "auto"
_MAX_THREADS = 1024


@dataclass(frozen=True)
class BackendChoice:
    """Request for the backend that runs a bundle's graphs.

    Args:
        name: one of :data:`~admtrt.runtime.backends.registry.BACKENDS`, or ``auto`` for the fastest here.
        precision: of the networks.
        threads: number of threads of a CPU backend; None takes every core.
        plans: folder of plans, for a backend that runs them; None for the bundle's own.
        batch_size: the largest batch to expect; ``auto`` chooses for it.

    Raises:
        RequestError: for a choice that no machine could open: an unknown name, a precision that the backend
            does not offer, numbers out of range, or plans for a backend that runs none.
    """

    name: str = DEFAULT_BACKEND
    precision: Precision = "fp32"
    threads: int | None = None
    plans: Path | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        threads = checked_threads(self.threads)
        plans = None if self.plans is None else Path(self.plans)
        batch_size = whole_number(self.batch_size, "batch_size")
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; expected at least 1")
        for name, value in {"threads": threads, "plans": plans, "batch_size": batch_size}.items():
            object.__setattr__(self, name, value)
        if self.name != AUTO and self.name not in BACKENDS:
            known = ", ".join([*BACKENDS, AUTO])
            raise RequestError(f"backend {self.name!r} is unknown; expected one of {known}")
        precision_named(self.precision, "precision")
        if self.name == AUTO:
            self._check_auto()
        else:
            self._check_named()

    def for_batches(self, batch_size: int) -> BackendChoice:
        """The same choice with another batch size.

        Raises:
            RequestError: if the batch size is invalid.
        """
        return replace(self, batch_size=batch_size)

    def __str__(self) -> str:
        return f"{self.name}, {self.precision}"

    def _check_auto(self) -> None:
        if self.plans is not None and not runs_plans(AUTO, self.precision):
            raise RequestError(
                f"backend {AUTO!r} runs no plans in fp32, where TensorRT may round products to TF32, "
                f"but {self.plans} was given as their folder",
                hint=f"Leave it out, or use the backend {' or '.join(PLAN_BACKENDS)}.",
            )

    def _check_named(self) -> None:
        backend = BACKENDS[self.name]
        if self.precision not in backend.precisions:
            others = [other.name for other in BACKENDS.values() if self.precision in other.precisions]
            raise RequestError(
                f"backend {self.name!r} computes in {' or '.join(backend.precisions)}, "
                f"not in {self.precision}",
                hint=f"Backends with {self.precision}: {', '.join(others)}.",
            )
        if self.threads is not None and backend.device != "cpu":
            raise RequestError(
                f"threads is {self.threads}, but backend {self.name!r} does not run on the CPU",
                hint="Leave the threads out.",
            )
        if self.plans is not None and not backend.runs_plans:
            raise RequestError(
                f"backend {self.name!r} runs no plans, but {self.plans} was given as their folder",
                hint=f"Leave it out, or use the backend {' or '.join(PLAN_BACKENDS)}.",
            )


def runs_plans(name: str, precision: Precision) -> bool:
    """True if a folder of plans matters: the backend, or one that ``auto`` may choose, runs plans."""
    if name != AUTO:
        return name in PLAN_BACKENDS
    return any(BACKENDS[one].admits(precision) for one in PLAN_BACKENDS)


def checked_threads(threads: int | None) -> int | None:
    """Check a number of CPU threads and return it; None is returned as it is.

    Raises:
        RequestError: unless it is a whole number from 1 to 1024.
    """
    if threads is None:
        return None
    number = whole_number(threads, "threads")
    if not 1 <= number <= _MAX_THREADS:
        raise RequestError(f"threads is {number}; expected 1 to {_MAX_THREADS}")
    return number
