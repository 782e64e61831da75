"""Find the inference library at run time: TensorRT or TensorRT-RTX, behind one code path.

Both libraries have the same Python interface except for a few members, which the modules that build and run
engines look up by name. ``USED_TO_BUILD`` lists what the builder uses; a test checks it.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections import deque
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from admtrt.errors import EngineError, MissingDependencyError, UserError
from admtrt.installing import pip_install

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Flavor = Literal["tensorrt", "rtx"]

_MODULES: Mapping[Flavor, tuple[str, ...]] = MappingProxyType(
    {"tensorrt": ("tensorrt", "tensorrt_bindings"), "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
)
LIBRARY_NAMES: Mapping[Flavor, str] = MappingProxyType({"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"})
"""Display names."""
_WHEELS: Mapping[Flavor, str] = MappingProxyType({"tensorrt": "tensorrt", "rtx": "tensorrt-rtx-cu13"})
_LATEST = 8  # messages of the library that an error quotes
_FLOORS: Mapping[Flavor, tuple[int, int]] = MappingProxyType({"tensorrt": (10, 13), "rtx": (1, 7)})

USED_TO_BUILD = (
    "Builder.build_serialized_network",
    "Builder.create_builder_config",
    "Builder.create_network",
    "Builder.create_optimization_profile",
    "BuilderFlag.REFIT",
    "BuilderFlag.REFIT_IDENTICAL",
    "BuilderFlag.STRIP_PLAN",
    "BuilderFlag.TF32",
    "BuilderFlag.VERSION_COMPATIBLE",
    "BuilderFlag.EXCLUDE_LEAN_RUNTIME",
    "HardwareCompatibilityLevel.AMPERE_PLUS",
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
    "IBuilderConfig.add_optimization_profile",
    "IBuilderConfig.builder_optimization_level",
    "IBuilderConfig.clear_flag",
    "IBuilderConfig.create_timing_cache",
    "IBuilderConfig.get_timing_cache",
    "IBuilderConfig.hardware_compatibility_level",
    "IBuilderConfig.profiling_verbosity",
    "IBuilderConfig.progress_monitor",
    "IBuilderConfig.set_flag",
    "IBuilderConfig.set_memory_pool_limit",
    "IBuilderConfig.set_timing_cache",
    "ILogger.ERROR",
    "ILogger.log",
    "INetworkDefinition.get_input",
    "INetworkDefinition.get_output",
    "INetworkDefinition.num_inputs",
    "INetworkDefinition.num_outputs",
    "IOptimizationProfile.set_shape",
    "IProgressMonitor.phase_finish",
    "IProgressMonitor.phase_start",
    "IProgressMonitor.step_complete",
    "ITensor.name",
    "ITensor.shape",
    "ITimingCache.serialize",
    "MemoryPoolType.WORKSPACE",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "OnnxParser.get_error",
    "OnnxParser.num_errors",
    "OnnxParser.parse_from_file",
    "ParserError.desc",
    "ParserError.node_name",
    "ParserError.node_operator",
    "ProfilingVerbosity.DETAILED",
)
"""Every member of both libraries that building uses."""

USED_TO_BUILD_RTX = (
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
)
"""Members used that only TensorRT-RTX has."""


@dataclass(frozen=True, eq=False)
class Library:
    """One inference library.

    Attributes:
        flavor: which of the two libraries.
        module: its Python module.
        version: its version, for instance "11.4.0.106".
    """

    flavor: Flavor
    module: Any
    version: str

    @property
    def name(self) -> str:
        """Display name."""
        return LIBRARY_NAMES[self.flavor]

    @property
    def targets(self) -> tuple[int, ...]:
        """Compute capabilities that can be build targets (75 for 7.5); none in TensorRT."""
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        return tuple(sorted(int(name[2:]) for name in members if re.fullmatch(r"SM\d+", name)))

    def runs_on(self, compute_capability: int) -> bool:
        """True if the library supports such a GPU. TensorRT decides only when it opens a plan: True."""
        return not self.targets or compute_capability in self.targets

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@functools.cache
def logger_of(trt: Any) -> Any:
    """The only logger of a library: the library keeps the first that it is given in a process.

    ``errors`` collects error messages, ``latest`` the last messages of importance, and ``layers`` the lines
    in which a build describes the engine. Clear a list before the call whose messages you want to read.
    """

    class Log(trt.ILogger):  # type: ignore[misc]  # a base class known only at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.latest: deque[str] = deque(maxlen=_LATEST)
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(message)
            elif "LayerType:" in message:
                self.layers.extend(line for line in message.splitlines() if "LayerType:" in line)
            if int(severity) <= int(trt.ILogger.INFO):
                self.latest.append(message)

        def clear(self) -> None:
            self.errors.clear()
            self.latest.clear()

        def said(self, *, everything: bool = False) -> str:
            """The errors on one line, or else the latest messages; each message once."""
            told = self.latest if everything else self.errors
            return "; ".join(dict.fromkeys(" ".join(message.split()) for message in told))

    return Log()


def find_library(flavor: Flavor) -> Library:
    """Import one library.

    Raises:
        MissingDependencyError: if it is not installed.
        EngineError: if it is too old, or is installed and cannot be loaded.
    """
    for module in _MODULES[flavor]:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name == module:
                continue
            raise _unloadable(flavor, error) from None
        except Exception as error:  # a missing or incompatible shared library raises various types
            raise _unloadable(flavor, error) from None
        library = Library(flavor=flavor, module=found, version=str(found.__version__))
        _check_floor(library)
        return library
    raise MissingDependencyError(
        _MODULES[flavor][0], extra=flavor, purpose=f"Building or running {LIBRARY_NAMES[flavor]} engines"
    )


def lean_runtime(version: str) -> Path | None:
    """Path of TensorRT's lean runtime of exactly this version, as its wheel installs it; None if missing."""
    for distribution in distributions():
        name = str(distribution.metadata["Name"]).replace("-", "_")
        if re.fullmatch(r"tensorrt_lean_\w*libs", name) and distribution.version == version:
            for file in distribution.files or ():
                if file.name.startswith("libnvinfer_lean.so"):
                    return Path(str(file.locate()))
    return None


def sizes_of(dims: Any) -> tuple[int, ...]:
    """Convert the library's sequence of sizes (-1 for a dynamic one) to a tuple."""
    return tuple(dims)


def choose_library(*, gpu: bool) -> Library:
    """Choose the library to build with if none was requested.

    TensorRT if there is a GPU, which it needs to build; otherwise TensorRT-RTX, which needs none.

    Raises:
        MissingDependencyError: if neither is installed, or only TensorRT without a GPU.
        EngineError: as :func:`find_library`.
    """
    found = find_libraries(("tensorrt", "rtx") if gpu else ("rtx",))
    return found[0]


def find_libraries(flavors: Sequence[Flavor] = ("tensorrt", "rtx")) -> list[Library]:
    """The libraries that are installed and can be loaded, in the given order.

    Raises:
        EngineError: if none can be loaded, saying why the first installed one cannot.
        MissingDependencyError: if none is installed.
    """
    found: list[Library] = []
    faults: list[UserError] = []
    for flavor in flavors:
        try:
            found.append(find_library(flavor))
        except (EngineError, MissingDependencyError) as error:
            faults.append(error)
    if not found:
        raise next((fault for fault in faults if isinstance(fault, EngineError)), faults[0])
    return found


def _unloadable(flavor: Flavor, error: Exception) -> EngineError:
    return EngineError(
        f"{LIBRARY_NAMES[flavor]} is installed but cannot be loaded: {error}",
        hint=f"Install it again with: {pip_install('--force-reinstall', _WHEELS[flavor])}",
    )


def _check_floor(library: Library) -> None:
    floor = _FLOORS[library.flavor]
    numbers = re.match(r"(\d+)\.(\d+)", library.version)
    if numbers is None or tuple(map(int, numbers.groups())) < floor:
        raise EngineError(
            f"{library} is too old; admtrt needs {'.'.join(map(str, floor))} or later",
            hint=f"Upgrade it with: {pip_install('--upgrade', _WHEELS[library.flavor])}",
        )
