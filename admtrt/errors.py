"""The errors that reach users of admtrt, and the exit code that the command line gives each.

A few subclasses are defined next to the one place that raises and catches them.

::

    AdmtrtError                 1
    ├── UserError               2   a user error: what was given, what was expected, what to do next
    │   ├── ConfigError             a configuration key or value
    │   ├── DataError               training images
    │   ├── CheckpointError         a checkpoint file or its contents
    │   ├── BundleError             a bundle on disk
    │   ├── RequestError            a request to a command or a function
    │   ├── OutputError             a place that cannot be written
    │   ├── EngineError             an inference library, or what it cannot build or run
    │   │   └── PlanError               a built engine that is missing, altered or made for something else
    │   └── MissingDependencyError  an optional package
    ├── ExportError             1   a module that the exporter cannot turn into a graph
    └── TrainingDivergedError   1   repeated NaN; the last good state was kept
"""

from __future__ import annotations

import re

from admtrt.installing import install_extra

_LONGEST_WORD, _LONGEST_TEXT = 1000, 4000  # characters: paths end well below


class AdmtrtError(Exception):
    """Base of all errors of admtrt.

    Args:
        message: what was given and what was expected.
        hint: what to do next; a note of the exception, so that ``str`` is the message alone.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = shortened(message)
        self.hint = shortened(hint)
        super().__init__(self.message)
        if hint:
            self.add_note(self.hint)


def shortened(text: str) -> str:
    """Shorten a text for people by cutting out the middle, since it may contain long foreign data."""

    def cut(text: str, longest: int) -> str:
        if len(text) <= longest:
            return text
        return f"{text[: longest // 2]}...[{len(text)} characters]...{text[-longest // 4 :]}"

    return cut(re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: cut(word[0], 200), text), _LONGEST_TEXT)


class UserError(AdmtrtError):
    """An error that the user can fix."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class DataError(UserError):
    """Training data that is missing, empty or unreadable."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, unsafe or of another model."""


class BundleError(UserError):
    """A bundle that is missing, incomplete, altered or of an unknown version."""


class RequestError(UserError):
    """An impossible request: an invalid option, or something that the bundle does not support."""


class OutputError(UserError):
    """A destination that exists, is read-only or is full."""


class EngineError(UserError):
    """An inference library that is too old or refuses something, or a device that it cannot use."""


class PlanError(EngineError):
    """A plan (a built engine) that is missing, damaged, altered or made for something else."""


class MissingDependencyError(UserError):
    """An optional package that this action needs.

    Args:
        package: the missing module.
        extra: the extra of admtrt that installs it; alternatives are joined by "or".
        purpose: what needs the package.
    """

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed",
            hint="Install it with: " + " or ".join(map(install_extra, extra.split(" or "))),
        )


class ExportError(AdmtrtError):
    """A module or graph that cannot be exported or differentiated."""


class LossError(UserError, ExportError):
    """A guide's loss, or an ONNX file in it, that cannot be exported."""


class TrainingDivergedError(AdmtrtError):
    """Training produced NaN too often in a row."""
