"""Plans on disk: ``KEY.plan`` and its record ``KEY.json``, where KEY hashes every field of the build.

A plan is machine code. It is not used before its size and SHA-256 match its record, and the record's fields
match its name. A bundle from elsewhere could bring all of these. Therefore a plan inside a bundle runs only
if this user built it on this machine. A folder that the user names is trusted.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from admtrt.bundle import FileEntry
from admtrt.config_base import Config
from admtrt.contract import GraphName, Precision
from admtrt.errors import ConfigError, OutputError, PlanError
from admtrt.files import atomic_file, check_place, locked, sha256_of
from admtrt.memo import Memo
from admtrt.reading import read_json, read_small
from admtrt.runtime.engines.library import Flavor
from admtrt.runtime.engines.options import PORTABLE, BuildOptions, targets_text
from admtrt.runtime.engines.report import FusionReport

if TYPE_CHECKING:
    from admtrt.bundle import Bundle
    from admtrt.runtime.engines.device import Gpu
    from admtrt.runtime.engines.library import Library
    from admtrt.runtime.engines.sources import GraphSource

PLANS = "plans"
"""Folder of the plans inside a bundle. They are not part of the manifest."""
RECIPE = 1
"""Version of the builder; increase it when the same options build something else."""
_MEMO = "built"
_AGAIN = "Build it again with: admtrt build BUNDLE"
_LARGEST_RECORD = 2**24  # bytes


class PlanKey(Config):
    """Everything that determines a plan.

    ``gpu`` is the hardware that a TensorRT plan is bound to, see :func:`bound_gpu`. It is None for
    TensorRT-RTX, whose plans depend on ``options.targets`` only.
    """

    graph: GraphName
    precision: Precision
    onnx: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    library: Flavor
    version: str
    gpu: str | None
    options: BuildOptions
    recipe: int = RECIPE

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the canonical JSON; the name of the plan's files."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


class PlanRecord(Config):
    """The record beside a plan.

    Attributes:
        key: all fields of the build.
        plan: size and SHA-256 of the plan.
        built: when, ISO 8601 in UTC.
        seconds: duration of the build.
        report: counts of the kernels that the builder chose.
    """

    schema_version: Literal[1] = 1
    key: PlanKey
    plan: FileEntry
    built: str
    seconds: Annotated[float, Field(ge=0)]
    report: FusionReport

    @property
    def runs_on(self) -> str:
        """Library and GPUs that the plan runs on, for people."""
        options, key = self.key.options, self.key
        version = f"{key.version} and later" if options.version_compatible else key.version
        if key.library == "tensorrt":
            return f"TensorRT {version} on {key.gpu}"
        return f"TensorRT-RTX {version} on {targets_text(options.targets)}"


def plan_key(source: GraphSource, options: BuildOptions, library: Library, gpu: Gpu | None) -> PlanKey:
    """The key of the plan that a library would build from a graph on this machine."""
    return PlanKey(
        graph=source.graph,
        precision=source.precision,
        onnx=source.digest,
        library=library.flavor,
        version=library.version,
        gpu=bound_gpu(options, library.flavor, gpu),
        options=options,
    )


def bound_gpu(options: BuildOptions, flavor: Flavor, gpu: Gpu | None) -> str | None:
    """Hardware that a plan built here is bound to: this GPU, its compute capability, or any from SM80 on."""
    if flavor == "rtx" or gpu is None:
        return None
    if options.hardware_compatible == "ampere_plus":
        return PORTABLE
    if options.hardware_compatible == "same_compute_capability":
        return f"SM{gpu.compute_capability}"
    return str(gpu)


class PlanStore:
    """A folder of plans.

    Args:
        root: the folder; it need not exist yet.
        bundle: directory of the bundle that the plans are for.
        own: whether the folder lies inside that bundle, and may have come with it.
    """

    def __init__(self, root: Path, bundle: Path | None = None, *, own: bool = False) -> None:
        self.root = root
        self.own = own
        self._bundle = bundle

    @classmethod
    def of(cls, bundle: Bundle, plans: Path | None = None) -> PlanStore:
        """The store inside a bundle, or a folder that serves several bundles."""
        if plans is None:
            return cls(bundle.path / PLANS, bundle.path, own=True)
        return cls(plans, bundle.path)

    def build_command(self, library: Flavor, precision: Precision) -> str:
        """The command line that fills the folder."""
        bundle = "BUNDLE" if self._bundle is None else shlex.quote(str(self._bundle))
        plans = "" if self.own else f" --plans {shlex.quote(str(self.root))}"
        return f"admtrt build {bundle} --library {library} --precision {precision}{plans}"

    def rebuild_command(self, key: PlanKey) -> str:
        """The command line that rebuilds one plan."""
        command = self.build_command(key.library, key.precision)
        return f"rm {shlex.quote(str(self.path(key)))} && {command}"

    @property
    def trusting(self) -> str:
        """The option that trusts everything in the folder."""
        return f"--plans {shlex.quote(str(self.root))}"

    @property
    def trust_hint(self) -> str:
        """The hint how to run a plan that somebody else built."""
        return f"Or, if you trust whoever built it as you trust a program, add: {self.trusting}"

    def trusts(self, sha256: str) -> bool:
        """True if machine code with this digest may be run from this folder."""
        return not self.own or Memo(_MEMO).get(sha256) is not None

    def remember(self, sha256: str, name: str) -> None:
        """Trust this digest from now on: it was built here, for the file ``name``."""
        Memo(_MEMO).update({sha256: name})

    def prepare(self) -> None:
        """Make the folder, so that an unwritable place fails before the work.

        Raises:
            OutputError: if it cannot be made or written.
        """
        try:
            check_place(self.root, folder=True)
        except OutputError as error:
            raise OutputError(error.message, hint="Name another folder with --plans.") from None

    def path(self, key: PlanKey) -> Path:
        """Path of a plan, whether it exists or not."""
        return self.root / f"{key.digest}.plan"

    def records(self) -> tuple[list[PlanRecord], list[str]]:
        """All usable records, newest first, and the faults of the others."""
        records, faults = [], []
        for path in sorted(self.root.glob("*.json")):
            if re.fullmatch(r"[0-9a-f]{64}", path.stem):
                try:
                    records.append(self._read(path))
                except PlanError as error:
                    faults.append(error.message)
        return sorted(records, key=lambda record: record.built, reverse=True), faults

    def fault(self, record: PlanRecord, *, whole: bool = False) -> str:
        """The reason to refuse a plan, judged by its size or its ``whole`` content; empty for none."""
        if not self.trusts(record.plan.sha256):
            return "was not built on this machine by this user"
        try:
            self._check_size(record)
            if whole:
                self._check_digest(sha256_of(self.path(record.key)), record)
        except PlanError as error:
            return error.message
        return ""

    def find(self, key: PlanKey) -> PlanRecord | None:
        """The record of exactly this plan, after verifying the plan; None if it was never built.

        Raises:
            PlanError: if the record or the plan is damaged, naming what differs.
        """
        path = self.path(key)
        if not path.with_suffix(".json").exists():
            return None
        record = self._read(path.with_suffix(".json"))
        self._check_size(record)
        self._check_digest(sha256_of(path), record)
        return record

    def load(self, record: PlanRecord) -> bytes:
        """The verified bytes of a plan.

        Raises:
            PlanError: if the plan is missing, truncated or altered.
        """
        self._check_size(record)
        path = self.path(record.key)
        try:
            plan = read_small(path, record.plan.size)
        except OSError as error:
            raise PlanError(f"cannot read {path}: {error.strerror}", hint=self._again(record)) from None
        self._check_digest(hashlib.sha256(plan).hexdigest(), record)
        return plan

    def put(
        self, key: PlanKey, plan: bytes | memoryview, *, seconds: float, report: FusionReport
    ) -> PlanRecord:
        """Store a plan, replacing an earlier one with the same key.

        Raises:
            OutputError: if the folder cannot be written.
        """
        data = memoryview(plan)
        record = PlanRecord(
            key=key,
            plan=FileEntry(size=data.nbytes, sha256=hashlib.sha256(data).hexdigest()),
            built=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            report=report,
        )
        path = self.path(key)
        with locked(self.root):  # else one process's record could end up beside another's plan
            # After a kill there is a plan without a record, which does not count.
            path.with_suffix(".json").unlink(missing_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_bytes(data)
            with atomic_file(path.with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps(record.to_dict(), indent=1) + "\n", encoding="utf-8")
        self.remember(record.plan.sha256, path.name)
        return record

    def _read(self, path: Path) -> PlanRecord:
        remove = f"Remove it with: rm {shlex.quote(str(path))}"
        try:
            data: Any = read_json(path, _LARGEST_RECORD)
            if not isinstance(data, dict):
                raise PlanError(f"{path} is no record of a plan", hint=remove)
            record = PlanRecord.from_dict(data, source=str(path))
        except OSError as error:
            raise PlanError(f"cannot read {path}: {error.strerror}", hint=remove) from None
        except ValueError as error:  # bad JSON, bad UTF-8
            raise PlanError(f"{path} is not valid JSON: {error}", hint=remove) from None
        except ConfigError as error:
            raise PlanError(error.message, hint=remove) from None
        if record.key.digest != path.stem:
            raise PlanError(
                f"{path} was altered: its fields belong to the name {record.key.digest[:12]}...",
                hint=remove,
            )
        return record

    def _check_size(self, record: PlanRecord) -> None:
        path = self.path(record.key)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise PlanError(
                f"cannot read the plan {path}: {error.strerror}", hint=self._again(record)
            ) from None
        if size != record.plan.size:
            raise PlanError(
                f"{path} has {size} bytes, its record says {record.plan.size}", hint=self._again(record)
            )

    def _check_digest(self, digest: str, record: PlanRecord) -> None:
        if digest != record.plan.sha256:
            raise PlanError(
                f"{self.path(record.key)} has SHA-256 {digest[:12]}..., its record says "
                f"{record.plan.sha256[:12]}...; it is not executed",
                hint=self._again(record),
            )

    def _again(self, record: PlanRecord) -> str:
        """The hint for a damaged plan, which the next build replaces."""
        return f"Build it again with: {self.build_command(record.key.library, record.key.precision)}"
