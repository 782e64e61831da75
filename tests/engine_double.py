"""A strict double of the engine API of TensorRT and TensorRT-RTX, over the double of the GPU.

A plan of the double names an ONNX file, its profiles and the GPU; ONNX Runtime computes. What the real one
refuses (a shape outside the profile, an address that was never set) is refused in its way, by ``False`` or
``None`` and a line in the log; what it would run into (freed or too small memory, a graph of a context that
was changed after the capture) is a :class:`~cuda_double.MisuseError`.
"""

from __future__ import annotations

import json
from enum import IntEnum
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from cuda_double import Buffer, Machine, MisuseError, Resource, Stream

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_DTYPES = {"tensor(float)": np.dtype(np.float32), "tensor(int64)": np.dtype(np.int64)}


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


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


class ILogger:
    ERROR = Severity.ERROR

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
    """A plan of the double; ``renamed`` gives an output another name, ``scratch`` is for each sample."""
    fields = {"onnx": str(onnx), "profiles": list(profiles), "gpu": gpu, "scratch": scratch, "lean": lean}
    return json.dumps(fields | {"stripped": stripped, "renamed": renamed, "capturable": capturable}).encode()


@cache
def _session(path: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Runtime:
    machine: Machine
    rtx = False
    gpu = "SM89"

    def __init__(self, logger: ILogger) -> None:
        self.machine.touch()
        self.logger = logger
        self.engine_host_code_allowed: bool | None = None  # whoever leaves it open trusts the plan

    def load_runtime(self, path: str) -> Runtime | None:
        if not path.endswith("libnvinfer_lean.so"):
            self.logger.log(Severity.ERROR, f"Unable to load library: {path}")
            return None
        lean = type("Lean", (LeanRuntime,), {"machine": self.machine, "gpu": self.gpu})
        loaded: Runtime = lean(self.logger)
        return loaded

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
    """What ``load_runtime`` gives."""


class RtxRuntime(Runtime):
    rtx = True

    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, int]:
        valid = self.gpu.encode() in buffer
        return (EngineValidity.VALID, 0) if valid else (EngineValidity.INVALID, 4)


class Engine:
    def __init__(self, runtime: Runtime, fields: dict[str, Any]) -> None:
        self.runtime, self.machine, self.fields = runtime, runtime.machine, fields
        self.weights = not fields["stripped"]
        self.session = _session(fields["onnx"])
        self.tensors: dict[str, tuple[TensorIOMode, Any]] = {}
        for value in self.session.get_inputs():
            self.tensors[value.name] = (TensorIOMode.INPUT, value)
        for index, value in enumerate(self.session.get_outputs()):
            name = fields["renamed"] if fields["renamed"] and index == 0 else value.name
            self.tensors[name] = (TensorIOMode.OUTPUT, value)
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(fields["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.INT64 if "int64" in self.tensors[name][1].type else DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """A profile of one size alone makes that size fixed."""
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
        return Context(self) if self.has_room(0) else None

    def has_room(self, profile: int) -> bool:
        room = self.get_device_memory_size_for_profile_v2(profile) <= self.machine.free
        if not room:
            self.runtime.logger.log(Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was ...)")
        return room


class EngineInspector:
    """Writes outputs as TensorRT 10 does, or as 11 does."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:  # noqa: A002 - as the real one
        assert format is LayerInformationFormat.JSON
        outputs = [name for name, (mode, _) in self.engine.tensors.items() if mode is TensorIOMode.OUTPUT]
        typed = (
            {"Format": "Row major linear", "DataType": "Float"}
            if self.engine.runtime.rtx
            else {"Format/Datatype": "Row major linear FP32 format"}
        )
        layers = [
            {"Name": f"last of {name}", "LayerType": "kgen", "Outputs": [{"Name": name, **typed}]}
            for name in outputs
        ]
        return json.dumps({"Layers": layers, "I/O Tensors": []})


class RuntimeConfig:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy


class RuntimeCache:
    """Holds as many bytes as batch sizes were prepared."""

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
        self.engine, self.machine = engine, engine.machine
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.version = 0
        self.prepared = -1
        self.scratch = Resource("scratch memory of a context")

    def _refuse(self, message: str) -> bool:
        self.engine.runtime.logger.log(Severity.ERROR, f"API Usage Error ({message})")
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._stream(stream_handle).check()
        self.profile, self.shapes = profile_index, {}
        self.version += 1
        if profile_index >= self.engine.num_optimization_profiles or not self.engine.has_room(profile_index):
            raise RuntimeError("Error in set optimization profile async.")  # as the real binding does
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
        inputs = [name for name, (mode, _) in self.engine.tensors.items() if mode is TensorIOMode.INPUT]
        return [name for name in inputs if name not in self.shapes]

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
        stream = self._stream(stream_handle)
        if self.infer_shapes() or set(self.addresses) != set(self.engine.tensors):
            return self._refuse("a shape or an address was not set")
        if len({shape[0] for shape in self.shapes.values()}) != 1:
            return self._refuse("inputs of different batches")
        if stream.capture is not None:
            capturable = self.engine.fields["capturable"] and not self.engine.runtime.rtx
            if not capturable or self.prepared != self.version:
                stream.capture.fault = "operation not permitted when stream is capturing"
                return self._refuse(stream.capture.fault)
            version = self.version

            def check() -> None:
                if self.version != version:
                    raise MisuseError("a graph is launched whose context was changed after the capture")

            stream.capture.checks.append(check)
        self.prepared = self.version
        buffers = {name: self._buffer(name) for name in self.engine.tensors}
        inputs = {name for name, (mode, _) in self.engine.tensors.items() if mode is TensorIOMode.INPUT}
        shapes = {name: self.get_tensor_shape(name) for name in self.engine.tensors}

        def run() -> None:
            feeds = {name: self._view(buffers[name], name, shapes[name]).copy() for name in inputs}
            outputs = [name for name in self.engine.tensors if name not in inputs]
            for name, value in zip(outputs, self.engine.session.run(None, feeds), strict=True):
                self._view(buffers[name], name, shapes[name])[...] = value

        self.machine.submit(
            stream,
            f"run {self.engine.session.get_outputs()[0].name}",
            run,
            reads=[buffers[name] for name in buffers if name in inputs],
            writes=[self.scratch, *(buffers[name] for name in buffers if name not in inputs)],
        )
        return True

    def _stream(self, handle: int) -> Stream:
        if handle not in self.machine.streams:
            raise MisuseError("the default stream, or none, was given")
        return self.machine.streams[handle]

    def _buffer(self, name: str) -> Buffer:
        buffer = self.machine.buffers.get(self.addresses[name])
        if buffer is None or buffer.stream is None:
            raise MisuseError(f"{name} lies in no memory of the device")
        dtype = _DTYPES[self.engine.tensors[name][1].type]
        if buffer.size != int(np.prod(self.get_tensor_shape(name))) * dtype.itemsize:
            raise MisuseError(f"{name} lies in {buffer.size} bytes")
        return buffer

    def _view(self, buffer: Buffer, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return buffer.data.view(_DTYPES[self.engine.tensors[name][1].type]).reshape(shape)


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


def engine_library(machine: Machine, *, rtx: bool = False, version: str = "11.4.0.106") -> ModuleType:
    """The double of the module ``tensorrt`` or ``tensorrt_rtx``, whose GPU is ``machine``."""
    runtime = type("Runtime", (RtxRuntime if rtx else Runtime,), {"machine": machine})
    shared = {
        "DataType": DataType,
        "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
        "ILogger": ILogger,
        "LayerInformationFormat": LayerInformationFormat,
        "OnnxParserRefitter": OnnxParserRefitter,
        "Refitter": Refitter,
        "Runtime": runtime,
        "TensorIOMode": TensorIOMode,
        "__version__": version,
    }
    only_rtx = {
        "CudaGraphStrategy": CudaGraphStrategy,
        "DynamicShapesKernelSpecializationStrategy": DynamicShapesKernelSpecializationStrategy,
        "EngineValidity": EngineValidity,
    }
    RtxRuntimeConfig.made = []
    module = ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    vars(module).update(shared | (only_rtx if rtx else {}))
    return module
