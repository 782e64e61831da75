"""Tiny feature networks as ONNX graphs, and their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from admtrt.evaluate.network import GRAPH, MANIFEST, FeatureManifest, Weights
from admtrt.files import sha256_of


def write_graph(
    path: Path, *, size: int | None = None, channels: int = 3, classes: int = 10, poison: bool = False
) -> Path:
    """Write a graph from ``images`` to ``pool`` [N, 12], ``spatial`` [N, 8] and ``logits``.

    With ``poison``, its outputs for white images are NaN.
    """
    rng = np.random.default_rng(7)

    def const(name: str, array: Any) -> str:
        initializers.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    initializers: list[Any] = []
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["first", const("scale", [64.0])], ["scaled"]),
    ]
    for name, width in (("pool", 12), ("spatial", 8)):
        kernel = const(f"{name}_kernel", rng.standard_normal((width, channels, 3, 3)) / 3)
        nodes += [
            helper.make_node("Conv", ["scaled", kernel], [f"{name}_conv"], pads=[1] * 4, kernel_shape=[3, 3]),
            helper.make_node("Relu", [f"{name}_conv"], [f"{name}_relu"]),
            helper.make_node("GlobalAveragePool", [f"{name}_relu"], [f"{name}_mean"]),
            helper.make_node(
                "Flatten", [f"{name}_mean"], [f"{name}_flat" if poison and name == "pool" else name]
            ),
        ]
    if poison:
        nodes += [
            helper.make_node("ReduceMin", ["first"], ["darkest"], axes=[1, 2, 3], keepdims=0),
            helper.make_node("Sub", [const("white", [254.5]), "darkest"], ["room"]),
            helper.make_node("Sqrt", ["room"], ["root"]),
            helper.make_node("Unsqueeze", ["root", "axis"], ["column"]),
            helper.make_node("Mul", ["column", const("zero", [0.0])], ["nothing"]),
            helper.make_node("Add", ["pool_flat", "nothing"], ["pool"]),
        ]
        initializers.append(numpy_helper.from_array(np.array([1]), "axis"))
    nodes.append(
        helper.make_node("MatMul", ["pool", const("head", rng.standard_normal((12, classes)))], ["logits"])
    )
    graph = helper.make_graph(
        nodes,
        "features",
        [
            helper.make_tensor_value_info(
                "images", TensorProto.UINT8, ["N", size or "H", size or "W", channels]
            )
        ],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])
            for name, width in (("pool", 12), ("spatial", 8), ("logits", classes))
        ],
        initializers,
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def features_folder(
    folder: Path, kind: str = "inception", *, size: int | None = None, channels: int = 3, known: bool = False
) -> Path:
    """Write a folder like that of `admtrt evaluate features`, with the tiny graph."""
    folder.mkdir(parents=True)
    graph = write_graph(folder / GRAPH, size=size, channels=channels)
    manifest = FeatureManifest(
        kind=kind,
        sha256=sha256_of(graph),
        weights=Weights(name="weights.pb", sha256="0" * 64, known=known),
        image_size=size,
        channels=channels,
        resize="none",
        class_names=tuple(map(str, range(10))) if kind == "judge" else (),
    )
    (folder / MANIFEST).write_text(json.dumps(manifest.to_dict()))
    return folder


def pictures(count: int, seed: int = 0, size: int = 8, channels: int = 3) -> np.ndarray:
    """Images that differ in colour and contrast, uint8 [N, H, W, C]."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(20, 200, (count, 1, 1, channels))
    spread = rng.integers(5, 50, (count, 1, 1, 1))
    return np.clip(colour + spread * rng.standard_normal((count, size, size, channels)), 0, 255).astype(
        np.uint8
    )


def run_folder(folder: Path, images: np.ndarray, *, asked: int, labelled: bool = True, cut: int = 7) -> Path:
    """Write the folder of a run of `admtrt sample` that was killed or is still drawing."""
    (folder / "shards").mkdir(parents=True)
    (folder / "request.json").write_text(json.dumps({"count": asked}))
    for start in range(0, len(images), cut):
        part = images[start : start + cut]
        labels = {"labels": np.arange(start, start + len(part)) % 3} if labelled else {}
        np.savez(folder / "shards" / f"{start:08d}.npz", images=part, **labels)
    return folder
