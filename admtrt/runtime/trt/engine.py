"""Open a plan on the GPU, check it against its graph's contract, and bind it for a batch size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from admtrt.errors import EngineError, PlanError
from admtrt.installing import pip_install
from admtrt.runtime.engines.library import lean_runtime, logger_of, sizes_of
from admtrt.runtime.engines.startup import require_start
from admtrt.runtime.trt.validity import check_validity

if TYPE_CHECKING:
    from collections.abc import Mapping

    import tensorrt as typed  # public stubs of 10.13: what both libraries share is checked against them

    from admtrt.contract import GraphSpec
    from admtrt.runtime.cuda import CudaDevice, Stream
    from admtrt.runtime.engines.library import Library
    from admtrt.runtime.engines.plans import PlanKey
    from admtrt.runtime.engines.sources import GraphSource
    from admtrt.runtime.trt.kernels import KernelCache

USED_TO_RUN = (
    "DataType.FLOAT",
    "DataType.INT64",
    "ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE",
    "ICudaEngine.create_execution_context",
    "ICudaEngine.create_runtime_config",
    "ICudaEngine.get_device_memory_size_for_profile_v2",
    "ICudaEngine.get_tensor_dtype",
    "ICudaEngine.get_tensor_mode",
    "ICudaEngine.get_tensor_name",
    "ICudaEngine.get_tensor_profile_shape",
    "ICudaEngine.get_tensor_shape",
    "ICudaEngine.num_io_tensors",
    "ICudaEngine.num_optimization_profiles",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.get_tensor_shape",
    "IExecutionContext.infer_shapes",
    "IExecutionContext.set_input_shape",
    "IExecutionContext.set_optimization_profile_async",
    "IExecutionContext.set_tensor_address",
    "ILogger.ERROR",
    "ILogger.INFO",
    "ILogger.log",
    "IRuntimeConfig.set_execution_context_allocation_strategy",
    "Runtime.deserialize_cuda_engine",
    "Runtime.engine_host_code_allowed",
    "Runtime.load_runtime",
    "TensorIOMode.INPUT",
    "TensorIOMode.OUTPUT",
)
"""Every member of both libraries and of TensorRT's lean runtime that running uses."""

USED_TO_REFIT = (
    "OnnxParserRefitter.refit_from_file",
    "Refitter.refit_cuda_engine",
)
"""Members that a stripped plan needs; the lean runtime has none of them."""

USED_TO_INSPECT = (
    "EngineInspector.get_engine_information",
    "ICudaEngine.create_engine_inspector",
    "LayerInformationFormat.JSON",
)
"""Members for listing a plan's layers; the lean runtime has no inspector."""

USED_TO_RUN_RTX = (
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "EngineInvalidityDiagnostics",
    "EngineValidity.INVALID",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.cuda_graph_strategy",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
    "Runtime.get_engine_validity",
)
"""Members used for running that only TensorRT-RTX has."""

_DTYPES = {"float32": "FLOAT", "int64": "INT64"}


@dataclass(frozen=True)
class Profile:
    """The range of batch sizes of one of a plan's profiles."""

    index: int
    smallest: int
    largest: int

    def holds(self, batch: int) -> bool:
        """True where a batch size lies inside."""
        return self.smallest <= batch <= self.largest


class Engine:
    """One plan.

    Args:
        library: the library that made it.
        device: the GPU, which has to be the current device.
        plan: the verified bytes of the plan.
        source: the graph that it was built from.
        key: how it was built. A stripped plan takes its weights from the graph's file; a version-compatible
            plan runs on its own version's lean runtime.
        build: the command that rebuilds the plan once its file is deleted.
        kernels: kernel cache of TensorRT-RTX for this GPU; None for TensorRT.

    Attributes:
        profiles: the ranges of batch sizes that it takes.

    Raises:
        PlanError: if the library refuses the plan, or its inputs or outputs differ from its graph's.
        EngineError: if the GPU has no room for the weights.
    """

    def __init__(
        self,
        library: Library,
        device: CudaDevice,
        plan: bytes,
        source: GraphSource,
        key: PlanKey,
        *,
        build: str,
        kernels: KernelCache | None,
    ) -> None:
        self._library, self._device, self._source, self._kernels = library, device, source, kernels
        self._again = f"Build it again with: {build}"
        self._logger = logger_of(library.module)
        self._logger.clear()
        self._runtime, parent = self._open_runtime(key)
        self._runtime.engine_host_code_allowed = False
        if library.flavor == "rtx":
            subject = f"its plan of graph '{source.graph}'"
            check_validity(self._runtime, plan, subject=subject, library=library, gpu=device.gpu, build=build)
        engine: typed.ICudaEngine | None = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._refused(len(plan), f"the weights of graph '{source.graph}'")
        self._engine = engine
        if key.options.strip:
            self._refit()
        self._check_contract(source.spec)
        self.profiles = self._read_profiles(source.spec)
        self._parent = parent  # set last, so that it is deleted last: the runtime must outlive the engine

    def profile(self, batch: int) -> Profile | None:
        """The tightest profile that holds a batch size."""
        fitting = [profile for profile in self.profiles if profile.holds(batch)]
        return min(fitting, key=lambda profile: profile.largest, default=None)

    def bind(self, batch: int, addresses: Mapping[str, int], stream: Stream) -> Binding:
        """Make a context for one batch size, with every tensor at a fixed address.

        Args:
            batch: a batch size that lies in one of the profiles.
            addresses: device address of every input and output, by name.
            stream: runs the preparation, and is waited for.

        Raises:
            EngineError: if the GPU has no room for the intermediate values, or the library refuses.
        """
        profile, spec = self.profile(batch), self._source.spec
        assert profile is not None, f"no profile holds a batch of {batch}"
        purpose = f"graph '{self._source.graph}' at a batch of {batch}"
        scratch = self._engine.get_device_memory_size_for_profile_v2(profile.index)
        self._logger.clear()
        context: typed.IExecutionContext | None = self._engine.create_execution_context(
            self._runtime_config()
        )
        if context is None:
            raise self._refused(scratch, purpose)
        try:
            done = context.set_optimization_profile_async(profile.index, stream.handle)
            stream.sync()
            for tensor in spec.inputs:
                done = done and context.set_input_shape(tensor.name, tensor.sized(batch))
            done = done and not context.infer_shapes()
            for tensor in (*spec.inputs, *spec.outputs):
                done = done and sizes_of(context.get_tensor_shape(tensor.name)) == tensor.sized(batch)
                done = done and context.set_tensor_address(tensor.name, addresses[tensor.name])
        except RuntimeError:  # raised instead of returning False; the log has the reason
            done = False
        if not done:
            raise self._refused(scratch, purpose)
        return Binding(context, self)

    def forget_errors(self) -> None:
        """Clear the log, so that :meth:`fault` reports only later messages."""
        self._logger.clear()

    def inspect(self) -> str:
        """The plan's layers as JSON, from the library's inspector.

        Raises:
            EngineError: if the library has no inspector.
        """
        self.forget_errors()
        inspector: typed.EngineInspector | None = self._engine.create_engine_inspector()
        if inspector is None:
            raise self.fault("its runtime has no inspector")
        return inspector.get_engine_information(self._library.module.LayerInformationFormat.JSON)

    def fault(self, what: str) -> EngineError:
        """Make the error of a failed operation, with the library's messages."""
        return EngineError(
            f"{self._library} cannot run graph '{self._source.graph}': {self._logger.said() or what}"
        )

    def _open_runtime(self, key: PlanKey) -> tuple[typed.Runtime, typed.Runtime]:
        """The runtime of a plan, and the runtime that loaded it, if any."""
        require_start(self._library)
        own: typed.Runtime = self._library.module.Runtime(self._logger)
        if not key.options.version_compatible:
            return own, own
        lean = lean_runtime(key.version)
        loaded = None if lean is None else cast("typed.Runtime | None", own.load_runtime(str(lean)))
        if loaded is None:
            raise PlanError(
                f"the plan of graph '{self._source.graph}' needs the lean runtime of TensorRT {key.version}: "
                f"{self._logger.said() or 'it is not installed'}",
                hint=f"Install it with: {pip_install(f'tensorrt-lean-cu13=={key.version}')}",
            )
        return loaded, own

    def _runtime_config(self) -> Any:
        trt = self._library.module
        config: Any = self._engine.create_runtime_config()  # some members exist only in TensorRT-RTX
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        )
        if self._kernels is not None:
            self._kernels.attach(config)
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config

    def _refit(self) -> None:
        trt = self._library.module
        refitter: typed.Refitter = trt.Refitter(self._engine, self._logger)
        parser: typed.OnnxParserRefitter = trt.OnnxParserRefitter(refitter, self._logger)
        with self._source.reading():
            refitted = parser.refit_from_file(str(self._source.path))
        if not refitted or not refitter.refit_cuda_engine():
            raise PlanError(
                f"{self._library} cannot put the weights of {self._source.path} into their plan: "
                f"{self._logger.said() or 'it gives no reason'}",
                hint=self._again,
            )

    def _check_contract(self, spec: GraphSpec) -> None:
        trt, engine = self._library.module, self._engine
        found = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            shape = (-1, *sizes_of(engine.get_tensor_shape(name))[1:])  # the profiles describe the batch
            found[name] = (engine.get_tensor_mode(name), engine.get_tensor_dtype(name), shape)
        declared = {
            tensor.name: (mode, getattr(trt.DataType, _DTYPES[tensor.dtype]), tensor.sized(-1))
            for mode, tensors in (
                (trt.TensorIOMode.INPUT, spec.inputs),
                (trt.TensorIOMode.OUTPUT, spec.outputs),
            )
            for tensor in tensors
        }
        if found != declared:
            raise PlanError(
                f"the plan of graph '{self._source.graph}' has {found}; the manifest declares {declared}",
                hint=self._again,
            )

    def _read_profiles(self, spec: GraphSpec) -> tuple[Profile, ...]:
        profiles = []
        for index in range(self._engine.num_optimization_profiles):
            shapes = [self._engine.get_tensor_profile_shape(tensor.name, index) for tensor in spec.inputs]
            smallest = max(shape[0][0] for shape in shapes)
            largest = min(shape[2][0] for shape in shapes)
            profiles.append(Profile(index, smallest, largest))
        return tuple(profiles)

    def _refused(self, size: int, purpose: str) -> EngineError:
        """The error of a call that returned nothing; the log tells whether memory ran out."""
        said = self._logger.said()
        if re.search(r"out ?of ?memory", said, re.IGNORECASE):
            return self._device.full(size, purpose)
        return PlanError(
            f"{self._library} refuses its plan of graph '{self._source.graph}' on {self._device.gpu}: "
            f"{said or 'it gives no reason'}",
            hint=self._again,
        )


class Binding:
    """A context bound to one batch size and to fixed addresses, used by one stream at a time."""

    def __init__(self, context: typed.IExecutionContext, engine: Engine) -> None:
        self._context = context
        self._engine = engine  # keeps it alive: a context must not outlive its engine

    def enqueue(self, stream: Stream) -> None:
        """Enqueue one run into a stream.

        Raises:
            EngineError: if the library refuses.
        """
        self._engine.forget_errors()
        if not self._context.execute_async_v3(stream.handle):
            raise self._engine.fault("the run could not be enqueued")
