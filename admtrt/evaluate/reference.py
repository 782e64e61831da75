"""Reference files: statistics of a set of images, and some of the images, as the ADM evaluator keeps them."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.evaluate.extract import Extractor
from admtrt.evaluate.frechet import Gaussian
from admtrt.evaluate.images import chosen_rows
from admtrt.evaluate.kept import extract
from admtrt.evaluate.sets import FEATURES_KEY, STATISTICS
from admtrt.files import atomic_file

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.evaluate.images import ImageSource, Pixels
    from admtrt.evaluate.judging import Computing, Progress
    from admtrt.evaluate.network import FeatureNetwork


def write_reference(
    images: ImageSource,
    network: FeatureNetwork,
    computing: Computing,
    path: Path,
    *,
    keep: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Write ``arr_0``, images drawn by the seed, ``arr_1``, their labels, and ``mu``, ``sigma``, ... of all.

    Images are read once and streamed to the file; they need not fit in memory.

    Args:
        images: the set; the statistics cover all of it.
        network: the feature network, whose hash is stored in the file.
        computing: how features are computed.
        path: the file; replaced if it exists.
        keep: the most images to store.
        seed: seed of the choice of images.
        progress: called with the images done.

    Raises:
        DataError: if there is only one image, or one cannot be read.
        OutputError: if the file cannot be written.
    """
    extractor = Extractor(
        network, computing.backend, computing.precision, threads=computing.threads, note=computing.note
    )
    kept = chosen_rows(len(images), min(keep, len(images)), seed)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(kept), *images.shape)}
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            first = 0

            def write(block: Pixels) -> None:
                nonlocal first
                own = kept[(kept >= first) & (kept < first + len(block))] - first
                member.write(np.ascontiguousarray(block[own]).tobytes())
                first += len(block)

            features = extract(
                images,
                extractor,
                "images",
                batch_size=computing.batch_size,
                progress=progress,
                each_block=write,
            )
        arrays: dict[str, Any] = {FEATURES_KEY: np.array([network.digest])}
        if images.labels is not None:
            arrays["arr_1"] = images.labels[kept]
        for output, (mean, covariance) in STATISTICS.items():
            if output in features.outputs:
                fitted = Gaussian.fit(features.parts(output))
                arrays |= {mean: fitted.mean, covariance: fitted.covariance}
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return {"images": len(images), "kept": len(kept), "features": network.digest, "seed": seed}
