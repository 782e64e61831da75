"""The fixture of plans that the tests of TensorRT share."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_rig import Rig


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    """Plans of every graph, built."""
    made = Rig(monkeypatch, tmp_path)
    made.build()
    return made
