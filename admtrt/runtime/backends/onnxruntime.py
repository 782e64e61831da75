"""ONNX Runtime on the CPU: the embedded default, fp32 and exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from admtrt.errors import BundleError, MissingDependencyError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from admtrt.bundle import Bundle
    from admtrt.contract import GraphName, GraphSpec
    from admtrt.runtime.sampler import Images, Labels

_ERRORS_ONLY = 3
_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}


class OnnxRuntimeDenoiser:
    """A bundle's graphs as a :class:`~admtrt.runtime.sampler.Denoiser`.

    Args:
        bundle: a verified bundle.
        threads: of each operator; None lets ONNX Runtime take every core.

    Raises:
        MissingDependencyError: if onnxruntime is not installed.
        BundleError: if ONNX Runtime refuses a graph, or a graph has other inputs or outputs than declared.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingDependencyError("onnxruntime", extra="cpu", purpose="Sampling on a CPU") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        self._sessions: dict[GraphName, Any] = {}
        for name, graph in bundle.manifest.graphs.items():
            path = bundle.graph_path(name)
            try:
                session = onnxruntime.InferenceSession(
                    str(path), sess_options=options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # the library raises types of its own for every cause
                raise BundleError(f"ONNX Runtime refuses {path}: {error}") from None
            _check_contract(path, session, graph.spec)
            self._sessions[name] = session

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
        (grad,) = self._sessions["classifier_gradient"].run(["grad"], {"x": x, "t": t, "y": y})
        out: Images = grad
        return out

    def update(
        self, x: Images, out: Images, grad: Images, noise: Images, coefficients: NDArray[np.float32]
    ) -> tuple[Images, Images]:
        """See :class:`~admtrt.runtime.sampler.Denoiser`."""
        feeds = {"x": x, "out": out, "grad": grad, "noise": noise, "coefficients": coefficients}
        results = self.run("update", feeds)
        return results["x_prev"], results["pred_x0"]

    def run(self, name: GraphName, feeds: dict[str, Any]) -> dict[str, Images]:
        """Run one graph on arrays by name; every output by name."""
        session = self._sessions[name]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))


def _check_contract(path: Path, session: Any, spec: GraphSpec) -> None:
    """The file's own inputs and outputs must be those that the manifest declares."""
    for values, tensors in ((session.get_inputs(), spec.inputs), (session.get_outputs(), spec.outputs)):
        found = [
            f"{value.name} {_DTYPES.get(value.type, value.type)}[{', '.join(map(str, value.shape))}]"
            for value in values
        ]
        declared = [str(tensor) for tensor in tensors]
        if found != declared:
            raise BundleError(
                f"{path} has {', '.join(found)}; the manifest declares {', '.join(declared)}",
                hint="Export the checkpoint again.",
            )
