"""Declaration of a backend: everything that can be asked of a backend before it is opened."""

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
        reason: why the backend cannot run; empty if it can.
        hint: how to make it run.
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
        summary: a description for people.
        precisions: the precisions that it offers.
        extra: the extra of admtrt that installs it; alternatives are joined by "or".
        packages: groups of modules. One module of each group has to be installed; messages name the first.
        opener: opens a bundle; called only when the requirements are met.
        distributions: distributions whose versions affect its speed.
        device: where it runs.
        exact: whether fp32 means float32 throughout; engines may round products to TF32.
        runs_plans: whether it runs plans and therefore takes a folder of plans.
        requirement: raises a :class:`~admtrt.errors.UserError` if any further requirement is not met.
        narrowed: returns the precisions of this machine, where they depend on it; needs the packages.
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
        """Check that the packages are installed and that a CUDA backend has a driver.

        Raises:
            MissingDependencyError: naming the package.
            EngineError: if there is no driver, or the provider cannot be loaded.
        """
        for group in self.packages:
            if not any(is_installed(name) for name in group):
                raise MissingDependencyError(group[0], extra=self.extra, purpose=f"The backend '{self.name}'")
        driver = query_driver() if self.device == "cuda" else None
        if driver is not None and driver.gpu is None:
            from admtrt.runtime.backends.registry import BACKENDS  # it imports this module in turn

            others = ", ".join(other.name for other in BACKENDS.values() if other.device == "cpu")
            raise EngineError(
                f"the backend '{self.name}' needs an NVIDIA GPU: {driver.fault}",
                hint=f"Install the driver, or use a backend for CPUs: {others}.",
            )
        self.requirement()

    def available(self) -> Availability:
        """Report as an :class:`Availability` what :meth:`require` finds."""
        try:
            self.require()
        except UserError as error:
            return Availability(error.message, error.hint)
        return Availability()

    def precisions_here(self) -> tuple[Precision, ...]:
        """The precisions that this machine supports; the packages have to be installed."""
        return self.precisions if self.narrowed is None else self.narrowed()

    def admits(self, precision: Precision) -> bool:
        """True if ``auto`` may choose this backend for a precision: fp32 requires ``exact``."""
        return precision in self.precisions and (precision != "fp32" or self.exact)

    def open(
        self, bundle: Bundle, choice: BackendChoice, *, graphs: Collection[GraphName] | None = None
    ) -> GraphDenoiser:
        """Open a bundle's graphs, or only the named ones if the backend can open some alone.

        The choice may have been made for ``auto``: only CPU backends use its threads, and only backends that
        run plans use its plans.

        Raises:
            UserError: if the backend cannot run here, or the bundle lacks what it needs.
        """
        self.require()
        return self.opener(bundle, choice, graphs)


def is_installed(name: str) -> bool:
    """True if a module can be found. Only its parent packages are imported."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
