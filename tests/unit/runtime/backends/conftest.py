"""Fixtures of the tests of backends: a cache folder of their own, and a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import pipeline

from admtrt.bundle import Bundle


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "admtrt"


@pytest.fixture
def bundle() -> Bundle:
    return pipeline("guided").bundle
