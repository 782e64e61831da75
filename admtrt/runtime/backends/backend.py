"""Declaration of a backend: all that the rest of the package asks of one without opening it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from admtrt.errors import EngineError, MissingDependencyError, UserError
from admtrt.runtime.engines.device import query_driver

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName, Precision
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.backends.graphs import GraphDenoiser

    Graphs = Collection[GraphName] | None
    Opener = Callable[[Bundle, BackendChoice, Graphs], GraphDenoiser]
    """Opens one backend, which takes of the choice what it needs."""


def _nothing_more() -> None:
    """A backend without further requirements."""


@dataclass(frozen=True)
class Availability:
    """Tells whether a backend can run on this machine.

    Attributes:
        reason: why it cannot; empty where it can.
        hint: what to do about it.
    """

    reason: str = ""
    hint: str = ""

    def __bool__(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Backend:
    """One way to run a bundle's graphs.

    Attributes:
        name: as given by ``--backend``.
        summary: what it is, for people.
        precisions: those that it computes in.
        extra: of admtrt, which installs it; several of which one will do, with "or" between.
        packages: what it needs: one module of each group, which the first names.
        opener: opens a bundle on it; its requirements are met.
        distributions: whose versions decide how fast it is.
        device: where it runs.
        exact: whether its fp32 is float32 throughout; engines may round products to TF32.
        runs_plans: whether it runs plans, and so takes a folder of them.
        requirement: raises a :class:`~admtrt.errors.UserError` for what else it needs.
        narrowed: the precisions of this machine, where they depend on it; the packages have to be there.
    """

    name: str
    summary: str
    precisions: tuple[Precision, ...]
    extra: str
    packages: tuple[tuple[str, ...], ...]
    opener: Opener
    distributions: tuple[str, ...]
    device: Literal["cpu", "cuda"] = "cpu"
    exact: bool = True
    runs_plans: bool = False
    requirement: Callable[[], None] = _nothing_more
    narrowed: Callable[[], tuple[Precision, ...]] | None = None

    def require(self) -> None:
        """Make sure that its packages are installed and, for a CUDA backend, that a driver is there.

        Raises:
            MissingDependencyError: naming the package.
            EngineError: if there is no driver, or the provider cannot be loaded.
        """
        for group in self.packages:
            if not any(is_installed(name) for name in group):
                raise MissingDependencyError(group[0], extra=self.extra, purpose=f"The backend '{self.name}'")
        driver = query_driver() if self.device == "cuda" else None
        if driver is not None and driver.gpu is None:
            from admtrt.runtime.backends.registry import BACKENDS  # whose files import this one

            others = ", ".join(other.name for other in BACKENDS.values() if other.device == "cpu")
            raise EngineError(
                f"the backend '{self.name}' needs an NVIDIA GPU: {driver.fault}",
                hint=f"Install the driver, or use a backend for CPUs: {others}.",
            )
        self.requirement()

    def available(self) -> Availability:
        """Availability by :meth:`require`, with the reason where it is missing."""
        try:
            self.require()
        except UserError as error:
            return Availability(error.message, error.hint)
        return Availability()

    def precisions_here(self) -> tuple[Precision, ...]:
        """Those precisions that this machine has; the packages have to be there."""
        return self.precisions if self.narrowed is None else self.narrowed()

    def admits(self, precision: Precision) -> bool:
        """True where ``auto`` may take it for a precision: in fp32 only if that is exact."""
        return precision in self.precisions and (precision != "fp32" or self.exact)

    def open(
        self, bundle: Bundle, choice: BackendChoice, *, graphs: Collection[GraphName] | None = None
    ) -> GraphDenoiser:
        """Open a bundle's graphs, or only those that are named where the backend can open some alone.

        The choice may be that of ``auto``: threads are for CPU backends and plans for those that run them.

        Raises:
            UserError: if the backend cannot run here, or the bundle lacks what it needs.
        """
        self.require()
        return self.opener(bundle, choice, graphs)


def is_installed(name: str) -> bool:
    """True where a module can be found; none is imported but the packages that it is within."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is within
        return False
