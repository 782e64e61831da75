"""The exported Inception against TensorFlow's features, from both kinds of file; generated weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evaluator_recipe as recipe
import numpy as np
import pytest
import torch
from evaluator_cases import GOLD, SALT, short_hash
from goldens import arrays

from admtrt.cli import run
from admtrt.errors import CheckpointError, DataError
from admtrt.evaluate.extract import Extractor
from admtrt.evaluate.network import open_network
from admtrt.features.plain import tf1_resize
from admtrt.features.topology import convolution_names
from admtrt.features.weights import NORM, read_weights, torch_name

NETWORK = GOLD["inception"]


# --- quick: the resize, the names and the readers -------------------------------------------------------


@pytest.mark.parametrize("name", list(GOLD["resize"]))
def test_resize_is_tensorflows_bit_for_bit(name: str) -> None:
    case = GOLD["resize"][name]
    images = recipe.images(SALT, f"resize.{name}", 1, *case["input"])
    resized = tf1_resize(images, *case["output"])[0]
    assert short_hash(resized) == case["sha256"]
    kept = case["kept_every"]
    np.testing.assert_array_equal(resized[::kept, ::kept], arrays("evaluator")[f"resize.{name}"])


def test_convolutions_are_those_of_the_recipe() -> None:
    assert sorted(convolution_names()) == sorted(layer[0] for layer in recipe.inception_layers())


def test_torch_names() -> None:
    """As pytorch-fid's file has them: 94 modules, which with fc and the counters make its 566 entries."""
    names = {torch_name(name) for name in convolution_names()}
    assert len(names) == 94
    assert 94 * 6 + 2 == 566
    assert {
        "Conv2d_4a_3x3", "Mixed_5b.branch_pool", "Mixed_5d.branch3x3dbl_3", "Mixed_6a.branch3x3dbl_1",
        "Mixed_6d.branch1x1", "Mixed_6e.branch7x7dbl_5", "Mixed_7a.branch7x7x3_4", "Mixed_7b.branch3x3_2a",
        "Mixed_7c.branch3x3dbl_3b",
    } <= names  # fmt: skip
    assert torch_name("mixed_6/conv") == "Mixed_6d.branch1x1"


def field(number: int, value: bytes | int) -> bytes:
    """One field of a protocol-buffer message."""

    def varint(rest: int) -> bytes:
        out = b""
        while rest >= 128:
            out += bytes([rest & 127 | 128])
            rest >>= 7
        return out + bytes([rest])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def node(name: str, array: np.ndarray, *, as_numbers: bool = False) -> bytes:
    """A constant of a GraphDef."""
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    tensor = field(1, 1) + field(2, shape) + field(5 if as_numbers else 4, array.astype("<f4").tobytes())
    attribute = field(1, b"value") + field(2, field(8, tensor))
    other = field(1, b"dtype") + field(2, field(6, 1))
    return field(1, field(1, name.encode()) + field(2, b"Const") + field(5, other) + field(5, attribute))


def tiny_weights() -> dict[str, np.ndarray]:
    """Every name with arrays of a few numbers."""
    rng = np.random.default_rng(0)
    made = {}
    for name in convolution_names():
        made[f"{name}/conv2d_params"] = rng.standard_normal((1, 1, 2, 2)).astype(np.float32)
        made |= {f"{name}/batchnorm/{part}": np.ones(2, np.float32) for part in NORM}
    return made | {"softmax/weights": np.zeros((2048, 1008), np.float32)}


def graph_of(weights: dict[str, np.ndarray]) -> bytes:
    placeholder = field(1, field(1, b"Cast") + field(2, b"Placeholder"))
    return placeholder + b"".join(
        node(name, array, as_numbers=index % 5 == 0) for index, (name, array) in enumerate(weights.items())
    )


def test_reader_of_frozen_graphs(tmp_path: Path) -> None:
    weights = tiny_weights()
    (tmp_path / "graph.pb").write_bytes(graph_of(weights))
    found = read_weights(tmp_path / "graph.pb")
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)


def damaged(kind: str) -> bytes:
    weights = tiny_weights()
    if kind == "lacking":
        del weights["mixed_6/conv/batchnorm/gamma"]
    elif kind == "not finite":
        weights["conv/batchnorm/beta"][1] = np.nan
    elif kind == "classes":
        weights["softmax/weights"] = np.zeros((2048, 1000), np.float32)
    whole = graph_of(weights)
    if kind.startswith("random"):
        rng = np.random.default_rng(int(kind.split()[1]))
        changed = bytearray(whole[:20_000])
        changed[rng.integers(len(changed))] = rng.integers(256)
        return bytes(changed)
    return {"empty": b"", "cut": whole[:20_000], "text": b"hello", "zeros": bytes(1000)}.get(kind, whole)


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "cut",
        "text",
        "zeros",
        "lacking",
        "not finite",
        "classes",
        *(f"random {n}" for n in range(20)),
    ],
)
def test_damaged_graphs_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "graph.pb").write_bytes(damaged(kind))
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "graph.pb")


def test_weights_that_are_unknown_or_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names both files with size, hash and address; no partial output remains."""
    (tmp_path / "graph.pb").write_bytes(graph_of(tiny_weights()))
    out = ["--out", str(tmp_path / "features")]
    for file, extra, message in (
        ("missing.pb", [], "there is no file"),
        ("graph.pb", [], "none of the published files"),
        ("graph.pb", ["--unknown-weights"], "do not fit together"),
        ("graph.pth", [], "no state dict of PyTorch"),
    ):
        if file == "graph.pth":
            (tmp_path / file).write_bytes(b"no archive")
        assert run(["evaluate", "features", "inception", str(tmp_path / file), *out, *extra]) == 2
        said = capsys.readouterr().err
        assert message in said
        if not extra and file != "graph.pth":
            for part in ("95,673,916", "e6bb154e85f5d4331c22abcddb5dcf31", "95,628,359", "6726825d0af5f729"):
                assert part in said
    with pytest.raises(DataError, match="there is no file"):
        read_weights(tmp_path / "missing.pb")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.pb", "graph.pth"]


# --- slow: the whole network ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return recipe.inception_weights(SALT)


@pytest.fixture(scope="module")
def features(weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From a frozen graph with the generated weights, by the command."""
    folder = tmp_path_factory.mktemp("inception")
    (folder / "graph.pb").write_bytes(graph_of(weights))
    command = ["evaluate", "features", "inception", str(folder / "graph.pb"), "--unknown-weights"]
    assert run([*command, "--out", str(folder / "features")]) == 0
    return folder / "features"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_features_are_tensorflows(features: Path, backend: str) -> None:
    """Bars: 1e-5 of the largest value in pool, 1e-4 in spatial. Seen: 6e-6, 3e-5 (OpenVINO, 299 pixels)."""
    extractor = Extractor(open_network(str(features)), backend)
    for name, case in NETWORK["features"].items():
        images = recipe.images(SALT, f"inception.{name}", *case["input"][:3])
        assert short_hash(images) == case["input_sha256"]
        found = extractor(images)
        for output, bar in (("pool", 1e-5), ("spatial", 1e-4)):
            expected = arrays("evaluator")[f"inception.{name}.{output}"]
            assert np.abs(found[output][:1] - expected).max() <= bar * np.abs(expected).max(), (name, output)
            norms = np.linalg.norm(found[output].astype(np.float64), axis=1)
            np.testing.assert_allclose(norms, case[f"{output}_norm"], rtol=1e-5)
            assert found[output].mean() == pytest.approx(np.mean(case[f"{output}_mean"]), rel=1e-4)
        one_by_one = [extractor(images[index : index + 1]) for index in range(len(images))]
        for output, values in found.items():
            alone = np.concatenate([part[output] for part in one_by_one])
            assert np.abs(alone - values).max() <= 1e-5 * np.abs(values).max(), (name, output)


@pytest.mark.slow
def test_state_dict_gives_the_same_graph(
    features: Path, weights: dict[str, np.ndarray], tmp_path: Path
) -> None:
    state: dict[str, torch.Tensor] = {}
    parts = dict(zip(NORM, ("bias", "weight", "running_mean", "running_var"), strict=True))
    for name in convolution_names():
        module = torch_name(name)
        kernel = weights[f"{name}/conv2d_params"].transpose(3, 2, 0, 1)
        state[f"{module}.conv.weight"] = torch.from_numpy(np.ascontiguousarray(kernel))
        for part, key in parts.items():
            state[f"{module}.bn.{key}"] = torch.from_numpy(weights[f"{name}/batchnorm/{part}"])
        state[f"{module}.bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"] = torch.from_numpy(np.ascontiguousarray(weights["softmax/weights"].T))
    state["fc.bias"] = torch.zeros(1008)
    assert len(state) == 566
    torch.save(state, tmp_path / "weights.pth")
    command = ["evaluate", "features", "inception", str(tmp_path / "weights.pth"), "--unknown-weights"]
    assert run([*command, "--out", str(tmp_path / "features")]) == 0
    assert (tmp_path / "features" / "features.onnx").read_bytes() == (features / "features.onnx").read_bytes()


def published_layout(features: Path, folder: Path, rows: int) -> tuple[Path, Path]:
    """Samples and a reference as published: statistics of all images, ``arr_0`` only some of them."""
    batch = NETWORK["batch"]
    reference = recipe.images(SALT, "batch.ref", *batch["reference"][:3])
    samples = recipe.images(SALT, "batch.sample", *batch["sample"][:3], contrast=60)
    np.savez(folder / "all.npz", arr_0=reference)
    np.savez(folder / "samples.npz", arr_0=samples)
    made = ["--features", str(features), "--out", str(folder / "made.npz")]
    assert run(["evaluate", "reference", str(folder / "all.npz"), *made]) == 0
    with np.load(folder / "made.npz") as file:
        statistics = {name: file[name] for name in ("sigma", "sigma_s")}
        means = {name: file[name].astype(np.float32) for name in ("mu", "mu_s")}
    np.savez(folder / "VIRTUAL.npz", arr_0=reference[:rows], **statistics, **means)
    return folder / "samples.npz", folder / "VIRTUAL.npz"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["batch", "virtual"])
def test_self_check_on_files_of_the_published_layout(
    features: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    """The whole way of `--self-check`, held to the ADM evaluator's own numbers for these files."""
    from admtrt.evaluate.published import Expected

    batch, own = NETWORK["batch"], NETWORK[case]
    rows = own["arr_0"] if case == "virtual" else batch["reference"][0]
    samples, reference = published_layout(features, tmp_path, rows)
    image = 1 / min(rows, batch["sample"][0])
    published = {
        "fid": Expected(batch["fid_exact"], 1e-4 * batch["fid_exact"]),
        "sfid": Expected(batch["sfid_exact"], 1e-4 * batch["sfid_exact"]),
        "inception_score": Expected(batch["inception_score"], 1e-5 * batch["inception_score"]),
        "precision": Expected(own["exact"]["precision"], image),
        "recall": Expected(own["exact"]["recall"], image),
    }
    monkeypatch.setattr("admtrt.evaluate.published.PUBLISHED", published)
    capsys.readouterr()
    command = [
        "evaluate",
        "samples",
        str(samples),
        "--reference",
        str(reference),
        "--features",
        str(features),
    ]
    assert run([*command, "--self-check", "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert found["self_check"]["passed"]
    metrics: dict[str, Any] = found["features"][0]["metrics"]
    assert metrics["precision"]["reference"] == rows
    assert {warned["code"] for warned in found["features"][0]["warnings"]} >= {"not-comparable", "singular"}
