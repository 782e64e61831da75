"""Rows of a benchmark: the peers and the backends, each in a precision."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from admtrt.contract import PRECISIONS
from admtrt.errors import MissingDependencyError, RequestError
from admtrt.runtime.backends.choice import AUTO, runs_plans
from admtrt.runtime.backends.registry import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from admtrt.contract import Precision

Device = Literal["cpu", "cuda"]
ORIGINAL, EAGER, COMPILED, PLAIN = "original", "torch", "torch-compile", "plain-onnx"


@dataclass(frozen=True)
class Row:
    """One contender; ``name`` is a peer's or a backend's."""

    name: str
    precision: Precision = "fp32"

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"

    def require(self) -> None:
        """Check that the packages of a peer are installed; backends check their own.

        Raises:
            MissingDependencyError: naming the first missing one.
        """
        needed = ("torch", "safetensors", *("onnx", "onnxscript") * (self.name == PLAIN))
        for package in needed if self.name in PEERS else ():
            if find_spec(package) is None:
                raise MissingDependencyError(package, extra="export", purpose=f"The row '{self.name}'")


PEERS: Mapping[str, tuple[Precision, ...]] = MappingProxyType(
    {
        ORIGINAL: PRECISIONS,
        EAGER: PRECISIONS,
        COMPILED: PRECISIONS,
        PLAIN: ("fp32",),
    }
)
"""The peers by name, with their precisions: the original implementation, admtrt's networks in PyTorch, eager
and compiled, and those networks exported by PyTorch's own ONNX exporter, on ONNX Runtime.
"""


def parse_rows(items: Sequence[str]) -> tuple[Row, ...]:
    """Parse rows written ``NAME`` or ``NAME:PRECISION``, in the given order.

    Raises:
        RequestError: for an unknown name, a precision that it does not have, or a repeated row.
    """
    known = _known()
    rows: list[Row] = []
    for item in items:
        name, _, given = item.partition(":")
        if name not in known:
            raise RequestError(f"there is no backend '{name}'", hint=f"There are: {', '.join(known)}.")
        precision = next((p for p in known[name] if p == (given or "fp32")), None)
        if precision is None:
            raise RequestError(f"{name} has no precision '{given}'; it has {', '.join(known[name])}")
        if Row(name, precision) in rows:
            raise RequestError(f"{item} comes twice")
        rows.append(Row(name, precision))
    return tuple(rows)


def takes_plans(row: Row) -> bool:
    """True if a row may run plans: ``auto`` does not run plans in fp32."""
    return runs_plans(row.name, row.precision)


def default_rows(device: Device, *, original: bool) -> tuple[Row, ...]:
    """The peers, and every backend that this machine can run, in each of its precisions.

    On a CPU the peers are measured in fp32 only.
    """
    rows = [
        Row(name, precision)
        for name, precisions in PEERS.items()
        for precision in (precisions if device == "cuda" else ("fp32",))
        if original or name != ORIGINAL
    ]
    for backend in BACKENDS.values():
        if backend.available():
            rows += [Row(backend.name, precision) for precision in backend.precisions]
    return (*rows, Row(AUTO))


def _known() -> dict[str, tuple[Precision, ...]]:
    backends = {backend.name: backend.precisions for backend in BACKENDS.values()}
    return {**PEERS, **backends, AUTO: PRECISIONS}
