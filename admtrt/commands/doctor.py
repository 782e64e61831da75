"""``admtrt doctor``: what this machine can build and run, and what is missing."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from admtrt.console import Output, table
from admtrt.installing import install_extra, pip_install, version_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admtrt.runtime.engines.device import Driver
    from admtrt.runtime.engines.library import Flavor


@dataclass(frozen=True)
class Finding:
    """The result of looking for one component.

    Attributes:
        name: name of the component.
        found: whether it is installed and can be loaded.
        version: its version; empty if it was not found.
        detail: its use on this machine, or the fault.
        hint: what to do if it is missing.
        builds: the library, if it can build plans here.
        runs_plans: whether it can run plans here.
    """

    name: str
    found: bool
    version: str = ""
    detail: str = ""
    hint: str = ""
    builds: str = ""
    runs_plans: bool = False


@dataclass(frozen=True)
class Ability:
    """Status of one backend of ``admtrt sample`` here; if it does not run, the reason and a remedy."""

    name: str
    runs: bool
    precisions: tuple[str, ...]
    detail: str
    hint: str = ""


def doctor(json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Show the GPU, the inference libraries and their versions, what they do here, and what is missing."""
    from admtrt.runtime.engines.device import query_driver

    findings = examine(query_driver())
    abilities = backends(findings)
    builds = [finding.builds for finding in findings if finding.builds]
    things = [
        [finding.name, finding.version or "-", _lines(finding.detail, finding.hint)] for finding in findings
    ]
    said = {finding.detail for finding in findings}
    runs = [
        [
            each.name,
            "yes" if each.runs else "no",
            ", ".join(each.precisions),
            each.detail if each.runs else _once(each, said),
        ]
        for each in abilities
    ]
    Output(json=json).result(
        {
            "findings": [asdict(finding) for finding in findings],
            "builds": builds,
            "backends": [asdict(ability) for ability in abilities],
        },
        table("this machine", ("", "version", "what it does here"), things),
        table("backends", ("", "runs", "precisions", "what it is, or lacks"), runs),
        _in_short(findings, abilities),
    )


def _lines(*texts: str) -> str:
    return "\n".join(filter(None, texts))


def _once(ability: Ability, said: set[str]) -> str:
    """The reason that a backend does not run here, unless the first table has said it."""
    if any(ability.detail.endswith(detail) for detail in said if detail):
        return "needs an NVIDIA GPU"
    return _lines(ability.detail, ability.hint)


def _in_short(findings: Sequence[Finding], abilities: Sequence[Ability]) -> str:
    """One sentence on what works here, and one on what to install for a GPU."""
    found = {finding.name for finding in findings if finding.found}
    can = [f"sample with {', '.join(each.name for each in abilities if each.runs) or 'nothing'}"]
    can += ["train, export and verify"] * ("PyTorch" in found)
    builds = [finding.builds for finding in findings if finding.builds]
    can += [f"build plans ({', '.join(builds)})"] * bool(builds)
    missing = [
        f"{gpus}: {install_extra(extra)}"
        for extra, gpus in (("rtx", "for an RTX card"), ("tensorrt", "for a data-centre GPU (H100, A100)"))
        if extra not in builds
    ]
    return f"Here you can {'; '.join(can)}." + "".join(f"\nInstall {one}" for one in missing)


def examine(driver: Driver) -> list[Finding]:
    """Look for every component. A missing one is no error."""
    return [
        *_hardware(driver),
        _engine("tensorrt", driver),
        _engine("rtx", driver),
        _package(
            "TensorRT lean",
            "tensorrt_lean",
            "its version's plans of build --version-compatible",
            _hint(pip_install("tensorrt-lean-cu13")),
        ),
        _package(
            "cuda-core",
            "cuda.core",
            "memory and streams of the GPU, for plans",
            _hint(pip_install("cuda-core", "cuda-bindings")),
        ),
        _package(
            "ONNX Runtime",
            "onnxruntime",
            "exact on CPUs; on GPUs by its providers",
            _hint(install_extra("cpu")),
        ),
        _package("OpenVINO", "openvino", "inference on CPUs", _hint(install_extra("openvino"))),
        _torch(),
    ]


def backends(findings: Sequence[Finding]) -> list[Ability]:
    """Check every backend. One that runs plans also needs a library that supports this GPU."""
    from admtrt.runtime.backends.registry import BACKENDS

    abilities = []
    for backend in BACKENDS.values():
        available = backend.available()
        reason, hint = available.reason, available.hint
        if available and backend.runs_plans and not any(each.runs_plans for each in findings):
            reason = "no library that is installed runs plans on this GPU"
            hint = _hint(install_extra("tensorrt"))
        precisions = backend.precisions
        if not reason:
            try:
                precisions = backend.precisions_here()
            except Exception as error:  # a missing or unfitting shared library shows as several types
                reason, hint = f"cannot be loaded: {error}", ""
        ability = Ability(
            backend.name,
            runs=not reason,
            precisions=precisions,
            detail=reason or backend.summary,
            hint=hint,
        )
        abilities.append(ability)
    return abilities


def _hint(command: str) -> str:
    return f"Install it with: {command}"


def _hardware(driver: Driver) -> list[Finding]:
    if driver.cuda is None:
        hint = "Plans can be built without it (rtx), and run only with it."
        return [Finding("NVIDIA driver", found=False, detail=driver.fault, hint=hint)]
    found = [Finding("NVIDIA driver", found=True, version=f"CUDA {driver.cuda}", detail=driver.fault)]
    for index, gpu in enumerate(driver.gpus):
        detail = f"{gpu.name}, {gpu.memory / 2**30:.0f} GiB"
        found.append(
            Finding(f"GPU {index}", found=True, version=f"SM{gpu.compute_capability}", detail=detail)
        )
    return found


def _engine(flavor: Flavor, driver: Driver) -> Finding:
    from admtrt.errors import UserError
    from admtrt.runtime.engines.library import LIBRARY_NAMES, find_library

    try:
        library = find_library(flavor)
    except UserError as error:
        return Finding(LIBRARY_NAMES[flavor], found=False, detail=error.message, hint=error.hint)
    runs = driver.gpu is not None and library.runs_on(driver.gpu.compute_capability)
    here = "runs plans" if runs else f"runs none on {driver.gpu}" if driver.gpu else "runs none without a GPU"
    targets = ", ".join(f"SM{target}" for target in library.targets)
    builds = bool(targets) or driver.gpu is not None  # TensorRT builds on the GPU that runs the plan
    what = f"builds plans for {targets}" if targets else "builds plans" if builds else "builds none"
    return Finding(
        library.name,
        found=True,
        version=library.version,
        detail=f"{what}; {here}",
        builds=flavor if builds else "",
        runs_plans=runs,
    )


def _package(name: str, module: str, purpose: str, hint: str) -> Finding:
    """Look for a package by importing it."""
    from admtrt.runtime.backends.quiet import silence

    silence()
    try:
        version = str(importlib.import_module(module).__version__).partition("-")[0]  # without the commit
    except ModuleNotFoundError:
        return Finding(name, found=False, detail=f"not installed: {purpose}", hint=hint)
    except Exception as error:  # a missing or unfitting shared library shows as several types
        return Finding(name, found=False, detail=f"cannot be loaded: {error}", hint=hint)
    return Finding(name, found=True, version=version, detail=purpose)


def _torch() -> Finding:
    """Look for PyTorch by its metadata, since importing it takes seconds."""
    purpose, version = "training, export and verification", version_of("torch")
    if version is not None:
        return Finding("PyTorch", found=True, version=version, detail=purpose)
    return Finding(
        "PyTorch", found=False, detail=f"not installed: {purpose}", hint=_hint(install_extra("export"))
    )
