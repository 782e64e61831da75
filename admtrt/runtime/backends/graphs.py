"""What backends share: a denoiser from graphs that run by name, and the check of a graph's contract."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from admtrt.errors import AdmtrtError, BundleError, EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from admtrt.contract import GraphName, GraphSpec
    from admtrt.runtime.sampler import Images, Labels


_KEPT = 2
Made = TypeVar("Made")


class GraphDenoiser(ABC):
    """A :class:`~admtrt.runtime.sampler.Denoiser` over arrays in host memory."""

    @abstractmethod
    def run(self, name: GraphName, feeds: dict[str, Any]) -> dict[str, Images]:
        """Run one graph on arrays by name; every output by name, owned by the caller.

        Raises:
            EngineError: if the library fails, most often for want of memory.
        """

    def check_batch(self, batch: int) -> None:  # noqa: B027 - most have nothing to check
        """Refuse a batch that cannot be run; most backends take any.

        Raises:
            RequestError: naming the largest.
        """

    def unet(self, x: Images, t: NDArray[np.float32], y: Labels | None, low_res: Images | None) -> Images:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        feeds: dict[str, Any] = {"x": x, "t": t}
        if y is not None:
            feeds["y"] = y
        if low_res is not None:
            feeds["low_res"] = low_res
        return self.run("unet", feeds)["out"]

    def classifier_gradient(self, x: Images, t: NDArray[np.float32], y: Labels) -> Images:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        return self.run("classifier_gradient", {"x": x, "t": t, "y": y})["grad"]

    def update(
        self, x: Images, out: Images, grad: Images, noise: Images, coefficients: NDArray[np.float32]
    ) -> tuple[Images, Images]:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        feeds = {"x": x, "out": out, "grad": grad, "noise": noise, "coefficients": coefficients}
        results = self.run("update", feeds)
        return results["x_prev"], results["pred_x0"]


class PerBatch(Generic[Made]):
    """What was made for a graph and a batch size: of each graph, that of the two sizes that were used last.

    A run has full batches and a rest; every size holds memory of its own.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[GraphName, int], Made] = {}

    def get(self, graph: GraphName, batch: int, make: Callable[[], Made]) -> Made:
        """What is there, or what ``make`` returns; the size that was not used for longest makes room."""
        made = self._made.pop((graph, batch), None)
        if made is None:
            held = [key for key in self._made if key[0] == graph]
            if len(held) >= _KEPT:
                del self._made[held[0]]
            made = make()
        self._made[graph, batch] = made  # the last of the dictionary is the last that was used
        return made


@contextlib.contextmanager
def working(library: str, graph: GraphName, batch: int, *, what: str = "run") -> Iterator[None]:
    """Name the graph and the batch in whatever a library raises while it does ``what``.

    Raises:
        EngineError: in place of it.
    """
    try:
        yield
    except AdmtrtError:
        raise
    except Exception as error:  # every library has types of its own for every cause
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EngineError(
            f"{library} cannot {what} graph '{graph}' for a batch of {batch}: {reason}",
            hint="Where memory ran out, use a smaller batch.",
        ) from error


def check_contract(path: Path, inputs: Sequence[str], outputs: Sequence[str], spec: GraphSpec) -> None:
    """A graph's own inputs and outputs, each as ``name dtype[sizes]``, must be those of the manifest.

    Raises:
        BundleError: if they differ.
    """
    for found, tensors in ((inputs, spec.inputs), (outputs, spec.outputs)):
        declared = [str(tensor) for tensor in tensors]
        if list(found) != declared:
            raise BundleError(
                f"{path} has {', '.join(found)}; the manifest declares {', '.join(declared)}",
                hint="Export the checkpoint again.",
            )
