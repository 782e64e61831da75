"""The process around the command line: signals in any number, and streams that cannot show every name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import admtrt

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(admtrt.__file__).parents[1])}

# The command waits in a clean-up that is itself interrupted, as a slow one is.
WAITING = """
import signal, sys, time
import admtrt.cli
from admtrt.__main__ import main

def run():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        try:
            print("cleaning", flush=True)
            time.sleep(60)
        finally:
            print("again", flush=True)
            time.sleep(60)

admtrt.cli.run = run
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job's shell would ignore
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_further_signal_is_heard_and_none_gives_a_traceback(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for expected in ("ready", "cleaning", "again"):
            assert process.stdout.readline().strip() == expected
            process.send_signal(number)
        complaint = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in complaint
    assert "Exception" not in complaint


MANY = """
import os, signal, sys, threading, time
import admtrt.cli
from admtrt.__main__ import main

def send():
    for _ in range(20):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(0.0002)

def run():
    threading.Thread(target=send, daemon=True).start()
    time.sleep(60)

admtrt.cli.run = run
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_in_quick_succession(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(int(number))],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 128 + number
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


UNPRINTABLE = """
import os
import admtrt.cli
from admtrt.__main__ import main
from admtrt.console import Output

def run():
    Output().result({}, os.fsdecode(b"run-\\xff"), "–")
    return 0

admtrt.cli.run = run
main()
"""


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict", "latin-1:strict"])
def test_a_name_that_stdout_cannot_show_is_written_out(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNPRINTABLE],
        env=ENVIRONMENT | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert rb"run-\udcff" in done.stdout
