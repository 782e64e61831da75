"""Turn a library's refusal of a graph into an error that names the ONNX node and its PyTorch module."""

from __future__ import annotations

import ast
import contextlib
import re
from typing import TYPE_CHECKING, Any

from admtrt.brief import beginning
from admtrt.contract import NODE_SCOPES
from admtrt.errors import BundleError, EngineError
from admtrt.onnx_wire import node_metadata

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from admtrt.runtime.engines.library import Library
    from admtrt.runtime.engines.sources import GraphSource

_LONGEST = 600
# On a machine without a driver, every log contains this message, whatever went wrong.
_NOISE = re.compile(r"^.*\bcatchCudaError\b.*cudaError 35.*$\n?", re.MULTILINE)
_HINTS = {
    "check_turing_op": "SM75 takes plans in which every matrix product is fp16: leave --target 75 out.",
    "OutOfMemory": "Build with a smaller --batch, or allow more or less scratch memory with --workspace.",
    "out of memory": "Build with a smaller --batch, or allow more or less scratch memory with --workspace.",
}
_GENERAL = "Build with another --precision or --library, or report it with this message and the graph."


def refused_graph(library: Library, source: GraphSource, errors: Sequence[Any]) -> EngineError:
    """The error of a graph that the parser refused; ``errors`` are the parser's."""
    modules, reasons = modules_of(source.path), []
    for error in errors:
        node, operator = error.node_name(), error.node_operator()
        place = f" (module {modules[node]})" if node in modules else ""
        where = f"{operator} '{node}'{place}: " if operator else ""
        reasons.append(where + _told(error.desc()))
    return EngineError(
        f"the parser of {library} refuses graph '{source.graph}' ({source.path}): {'; '.join(reasons)}",
        hint=_hint(" ".join(reasons)),
    )


def failed_build(library: Library, source: GraphSource, errors: Sequence[str]) -> EngineError:
    """The error of a failed build; ``errors`` are the lines of the builder's log."""
    reasons = [told for told in map(_told, errors) if told]
    text = "; ".join(dict.fromkeys(reasons)) or "it gives no reason"
    modules = modules_of(source.path)
    nodes = dict.fromkeys(word for word in re.findall(r"[\w./]+", text) if word in modules)
    where = " at " + ", ".join(f"'{node}' (module {modules[node]})" for node in nodes) if nodes else ""
    return EngineError(
        f"{library} cannot build graph '{source.graph}' in {source.precision}{where}: {text}",
        hint=_hint(text),
    )


def _told(message: str) -> str:
    """Clean up and shorten a message to one line."""
    return beginning(" ".join(_NOISE.sub("", message).split()), _LONGEST)


def modules_of(path: Path) -> dict[str, str]:
    """The PyTorch module of each node, as far as the graph records it."""
    modules = {}
    with contextlib.suppress(BundleError):  # the library's message says what is wrong with the file
        for node, scopes in node_metadata(path, NODE_SCOPES).items():
            with contextlib.suppress(IndexError, TypeError, ValueError, SyntaxError):
                modules[node] = str(ast.literal_eval(scopes)[-2])
    return modules


def _hint(text: str) -> str:
    return next((hint for sign, hint in _HINTS.items() if sign in text), _GENERAL)
