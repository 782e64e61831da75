"""Build one ONNX file into one plan, in memory: parse, profiles, flags, build; interruptible, with progress.

The library works in a thread of its own. Otherwise a KeyboardInterrupt would be raised in one of its
callbacks into Python (log, progress), in the middle of C++. Here the main thread receives it, and the monitor
tells the library to stop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from admtrt.errors import EngineError
from admtrt.runtime.engines.faults import failed_build, refused_graph
from admtrt.runtime.engines.library import logger_of, sizes_of
from admtrt.runtime.engines.options import check_options
from admtrt.runtime.engines.startup import require_start

if TYPE_CHECKING:
    import tensorrt as typed  # public stubs of 10.13: what both libraries share is checked against them

    from admtrt.runtime.engines.library import Library
    from admtrt.runtime.engines.options import BuildOptions
    from admtrt.runtime.engines.sources import GraphSource

Progress = Callable[[float, str], None]
"""Called with the fraction done, 0 to 1, and the current phase."""
_MIB = 2**20
_STOPPING = "stopping after this step; interrupt again to leave at once"


@dataclass(frozen=True, eq=False)
class BuiltPlan:
    """Result of a build.

    Attributes:
        plan: a view of the library's own memory.
        seconds: duration of the build.
        layers: the lines of the builder's log that describe the engine, for :mod:`report`.
        timing_cache: TensorRT's timing cache; empty in TensorRT-RTX, which measures nothing.
    """

    plan: memoryview
    seconds: float
    layers: tuple[str, ...]
    timing_cache: bytes


@dataclass(eq=False)
class _BuildSession:
    """Messages between the library's thread and the caller's."""

    progress: Progress | None
    stopped: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    result: BuiltPlan | None = None
    fault: BaseException | None = None

    done: float = 0.0

    def tell(self, done: float, phase: str) -> None:
        """Pass progress on. An exception of the listener stops the build; it cannot pass through C++."""
        self.done = done
        try:
            if self.progress is not None:
                self.progress(done, _STOPPING if self.stopped.is_set() else phase)
        except BaseException as error:
            self.progress, self.fault = None, error
            self.stopped.set()


def build_plan(
    library: Library,
    source: GraphSource,
    options: BuildOptions,
    *,
    timing_cache: bytes = b"",
    progress: Progress | None = None,
) -> BuiltPlan:
    """Build one graph.

    Args:
        library: the library that builds.
        source: the graph.
        options: checked against the library first.
        timing_cache: timing cache of an earlier build with TensorRT; empty for none.
        progress: called from the library's thread as the build goes on.

    Raises:
        EngineError: naming the option, the node or the library's reason.
        KeyboardInterrupt: after the library has stopped.
    """
    check_options(options, library, source.precision)
    session = _BuildSession(progress=progress)

    def work() -> None:
        try:
            session.result = _build(library, source, options, timing_cache, session)
        except BaseException as error:  # handed to the caller's thread
            session.fault = session.fault or error
        finally:
            session.ended.set()

    threading.Thread(target=work, name=f"build {source.graph}", daemon=True).start()
    try:
        session.ended.wait()  # not Thread.join(): it treats an interrupted wait as the thread's end
    except BaseException:
        session.stopped.set()
        session.tell(session.done, _STOPPING)
        session.ended.wait()  # a second interrupt leaves at once: nothing has been written yet
        raise
    if session.fault is not None:
        raise session.fault
    assert session.result is not None
    return session.result


def _build(
    library: Library, source: GraphSource, options: BuildOptions, timing_cache: bytes, session: _BuildSession
) -> BuiltPlan:
    trt, started = library.module, time.monotonic()
    logger, monitor = logger_of(trt), _monitor(trt, session)
    logger.clear()
    logger.layers.clear()
    require_start(library)
    builder: typed.Builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser: typed.OnnxParser = trt.OnnxParser(network, logger)  # owns the weights until the build ends
    with source.reading():
        parsed = parser.parse_from_file(str(source.path))
    if not parsed:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise refused_graph(library, source, errors)
    _check_contract(network, library, source)
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    configure(config, library, options)
    for profile in options.profiles:
        shapes: Any = builder.create_optimization_profile()  # takes tuples, but the stubs say Dims
        for tensor in source.spec.inputs:
            sizes = (profile.smallest, profile.best, profile.largest)
            shapes.set_shape(tensor.name, *(tensor.sized(size) for size in sizes))
        if config.add_optimization_profile(shapes) < 0:
            raise failed_build(library, source, logger.errors)
    if library.flavor == "tensorrt":
        use_timing_cache(config, library, timing_cache)
    plan = cast("typed.IHostMemory | None", builder.build_serialized_network(network, config))
    if plan is None:
        raise failed_build(library, source, logger.errors)
    measured = bytes(config.get_timing_cache().serialize()) if library.flavor == "tensorrt" else b""
    return BuiltPlan(
        plan=memoryview(plan),
        seconds=time.monotonic() - started,
        layers=tuple(logger.layers),
        timing_cache=measured,
    )


def configure(config: typed.IBuilderConfig, library: Library, options: BuildOptions) -> None:
    """Set every option of a build except its profiles on the library's configuration."""
    trt = library.module
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace * _MIB)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # set by default
    chosen = {
        "REFIT": options.refit,
        "REFIT_IDENTICAL": options.strip,
        "STRIP_PLAN": options.strip,
        "VERSION_COMPATIBLE": options.version_compatible,
        # a lean runtime inside the plan would be host code, which the runtime does not execute
        "EXCLUDE_LEAN_RUNTIME": options.version_compatible,
    }
    for flag, wanted in chosen.items():
        if wanted:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if options.hardware_compatible is not None:
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatible.upper())
        config.hardware_compatibility_level = level
    if library.flavor == "rtx":
        rtx: Any = config
        rtx.num_compute_capabilities = len(options.targets)
        for index, target in enumerate(options.targets):
            rtx.set_compute_capability(getattr(trt.ComputeCapability, f"SM{target}"), index)


def use_timing_cache(config: typed.IBuilderConfig, library: Library, content: bytes) -> None:
    """Start a build from the timing cache of another.

    Raises:
        EngineError: if the library refuses it.
    """
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        raise EngineError(
            f"{library} refuses the timing cache: it is damaged, or of another version or GPU",
            hint="Delete the file, or name another with --timing-cache.",
        )


def _monitor(trt: Any, session: _BuildSession) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = Phases()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            session.tell(self.phases.start(phase_name, parent_phase, num_steps), phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            session.tell(self.phases.step(phase_name, step), phase_name)
            return not session.stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            session.tell(self.phases.finish(phase_name), phase_name)

    return Monitor()


class Phases:
    """Turn the builder's nested phases into one fraction done, 0 to 1, which never falls."""

    def __init__(self) -> None:
        self._running: dict[str, _Phase] = {}
        self._lock = threading.Lock()  # phases may run in threads of the library
        self._done = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> float:
        """A phase begins as the current step of its parent."""
        with self._lock:
            self._running[name] = _Phase(parent, max(steps, 1))
            return self._done

    def step(self, name: str, step: int) -> float:
        """Step ``step`` (from 0) of a phase has ended."""
        with self._lock:
            phase = self._running.get(name)
            if phase is None:  # an exception here would cancel the build without a message
                return self._done
            phase.done = min(step + 1, phase.steps)
            roots = [name for name, phase in self._running.items() if phase.parent not in self._running]
            self._done = max(self._done, *(self._part(root) for root in roots))
            return self._done

    def finish(self, name: str) -> float:
        """A phase has ended, complete or cancelled."""
        with self._lock:
            self._running.pop(name, None)
            return self._done

    def _part(self, name: str) -> float:
        phase = self._running[name]
        inner = sum(self._part(child) for child, other in self._running.items() if other.parent == name)
        return min(1.0, (phase.done + min(inner, 1.0)) / phase.steps)


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


def _check_contract(network: typed.INetworkDefinition, library: Library, source: GraphSource) -> None:
    """The parsed inputs and outputs must be those of the manifest; an unknown size (-1) is the batch."""
    spec = source.spec
    for what, count, get, tensors in (
        ("inputs", network.num_inputs, network.get_input, spec.inputs),
        ("outputs", network.num_outputs, network.get_output, spec.outputs),
    ):
        found = sorted((get(index).name, sizes_of(get(index).shape)) for index in range(count))
        declared = sorted((tensor.name, tensor.sized(-1)) for tensor in tensors)
        if found != declared:
            raise EngineError(
                f"{library} finds {what} {found} in {source.path}; the manifest declares {declared}",
                hint="Export the checkpoint again.",
            )
