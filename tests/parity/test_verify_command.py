"""`admtrt verify` as a command: its table, its document, its plot and its exit codes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles import edit_manifest, replace_graph
from typer import Typer
from typer.testing import CliRunner
from verified import CLASSIFIER, TINY, append_ops, network

from admtrt.commands.verify import verify
from admtrt.errors import MissingDependencyError, UserError
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import save_checkpoint


class Cli:
    """Only the command, with checkpoints on disk."""

    def __init__(self, bundle: Path, unet: Path, classifier: Path) -> None:
        self.bundle = bundle
        self.app = Typer()
        self.app.command()(verify)
        self.networks = ["--unet", str(unet), "--classifier", str(classifier)]

    def __call__(self, bundle: Path, *options: str) -> Any:
        return CliRunner().invoke(self.app, [str(bundle), *self.networks, "--steps", "2", *options])


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    folder = tmp_path_factory.mktemp("checkpoints")
    unet, classifier = network("unet", TINY), network("classifier", CLASSIFIER)
    bundle = bundle_from_checkpoints(unet, classifier, folder / "bundle")
    for name, loaded in (("unet", unet), ("classifier", classifier)):
        save_checkpoint(folder / f"{name}.safetensors", loaded.module.state_dict(), loaded.config)
    return Cli(bundle.path, folder / "unet.safetensors", folder / "classifier.safetensors")


@pytest.fixture
def altered(cli: Cli, tmp_path: Path) -> Path:
    """A copy of the bundle to be spoilt."""
    return Path(shutil.copytree(cli.bundle, tmp_path / "altered"))


def test_command_passes_and_plots(cli: Cli, tmp_path: Path) -> None:
    plot = tmp_path / "drift.png"
    result = cli(cli.bundle, "--json", "--plot", str(plot))
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["passed"] is True
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(document["drift"]["ddpm"]) == 2


def test_command_shows_a_table(cli: Cli) -> None:
    result = cli(cli.bundle)
    assert result.exit_code == 0, result.output
    assert "classifier_gradient: grad" in result.stdout
    assert result.stdout.rstrip().endswith("passed")


def test_command_exit_codes(altered: Path, cli: Cli, tmp_path: Path) -> None:
    edit_manifest(altered, lambda data: data["diffusion"].update({"schedule": "cosine"}))
    result = cli(altered)
    assert result.exit_code == 1
    assert "FAILED (compare)" in result.stdout
    append_ops(altered, "update", "x_prev", "Exp", "Neg", "Log")
    result = cli(altered, "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["outcome"] == "run"
    replace_graph(altered, "update", b"\x0a\x07garbage")
    plot = tmp_path / "none.png"
    result = cli(altered, "--json", "--plot", str(plot))
    assert result.exit_code == 3
    assert json.loads(result.stdout)["outcome"] == "build"
    assert not plot.exists()


@pytest.mark.parametrize("options", [["--unet", "nowhere.safetensors"], ["--unet-preset", "no-such-model"]])
def test_command_leaves_user_faults_to_the_command_line(cli: Cli, options: list[str]) -> None:
    result = cli(cli.bundle, *options)
    assert isinstance(result.exception, UserError)
    assert result.exception.exit_code == 2


def test_command_without_torch(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = cli(cli.bundle)
    assert isinstance(result.exception, MissingDependencyError)


def test_command_refuses_a_missing_or_altered_bundle(altered: Path, cli: Cli, tmp_path: Path) -> None:
    (altered / "unet.onnx").write_bytes(b"other bytes")
    for bundle in (altered, tmp_path / "nowhere"):
        result = cli(bundle)
        assert isinstance(result.exception, UserError)
