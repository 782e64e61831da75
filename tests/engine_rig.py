"""A bundle's plans for the double of the engine library, on the stub of the CUDA driver."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

import cuda_stub
import numpy as np
from bundles import exported_bundle
from engine_double import engine_library, plan_bytes

from admtrt.bundle import Bundle
from admtrt.runtime.backends.tensorrt import TensorRTDenoiser
from admtrt.runtime.engines.device import Driver, Gpu
from admtrt.runtime.engines.library import find_library
from admtrt.runtime.engines.options import BatchProfile, BuildOptions
from admtrt.runtime.engines.plans import PlanStore, plan_key
from admtrt.runtime.engines.report import fusion_report
from admtrt.runtime.engines.sources import graph_source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pytest

    from admtrt.runtime.engines.plans import PlanRecord
    from admtrt.runtime.trt.batch_buffers import BatchBuffers

GPU = Gpu(cuda_stub.GPU_NAME, 89, 2**30)
DRIVER = Driver(cuda="13.1", gpus=(GPU,))
Profiles = tuple[tuple[int, int, int], ...]


class Rig:
    """One library, one GPU, one folder of plans of one of the bundles of :mod:`bundles`.

    Args:
        rtx: TensorRT-RTX instead of TensorRT.
        profiles: profiles of the plans, for each graph or for all.
        memory: memory of the GPU, in bytes.
        order: when the GPU does its work, one of :data:`cuda_stub.ORDERS`.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        folder: Path,
        name: str = "guided",
        *,
        rtx: bool = False,
        profiles: Profiles = ((1, 4, 8),),
        memory: int = 2**30,
        order: str = "lazy",
    ) -> None:
        cuda_stub.reset(order, memory=memory)
        patch.setattr("admtrt.runtime.engines.device._LIBRARIES", (cuda_stub.library_path(),))
        self.bundle = Bundle.open(exported_bundle(name))
        self.folder = folder
        self.store = PlanStore(folder)
        self.profiles: dict[str, Profiles] = dict.fromkeys(self.bundle.manifest.graphs, profiles)
        self.flavor: Any = "rtx" if rtx else "tensorrt"
        self.module = engine_library(rtx=rtx, version="1.7.1.116" if rtx else "11.4.0.106")
        hidden = ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings")
        for module in hidden:
            patch.setitem(sys.modules, module, None)
        self.module.__spec__ = ModuleSpec(self.module.__name__, None)  # required by its declaration
        patch.setitem(sys.modules, self.module.__name__, self.module)
        patch.setattr(
            "admtrt.runtime.trt.engine.require_start", lambda _: None
        )  # the double exists only in this process

    def driver(self, patch: pytest.MonkeyPatch, driver: Driver) -> None:
        """Change the reported driver."""
        for module in ("admtrt.runtime.cuda", "admtrt.runtime.backends.backend"):
            patch.setattr(f"{module}.query_driver", lambda: driver)

    def build(self, graphs: Sequence[str] = (), **plan: Any) -> list[PlanRecord]:
        """Store plans of these graphs, or of all; ``plan`` are fields of the double's plans."""
        library, records = find_library(self.flavor), []
        for graph in graphs or self.profiles:
            source = graph_source(self.bundle, graph, "fp32")
            profiles = self.profiles[graph]
            options = BuildOptions(
                profiles=tuple(BatchProfile(smallest=a, best=b, largest=c) for a, b, c in profiles),
                strip=plan.get("stripped", False),
                version_compatible=plan.get("lean", False),
            )
            key = plan_key(source, options, library, GPU)
            fields = {"gpu": f"SM{GPU.compute_capability}"} | plan
            records.append(
                self.store.put(
                    key, plan_bytes(source.path, profiles, **fields), seconds=1.0, report=fusion_report([])
                )
            )
        return records

    def open(self, **options: Any) -> TensorRTDenoiser:
        """Open the backend with the stored plans."""
        return TensorRTDenoiser(self.bundle, plans=self.folder, **options)


def on_device(buffers: BatchBuffers, key: str) -> np.ndarray[Any, Any]:
    """An array of a batch size in device memory, which the host cannot read."""
    array = buffers.arrays[key]
    size = int(np.prod(array.shape)) * array.dtype.itemsize
    return np.frombuffer(cuda_stub.memory_at(array.address, size), array.dtype).reshape(array.shape)
