"""A TensorRT whose CUDA does not start is found out in another process, before it ends this one."""

from __future__ import annotations

import textwrap
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from admtrt.errors import EngineError
from admtrt.runtime.engines import startup
from admtrt.runtime.engines.device import query_driver
from admtrt.runtime.engines.library import Library
from admtrt.runtime.engines.startup import require_start

if TYPE_CHECKING:
    from pathlib import Path

LIBRARY = """
    import os, time
    class ILogger:
        ERROR, INFO = 1, 3
    class Runtime:
        def __init__(self, logger):
            self.logger = logger
            {made}
        def __setattr__(self, name, value):
            if name == "engine_host_code_allowed":
                {used}
"""


def library(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, made: str = "pass", used: str = "pass"
) -> Library:
    module = f"{folder.name}_trt"  # what was found of a module is kept
    (folder / f"{module}.py").write_text(textwrap.dedent(LIBRARY.format(made=made, used=used)))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return Library("tensorrt", ModuleType(module), "11.4")


def test_a_library_that_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_start(library(tmp_path, monkeypatch))


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"used": "os.abort()"}, "was ended by signal 6"),
        ({"used": "os._exit(3)"}, "ended with 3"),
        ({"made": "logger.log(1, 'no   driver')", "used": "os.abort()"}, "no driver\n"),
        ({"made": "raise RuntimeError('nothing here')"}, "RuntimeError: nothing here"),
        ({"made": "time.sleep(9)"}, "gave no answer for 2 seconds"),
    ],
    ids=str,
)
def test_one_that_does_not(
    behaviour: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "_SECONDS", 2.0)
    with pytest.raises(EngineError, match=rf"TensorRT 11\.4 cannot start CUDA: (.* )?{message}") as info:
        require_start(library(tmp_path, monkeypatch, **behaviour))
    assert "admtrt doctor" in info.value.hint


def test_the_real_lean_runtime_without_a_driver() -> None:
    module = pytest.importorskip("tensorrt_lean")
    if query_driver().gpu is not None:
        pytest.skip("CUDA starts here")
    with pytest.raises(EngineError, match=r"cannot start CUDA: .*CUDA initialization failure with error: 35"):
        require_start(Library("tensorrt", module, "11"))


def test_rtx_needs_no_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_fault", lambda _: "tried")
    require_start(Library("rtx", ModuleType("anything"), "1.7"))
