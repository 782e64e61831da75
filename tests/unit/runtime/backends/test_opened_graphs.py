"""Graphs that are replaced after they were verified, while a library opens them: it is always noticed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import exported_bundle
from graph_calls import unet_out

from admtrt.bundle import Bundle
from admtrt.errors import BundleError
from admtrt.runtime.backends.onnxruntime import OnnxRuntimeDenoiser
from admtrt.runtime.backends.openvino import OpenVinoDenoiser
from admtrt.runtime.engines.builder import build_plan
from admtrt.runtime.engines.library import find_library
from admtrt.runtime.engines.options import BuildOptions
from admtrt.runtime.engines.sources import graph_source

CHANGED = r"'unet.onnx' was replaced or changed while the bundle was being opened"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    shutil.copytree(exported_bundle("guided"), tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def replaces(bundle: Bundle, function: Any) -> Any:
    """The function, with the UNet's graph replaced by another one just before each call."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        other = bundle.path / ".other"
        shutil.copyfile(bundle.path / "unet.onnx", other)
        other.replace(bundle.path / "unet.onnx")
        return function(*arguments, **options)

    return wrapped


def test_onnxruntime(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", replaces(bundle, onnxruntime.InferenceSession))
    with pytest.raises(BundleError, match=CHANGED):
        OnnxRuntimeDenoiser(bundle, threads=1).open(["unet"])


def test_openvino_when_it_opens_and_when_it_compiles(bundle: Bundle) -> None:
    denoiser = OpenVinoDenoiser(bundle, threads=1, graphs=["unet"])
    x, t = np.zeros((1, 1, 8, 8), np.float32), np.zeros(1, np.float32)
    unet_out(denoiser, x, t)
    replaces(bundle, lambda: None)()
    unet_out(denoiser, x, t)  # compiled before that
    with pytest.raises(BundleError, match=CHANGED):
        unet_out(denoiser, np.repeat(x, 2, 0), np.repeat(t, 2))
    with pytest.raises(BundleError, match=CHANGED):
        OpenVinoDenoiser(bundle, threads=1, graphs=["unet"])


def test_a_builder(bundle: Bundle) -> None:
    library = find_library("rtx")
    source = graph_source(bundle, "unet", "fp32")
    replaces(bundle, lambda: None)()
    with pytest.raises(BundleError, match=CHANGED):
        build_plan(library, source, BuildOptions())
