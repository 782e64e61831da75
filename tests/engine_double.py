"""A strict double of the engine API of TensorRT and TensorRT-RTX, on the stub of the CUDA driver.

A plan of the double names an ONNX file, its profiles and the GPU; ONNX Runtime computes, on the stub's memory
and in the order of its streams. Calls that the real library refuses (a shape outside the profile, an address
that was never set) are refused in the same way, by ``False`` or ``None`` and a line in the log. Errors that
the real library does not detect (freed or too small memory, a graph of a context that was changed after the
capture) are misuses of the stub, or raise :class:`MisuseError` if the double detects them at once.
"""

from __future__ import annotations

import json
import weakref
from enum import IntEnum
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import cuda_stub
import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_DTYPES = {"tensor(float)": np.dtype(np.float32), "tensor(int64)": np.dtype(np.int64)}


class MisuseError(AssertionError):
    """A call for which the real library gives wrong results or crashes."""


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class DataType(IntEnum):
    FLOAT = 0
    INT64 = 8


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1


class EngineValidity(IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class LayerInformationFormat(IntEnum):
    ONELINE = 0
    JSON = 1


class CudaGraphStrategy(IntEnum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    LAZY = 0
    EAGER = 1


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


class ILogger:
    ERROR = Severity.ERROR
    INFO = Severity.INFO

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


def plan_bytes(
    onnx: Path,
    profiles: Sequence[tuple[int, int, int]] = ((1, 4, 8),),
    *,
    gpu: str = "SM89",
    scratch: int = 4096,
    stripped: bool = False,
    lean: bool = False,
    renamed: str = "",
    capturable: bool = True,
) -> bytes:
    """A plan of the double. ``renamed`` renames an output; ``scratch`` is the scratch memory per sample."""
    fields = {"onnx": str(onnx), "profiles": list(profiles), "gpu": gpu, "scratch": scratch, "lean": lean}
    return json.dumps(fields | {"stripped": stripped, "renamed": renamed, "capturable": capturable}).encode()


@cache
def _session(path: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Runtime:
    rtx = False
    gpu = "SM89"

    def __init__(self, logger: ILogger) -> None:
        if not cuda_stub.is_current():
            raise MisuseError("the device is not current in this thread")
        self.logger = logger
        self.engine_host_code_allowed: bool | None = None  # leaving it open means trusting the plan

    def load_runtime(self, path: str) -> Runtime | None:
        if not path.endswith("libnvinfer_lean.so"):
            self.logger.log(Severity.ERROR, f"Unable to load library: {path}")
            return None
        return LeanRuntime(self.logger)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        if self.engine_host_code_allowed is not False:
            raise MisuseError("host code of a plan was not forbidden")
        try:
            fields = json.loads(serialized_engine)
        except ValueError:
            self.logger.log(Severity.ERROR, "Serialization assertion magicTagRead failed")
            return None
        if fields["lean"] != isinstance(self, LeanRuntime):
            self.logger.log(Severity.ERROR, "The plan needs the lean runtime of its version, and it alone")
            return None
        if fields["gpu"] != self.gpu:
            self.logger.log(Severity.ERROR, f"The plan is for {fields['gpu']}, got {self.gpu}")
            return None
        return Engine(self, fields)


class LeanRuntime(Runtime):
    """The result of ``load_runtime``."""


class RtxRuntime(Runtime):
    rtx = True
    diagnostics = 2

    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, int]:
        if self.gpu.encode() in buffer:
            return EngineValidity.VALID, 0
        self.logger.log(Severity.INFO, "The engine was not built for this device.")
        return EngineValidity.INVALID, self.diagnostics


class Engine:
    def __init__(self, runtime: Runtime, fields: dict[str, Any]) -> None:
        self.runtime, self.fields = runtime, fields
        self.weights = not fields["stripped"]
        self.session = _session(fields["onnx"])
        self.tensors: dict[str, tuple[TensorIOMode, Any]] = {}
        for value in self.session.get_inputs():
            self.tensors[value.name] = (TensorIOMode.INPUT, value)
        for index, value in enumerate(self.session.get_outputs()):
            name = fields["renamed"] if fields["renamed"] and index == 0 else value.name
            self.tensors[name] = (TensorIOMode.OUTPUT, value)
        self.inputs = [name for name, (mode, _) in self.tensors.items() if mode is TensorIOMode.INPUT]
        self.outputs = [name for name in self.tensors if name not in self.inputs]
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(fields["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.INT64 if "int64" in self.tensors[name][1].type else DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """A profile with a single size makes that size fixed."""
        sizes = {size for profile in self.fields["profiles"] for size in profile}
        batch = sizes.pop() if len(sizes) == 1 else -1
        return tuple(size if isinstance(size, int) else batch for size in self.tensors[name][1].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert self.tensors[name][0] is TensorIOMode.INPUT
        shape = self.get_tensor_shape(name)
        return [(size, *shape[1:]) for size in self.fields["profiles"][profile_index]]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return int(self.fields["scratch"]) * self.fields["profiles"][profile_index][2]

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def create_runtime_config(self) -> RuntimeConfig:
        return RtxRuntimeConfig(self) if self.runtime.rtx else RuntimeConfig(self)

    def create_execution_context(self, runtime_config: RuntimeConfig) -> Context | None:
        assert runtime_config.engine is self
        assert runtime_config.strategy is ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self.runtime.rtx:
            assert isinstance(runtime_config, RtxRuntimeConfig)
            assert runtime_config.cache is not None
            assert runtime_config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if not self.weights:
            raise MisuseError("a plan without weights is run")
        return Context(self)


class EngineInspector:
    """Formats outputs like TensorRT 10, or like TensorRT 11."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:  # noqa: A002 - as the real one
        assert format is LayerInformationFormat.JSON
        typed = (
            {"Format": "Row major linear", "DataType": "Float"}
            if self.engine.runtime.rtx
            else {"Format/Datatype": "Row major linear FP32 format"}
        )
        layers = [
            {"Name": f"last of {name}", "LayerType": "kgen", "Outputs": [{"Name": name, **typed}]}
            for name in self.engine.outputs
        ]
        return json.dumps({"Layers": layers, "I/O Tensors": []})


class RuntimeConfig:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy


class RuntimeCache:
    """Contains one byte for each prepared batch size."""

    def __init__(self) -> None:
        self.kernels = b""
        self.read: list[bytes] = []

    def deserialize(self, buffer: bytes) -> bool:
        self.read.append(buffer)
        self.kernels = buffer if buffer.startswith(b"rtx") else b""
        return bool(self.kernels)

    def serialize(self) -> bytes:
        return self.kernels or b"rtx"


class RtxRuntimeConfig(RuntimeConfig):
    made: list[RuntimeCache]

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.cache: RuntimeCache | None = None
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def create_runtime_cache(self) -> RuntimeCache:
        self.made.append(RuntimeCache())
        return self.made[-1]

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.version = 0
        self.prepared = -1
        self.scratch = 0

    def __del__(self) -> None:
        if self.scratch:
            cuda_stub.give_memory(self.scratch)

    def _refuse(self, message: str) -> bool:
        self.engine.runtime.logger.log(Severity.ERROR, f"API Usage Error ({message})")
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if profile_index >= self.engine.num_optimization_profiles:
            raise RuntimeError("Error in set optimization profile async.")  # like the real binding
        size = self.engine.get_device_memory_size_for_profile_v2(profile_index)
        self.scratch = cuda_stub.take_memory(max(size, 1))
        if not self.scratch:
            self.engine.runtime.logger.log(
                Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was ...)"
            )
            raise RuntimeError("Error in set optimization profile async.")
        cuda_stub.run(stream_handle, "profile", lambda: None, reads=[], writes=[self.scratch])
        self.profile, self.shapes = profile_index, {}
        self.version += 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.engine.get_tensor_profile_shape(name, self.profile)
        inside = len(shape) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )
        if not inside:
            return self._refuse(f"shape {shape} of {name} is outside profile {self.profile}")
        self.shapes[name] = tuple(shape)
        self.version += 1
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = next(iter(self.shapes.values()))[0] if not self.infer_shapes() else -1
        return (batch, *self.engine.get_tensor_shape(name)[1:])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.tensors:
            return self._refuse(f"there is no tensor {name}")
        self.addresses[name] = memory
        self.version += 1
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not stream_handle:
            raise MisuseError("the default stream, or none, was given")
        if self.infer_shapes() or set(self.addresses) != set(self.engine.tensors):
            return self._refuse("a shape or an address was not set")
        if len({shape[0] for shape in self.shapes.values()}) != 1:
            return self._refuse("inputs of different batches")
        if cuda_stub.capturing(stream_handle):
            capturable = self.engine.fields["capturable"] and not self.engine.runtime.rtx
            if not capturable or self.prepared != self.version:
                cuda_stub.wait_for(stream_handle)  # this invalidates the capture
                return self._refuse("operation not permitted when stream is capturing")
        self.prepared = self.version
        inputs, outputs = self.engine.inputs, self.engine.outputs
        views = {name: self._view(name) for name in self.engine.tensors}
        session, context, version = self.engine.session, weakref.ref(self), self.version

        def work() -> None:
            bound = context()
            if bound is None or bound.version != version:
                raise MisuseError(
                    "a run is done whose context was changed or destroyed after it was enqueued"
                )
            results = session.run(None, {name: views[name].copy() for name in inputs})
            for name, value in zip(outputs, results, strict=True):
                views[name][...] = value

        code = cuda_stub.run(
            stream_handle,
            f"run {session.get_outputs()[0].name}",
            work,
            reads=[self.addresses[name] for name in inputs],
            writes=[self.scratch, *(self.addresses[name] for name in outputs)],
        )
        return code == 0 or self._refuse(f"CUDA error {code}")

    def _view(self, name: str) -> np.ndarray[Any, Any]:
        dtype, shape = _DTYPES[self.engine.tensors[name][1].type], self.get_tensor_shape(name)
        found = cuda_stub.memory_at(self.addresses[name], int(np.prod(shape)) * dtype.itemsize)
        if found is None:
            raise MisuseError(f"{name} lies in no memory of the device, or in too little")
        return np.frombuffer(found, dtype).reshape(shape)


class Refitter:
    def __init__(self, engine: Engine, logger: ILogger) -> None:
        self.engine, self.logger, self.parsed = engine, logger, False

    def refit_cuda_engine(self) -> bool:
        self.engine.weights = self.parsed
        return self.parsed


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self.refitter, self.logger = refitter, logger

    def refit_from_file(self, model_file: str) -> bool:
        self.refitter.parsed = model_file == self.refitter.engine.fields["onnx"]
        if not self.refitter.parsed:
            self.logger.log(Severity.ERROR, "weights are missing")
        return self.refitter.parsed


def engine_library(*, rtx: bool = False, version: str = "11.4.0.106") -> ModuleType:
    """The double of the module ``tensorrt`` or ``tensorrt_rtx``."""
    shared = {
        "DataType": DataType,
        "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
        "ILogger": ILogger,
        "LayerInformationFormat": LayerInformationFormat,
        "OnnxParserRefitter": OnnxParserRefitter,
        "Refitter": Refitter,
        "Runtime": RtxRuntime if rtx else Runtime,
        "TensorIOMode": TensorIOMode,
        "__version__": version,
    }
    only_rtx = {
        "CudaGraphStrategy": CudaGraphStrategy,
        "DynamicShapesKernelSpecializationStrategy": DynamicShapesKernelSpecializationStrategy,
        "EngineInvalidityDiagnostics": EngineInvalidityDiagnostics,
        "EngineValidity": EngineValidity,
    }
    RtxRuntimeConfig.made = []
    module = ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    vars(module).update(shared | (only_rtx if rtx else {}))
    return module
