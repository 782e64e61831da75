"""`admtrt sample --guide`: what is refused before any graph is opened, with exit code 2 and a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import sham_bundle

from admtrt.cli import run
from admtrt.export.guides import losses

EVENT = (1, 8, 8)
IMAGE = np.zeros((1, *EVENT), np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    guides = {"linear": losses.linear(EVENT).config, "fourier": losses.fourier(EVENT).config}
    path = tmp_path_factory.mktemp("commands") / "bundle"
    return sham_bundle(path, guides=guides, classifier=None, class_names=()).path


def refused(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, *options: Any) -> str:
    out = tmp_path / "run"
    assert run([str(one) for one in ("sample", bundle, "--out", out, *options)]) == 2
    assert not out.exists()
    complaint = capsys.readouterr().err
    assert "Traceback" not in complaint
    return " ".join(complaint.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--guide", "nothing"], "has no guide 'nothing'; it has linear, fourier"),
        (["--target", "measurement=a.npz"], "--target is of a guide, and none guides"),
        (["--no-guide-clip"], "--guide-clip is of a guide, and none guides"),
        (["--guide", "linear", "--target", "measurement"], "is not of the form [GUIDE.]NAME=FILE"),
        (["--guide", "linear", "--target", "measurement="], "is not of the form [GUIDE.]NAME=FILE"),
        (["--guide", "linear", "--guide", "linear", "--operator", "sr:2"], "--guide linear was given twice"),
        (["--guide", "linear", *2 * ["--target", "measurement={image}"]], "'linear' was given twice"),
        (["--guide", "linear", "--target", "mask={mask}", "--mask", "{mask}"], "both give the mask"),
        (["--guide", "linear"], "Give it by --target NAME=FILE"),
        (["--guide", "linear", "--target", "level={image}"], "has no target 'level'; it has measurement"),
        (["--guide", "linear", "--target", "fourier.mask={image}"], "'fourier', which does not guide"),
        (["--guide", "linear", "--target", "measurement=none.npz"], "No such file"),
        (["--guide", "linear", "--target", "measurement={small}"], "expected float32 [N, 1, 8, 8]"),
        (["--guide", "linear", "--operator", "zoom:2", "--target", "measurement={image}"], "is unknown"),
        (["--guide", "linear", "--operator", "sr:2", "--target", "measurement={image}"], "[N, 1, 4, 4]"),
        (["--guide", "linear", "--guide-scale", "much", "--target", "measurement={image}"], "is no number"),
        (["--guide", "linear", "--guide-scale", "nan", "--target", "measurement={image}"], "scale"),
        (["--guide", "linear", "--guide-scale", "1", "--guide-scale", "2"], "given twice"),
        (["--guide", "linear", "--guide-interval", "3", "--target", "measurement={image}"], "LOW:HIGH"),
        (["--guide", "linear", "--guide-place", "nowhere"], "'place' is 'nowhere'"),
        (["--guide", "linear", "--guide", "fourier", "--guide-scale", "1"], "does not say of which guide"),
        (["--guide", "linear", "--guide", "fourier", "--target", "mask={mask}"], "--target linear.NAME=FILE"),
        (["--guide", "linear", "--guide", "fourier", "--mask", "{mask}"], "the one guide that takes a mask"),
        (["--guide", "linear", "--target", "measurement={three}", "--num", "2"], "3 images"),
    ],
)  # fmt: skip
def test_bad_input(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    arrays = {"image": IMAGE, "three": IMAGE.repeat(3, axis=0), "small": IMAGE[:, :, :4]}
    arrays["mask"] = np.eye(8, dtype=bool)
    files = {name: tmp_path / f"{name}.npz" for name in arrays}
    for name, path in files.items():
        np.savez(path, arrays[name])
    assert said in refused(capsys, bundle, tmp_path, *(one.format(**files) for one in options))
