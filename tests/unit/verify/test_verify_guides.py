"""The guides of a bundle in PyTorch: built if they take no file, otherwise required as an option."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundles import UNET, network, sham_bundle

from admtrt.contract import event_shape
from admtrt.errors import CheckpointError
from admtrt.export.guides.guide import AnyGuide
from admtrt.export.guides.losses import convolution, fourier, linear, total_variation, value_range
from admtrt.export.guides.named import BUILT_INS, BuiltIn
from admtrt.verify.guides import guides_of

EVENT = event_shape(UNET)
MADE = (linear(EVENT), fourier(EVENT), total_variation(EVENT), value_range(EVENT))


def found(folder: Path, guide: AnyGuide, *given: AnyGuide) -> AnyGuide:
    """The guide of a bundle that has it by the name ``one``."""
    bundle = sham_bundle(
        folder / "bundle", overwrite=True, guides={"one": guide.config}, classifier=None, class_names=()
    )
    return guides_of(bundle.manifest, given, network(UNET))["one"]


@pytest.mark.parametrize("guide", MADE, ids=lambda guide: guide.name)
def test_one_without_a_file_is_made(tmp_path: Path, guide: AnyGuide) -> None:
    made = found(tmp_path, guide)
    assert (made.name, made.config) == ("one", guide.config)


def test_a_new_one_without_a_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is enough to declare it."""
    guide = convolution(EVENT, torch.ones(3, 3))
    monkeypatch.setitem(BUILT_INS, guide.config.loss, BuiltIn(lambda unet, _: guide))
    assert found(tmp_path, guide).config == guide.config


def test_one_with_a_file_is_asked_for(tmp_path: Path) -> None:
    guide = convolution(EVENT, torch.ones(3, 3))
    with pytest.raises(CheckpointError, match="the bundle has the guide 'one'") as info:
        found(tmp_path, guide)
    assert "with --guide as at its export" in info.value.hint
    assert found(tmp_path, guide, guide.named("one")).config == guide.config
