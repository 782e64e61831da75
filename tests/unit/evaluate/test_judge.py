"""`admtrt evaluate features judge`: the network, its training, its graph, and judges that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from admtrt.cli import run
from admtrt.data.image_set import load_data
from admtrt.evaluate.extract import Extractor
from admtrt.evaluate.network import FeatureNetwork
from admtrt.features.judge import (
    check_judge,
    judge_accuracy,
    judge_graph,
    judge_images,
    seen_hashes,
    shifted,
    train_judge,
)
from admtrt.features.judge_network import FEATURES, Judge, judge_widths
from admtrt.files import sha256_of
from admtrt.run_config import DataConfig

DIGITS = DataConfig(source="digits", image_size=8, channels=1, hold_out=0.5)


def trained(config: DataConfig, steps: int, seed: int = 1) -> Judge:
    images, _ = judge_images(config, "judge")
    return train_judge(
        images, config, steps=steps, batch_size=32, lr=5e-3, seed=seed, progress=lambda *_: None
    )


def test_levels_halve_the_size_to_eight() -> None:
    assert [judge_widths(size) for size in (3, 8, 28, 32)] == [[64, 128]] * 4
    assert judge_widths(64) == [32, 64, 128]
    assert judge_widths(256) == [32, 32, 32, 64, 128]


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (65, 3)])
def test_the_graph_gives_what_the_network_gives(size: int, channels: int, tmp_path: Path) -> None:
    """Features have the size of the coarsest level, whatever the image's."""
    torch.manual_seed(0)
    judge = Judge(size, channels, 5)
    for module in judge.modules():  # as after training: no statistic is 0 or 1
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    judge.eval().requires_grad_(False)
    graph = tmp_path / "features.onnx"
    judge_graph(judge, graph)
    extractor = Extractor(FeatureNetwork("judge", "onnx", graph, sha256_of(graph)))
    pixels = np.random.default_rng(0).integers(0, 256, (7, size, size, channels), dtype=np.uint8)
    found, expected = extractor(pixels), judge(torch.from_numpy(pixels))
    assert found["pool"].shape == (7, FEATURES)
    assert found["logits"].shape == (7, 5)
    for name, wanted in zip(("pool", "logits"), expected, strict=True):  # float32 sums in another order
        np.testing.assert_allclose(found[name], wanted.numpy(), rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_training_is_a_function_of_the_seed() -> None:
    one, same, other = (trained(DIGITS, 3, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["last.weight"], other["last.weight"])
    assert not torch.equal(trained(DIGITS, 1).state_dict()["last.weight"], one["last.weight"])


def test_training_flips_where_the_data_may_be_flipped() -> None:
    flipped = DIGITS.model_copy(update={"random_flip": True})
    assert not torch.equal(trained(DIGITS, 2).last.weight, trained(flipped, 2).last.weight)


def test_shifts_repeat_the_border() -> None:
    torch.manual_seed(0)
    x = torch.arange(6.0).repeat(500, 1, 4, 1)  # every row is 0 ... 5
    moved = shifted(x, 2)
    rows = {tuple(row) for row in moved[:, 0, 0].tolist()}
    assert rows == {tuple(float(min(max(i + by, 0), 5)) for i in range(6)) for by in (-2, -1, 0, 1, 2)}
    assert shifted(x, 0) is x
    columns = {tuple(row) for row in shifted(x.transpose(2, 3), 1)[:, 0, :, 0].tolist()}
    assert len(columns) == 3


def test_accuracy_is_of_the_images_as_they_are() -> None:
    """Data that is flipped in training gives the same number every time; hashes are of unchanged images."""
    config = DIGITS.model_copy(update={"random_flip": True, "random_crop": True})
    images, others = judge_images(config, "judge")
    judge = Judge(8, 1, 10).eval()
    assert judge_accuracy(judge, others) == judge_accuracy(judge, others)
    np.testing.assert_array_equal(seen_hashes(images), seen_hashes(judge_images(DIGITS, "judge")[0]))
    assert len(images) + len(others) < len(load_data(DIGITS))  # the floor is in neither


def test_a_graph_that_differs_is_refused(tmp_path: Path) -> None:
    from admtrt.errors import ExportError

    judge, graph = trained(DIGITS, 1), tmp_path / "features.onnx"
    judge_graph(judge, graph)
    extractor = Extractor(FeatureNetwork("judge", "onnx", graph, sha256_of(graph)))
    images, _ = judge_images(DIGITS, "judge")
    check_judge(judge, extractor, images)
    judge.last.bias += 0.01
    with pytest.raises(ExportError, match="from PyTorch in 'logits'"):
        check_judge(judge, extractor, images)


CONFIG = '[data]\nsource = "digits"\nimage_size = 8\nchannels = 1\nhold_out = 0.5\n'


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG, ["--seed", "0"], "seed 0 is the guide's own"),
        (CONFIG, ["--part", "train"], "part 'train' is unknown"),
        (CONFIG.replace("0.5", "0.0"), [], "nothing is held out"),
        (CONFIG + 'label_from = "none"\n', [], "has no labels"),
        (CONFIG, ["--batch-size", "1"], "greater than or equal to 2"),
        (CONFIG, ["--lr", "0"], "a learning rate of 0 trains nothing"),
        (CONFIG, ["--lr", "nan"], "a learning rate of nan trains nothing"),
    ],
)
def test_judges_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, options: list[str], message: str
) -> None:
    (tmp_path / "run.toml").write_text(config)
    command = ["evaluate", "features", "judge", str(tmp_path / "run.toml"), "--out", str(tmp_path / "judge")]
    assert run([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "judge").exists()


@pytest.mark.slow
def test_judge_on_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It learns, its graph runs, it recognises classes, and it is not trained on the floor."""
    (tmp_path / "run.toml").write_text(CONFIG)
    config = str(tmp_path / "run.toml")
    out = str(tmp_path / "judge")
    command = ["evaluate", "features", "judge", config, "--out", out, "--steps", "150", "--json"]
    assert run(command) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["accuracy"] > 0.8
    assert made["manifest"]["class_names"] == [str(digit) for digit in range(10)]
    evaluate = ["evaluate", "samples", f"{config}:floor", "--reference", f"{config}:train"]
    assert run([*evaluate, "--features", out, "--floor", f"{config}:floor", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["features"][0]
    assert result["metrics"]["accuracy"]["value"] > 0.8
    assert result["metrics"]["judge_score"]["value"] > 3
    assert abs(result["metrics"]["kid"]["value"]) < 5 * result["metrics"]["kid"]["error"]
    assert "judge-saw-floor" not in [warned["code"] for warned in result["warnings"]]
