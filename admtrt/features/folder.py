"""Write folders of feature networks, with graph and manifest, atomically and after a check."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from admtrt.config_files import load_config
from admtrt.errors import CheckpointError, RequestError
from admtrt.evaluate.extract import Extractor
from admtrt.evaluate.network import GRAPH, MANIFEST, SEEN, FeatureManifest, FeatureNetwork, Weights
from admtrt.features.inception import check_inception, write_inception
from admtrt.features.weights import describe_weights, known_files, read_weights
from admtrt.files import atomic_directory, sha256_of
from admtrt.run_config import RunConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


JUDGE_WEIGHTS = "judge.safetensors"


def make_inception(
    weights_file: Path, out: Path, *, unknown_weights: bool = False, overwrite: bool = False
) -> tuple[FeatureManifest, dict[str, float]]:
    """Write the FID Inception from a weights file, after checking it against the network in NumPy.

    Args:
        weights_file: TensorFlow's ``.pb`` or PyTorch's ``.pth``.
        out: the folder.
        unknown_weights: accept an unpublished file; every result will say so.
        overwrite: replace a folder that is there.

    Returns:
        The manifest, and the largest relative error of each output.

    Raises:
        CheckpointError: if it is not the Inception of 2015-12-05, or is unknown and not allowed.
        DataError: if there is no such file.
        ExportError: if the graph computes something else.
        OutputError: if the folder cannot be written.
    """
    weights = read_weights(weights_file)
    described = Weights.from_dict(describe_weights(weights_file))
    if not described.known and not unknown_weights:
        raise CheckpointError(
            f"{weights_file} is none of the published files: its SHA-256 is {described.sha256}",
            hint=f"Published: {known_files()}. With --unknown-weights it is taken, and results say so.",
        )
    with atomic_directory(out, overwrite=overwrite) as folder:
        graph = folder / GRAPH
        write_inception(weights, graph)
        manifest = FeatureManifest(
            kind="inception",
            sha256=sha256_of(graph),
            weights=described,
            image_size=None,
            channels=3,
            resize="TensorFlow 1 bilinear, in the graph",
            made_with={"onnx": version("onnx")},
        )
        network = FeatureNetwork("inception", "inception", graph, manifest.sha256, manifest, folder)
        errors = check_inception(weights, Extractor(network))
        _write_manifest(folder, manifest)
    return manifest, errors


def make_judge(
    config_file: Path,
    out: Path,
    *,
    part: str = "judge",
    steps: int = 2000,
    batch_size: int = 64,
    lr: float = 5e-3,
    seed: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, str], None] = lambda _count, _text: None,
) -> tuple[FeatureManifest, float]:
    """Train a classifier of clean images on held-out data, and write its features and logits as a graph.

    Args:
        config_file: a training file, whose section ``data`` names labelled images and holds some out.
        out: the folder.
        part: ``judge``, half of the held-out images, or ``held-out``, all of them.
        steps, batch_size, lr, seed: of the training; the seed must differ from the guide's.
        overwrite: replace a folder that is there.
        progress: called with the steps done.

    Returns:
        The manifest, and its accuracy on the networks' training images (at most 5,000).

    Raises:
        RequestError: for another part, a learning rate that is not above 0, or the guide's seed.
        DataError: if the images have no labels, or nothing is held out.
        OutputError: if the folder cannot be written.
    """
    from admtrt.features.judge import (
        check_judge,
        judge_accuracy,
        judge_graph,
        judge_images,
        seen_hashes,
        train_judge,
    )

    if part not in ("judge", "held-out"):
        raise RequestError(f"part {part!r} is unknown; expected judge or held-out")
    if not 0 < lr < math.inf:
        raise RequestError(f"a learning rate of {lr:g} trains nothing", hint="Give --lr a number above 0.")
    config = load_config(RunConfig, config_file)
    if seed == config.train_classifier.seed:
        raise RequestError(
            f"seed {seed} is the guide's own (train_classifier.seed)", hint="Give the judge another."
        )
    images, others = judge_images(config.data, part)
    with atomic_directory(out, overwrite=overwrite) as folder:
        judge = train_judge(
            images, config.data, steps=steps, batch_size=batch_size, lr=lr, seed=seed, progress=progress
        )
        judge.save(folder / JUDGE_WEIGHTS)
        accuracy = judge_accuracy(judge, others)
        graph = folder / GRAPH
        judge_graph(judge, graph)
        digest = sha256_of(folder / JUDGE_WEIGHTS)
        manifest = FeatureManifest(
            kind="judge",
            sha256=sha256_of(graph),
            weights=Weights(name=JUDGE_WEIGHTS, sha256=digest, known=False),
            image_size=config.data.image_size,
            channels=config.data.channels,
            resize="none",
            class_names=images.class_names,
            made_with={"torch": version("torch"), "part": part, "images": str(len(images))},
        )
        network = FeatureNetwork("judge", "judge", graph, manifest.sha256, manifest, folder)
        check_judge(judge, Extractor(network), images)
        np.save(folder / SEEN, seen_hashes(images), allow_pickle=False)
        _write_manifest(folder, manifest)
    return manifest, accuracy


def _write_manifest(folder: Path, manifest: FeatureManifest) -> None:
    text = json.dumps(manifest.to_dict(), indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
