"""``admtrt presets``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from admtrt.cli import run
from admtrt.presets import PRESETS


def test_it_fits_a_usual_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line a model, and no word is cut."""
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {"preset", "GFLOP", "ddim25"} <= {*lines[2].split()}
    starts = [line.split()[0] for line in lines[4:] if line.strip()]
    assert starts[: len(PRESETS)] == [*PRESETS]


def test_the_table_names_every_model_and_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["presets"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()[:1]}
    assert set(PRESETS) <= set(rows)
    assert rows["128x128_diffusion"] == ["128", "422", "M", "614", "250", "0.5", "1.25"]
    assert rows["64x64_classifier"] == ["64", "65", "M", "81", "250", "1", "-"]
    assert rows["lsun_cat"] == ["256", "553", "M", "2,240", "1000", "-", "-"]
    for name in PRESETS:
        assert " ".join(PRESETS[name].note.split()) in " ".join(out.split())


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["presets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["presets"]
    assert [entry["name"] for entry in listed] == list(PRESETS)
    entry = listed[0]
    assert entry["file"] == "64x64_diffusion.pt"
    assert entry["parameters"] * 4 == entry["weight_bytes"]
    assert entry["network"] == PRESETS["64x64_diffusion"].network.to_dict()
    assert entry["guided_by"] == "64x64_classifier"
    assert listed[2]["fast_sampler"] == {
        "method": "ddim",
        "steps": "ddim25",
        "scale": 1.25,
        "eta": 0.0,
        "guidance_interval": None,
        "clip": True,
    }


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['safetensors'] = None\n"
        "from admtrt.cli import run; sys.exit(run(['presets']))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
