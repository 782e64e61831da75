"""A tiny bundle with its graphs in every engine form, made once per process."""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path

from bundles import CLASSIFIER, UNET, network

from admtrt.bundle import Bundle
from admtrt.contract import PRECISIONS
from admtrt.export.pack import bundle_from_checkpoints


@cache
def typed_bundle() -> Bundle:
    """Unconditional with a classifier of 3 classes, for CPUs and for engines in fp32, fp16 and bf16."""
    directory = tempfile.TemporaryDirectory(prefix="admtrt-tests-")
    atexit.register(directory.cleanup)
    path = Path(directory.name) / "typed"
    bundle_from_checkpoints(network(UNET), network(CLASSIFIER), path, engines=PRECISIONS)
    return Bundle.open(path)
