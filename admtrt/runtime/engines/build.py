"""Build the plans of a bundle: each graph whose plan is not in the store yet, written atomically."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from admtrt.errors import EngineError, PlanError
from admtrt.files import atomic_file, check_place
from admtrt.reading import read_small
from admtrt.runtime.engines.builder import build_plan
from admtrt.runtime.engines.options import check_options
from admtrt.runtime.engines.plans import plan_key
from admtrt.runtime.engines.report import fusion_report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from admtrt.runtime.engines.device import Gpu
    from admtrt.runtime.engines.library import Library
    from admtrt.runtime.engines.options import BuildOptions
    from admtrt.runtime.engines.plans import PlanKey, PlanRecord, PlanStore
    from admtrt.runtime.engines.sources import GraphSource

_LARGEST_TIMING_CACHE = 2**30  # bytes


@dataclass(frozen=True, eq=False)
class BuildResult:
    """One plan.

    Attributes:
        record: the plan's record in the store.
        built: whether it was built now, or was there already.
    """

    record: PlanRecord
    built: bool


@dataclass(frozen=True, eq=False)
class PlanBuilder:
    """Builds plans with one library into one store.

    Attributes:
        library: the library that builds.
        gpu: this machine's GPU; TensorRT needs one.
        store: the store that keeps the plans.
        timing_cache: file of TensorRT's timing cache; read before a build and written after it.
        note: called with lines for people.
    """

    library: Library
    gpu: Gpu | None
    store: PlanStore
    timing_cache: Path | None = None
    note: Callable[[str], None] = print

    def check(self, sources: Sequence[GraphSource], options: BuildOptions) -> None:
        """Refuse builds that cannot work, before any work.

        Raises:
            EngineError: naming the option or what the machine lacks.
            OutputError: if the store or the timing cache cannot be written.
        """
        for precision in dict.fromkeys(source.precision for source in sources):
            check_options(options, self.library, precision)
        if self.library.flavor == "rtx" and self.timing_cache is not None:
            raise EngineError(
                f"{self.library} does not offer --timing-cache: it measures nothing when it builds",
                hint="Leave it out, or build with --library tensorrt.",
            )
        if self.library.flavor == "tensorrt" and self.gpu is None:
            raise EngineError(
                f"{self.library} builds on the GPU that runs the plan, and this machine has none",
                hint="Build with --library rtx, which needs no GPU; see: admtrt doctor",
            )
        keys = (plan_key(source, options, self.library, self.gpu) for source in sources)
        if not all(self.store.path(key).exists() for key in keys):
            self.store.prepare()
        if self.timing_cache is not None:
            check_place(self.timing_cache)

    def make(
        self, source: GraphSource, options: BuildOptions, progress: Callable[[float, str], None] | None = None
    ) -> BuildResult:
        """Return the plan of one graph, from the store or newly built.

        Raises:
            EngineError: as :func:`~admtrt.runtime.engines.builder.build_plan`.
            OutputError: if the store or the timing cache cannot be written.
        """
        key = plan_key(source, options, self.library, self.gpu)
        found = self._found(key)
        if found is not None:
            return BuildResult(found, built=False)
        built = build_plan(self.library, source, options, timing_cache=self._measured(), progress=progress)
        record = self.store.put(key, built.plan, seconds=built.seconds, report=fusion_report(built.layers))
        if not self.store.trusts(record.plan.sha256):
            self.note(
                "the user's cache folder cannot be written: nothing will know that this plan was built here; "
                f"run it with {self.store.trusting}"
            )
        if self.timing_cache is not None:
            with atomic_file(self.timing_cache) as temporary:
                temporary.write_bytes(built.timing_cache)
        return BuildResult(record, built=True)

    def _found(self, key: PlanKey) -> PlanRecord | None:
        try:
            found = self.store.find(key)
        except PlanError as error:
            self.note(f"{error.message}; building it again")
            return None
        if found is None or self.store.trusts(found.plan.sha256):
            return found
        self.note(f"{self.store.path(key)} was not built on this machine by this user; building it again")
        return None

    def _measured(self) -> bytes:
        if self.timing_cache is None or not self.timing_cache.exists():
            return b""
        try:
            return read_small(self.timing_cache, _LARGEST_TIMING_CACHE)
        except OSError as error:
            raise EngineError(f"cannot read {self.timing_cache}: {error.strerror}") from None
