"""Imports: `import admtrt` is light, and sampling needs neither PyTorch nor ONNX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import exported_bundle

import admtrt

ROOT = Path(admtrt.__file__).parents[1]
HEAVY = (
    "torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "tensorrt", "tensorrt_rtx", "matplotlib",
    "sklearn", "scipy", "accelerate", "safetensors", "PIL", "tensorboard", "starlette", "uvicorn",
    "prometheus_client",
)  # fmt: skip
EXPORT_STACK = (
    "torch",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "safetensors",
    "accelerate",
    "sklearn",
    "matplotlib",
)


def python(code: str, *arguments: Any) -> str:
    """Run code in a new interpreter; returns its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code: str) -> set[str]:
    return set(
        python(f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})").split()
    )


def test_importing_the_package_loads_nothing_but_itself() -> None:
    loaded = loaded_after("import admtrt\nassert admtrt.__version__")
    assert not loaded & {*HEAVY, "numpy", "pydantic", "rich", "typer"}


@pytest.mark.parametrize(
    "command",
    [
        "",
        "train unet",
        "export",
        "verify",
        "sample",
        "serve",
        "inspect",
        "demo",
        "build",
        "doctor",
        "drift",
        "bench",
        "evaluate samples",
        "evaluate sweep",
        "evaluate features inception",
    ],
)
def test_help_is_light(command: str) -> None:
    """The command line loads no libraries before it parses a command."""
    arguments = [*command.split(), "--help"]
    loaded = loaded_after(
        "import io, contextlib\nfrom admtrt.cli import run\n"
        f"with contextlib.redirect_stdout(io.StringIO()):\n    assert run({arguments!r}) == 0"
    )
    assert not loaded & set(HEAVY)


def test_the_command_line_is_there_at_once() -> None:
    """Only the given command loads what it needs."""
    assert not loaded_after("import admtrt.cli") & {"numpy", "pydantic", "PIL"}


def test_the_sampler_itself_needs_no_engine() -> None:
    """A pipeline takes any denoiser; only ONNX Runtime's own backend loads it."""
    assert not loaded_after("import admtrt.runtime.pipeline, admtrt.runtime.bulk") & set(HEAVY)


def test_public_names() -> None:
    shown = python(
        "import admtrt, json\nfrom admtrt.errors import UserError\n"
        "print(json.dumps([sorted(admtrt.__all__), admtrt.Pipeline.__module__, admtrt.Bundle.__module__]))"
    )
    names = [
        "AdmtrtError", "Bundle", "Frames", "Guide", "Known", "Latents", "Pipeline", "Reference", "Samples",
        "Step", "TwoStage", "__version__",
        "export_hessian_vector", "export_input_gradient", "export_vector_jacobian",
    ]  # fmt: skip
    assert json.loads(shown) == [names, "admtrt.runtime.pipeline", "admtrt.bundle"]
    assert callable(admtrt.export_input_gradient)
    with pytest.raises(AttributeError, match="module 'admtrt' has no attribute 'Sampler'"):
        _ = admtrt.Sampler


WITHOUT = "import sys\nfor name in {names}:\n    sys.modules[name] = None\n"


def test_sampling_without_pytorch_and_onnx(tmp_path: Path) -> None:
    """As on a machine where only the runtime's packages are installed."""
    shown = python(
        WITHOUT.format(names=EXPORT_STACK) + "from admtrt.cli import run\n"
        "bundle, out = sys.argv[1:]\n"
        "assert run(['inspect', bundle, '--json']) == 0\n"
        "options = ['--num', '3', '--threads', '1', '--format', 'png', '--format', 'grid']\n"
        "sys.exit(run(['sample', bundle, '--out', out, *options, '--json']))",
        exported_bundle("guided"),
        tmp_path / "run",
    )
    assert json.loads(shown.splitlines()[-1])["samples"] == 3
    assert (tmp_path / "run" / "grid.png").exists()


NO_EVALUATION_STACK = (*EXPORT_STACK, "scipy", "tensorflow", "torchvision")


def test_evaluating_without_pytorch_scipy_and_onnx(tmp_path: Path) -> None:
    """Images, a reference, every metric and nearest images with their picture work without them."""
    from feature_networks import features_folder, pictures

    features = features_folder(tmp_path / "features")
    for name, seed in (("s", 1), ("r", 2), ("f", 3)):
        np.savez(tmp_path / f"{name}.npz", arr_0=pictures(60, seed))
    shown = python(
        WITHOUT.format(names=NO_EVALUATION_STACK) + "from admtrt.cli import run\n"
        "folder, features = sys.argv[1:]\n"
        "given = ['--features', features, '--threads', '1']\n"
        "place = {name: f'{folder}/{name}.npz' for name in ('s', 'r', 'f', 'ref')}\n"
        "assert run(['evaluate', 'reference', place['r'], '--out', place['ref'], *given]) == 0\n"
        "given += ['--floor', place['f'], '--nearest', place['r'], '--plot', folder, '--json']\n"
        "sys.exit(run(['evaluate', 'samples', place['s'], '--reference', place['ref'], *given]))",
        tmp_path,
        features,
    )
    assert json.loads(shown.splitlines()[-1])["features"][0]["metrics"]["fid"]["value"] > 0


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        (["onnxruntime"], ["sample", "BUNDLE", "--out", "run"], "cpu"),
        (["uvicorn"], ["serve", "BUNDLE"], "serve"),
        (["torch"], ["export", "BUNDLE/unet.onnx", "--out", "x"], "export"),
        (["torch"], ["verify", "BUNDLE", "--unet", "x"], "export"),
        (["torch"], ["train", "unet", "CONFIG", "--out", "x"], "train"),
        (["accelerate"], ["train", "unet", "CONFIG", "--out", "x"], "train"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, missing: list[str], arguments: list[str], extra: str
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[data]\nsource = "digits"\nimage_size = 8\nchannels = 1\n')
    places = {"BUNDLE": str(exported_bundle("guided")), "CONFIG": str(config)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT.format(names=missing) + "from admtrt.cli import run\nsys.exit(run(sys.argv[1:]))",
            *arguments,
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert f"needs the package '{missing[0]}', which is not installed" in done.stderr
    assert f"pip install -e '{ROOT}[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["torch", "onnx_ir"])
def test_a_public_name_without_its_extra(missing: str) -> None:
    shown = python(
        WITHOUT.format(names=[missing]) + "from admtrt.errors import MissingDependencyError\n"
        "try:\n    from admtrt import export_input_gradient\n"
        "except MissingDependencyError as error:\n    print(error, error.hint)"
    )
    assert f"export_input_gradient needs the package '{missing}', which is not installed" in shown
    assert f"pip install -e '{ROOT}[export]'" in shown


def test_the_bench_measures_what_is_there(tmp_path: Path) -> None:
    """Without PyTorch and ONNX in any of its processes."""
    names = [*EXPORT_STACK, "openvino", "tensorrt", "tensorrt_rtx"]
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(names=names))
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    rows = ("plain-onnx", "torch", "onnxruntime")
    options = ["--repeat", "1", "--threads", "1", "--json", *(f"--backend={row}" for row in rows)]
    done = subprocess.run(
        [sys.executable, "-m", "admtrt", "bench", exported_bundle("guided"), *options],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    plain, eager, measured = json.loads(done.stdout)["rows"]
    for row, name in ((plain, "plain-onnx"), (eager, "torch")):
        assert f"The row '{name}' needs the package 'torch', which is not installed. Install" in row["reason"]
    assert measured["reason"] == ""
    assert measured["step"]["count"] == 1


def test_the_layers_are_kept() -> None:
    """The contracts of import-linter in pyproject.toml."""
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the package under test is installed without its sources")
    done = subprocess.run(
        [linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
