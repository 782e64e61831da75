"""``admtrt serve`` of a tiny bundle in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from bundles import exported_bundle


def start_server(*options: Any, **process: Any) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """Start a server on a free port; returns it and its JSON. ``process`` are keyword arguments of Popen."""
    command = [sys.executable, "-m", "admtrt", "serve", exported_bundle("guided"), "--port", 0, "--json"]
    started = subprocess.Popen(
        [*map(str, command), "--threads", "1", *map(str, options)],
        stdout=subprocess.PIPE,
        text=True,
        **process,
    )
    assert started.stdout is not None
    line = started.stdout.readline()
    assert line, started.communicate()[1]
    return started, json.loads(line)
