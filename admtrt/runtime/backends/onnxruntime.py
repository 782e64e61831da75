"""ONNX Runtime on the CPU: the embedded default, fp32 and exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from admtrt.errors import BundleError
from admtrt.runtime.backends.backend import Backend
from admtrt.runtime.backends.graphs import GraphDenoiser, batch_of, check_contract, working
from admtrt.runtime.backends.quiet import import_silent
from admtrt.schedule.guides import GUIDE_GRAPH

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName, GraphSpec
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.slots import Array

ERRORS_ONLY = 3
"""Severity from which ONNX Runtime logs to stderr: only the log says why a provider cannot be loaded."""
_NOTHING = 4  # log only fatal errors: all other errors are raised as well
_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}


class OnnxRuntimeDenoiser(GraphDenoiser):
    """A bundle's graphs on the CPU, each opened when it first runs or by :meth:`open`.

    Args:
        bundle: a verified bundle.
        threads: threads per operator; None lets ONNX Runtime take every core.
        graphs: names of the graphs to run; None for all.

    Raises:
        MissingDependencyError: if onnxruntime is not installed.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        graphs: Collection[GraphName] | None = None,
    ) -> None:
        self._library = import_onnxruntime(extra="cpu", purpose="Sampling on a CPU")
        self._options = self._library.SessionOptions()
        self._options.log_severity_level = _NOTHING
        # Each graph has its own thread pool: idle threads must not spin on the cores while the next graph
        # runs.
        self._options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            self._options.intra_op_num_threads = threads
        self._bundle = bundle
        self.specs: dict[GraphName, GraphSpec] = {
            name: bundle.graph_entry(name).spec
            for name in bundle.manifest.graphs
            if graphs is None or name in graphs
        }
        self._sessions: dict[GraphName, Any] = {}

    def open(self, graphs: Collection[GraphName]) -> None:
        """See :meth:`GraphDenoiser.open`.

        Raises:
            KeyError: as there.
            BundleError: if ONNX Runtime refuses a graph, or the inputs or outputs of a graph differ from the
                manifest.
        """
        for name in graphs:
            self._session(name)

    def _session(self, name: GraphName) -> Any:
        if name in self._sessions:
            return self._sessions[name]
        spec = self.specs[name]
        # A pattern is one more block as large as all activations, beside those that the first run took. A
        # guide keeps those of its whole forward pass: too large a block for a few percent of speed.
        self._options.enable_mem_pattern = not name.startswith(GUIDE_GRAPH)
        with self._bundle.reading(name) as path:
            try:
                session = self._library.InferenceSession(
                    str(path), sess_options=self._options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # the library raises types of its own
                raise BundleError(f"ONNX Runtime refuses {path}: {error}") from None
        check_session(path, session, spec)
        self._sessions[name] = session
        return session

    def _run(self, graph: GraphName, feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = [output.name for output in self.specs[graph].outputs]
        session = self._session(graph)
        with working("ONNX Runtime", graph, batch_of(feeds)):
            return dict(zip(names, session.run(names, feeds), strict=True))


def import_onnxruntime(*, extra: str, purpose: str) -> Any:
    """The library; see :func:`~admtrt.runtime.backends.quiet.import_silent`."""
    return import_silent("onnxruntime", extra=extra, purpose=purpose)


def check_session(path: Path, session: Any, spec: GraphSpec) -> None:
    """Refuse a session whose inputs or outputs are not those of the manifest, see :func:`check_contract`."""
    check_contract(path, _shown(session.get_inputs()), _shown(session.get_outputs()), spec)


def _shown(values: Any) -> list[str]:
    return [
        f"{value.name} {_DTYPES.get(value.type, value.type)}[{', '.join(map(str, value.shape))}]"
        for value in values
    ]


def _open(bundle: Bundle, choice: BackendChoice, graphs: Collection[GraphName] | None) -> GraphDenoiser:
    return OnnxRuntimeDenoiser(bundle, threads=choice.threads, graphs=graphs)


BACKENDS = (
    Backend(
        "onnxruntime",
        "ONNX Runtime on the CPU: the default",
        ("fp32",),
        "cpu",
        (("onnxruntime",),),
        _open,
        distributions=("onnxruntime",),
    ),
)
