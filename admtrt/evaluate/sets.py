"""Inputs of an evaluation: samples and their reference, as images, features or statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admtrt.errors import DataError, RequestError
from admtrt.evaluate.compare import Reference, Warned
from admtrt.evaluate.frechet import Gaussian
from admtrt.evaluate.images import draw, npz_images, open_images
from admtrt.evaluate.kept import extract, given_features
from admtrt.evaluate.network import POOL, SPATIAL
from admtrt.npz import NpzFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from admtrt.evaluate.extract import Extractor
    from admtrt.evaluate.images import ImageSource, Labels
    from admtrt.evaluate.kept import FeatureSet
    from admtrt.evaluate.network import FeatureNetwork

STATISTICS = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
"""Names of stored statistics, as in the ADM evaluator's reference files."""
FEATURES_KEY = "features"
"""Name under which `admtrt evaluate reference` stores which network the statistics belong to."""


@dataclass(frozen=True, eq=False)
class OpenedSet:
    """One set of samples or reference data.

    Attributes:
        name: for messages and the progress display.
        images: the images; None if there are none.
        features: features given directly; else None.
        archive: an .npz file that may hold statistics.
    """

    name: str
    images: ImageSource | None = None
    features: FeatureSet | None = None
    archive: NpzFile | None = None

    @property
    def labels(self) -> Labels | None:
        """The labels of the images."""
        return None if self.images is None else self.images.labels

    def __len__(self) -> int:
        if self.features is not None:
            return len(self.features)
        return 0 if self.images is None else len(self.images)

    def describe(self) -> dict[str, Any]:
        """Plain data for JSON; no paths."""
        if self.images is None:
            return {"kind": "statistics" if self.features is None else "features", "count": len(self) or None}
        height, width, channels = self.images.shape
        return {
            "kind": self.images.kind,
            "count": len(self),
            "height": height,
            "width": width,
            "channels": channels,
        }


def open_set(
    text: str,
    name: str,
    *,
    size: int | None = None,
    lossy: bool = False,
    count: int | None = None,
    seed: int = 0,
) -> OpenedSet:
    """Open images or features as samples; statistics alone can only be a reference.

    Args:
        text: as of :func:`admtrt.evaluate.images.open_images`, or an .npz file with ``pool``.
        name: name of the set.
        size, lossy: see :func:`~admtrt.evaluate.images.open_images`.
        count, seed: draw this many images by the seed.

    Raises:
        DataError: if nothing usable stands there.
        RequestError: if there are fewer images than requested.
    """
    path = Path(text).expanduser()
    if path.suffix == ".npz" and path.is_file() and size is None:
        archive = NpzFile.open(path)
        if POOL in archive:
            return OpenedSet(name, features=given_features(path, archive, count, seed))
        if "arr_0" not in archive and "mu" in archive:
            raise DataError(
                f"{text} holds statistics without images, which can only be a reference",
                hint="Give the images themselves, or their features as 'pool'.",
            )
    return OpenedSet(name, images=draw(open_images(text, size=size, lossy=lossy), count, seed))


def open_reference(text: str, *, lossy: bool = False) -> OpenedSet:
    """Open a reference: images, features or statistics.

    Raises:
        DataError: if nothing usable stands there.
    """
    path = Path(text).expanduser()
    if path.suffix == ".npz" and path.is_file():
        archive = NpzFile.open(path)
        if "mu" in archive and POOL not in archive:
            images = npz_images(archive) if "arr_0" in archive else None
            return OpenedSet("reference", images=images, archive=archive)
    return open_set(text, "reference", lossy=lossy)


def check_networks(samples: OpenedSet, networks: Sequence[FeatureNetwork]) -> None:
    """Check that features are either given or computed by named networks, not both.

    Raises:
        RequestError: if there are both, or neither.
    """
    if samples.features is not None and networks:
        raise RequestError(
            "the samples are features already, and --features asks for others", hint="Leave --features out."
        )
    if samples.features is None and not networks:
        raise RequestError(
            "the samples are images, and there are no features to see them with",
            hint="Give --features FOLDER of admtrt evaluate features, or --features NAME=FILE.onnx.",
        )


def features_of(
    opened: OpenedSet,
    extractor: Extractor | None,
    *,
    batch_size: int,
    progress: Callable[[int, str], None] = lambda _count, _text: None,
) -> FeatureSet | None:
    """Features of a set, given or computed; None for statistics alone.

    Raises:
        RequestError: if there are images but no network.
    """
    if opened.features is not None:
        return opened.features
    if opened.images is None:
        return None
    if extractor is None:
        raise RequestError(
            f"the {opened.name} are images, and there are no features to see them with",
            hint="Give --features FOLDER of admtrt evaluate features, or --features NAME=FILE.onnx.",
        )
    return extract(opened.images, extractor, opened.name, batch_size=batch_size, progress=progress)


def reference_of(
    opened: OpenedSet,
    network: FeatureNetwork | None,
    features: Callable[[], FeatureSet | None],
    warn: Callable[[Warned], None],
) -> Reference:
    """Make a reference of a set: stored statistics, if they are of this network, and images' features.

    Raises:
        DataError: if the statistics are damaged, or belong to another network and there are no images.
    """
    stored = {}
    archive = opened.archive
    if archive is not None:
        if _are_of(archive, network):
            stored = {
                output: Gaussian.from_statistics(
                    archive[mean].read(), _member(archive, covariance, mean), f"{archive.file}: {mean}"
                )
                for output, (mean, covariance) in STATISTICS.items()
                if mean in archive
            }
        elif opened.images is None:
            raise DataError(
                f"{archive.file} holds statistics of other features, and no images",
                hint="Make one with these: admtrt evaluate reference DATA --features FOLDER --out ref.npz.",
            )
        else:
            warn(
                Warned(
                    "other-statistics",
                    "the reference's statistics are of other features: its images are taken instead",
                )
            )
    return Reference(features(), opened.labels, stored)


def _member(archive: NpzFile, name: str, beside: str) -> Any:
    if name not in archive:
        raise DataError(f"{archive.file} has {beside} but no {name}")
    return archive[name].read()


def _are_of(archive: NpzFile, network: FeatureNetwork | None) -> bool:
    """True if stored statistics belong to this network. Unlabelled, published files are Inception's."""
    if FEATURES_KEY in archive:
        return network is not None and archive[FEATURES_KEY].read().tolist() == [network.digest]
    return network is None or network.kind == "inception"
