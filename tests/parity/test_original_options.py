"""Every option of the originals' constructors, one at a time: equal outputs, or a refusal.

``data/options.*`` contain results of openai/guided-diffusion (22e0df8) and openai/improved-diffusion with
generated weights: constructor arguments, names and shapes of tensors, outputs of the first of two samples.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from goldens import DATA, arrays, golden_input, relative_error
from torch import Tensor

from admtrt.errors import UserError
from admtrt.export.graphs import classifier_gradient_graph
from admtrt.export.write import write_graph
from admtrt.models.checkpoint import StoredCheckpoint, load_identified
from admtrt.models.classifier import Classifier, log_prob_gradient
from admtrt.models.generated import generated_weight
from admtrt.models.identify import identify_checkpoint
from admtrt.models.unet import UNet

CASES: dict[str, Any] = json.loads(gzip.decompress((DATA / "options.json.gz").read_bytes()))
T = torch.tensor([10.0, 700.0])
PROCESS = {"schedule": "linear", "steps": 1000, "rescale_timesteps": "False"}
REFUSED = {
    "guided.image_size_odd": "image_size 7 cannot be halved 1 times",
    "guided.dims_1": r"input_blocks.0.0.weight is \[32, 3, 3\], expected \[32, 3, 3, 3\]",
    "guided.dims_3": r"input_blocks.0.0.weight is \[32, 3, 3, 3, 3\], expected",
    "guided.condition_2_1": "another condition joined to x_t .*do not tell low_res_size",
    "guided.condition_4_2": "another condition joined to x_t .*do not tell low_res_size",
    "guided.condition_6_3": "another condition joined to x_t .*do not tell low_res_size",
    "guided.condition_5_2": "takes 5 channels and the last gives 2: a condition of 3 channels is joined",
    "guided.condition_4_6": "takes 4 channels and the last gives 6: a condition of 1 channels is joined",
    "improved.channel_mult": r"input_blocks.0.0.weight is \[32, 3, 3, 3\], expected \[64, 3, 3, 3\]",
    "improved.dims_1": "not the tensors of an ADM network, whatever its settings",
    "classifier.attention_odd_strided": "say that image_size is 9 to 12; 13 was given",
}
"""Options that admtrt does not have. The originals run all but the odd ones and ``improved.channel_mult``."""


@cache
def stored(name: str) -> StoredCheckpoint:
    tensors = {
        key: torch.from_numpy(generated_weight(key, tuple(shape)))
        for key, shape in CASES[name]["shapes"].items()
    }
    return StoredCheckpoint(path=Path(f"{name}.pt"), tensors=tensors, prefix="", embedded=None)


def told(name: str) -> dict[str, Any]:
    """Settings that shapes do not show, spelled as the original's flags."""
    case = CASES[name]
    options = case["options"]
    settings = PROCESS | {
        "image_size": case["size"],
        "new_attention_order": str(options.get("use_new_attention_order", False)),
    }
    if case["kind"] == "classifier":
        heads = options["num_head_channels"]
        return settings | (
            {"num_heads": options["num_heads"]} if heads == -1 else {"num_head_channels": heads}
        )
    learned = options["out_channels"] == 2 * options["in_channels"]
    settings |= {"mean_type": "eps", "variance_type": "learned_range" if learned else "fixed_large"}
    settings |= {
        key: options.get(key, -1) for key in ("num_heads", "num_heads_upsample", "num_head_channels")
    }
    return settings | ({"low_res_size": 4} if case["kind"] == "superres" else {})


def network(name: str) -> UNet | Classifier:
    found = identify_checkpoint(stored(name), kinds=("unet", "upsampler", "classifier"), settings=told(name))
    return load_identified(found).module


def noisy(name: str) -> Tensor:
    case = CASES[name]
    channels, size = case["options"]["in_channels"], case["size"]
    return torch.from_numpy(golden_input(name, 2, channels, size, size))


ROUNDING = {"classifier.deep": (5e-5, 1e-2)}
"""Of logits and gradients, where random weights of many layers amplify float32's rounding.

The stored gradient itself is 6e-3 from this network's in float64, PyTorch's on one processor 4e-3, on another
1e-3; a wrong option moves both by tenths.
"""


@pytest.mark.parametrize("name", sorted(CASES.keys() - REFUSED))
def test_the_same_output(name: str) -> None:
    module, x = network(name), noisy(name)
    # Two computations of one network in float32: 3e-6 at the most here, 2e-5 of gradients.
    if isinstance(module, Classifier):
        of_logits, of_gradient = ROUNDING.get(name, (1e-5, 5e-5))
        with torch.no_grad():
            assert relative_error(module(x, T), arrays("options")[f"{name}.logits"]) < of_logits
        gradient = log_prob_gradient(module, x, T, torch.tensor([1, 3]))
        assert relative_error(gradient[:1], arrays("options")[f"{name}.grad"]) < of_gradient
        return
    classes = CASES[name]["options"].get("num_classes")
    given = {"y": torch.arange(2) % classes} if classes else {}
    if CASES[name]["kind"] == "superres":
        given["low_res"] = torch.from_numpy(golden_input(f"{name}.low_res", 2, 3, 4, 4))
    with torch.no_grad():
        assert relative_error(module(x, T, **given)[:1], arrays("options")[f"{name}.out"]) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(UserError, match=REFUSED[name]):
        network(name)


@pytest.mark.parametrize("name", [name for name in REFUSED if "odd" not in name])
def test_what_no_answer_mends_is_said_before_anything_is_asked(name: str) -> None:
    asked_for = "condition" if "condition" in REFUSED[name] else "ADM network, whatever its settings"
    with pytest.raises(UserError, match=asked_for):
        identify_checkpoint(stored(name), kinds=("unet", "classifier"))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("guided.num_heads_upsample", "num_heads_upsample"),
        ("improved.num_heads_upsample", "num_heads_upsample"),
        ("guided.use_new_attention_order", "new_attention_order"),
        ("guided.num_heads", "num_heads"),
        ("superres.base", "low_res_size"),
        ("classifier.attention_odd_pooled", "image_size"),
        ("classifier.adaptive_odd_strided", "image_size"),
    ],
)
def test_what_changes_the_result_is_asked_for(name: str, key: str) -> None:
    settings = {one: value for one, value in told(name).items() if one not in (key, "num_head_channels")}
    if "attention" in name and "classifier" in name:
        settings["num_head_channels"] = told(name)["num_head_channels"]
    with pytest.raises(UserError, match=f"do not tell .*{key}"):
        identify_checkpoint(stored(name), kinds=("unet", "upsampler", "classifier"), settings=settings)


@pytest.mark.parametrize("name", ["attention_odd_pooled", "odd_strided_fed"])
def test_exported_gradients_of_sizes_that_do_not_halve(name: str, tmp_path: Path) -> None:
    module, x = network(f"classifier.{name}"), noisy(f"classifier.{name}")
    assert isinstance(module, Classifier)
    write_graph(classifier_gradient_graph(module), tmp_path / "gradient.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "gradient.onnx")
    given = {"x": x.numpy(), "t": T.numpy(), "y": np.array([1, 3])}
    (gradient,) = session.run(["grad"], given)
    assert relative_error(gradient[:1], arrays("options")[f"classifier.{name}.grad"]) < 5e-5
