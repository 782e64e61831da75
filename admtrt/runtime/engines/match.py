"""Find the plans of a store that run here: for the same graph, the same library and this GPU."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from admtrt.errors import EngineError, PlanError
from admtrt.runtime.engines.library import lean_runtime
from admtrt.runtime.engines.options import FIRST_PORTABLE, targets_text
from admtrt.runtime.engines.plans import RECIPE, bound_gpu

if TYPE_CHECKING:
    from admtrt.runtime.engines.device import Gpu
    from admtrt.runtime.engines.library import Library
    from admtrt.runtime.engines.plans import PlanKey, PlanRecord, PlanStore
    from admtrt.runtime.engines.sources import GraphSource


def usable_plans(store: PlanStore, source: GraphSource, library: Library, gpu: Gpu) -> list[PlanRecord]:
    """The plans of a graph that run on this machine, the newest first; none of them is read yet.

    Raises:
        EngineError: if the library does not support this GPU.
        PlanError: if no plan fits, saying what differs for each plan of the graph.
    """
    if not library.runs_on(gpu.compute_capability):
        raise EngineError(
            f"{library} does not run on {gpu}; it runs on "
            + ", ".join(f"SM{target}" for target in library.targets),
            hint="Use plans of TensorRT (admtrt build BUNDLE --library tensorrt), or another backend.",
        )
    known, damaged = store.records()
    records = [record for record in known if record.key.graph == source.graph]
    reasons = [mismatch(record.key, source, library, gpu) or store.fault(record) for record in records]
    usable = [record for record, reason in zip(records, reasons, strict=True) if not reason]
    if usable:
        return usable
    fitting = [record for record in records if not mismatch(record.key, source, library, gpu)]
    foreign = any(not store.trusts(record.plan.sha256) for record in fitting)
    wanted = f"graph '{source.graph}' in {source.precision} for {library} on {gpu}"
    names = [record.key.digest[:12] for record in records]
    differing = [f"{name} {reason}" for name, reason in zip(names, reasons, strict=True)]
    found = "; ".join((*differing, *damaged))
    raise PlanError(
        f"{store.root} has no plan of {wanted}" + (f": {found}" if found else ""),
        hint=f"Make one with: {store.build_command(library.flavor, source.precision)}"
        + (f". {store.trust_hint}" if foreign else ""),
    )


def mismatch(key: PlanKey, source: GraphSource, library: Library, gpu: Gpu) -> str:
    """The reasons that a plan does not fit this graph, library and GPU; empty if it fits."""
    faults = []
    if key.precision != source.precision:
        faults.append(f"is in {key.precision}")
    elif key.onnx != source.digest:
        faults.append("was built from another ONNX file")
    if key.recipe != RECIPE:
        faults.append("was built by another version of admtrt")
    if key.library != library.flavor:
        faults.append(f"is a plan of {key.library}")
    elif not _version_fits(key, library):
        lean = ", whose lean runtime it needs" if key.options.version_compatible else ""
        faults.append(f"was built by version {key.version}{lean}")
    if not _gpu_fits(key, gpu):
        faults.append(f"was built for {key.gpu or targets_text(key.options.targets)}")
    return ", ".join(faults)


def _version_fits(key: PlanKey, library: Library) -> bool:
    if key.options.version_compatible:  # runs on the lean runtime of exactly its own version
        return _numbers(key.version) <= _numbers(library.version) and lean_runtime(key.version) is not None
    return key.version == library.version


def _gpu_fits(key: PlanKey, gpu: Gpu) -> bool:
    if key.library == "rtx":
        targets = key.options.targets
        return gpu.compute_capability in targets if targets else gpu.compute_capability >= FIRST_PORTABLE
    if key.options.hardware_compatible == "ampere_plus" and gpu.compute_capability < FIRST_PORTABLE:
        return False
    return key.gpu == bound_gpu(key.options, key.library, gpu)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
