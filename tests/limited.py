"""The command line in a separate process, with limits of time and memory for each command.

A worker runs one command after another, because loading PyTorch takes longer than most commands. If a command
hangs or crashes, the worker is ended and the next command gets a new one.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import resource
import selectors
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import typer.main

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """How one command ended.

    Attributes:
        code: the exit code; "hang", "crash" or "traceback" if there is none.
        out, err: its output; for a worker that ended, the end of its stderr.
        seconds: its duration.
        grown: growth of the worker's resident memory at its peak, in bytes.
    """

    code: int | str
    out: str
    err: str
    seconds: float
    grown: int

    @property
    def sound(self) -> bool:
        """True if a bad input was refused, or a good one accepted, in the way that users should see."""
        refused = isinstance(self.code, int) and self.code in (0, 1, 2)
        return refused and "Traceback" not in self.err and "not enough memory" not in self.err


class Worker:
    """Runs commands of admtrt.

    Args:
        preload: modules loaded before the first command, so that no command pays for them.
        memory: bytes that a command may add to the address space of the process.
    """

    def __init__(self, *preload: str, memory: int = 2 << 30) -> None:
        self._preload = preload
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, arguments: Sequence[str | os.PathLike[str]], *, seconds: float = 20) -> Outcome:
        """Run one command line."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        began = time.monotonic()
        process.stdin.write(json.dumps([os.fspath(argument) for argument in arguments]).encode() + b"\n")
        process.stdin.flush()
        line = self._line(seconds)
        taken = time.monotonic() - began
        if line:
            return Outcome(**json.loads(line), seconds=taken)
        hangs = line is None
        err = self._end()
        return Outcome("hang" if hangs else "crash", "", err, taken, 0)

    def _start(self) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "limited", str(self._memory), *self._preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )
        assert self._line(120), f"no worker: {self._end()}"
        return self._process

    def _line(self, seconds: float) -> bytes | None:
        """One line of the worker; empty if the worker ended, None after the time limit."""
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return self._process.stdout.readline() if selector.select(seconds) else None

    def _end(self) -> str:
        """End the worker and return its stderr."""
        process, self._process = self._process, None
        if process is None:
            return ""
        process.kill()
        _, err = process.communicate()
        return err.decode(errors="replace")[-2000:]


def _run(arguments: list[str]) -> dict[str, Any]:
    from admtrt.cli import run

    out, err = io.StringIO(), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc_pid_clear_refs(5))
    before = _memory("VmRSS")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: int | str = run(arguments)
        except BaseException:
            code = "traceback"
            traceback.print_exc()
    texts = {"out": out.getvalue()[:100_000], "err": err.getvalue()[:100_000]}
    return {"code": code, **texts, "grown": _memory("VmHWM") - before}


def _memory(kind: str) -> int:
    """Memory in bytes: VmRSS is the resident memory, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def _serve(memory: int, preload: Sequence[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not be taken for an answer
    for module in ("admtrt.cli", *preload):
        __import__(module)
    typer.main.get_command = functools.cache(typer.main.get_command)  # created anew for every command line
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2:])
