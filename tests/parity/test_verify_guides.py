"""`admtrt verify` of a bundle with guides: rows of their graphs, steps and whole samples; planted defects."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from bundles import CLASSIFIER, UNET, exported_bundle, guides, network
from verified import append_ops

from admtrt.bundle import Bundle
from admtrt.verify.report import VerificationReport
from admtrt.verify.stages import verify_bundle

NAMES = ("linear", "tv", "noisy", "weak")
ROWS = {
    "step": ["guide {}: x_prev"],
    "trajectory": ["guide {}: x_t of every step", "guide {}: final x_0"],
    "image": ["guide {}: uint8 levels"],
}


def verified(path: Path, *, seed: int = 0) -> VerificationReport:
    given = network(UNET), network(CLASSIFIER)
    return verify_bundle(Bundle.open(path), *given, guides=guides(), steps=6, seed=seed)


def named(report: VerificationReport, stage: str, guide: str) -> list[str]:
    """Rows of one guide without what judged them."""
    rows = (row.what.removesuffix(", against float64") for row in report.rows if row.stage == stage)
    return [what for what in rows if what.startswith(f"guide {guide}:")]


@pytest.mark.parametrize("seed", [0, 1000])
def test_every_guide_has_its_rows(seed: int) -> None:
    report = verified(exported_bundle("steered"), seed=seed)
    assert report.passed, report.failures
    for name in NAMES:
        for stage, rows in ROWS.items():
            assert named(report, stage, name) == [row.format(name) for row in rows]
        assert len(report.drift[f"guide {name}"]) == 6
        assert np.isfinite(report.drift[f"guide {name}"]).all()


@pytest.mark.parametrize("name", ["linear", "noisy"])
def test_a_gradient_of_the_wrong_sign_shows_at_every_stage(name: str, tmp_path: Path) -> None:
    altered = Path(shutil.copytree(exported_bundle("steered"), tmp_path / "altered"))
    append_ops(altered, f"guide.{name}", "grad", "Neg")
    report = verified(altered)
    assert report.exit_code == 1
    assert {row.what.partition(", ")[0] for row in report.failures} == {
        f"guide.{name}: grad",
        *(row.format(name) for rows in ROWS.values() for row in rows),
    }
