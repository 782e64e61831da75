"""One evaluation: judge samples, and real images, against a reference in every set of features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from admtrt.errors import BundleError
from admtrt.evaluate.compare import Asked, Reference, Value, Warned, compare
from admtrt.evaluate.extract import Extractor
from admtrt.evaluate.frechet import Gaussian, frechet_distance
from admtrt.evaluate.images import chosen_rows, draw
from admtrt.evaluate.nearest import Nearest, find_nearest
from admtrt.evaluate.network import POOL, SEEN
from admtrt.evaluate.set_warnings import USUAL_SAMPLES, set_warnings, shape_warnings
from admtrt.evaluate.sets import OpenedSet, features_of, reference_of
from admtrt.reading import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable

    from admtrt.evaluate.kept import FeatureSet
    from admtrt.evaluate.network import FeatureNetwork


Progress: TypeAlias = "Callable[[int, str], None]"
"""Called with the number of images done and a text."""
PROTOCOL = "adm-2021"
"""Name of the paper's protocol: published weights, 50,000 samples, stored statistics, fp32."""
_PRECISION_IMAGES = 256


def _unseen(count: int, text: str) -> None: ...


@dataclass(frozen=True)
class Computing:
    """Settings of feature extraction.

    Attributes:
        backend, precision, threads: as of :class:`~admtrt.evaluate.extract.Extractor`.
        batch_size: images computed at once; it changes results by rounding only.
        note: called with what ``auto`` measures.
    """

    backend: str = "onnxruntime"
    precision: str = "fp32"
    threads: int | None = None
    batch_size: int = 16
    note: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, eq=False)
class Judged:
    """Results in one set of features.

    Attributes:
        name: name of the features.
        about: the network, the backend, and a hash of the samples, as plain data.
        metrics: the samples' metrics.
        floor: the same metrics of real images; None without real images.
        nearest: nearest training images; None if not requested.
        warnings: in order of occurrence.
        protocol: :data:`PROTOCOL` if the conditions are met, else None.
        precision_change: change of the Fréchet distance against fp32; None in fp32.
    """

    name: str
    about: dict[str, Any]
    metrics: dict[str, Value]
    floor: dict[str, Value] | None
    nearest: Nearest | None
    warnings: list[Warned]
    protocol: str | None
    precision_change: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: no times, no paths."""
        return {
            "name": self.name,
            **self.about,
            "protocol": self.protocol,
            "metrics": _plain(self.metrics),
            "floor": None if self.floor is None else _plain(self.floor),
            "nearest": None if self.nearest is None else self.nearest.to_dict(),
            "precision_change": self.precision_change,
            "warnings": [warned._asdict() for warned in self.warnings],
        }


class Evaluator:
    """One set of features: judges any number of sample sets against one reference.

    Args:
        network: the feature network; None if samples are given as features.
        reference: what samples are compared with.
        asked: the metrics.
        computing: how features are computed.
        floor: real images outside the reference; as many are used as there are samples.
        training: training images, to find copies of them.
    """

    def __init__(
        self,
        network: FeatureNetwork | None,
        reference: OpenedSet,
        asked: Asked,
        computing: Computing,
        *,
        floor: OpenedSet | None = None,
        training: OpenedSet | None = None,
    ) -> None:
        self._network, self._asked, self._computing = network, asked, computing
        self._sets = {"reference": reference, "floor": floor, "training": training}
        self._known: dict[str, FeatureSet | None] = {}
        self._reference: Reference | None = None
        self._reference_warnings: list[Warned] = []
        self._floors: dict[int, dict[str, Value]] = {}

    def total(self, samples: OpenedSet) -> int:
        """Number of images to process when judging these samples."""
        others = (one for name, one in self._sets.items() if name not in self._known and one is not None)
        return len(samples) + sum(len(one) for one in others)

    def __call__(self, samples: OpenedSet, *, progress: Progress = _unseen) -> Judged:
        """Judge samples.

        Raises:
            RequestError: if a metric that the user named cannot be computed, or samples do not fit the
                network.
            DataError: if a set cannot be used.
        """
        warnings: list[Warned] = []

        def warn(warned: Warned) -> None:
            if warned not in warnings:
                warnings.append(warned)

        network, asked = self._network, self._asked
        extractor = self._extractor()
        ours = features_of(samples, extractor, batch_size=self._computing.batch_size, progress=progress)
        assert ours is not None  # samples are never statistics alone
        reference = self._prepared(extractor, progress)
        for warned in (
            *set_warnings(ours, network, asked.metrics, self._computing.precision),
            *shape_warnings(samples, self._sets["reference"]),
            *self._reference_warnings,
        ):
            warn(warned)
        change = self._precision_change(samples, extractor, reference)
        about = {"samples_sha256": ours.digest, **_about(network, extractor)}
        del extractor  # frees memory for what follows
        metrics = compare(ours, reference, network, asked, labels=samples.labels, warn=warn)
        floor, training = self._known["floor"], self._known["training"]
        if floor is not None and len(floor) < len(ours):
            warn(
                Warned(
                    "floor-count",
                    f"the floor is of {len(floor)} real images, the samples are {len(ours)}: distances of "
                    "fewer images are larger",
                )
            )
        nearest = None
        if training is not None:
            held_out = None if floor is None else floor.matrix(POOL)
            nearest = find_nearest(ours.matrix(POOL), training.matrix(POOL), held_out)
        return Judged(
            name="given" if network is None else network.name,
            about=about,
            metrics=metrics,
            floor=None if floor is None else self._floor_metrics(floor, len(ours), reference),
            nearest=nearest,
            warnings=warnings,
            protocol=self._protocol(ours, reference),
            precision_change=change,
        )

    def _extractor(self) -> Extractor | None:
        if self._network is None:
            return None
        c = self._computing
        return Extractor(self._network, c.backend, c.precision, threads=c.threads, note=c.note)

    def _prepared(self, extractor: Extractor | None, progress: Progress) -> Reference:
        """The features of reference, floor and training images, computed when first needed."""

        def seen(name: str) -> FeatureSet | None:
            if name not in self._known:
                opened = self._sets[name]
                self._known[name] = None
                if opened is not None:
                    self._known[name] = features_of(
                        opened, extractor, batch_size=self._computing.batch_size, progress=progress
                    )
            return self._known[name]

        if self._reference is None:
            opened = self._sets["reference"]
            assert opened is not None
            self._reference = reference_of(
                opened, self._network, lambda: seen("reference"), self._reference_warnings.append
            )
            floor = seen("floor")
            if floor is not None and self._network is not None:
                _check_seen(self._network, floor, self._reference_warnings.append)
            seen("training")
        return self._reference

    def _floor_metrics(self, floor: FeatureSet, count: int, reference: Reference) -> dict[str, Value]:
        """The same metrics of real images, as many as there are samples if possible."""
        taken = min(count, len(floor))
        if taken not in self._floors:
            opened = self._sets["floor"]
            labels = None if opened is None else opened.labels
            rows = chosen_rows(len(floor), taken, self._asked.seed)
            asked = replace(self._asked, by_name=False)
            self._floors[taken] = compare(
                floor.subset(rows),
                reference,
                self._network,
                asked,
                labels=None if labels is None else labels[rows],
                warn=lambda _: None,
            )
        return self._floors[taken]

    def _precision_change(
        self, samples: OpenedSet, extractor: Extractor | None, reference: Reference
    ) -> float | None:
        """Change of the Fréchet distance of the same samples by the precision, against fp32."""
        theirs = reference.gaussian(POOL)
        unchanged = extractor is None or extractor.precision == "fp32"
        if extractor is None or unchanged or samples.images is None or theirs is None or len(samples) < 2:
            return None
        count = min(len(samples), _PRECISION_IMAGES)
        few = OpenedSet(samples.name, images=draw(samples.images, count, self._asked.seed))
        exact = Extractor(extractor.network, extractor.backend, "fp32", threads=self._computing.threads)
        distances = []
        for one in (extractor, exact):
            found = features_of(few, one, batch_size=self._computing.batch_size)
            assert found is not None
            distances.append(frechet_distance(Gaussian.fit(found.parts(POOL)), theirs))
        return distances[0] - distances[1]

    def _protocol(self, samples: FeatureSet, reference: Reference) -> str | None:
        holds = (
            self._network is not None
            and self._network.kind == "inception"
            and self._network.published
            and len(samples) == USUAL_SAMPLES
            and reference.is_stored(POOL)
            and self._asked.parts is None
            and self._computing.precision == "fp32"
        )
        return PROTOCOL if holds else None


def _check_seen(network: FeatureNetwork, floor: FeatureSet, warn: Callable[[Warned], None]) -> None:
    """Refuse a judge that was trained on the floor's images: it would rate them too high."""
    file = None if network.folder is None else network.folder / SEEN
    if file is None or not file.exists():
        return
    try:
        with open_regular(file) as opened:
            learned = np.load(opened, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(
            f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is damaged'}",
            hint="Make the judge again: admtrt evaluate features judge CONFIG.toml --out FOLDER --overwrite.",
        ) from None
    seen = int(np.isin(floor.hashes, learned).sum())
    if seen:
        warn(
            Warned(
                "judge-saw-floor",
                f"the judge learned from {seen} of the {len(floor)} real images of the floor",
            )
        )


def _about(network: FeatureNetwork | None, extractor: Extractor | None) -> dict[str, Any]:
    if network is None or extractor is None:
        return {"kind": "given"}
    manifest = network.manifest
    return {
        "kind": network.kind,
        "sha256": network.digest,
        "weights": None if manifest is None else manifest.weights.to_dict(),
        "backend": extractor.backend,
        "precision": extractor.precision,
        "resize": extractor.resize,
    }


def _plain(metrics: dict[str, Value]) -> dict[str, Any]:
    return {name: value.to_dict() for name, value in metrics.items()}
