"""Every published model at its real size, with generated weights: export, memory, and an engine built.

Parity is tested at small sizes (test_preset_exports); at real size it is for `admtrt verify`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from admtrt.presets import PRESETS

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "preset_table.py"
EXPORT_LIMIT = 24e9  # bytes of memory
ENGINE_LIMIT = 1.15  # of the weights: nothing is stored twice


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preset_table", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _tool()
DISTINCT = list(dict.fromkeys(tool.of_same_graphs(name)[0] for name in PRESETS))


@pytest.fixture(autouse=True)
def _package_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool starts its own processes, from its own folder."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_presets_of_the_same_graphs() -> None:
    shared = [names for names in map(tool.of_same_graphs, DISTINCT) if len(names) > 1]
    lsun = ["lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"]
    imagenet, bedrooms, cats = (
        [f"edm_{data}_ema", f"cd_{data}_l2", f"cd_{data}_lpips", f"ct_{data}"]
        for data in ("imagenet64", "bedroom256", "cat256")
    )
    assert shared == [["256x256_diffusion_uncond", *lsun], imagenet, bedrooms + cats]
    assert len(DISTINCT) == 11 + 2


def test_what_was_measured_is_kept_and_shown(tmp_path: Path) -> None:
    """A second run reads its rows and measures nothing."""
    measured = {
        "weight_bytes": 4 * 2**20, "nodes": 1234, "export_s": 5.4, "export_peak": 2**30, "engine_nodes": 99,
        "build_s": 7.6, "build_peak": 3 * 2**29, "plan_bytes": 5 * 2**20,
    }  # fmt: skip
    tool.write_rows({"lsun_cat": measured, "256x256_diffusion_uncond": measured}, tmp_path / "rows.jsonl")
    command = [sys.executable, str(TOOL), str(tmp_path / "rows.jsonl"), "lsun_horse"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row = done.stdout.splitlines()[-1]
    assert row.startswith("| 256x256_diffusion_uncond, lsun_bedroom, lsun_cat,")
    assert row.endswith("| 1 M | 4 | 1,234 | 5 | 1.0 | 256.0 | 99 | 8 | 1.5 | 5 |")
    assert len(tool.read_rows(tmp_path / "rows.jsonl")) == 2


def test_an_unknown_preset_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), str(tmp_path / "rows.jsonl"), "65x65"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no preset '65x65'; the presets are 64x64_diffusion" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed (pip install '.[rtx]')"
)
@pytest.mark.parametrize("name", DISTINCT)
def test_export_and_engine(name: str) -> None:
    found = tool.measure(name)
    assert found["weight_bytes"] == PRESETS[name].weight_bytes
    for peak in ("export_peak", "engine_export_peak"):
        assert found[peak] <= min(3 * found["weight_bytes"] + 1.5e9, EXPORT_LIMIT), peak
    assert found["weight_bytes"] < found["plan_bytes"] <= ENGINE_LIMIT * found["weight_bytes"]
