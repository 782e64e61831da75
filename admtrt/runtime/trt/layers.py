"""The layers of a plan, from the library's inspector on the GPU that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from admtrt.errors import EngineError, PlanError
from admtrt.reading import parse_json
from admtrt.runtime.cuda import CudaDevice
from admtrt.runtime.engines.library import find_library
from admtrt.runtime.engines.match import mismatch
from admtrt.runtime.engines.sources import graph_source
from admtrt.runtime.trt.engine import Engine

if TYPE_CHECKING:
    from admtrt.bundle import Bundle
    from admtrt.runtime.engines.plans import PlanRecord, PlanStore


@dataclass(frozen=True)
class Layer:
    """One layer of a plan.

    Attributes:
        name: its name, which contains the graph's operators that it implements.
        kind: the library's name of its kind.
        outputs: type and layout of each output.
    """

    name: str
    kind: str
    outputs: tuple[str, ...]


def plan_layers(bundle: Bundle, store: PlanStore, record: PlanRecord) -> list[Layer]:
    """Open a plan and list its layers.

    Raises:
        MissingDependencyError: if the library, or cuda-core, is not installed.
        EngineError: without a usable GPU or driver, or if the library's answer cannot be parsed.
        PlanError: if the plan is damaged or does not run here.
    """
    key = record.key
    source = graph_source(bundle, key.graph, key.precision)
    library, device = find_library(key.library), CudaDevice()
    fault = mismatch(key, source, library, device.gpu)
    if fault:
        raise PlanError(
            f"plan {key.digest[:12]} cannot be opened on {device.gpu}: it {fault}",
            hint="Layers can be shown where a plan runs; for what the builder fused, see: "
            "admtrt build BUNDLE --report",
        )
    if not store.trusts(record.plan.sha256):
        raise PlanError(
            f"plan {key.digest[:12]} cannot be opened: it {store.fault(record)}",
            hint=f"Make one with: {store.build_command(key.library, key.precision)}. {store.trust_hint}",
        )
    engine = Engine(
        library, device, store.load(record), source, key, build=store.rebuild_command(key), kernels=None
    )
    return read_layers(engine.inspect(), str(library))


def read_layers(text: str, library: str) -> list[Layer]:
    """Parse the layers in an inspector's JSON of TensorRT 10 or 11.

    Raises:
        EngineError: if the JSON has another form.
    """
    try:
        listed = parse_json(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        raise EngineError(f"the inspector of {library} gives no list of layers") from None
    return [_layer(entry) for entry in listed]


def _layer(entry: Any) -> Layer:
    if not isinstance(entry, dict):  # a plan built without details has only names
        return Layer(str(entry), "", ())
    outputs = tuple(map(_type, entry.get("Outputs", ())))
    return Layer(str(entry.get("Name", "")), str(entry.get("LayerType", "")), outputs)


def _type(output: Any) -> str:
    """Type and layout of an output: one field in TensorRT 10, two in 11."""
    fields = ("Format/Datatype", "DataType", "Datatype", "Format")
    told = [str(output[field]) for field in fields if isinstance(output, dict) and field in output]
    return ", ".join(told)
