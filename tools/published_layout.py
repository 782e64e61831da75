"""The whole way of `admtrt evaluate samples --self-check` on generated files of the published layout.

    python tools/published_layout.py FOLDER                 # 50,000 and 10,000 images of 256x256: 12 GB
    python tools/published_layout.py FOLDER --images 2000 --reference 1000 --features inception.features

Makes what is not there yet: samples as `admnet_guided_upsampled_imagenet256.npz` has them (arr_0), a
reference as `VIRTUAL_imagenet256_labeled.npz` has it (arr_0, mu, sigma, mu_s, sigma_s), and, where none is
given, a small network with Inception's outputs. Then evaluates in a process of its own, kills it as often
as asked for, and says what came out, how long it took and the most memory that it had. The published
numbers cannot come out: the images are patterns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from admtrt.evaluate.extract import Extractor
from admtrt.evaluate.network import GRAPH, MANIFEST, POOL, SPATIAL, FeatureManifest, Weights, open_network
from admtrt.files import atomic_directory, atomic_file, sha256_of
from admtrt.npz import NpzFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

WIDTHS = {POOL: 2048, SPATIAL: 2023}
CLASSES = 1008
CELLS = 8  # of a pattern, along each side
BLOCK = 500


def images(count: int, size: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Patterns of squares, in blocks uint8 [n, size, size, 3]; the two seeds differ in brightness."""
    rng = np.random.default_rng(seed)
    for first in range(0, count, BLOCK):
        number = min(BLOCK, count - first)
        cells = rng.integers(0, 200 + 10 * seed, (number, CELLS, CELLS, 3), dtype=np.uint8)
        yield cells.repeat(size // CELLS, axis=1).repeat(size // CELLS, axis=2)


def write_images(path: Path, count: int, size: int, seed: int, **further: NDArray[Any]) -> None:
    """The file that numpy.savez would write, without the whole array in memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    with (
        atomic_file(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for block in images(count, size, seed):
                member.write(block.tobytes())
        for name, array in further.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)


def write_features(folder: Path, size: int) -> None:
    """A network with Inception's outputs: products of the mean colours of 64 squares."""
    rng = np.random.default_rng(0)
    values = CELLS * CELLS * 3
    given = {f"{name}_weights": rng.standard_normal((values, width)) / 400 for name, width in WIDTHS.items()}
    given["head"] = rng.standard_normal((WIDTHS[POOL], CLASSES)) / 40
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node(
            "AveragePool", ["first"], ["cells"], kernel_shape=[size // CELLS] * 2, strides=[size // CELLS] * 2
        ),
        helper.make_node("Flatten", ["cells"], ["flat"]),
    ]
    for name in WIDTHS:
        nodes.append(helper.make_node("MatMul", ["flat", f"{name}_weights"], [f"{name}_product"]))
        nodes.append(helper.make_node("Relu", [f"{name}_product"], [name]))
    nodes.append(helper.make_node("MatMul", [POOL, "head"], ["logits"]))
    widths = {**WIDTHS, "logits": CLASSES}
    graph = helper.make_graph(
        nodes,
        "features",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", size, size, 3])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])
            for name, width in widths.items()
        ],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in given.items()],
    )
    with atomic_directory(folder) as temporary:
        path = temporary / GRAPH
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
        digest = sha256_of(path)
        manifest = FeatureManifest(
            kind="inception",
            sha256=digest,
            weights=Weights(name="generated", sha256=digest, known=False),
            image_size=size,
            channels=3,
            resize="none",
        )
        (temporary / MANIFEST).write_text(json.dumps(manifest.to_dict()), encoding="utf-8")


def write_reference(path: Path, features: Path, count: int, size: int) -> None:
    """Images and the statistics of their features, as the original computes them."""
    extractor = Extractor(open_network(str(features)))
    parts = [extractor(block) for block in images(count, size, 1)]
    further: dict[str, NDArray[Any]] = {}
    for output, suffix in ((POOL, ""), (SPATIAL, "_s")):
        matrix = np.concatenate([part[output] for part in parts])
        further |= {f"mu{suffix}": matrix.mean(axis=0), f"sigma{suffix}": np.cov(matrix, rowvar=False)}
    write_images(path, count, size, 1, **further)


def make(given: argparse.Namespace, folder: Path, features: Path) -> None:
    """Write what is not there yet."""
    if not features.exists():
        write_features(features, given.size)
    if not (folder / "samples.npz").exists():
        write_images(folder / "samples.npz", given.images, given.size, 2)
    if not (folder / "reference.npz").exists():
        write_reference(folder / "reference.npz", features, given.reference, given.size)


def evaluate(folder: Path, features: Path, kills: int, longest: float) -> dict[str, Any]:
    """Run the self-check, undisturbed or after so many kills at random moments; what came of it."""
    command = [sys.executable, "-m", "admtrt", "evaluate", "samples", str(folder / "samples.npz")]
    command += [
        "--reference",
        str(folder / "reference.npz"),
        "--features",
        str(features),
        "--self-check",
        "--json",
    ]
    cache = folder / f"cache-{kills}"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    chance = random.Random(kills)
    for _ in range(kills):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(chance.uniform(0, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    began = time.monotonic()
    said, complaint = folder / "stdout", folder / "stderr"
    with said.open("wb") as stdout, complaint.open("wb") as stderr:
        process = subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1) or not said.stat().st_size:
        raise SystemExit(complaint.read_text())
    return {
        "document": said.read_bytes(),
        "seconds": round(time.monotonic() - began, 1),
        "memory": 1024 * usage.ru_maxrss,
    }


def main() -> int:
    """Make the files, evaluate, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=256, help="a multiple of 8")
    parser.add_argument("--features", type=Path, help="folder of admtrt evaluate features")
    parser.add_argument("--kills", type=int, default=0, help="evaluate again, killed so often")
    given = parser.parse_args()
    folder, features = given.folder, given.features or given.folder / "small.features"
    folder.mkdir(parents=True, exist_ok=True)
    # In a process of its own: what this one ever held would count as memory of those that it starts.
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(given, folder, features))
    maker.start()
    maker.join()
    if maker.exitcode:
        return 1
    shape = NpzFile.open(folder / "samples.npz")["arr_0"].shape
    whole = evaluate(folder, features, 0, 0)
    found = json.loads(whole["document"].splitlines()[-1])
    summary = {
        "samples": list(shape),
        "seconds": whole["seconds"],
        "memory": whole["memory"],
        "metrics": {name: one["value"] for name, one in found["features"][0]["metrics"].items()},
    }
    if given.kills:
        again = evaluate(folder, features, given.kills, whole["seconds"])
        summary |= {"kills": given.kills, "same": again["document"] == whole["document"]}
    print(json.dumps(summary, indent=1))
    return int(not summary.get("same", True))


if __name__ == "__main__":
    raise SystemExit(main())
