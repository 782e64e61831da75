"""The section "Follow one sample" of docs/architecture.md: the calls of a sample, in their order."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from bundles import exported_bundle

from admtrt.cli import run
from admtrt.schedule.table import sampling_schedule

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
SECTION = PAGE.split("## Follow one sample\n")[1].split("\n## ")[0]
CALLS = re.findall(r"`([\w.]+)`\s+in\s+`(admtrt/[\w/]+\.py)`", SECTION)


def test_the_calls_are_those_of_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(ROOT / "admtrt")):
            call = (frame.f_code.co_qualname, Path(file).relative_to(ROOT).as_posix())
            if call in CALLS:
                seen.append(call)

    bundle = exported_bundle("guided")
    sampling_schedule.cache_clear()  # another test may have drawn with this sampler
    given = ("--classes", "1", "--steps", "ddim3", "--scale", "2", "--format", "grid", "--threads", "1")
    sys.setprofile(note)
    try:
        assert run(["sample", str(bundle), "--out", str(tmp_path / "run"), *given]) == 0
    finally:
        sys.setprofile(None)
    capsys.readouterr()
    assert len(CALLS) > 15
    assert [call for call in CALLS if call not in seen] == []
    left = iter(seen)  # opening a bundle calls some of them, too, for its recommended sampler
    assert [call for call in CALLS if call not in left] == [], "not in this order"
