"""``admtrt bench --training``: rows, numbers and refusals; a stub replaces the original's checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from training_runs import tiny_config

from admtrt.bench.report import Spread
from admtrt.bench.throughput import ThroughputMeasurement, ThroughputReport
from admtrt.bench.training import (
    TrainingRow,
    default_training_rows,
    fixed,
    parse_training_rows,
)
from admtrt.bench.yardstick import count_training
from admtrt.cli import run
from admtrt.config import ClassifierConfig, UNetConfig
from admtrt.config_files import save_config
from admtrt.errors import RequestError
from admtrt.models.classifier import Classifier
from admtrt.models.unet import UNet

CHECKOUT = {
    "unet": """
        import torch
        class UNetModel(torch.nn.Module):
            def __init__(self, *, in_channels, out_channels, num_classes, **_):
                super().__init__()
                assert num_classes == 10
                self.conv = torch.nn.Conv2d(in_channels, out_channels, 1)
        """,
    "script_util": """
        from types import SimpleNamespace
        def create_gaussian_diffusion(*, steps, learn_sigma, noise_schedule, **_):
            assert (steps, learn_sigma, noise_schedule) == (8, True, "cosine")
            return SimpleNamespace(num_timesteps=steps)
        """,
    "train_util": """
        import blobfile, torch
        from mpi4py import MPI
        import torch.distributed as dist
        class TrainLoop:
            def __init__(self, *, model, batch_size, schedule_sampler, **_):
                assert dist.get_world_size() == MPI.COMM_WORLD.Get_size() == 1
                self.model, self.step, self.batch_size = model, 0, batch_size
            def run_step(self, batch, cond):
                assert batch.shape == (self.batch_size, 1, 8, 8) and batch.abs().max() <= 1
                assert cond["y"].shape == (self.batch_size,)
                self.model.conv(batch).mean().backward()
        """,
    "resample": """
        class UniformSampler:
            def __init__(self, diffusion):
                assert diffusion.num_timesteps == 8
        """,
    "logger": """
        import os
        def configure(dir, format_strs):
            os.makedirs(dir)
        def dumpkvs(): ...
        """,
    "fp16_util": "",
    "dist_util": "",
    "__init__": "",
}


def test_rows_by_name() -> None:
    rows = parse_training_rows(["original", "eager", "admtrt", "admtrt:bf16+compile+channels-last"])
    assert rows[2] == TrainingRow("admtrt")
    assert rows[3] == TrainingRow("admtrt", True, "bf16", ("channels-last", "compile"))
    assert [str(row) for row in rows][2:] == ["admtrt", "admtrt:bf16+channels-last+compile"]
    assert [row.name for row in default_training_rows(original=True, bf16=False)][:3] == [
        "original",
        "eager",
        "admtrt",
    ]
    assert any(row.precision == "bf16" for row in default_training_rows(original=False, bf16=True))


def test_a_row_trains_as_it_says_and_a_bare_one_as_the_file_does() -> None:
    config = tiny_config(precision="bf16", channels_last=True)
    bare, given = (
        fixed(config, "unet", row).train_unet
        for row in parse_training_rows(["admtrt", "admtrt:fp32+compile"])
    )
    assert (bare.precision, bare.channels_last, bare.compile) == ("bf16", True, False)
    assert (given.precision, given.channels_last, given.compile) == ("fp32", False, True)


@pytest.mark.parametrize(
    ("items", "complaint"),
    [
        (["ours"], "no way to train called 'ours'"),
        (["admtrt:fp64"], "cannot be read"),
        (["admtrt:fp32+fast"], "cannot be read"),
        (["eager:fp32+compile"], "eager trains as it does"),
        (["original:bf16"], "original trains as it does"),
        (["eager", "eager"], "comes twice"),
    ],
)
def test_rows_that_there_are_not(items: list[str], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        parse_training_rows(items)


def test_operations_of_a_step_are_those_of_the_forward_and_twice_backwards() -> None:
    """A convolution's backward is two more of its size; the first layer's has no input gradient."""
    config = tiny_config()
    for shape, network in ((config.unet, UNet), (config.classifier, Classifier)):
        assert isinstance(shape, UNetConfig | ClassifierConfig)
        built: nn.Module = network(shape)  # type: ignore[arg-type]
        macs = 0

        def add(module: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            nonlocal macs
            macs += module.weight[0].numel() * out.numel()

        for module in built.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(add)
        extra = {"y": torch.zeros(1, dtype=torch.int64)} if shape is config.unet else {}
        built(x=torch.zeros(1, 1, 8, 8), t=torch.zeros(1), **extra)
        # Attention and its 1x1 convolutions, which have no module of their own here, are the rest.
        assert 0.9 * 6 * macs < count_training(shape) < 1.3 * 6 * macs


def test_shares_and_ratios() -> None:
    rows = parse_training_rows(["eager", "admtrt:bf16"])
    steps = [Spread(1.0, 1.0, 2.0, 3.0, 5), Spread(0.5, 0.5, 0.5, 0.5, 5)]
    measured = [
        ThroughputMeasurement(str(row), row.precision, 8, step=step, memory=2**30, ready=1.0)
        for row, step in zip(rows, steps, strict=True)
    ]
    failed = ThroughputMeasurement("original", "fp32", 8, reason="no checkout")
    machine = {"threads": 1, "processors": 1, "gpu": None, "processor": "p", "memory": 1, "system": "s"}
    report = ThroughputReport(
        "unet", machine | {"versions": {}}, (failed, *measured), 10**9, {"fp32": 1e10, "bf16": 1e11}
    )
    assert [report.ratio(one) for one in report.measurements] == [None, 1.0, 4.0]
    assert [report.of_peak(one) for one in report.measurements] == [None, 0.4, 0.16]
    assert report.cells()[1] == ["eager", "4", "100%", "1.00x", "40%", "1.00", "1.0"]
    assert "original: no checkout" in report.footnotes()
    assert "| admtrt:bf16 | 16 |" in report.markdown()


@pytest.mark.slow
def test_every_row_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One step each, in real processes."""
    save_config(tiny_config().model_copy(update={"classifier": None}), tmp_path / "run.toml")
    package = tmp_path / "checkout" / "guided_diffusion"
    package.mkdir(parents=True)
    for name, text in CHECKOUT.items():
        lines = [line[8:] for line in text.strip("\n").splitlines()]
        (package / f"{name}.py").write_text("\n".join(lines) + "\n")
    options = [
        "--original",
        tmp_path / "checkout",
        "--repeat",
        "1",
        "--batch",
        "4",
        "--threads",
        "1",
        "--json",
    ]
    rows = ["--backend", "original", "--backend", "eager", "--backend", "admtrt:fp32+channels-last"]
    arguments = ["bench", "--training", tmp_path / "run.toml", "--out", tmp_path / "out", *options, *rows]
    assert run([str(argument) for argument in arguments]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    (report,) = data["reports"]
    assert report["subject"] == "unet of 8x8, batch 4"
    assert [row["row"] for row in report["rows"]] == ["original", "eager", "admtrt:fp32+channels-last"]
    for row in report["rows"]:
        assert row["reason"] == ""
        assert row["images_per_second"] > 0
        assert row["of_peak"] > 0
        assert row["memory"] > 2**20
    assert report["rows"][0]["ratio"] == 1
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == data
    assert "| eager |" in (tmp_path / "out" / "bench.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--unet", "x"], "--unet is nothing of --training"),
        (["--sampling", "3"], "--sampling is nothing of --training"),
        (["--backend", "original"], "belong together"),
        (["--original", "FOLDER"], "no checkout of the original"),
        (["--backend", "openvino"], "no way to train called 'openvino'"),
        (["--batch", "0"], "--batch is 0"),
        (["BUNDLE"], "one of them only"),
    ],
)
def test_requests_that_make_no_sense(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(tiny_config(), tmp_path / "run.toml")
    given = [str(tmp_path) if one == "FOLDER" else one for one in arguments]
    assert run(["bench", "--training", str(tmp_path / "run.toml"), *given]) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
