"""Compute every metric of a set of features against a reference, with errors and warnings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from admtrt.errors import RequestError
from admtrt.evaluate.diversity import diversity
from admtrt.evaluate.frechet import Gaussian, frechet_distance, half_sample_error, infinite_distance
from admtrt.evaluate.kernel import MAX_IMAGES, kernel_distance
from admtrt.evaluate.manifold import manifold_metrics
from admtrt.evaluate.network import LOGITS, POOL, SPATIAL
from admtrt.evaluate.score import PART, inception_score

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from admtrt.evaluate.frechet import Features
    from admtrt.evaluate.images import Labels
    from admtrt.evaluate.kept import FeatureSet
    from admtrt.evaluate.manifold import Matrix
    from admtrt.evaluate.network import FeatureNetwork

DEFAULT = (
    "fid", "sfid", "is", "precision", "recall", "kid", "density", "coverage", "diversity", "accuracy",
)  # fmt: skip
METRICS = (*DEFAULT, "fid-infinity")
"""Names for ``--metrics``; ``fd`` is another name of ``fid``."""
_OF_MANIFOLD = ("precision", "recall", "density", "coverage")
_OF_POOLS = ("kid", "diversity", *_OF_MANIFOLD)
"""Metrics that need the features of the reference's images."""
_NEEDS = {"sfid": SPATIAL, "is": LOGITS, "accuracy": LOGITS}


class Warned(NamedTuple):
    """A warning about a result: a code for programs and a sentence."""

    code: str
    text: str


@dataclass(frozen=True)
class Value:
    """One metric.

    Attributes:
        value: None if it cannot be computed.
        error: standard error; None if unknown or not requested.
        samples, reference: numbers of images; None for the reference if only statistics are stored, or the
            metric uses none.
    """

    value: float | None
    error: float | None
    samples: int
    reference: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "value": self.value,
            "error": self.error,
            "samples": self.samples,
            "reference": self.reference,
        }


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference that samples are compared with.

    Attributes:
        features: features of the reference's images; None if only statistics are stored.
        labels: class of each of these images; None if unknown.
        stored: stored statistics by output, which replace those of the images.
        radii: the features' radii that are known so far, by number of neighbours.
    """

    features: FeatureSet | None
    labels: Labels | None = None
    stored: dict[str, Gaussian] = field(default_factory=dict)
    radii: dict[int, Matrix] = field(default_factory=dict)
    _fitted: dict[str, Gaussian] = field(default_factory=dict)

    def is_stored(self, output: str) -> bool:
        """True if the statistics of an output are stored."""
        return output in self.stored

    def gaussian(self, output: str) -> Gaussian | None:
        """Mean and covariance of an output, stored or computed from the images."""
        if output in self.stored:
            return self.stored[output]
        if output not in self._fitted:
            if self.features is None or output not in self.features.outputs:
                return None
            self._fitted[output] = Gaussian.fit(self.features.parts(output), "the reference")
        return self._fitted[output]


@dataclass(frozen=True)
class Asked:
    """Metrics to compute.

    Attributes:
        metrics: names of :data:`METRICS`.
        by_name: whether the user named them; otherwise metrics that cannot be computed are skipped.
        parts: number of splits of the inception score; None for the original's splits of 5,000 images.
        errors: whether to compute slow standard errors.
        seed: seed of every random choice.
    """

    metrics: tuple[str, ...] = DEFAULT
    by_name: bool = False
    parts: int | None = None
    errors: bool = True
    seed: int = 0


def asked_metrics(text: str | None) -> tuple[str, ...]:
    """Parse ``--metrics``, a comma-separated list; None gives the default metrics.

    Raises:
        RequestError: for an unknown one.
    """
    if text is None:
        return DEFAULT
    names = [name.strip().lower().replace("_", "-") for name in text.split(",")]
    names = [{"fd": "fid", "fd-infinity": "fid-infinity"}.get(name, name) for name in names]
    for name in names:
        if name not in METRICS:
            raise RequestError(f"metric {name!r} is unknown; expected some of {', '.join(METRICS)}")
    return tuple(dict.fromkeys(names))


def key_of(metric: str, network: FeatureNetwork | None) -> str:
    """A metric's key in results: only on Inception's features are they called FID and inception score."""
    kind = None if network is None else network.kind
    if metric.startswith("fid") and kind != "inception":
        metric = metric.replace("fid", "fd", 1)
    if metric == "is":
        return {"inception": "inception_score", "judge": "judge_score"}.get(kind or "", "score")
    return metric.replace("-", "_")


def compare(
    samples: FeatureSet,
    reference: Reference,
    network: FeatureNetwork | None,
    asked: Asked,
    *,
    labels: Labels | None = None,
    warn: Callable[[Warned], None],
) -> dict[str, Value]:
    """Compute the requested metrics that these features allow, by :func:`key_of`.

    Args:
        samples: features of the samples.
        reference: what they are compared with.
        network: the network of the features; None if features were given directly.
        asked: the request.
        labels: the requested class of each sample.
        warn: called with warnings about the numbers.

    Raises:
        RequestError: if a metric that the user named cannot be computed.
        DataError: if there is one sample, or sets do not fit together.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # overflow becomes a warning
        return _compared(samples, reference, network, asked, labels, warn)


def _compared(
    samples: FeatureSet,
    reference: Reference,
    network: FeatureNetwork | None,
    asked: Asked,
    labels: Labels | None,
    warn: Callable[[Warned], None],
) -> dict[str, Value]:
    wanted = [metric for metric in asked.metrics if _is_possible(metric, samples, reference, network, asked)]
    if "accuracy" in wanted and not _knows_classes(network, labels):
        if asked.by_name:
            raise RequestError("accuracy needs a judge, and samples with the labels that were asked for")
        wanted.remove("accuracy")
    if "diversity" in wanted and (labels is None or reference.labels is None):
        if asked.by_name:
            raise RequestError("diversity needs samples and reference images that have labels")
        wanted.remove("diversity")
    found: dict[str, Value] = {}
    if {"fid", "fid-infinity"} & {*wanted}:
        found |= _frechet(POOL, "fid", samples, reference, asked, wanted, warn)
    if "sfid" in wanted:
        found |= _frechet(SPATIAL, "sfid", samples, reference, asked, wanted, warn)
    pool = _pools(samples, reference) if {*_OF_POOLS} & {*wanted} else None
    if pool is not None:
        found |= _manifold(*pool, reference.radii, wanted, warn)
        if "kid" in wanted:
            found["kid"] = _kid(*pool, asked.seed, warn)
        if "diversity" in wanted and labels is not None and reference.labels is not None:
            found["diversity"] = _diversity(*pool, labels, reference.labels, warn)
    del pool
    if {"is", "accuracy"} & {*wanted}:
        found |= _classes(samples.matrix(LOGITS), wanted, asked, labels, warn)
    ordered = {metric: found[metric] for metric in METRICS if metric in found}
    for metric, value in ordered.items():
        if asked.by_name and value.value is None:
            raise RequestError(
                f"{metric} cannot be formed from {value.samples} samples and {value.reference or 'no'} "
                "reference images",
                hint="Give more images, or leave the metric out of --metrics.",
            )
    return {key_of(metric, network): value for metric, value in ordered.items()}


def _is_possible(
    metric: str,
    samples: FeatureSet,
    reference: Reference,
    network: FeatureNetwork | None,
    asked: Asked,
) -> bool:
    """True if the features allow a metric."""
    lacking = ""
    output = _NEEDS.get(metric)
    if output is not None and output not in samples.outputs:
        lacking = f"the features have no '{output}'"
    elif metric == "sfid" and reference.gaussian(SPATIAL) is None:
        lacking = "the reference has neither images nor statistics of 'spatial'"
    elif metric in _OF_POOLS and reference.features is None:
        lacking = "the reference has no images, only statistics"
    elif metric.startswith("fid") and reference.gaussian(POOL) is None:
        lacking = "the reference has no 'pool'"
    if lacking and asked.by_name:
        raise RequestError(f"{key_of(metric, network)} cannot be computed: {lacking}")
    return not lacking


def _knows_classes(network: FeatureNetwork | None, labels: Labels | None) -> bool:
    if labels is None or network is None or network.manifest is None or network.kind != "judge":
        return False
    return bool(labels.min() >= 0 and labels.max() < len(network.manifest.class_names))


def _frechet(
    output: str,
    metric: str,
    samples: FeatureSet,
    reference: Reference,
    asked: Asked,
    wanted: Collection[str],
    warn: Callable[[Warned], None],
) -> dict[str, Value]:
    theirs = reference.gaussian(output)
    assert theirs is not None  # asked for before
    ours = Gaussian.fit(samples.parts(output), "the samples")
    _check_size(output, len(ours.mean), len(theirs.mean))
    for name, count in (("samples", ours.count), ("reference images", theirs.count)):
        if count is not None and count <= len(ours.mean):
            warn(
                Warned(
                    "singular",
                    f"{metric}: {count} {name} for {len(ours.mean)} features: the covariance is singular, "
                    "the distance biased and not comparable with others",
                )
            )
    found: dict[str, Value] = {}
    count = len(samples)
    features = samples.matrix(output) if asked.errors or "fid-infinity" in wanted else None
    if metric in wanted:
        error = None
        if asked.errors and features is not None:
            error = half_sample_error(features, theirs, asked.seed)
        found[metric] = _value(frechet_distance(ours, theirs), error, count, theirs.count, metric, warn)
    if metric == "fid" and "fid-infinity" in wanted and features is not None:
        infinite = infinite_distance(features, theirs, asked.seed)
        if infinite is None:
            warn(Warned("too-few", f"fid-infinity: {count} samples; it takes 20 or more"))
        value, error = (None, None) if infinite is None else infinite
        found["fid-infinity"] = _value(value, error, count, theirs.count, "fid-infinity", warn)
    return found


def _check_size(output: str, ours: int, theirs: int) -> None:
    if ours != theirs:
        raise RequestError(
            f"'{output}' has {ours} features for the samples and {theirs} in the reference",
            hint="Both must come from one network.",
        )


def _pools(samples: FeatureSet, reference: Reference) -> tuple[Features, Features]:
    assert reference.features is not None  # asked for before
    theirs, ours = reference.features.matrix(POOL), samples.matrix(POOL)
    _check_size(POOL, ours.shape[1], theirs.shape[1])
    return theirs, ours


def _manifold(
    reference: Features,
    samples: Features,
    radii: dict[int, Matrix],
    wanted: Collection[str],
    warn: Callable[[Warned], None],
) -> dict[str, Value]:
    names = [name for name in _OF_MANIFOLD if name in wanted]
    if not names:
        return {}
    found = manifold_metrics(reference, samples, known=radii)
    n, m = len(samples), len(reference)
    errors = {
        "precision": _binomial(found.precision, n),
        "recall": _binomial(found.recall, m),
        "density": found.density_error,
        "coverage": _binomial(found.coverage, m),
    }
    missing = [name for name in names if getattr(found, name) is None]
    if missing:
        warn(
            Warned(
                "too-few",
                f"{', '.join(missing)}: {n} samples and {m} reference images, no more than the neighbours "
                "that are looked for",
            )
        )
    return {name: _value(getattr(found, name), errors[name], n, m, name, warn) for name in names}


def _kid(reference: Features, samples: Features, seed: int, warn: Callable[[Warned], None]) -> Value:
    n, m = len(samples), len(reference)
    if max(n, m) > MAX_IMAGES:
        rng = np.random.default_rng(seed)
        samples, reference = (
            one if len(one) <= MAX_IMAGES else one[np.sort(rng.permutation(len(one))[:MAX_IMAGES])]
            for one in (samples, reference)
        )
        warn(
            Warned(
                "kid-drawn", f"kid: of {n} samples and {m} reference images at most {MAX_IMAGES} are drawn"
            )
        )
    found = kernel_distance(reference, samples)
    value, error = (None, None) if found is None else found
    return _value(value, error, len(samples), len(reference), "kid", warn)


def _diversity(
    reference: Features,
    samples: Features,
    labels: Labels,
    reference_labels: Labels,
    warn: Callable[[Warned], None],
) -> Value:
    found = diversity(samples, labels, reference, reference_labels)
    value, error = (None, None) if found is None else found
    return _value(value, error, len(samples), len(reference), "diversity", warn)


def _classes(
    logits: Features,
    wanted: Collection[str],
    asked: Asked,
    labels: Labels | None,
    warn: Callable[[Warned], None],
) -> dict[str, Value]:
    found: dict[str, Value] = {}
    if "is" in wanted:
        score = inception_score(logits, asked.parts)
        if score.parts > 1 and score.shortest < PART and asked.parts is None:
            warn(
                Warned(
                    "short-part",
                    f"is: the last part has {score.shortest} images and counts as much as one of {PART}, as "
                    "in the ADM evaluator; --parts 1 scores all at once",
                )
            )
        if score.parts > 1 and labels is not None and len(labels) > 2 and (np.diff(labels) >= 0).all():
            warn(
                Warned(
                    "sorted-labels",
                    "is: the samples are sorted by class, so that no part holds all classes and the score is "
                    "too low; --parts 1 scores all at once",
                )
            )
        found["is"] = _value(score.value, score.error, len(logits), None, "is", warn)
    if "accuracy" in wanted and labels is not None:
        right = float((logits.argmax(axis=1) == labels).mean())
        found["accuracy"] = Value(right, _binomial(right, len(logits)), len(logits))
    return found


def _binomial(p: float | None, count: int) -> float | None:
    return None if p is None else math.sqrt(p * (1 - p) / count)


def _value(
    value: float | None,
    error: float | None,
    samples: int,
    reference: int | None,
    metric: str,
    warn: Callable[[Warned], None],
) -> Value:
    """Make a value that JSON can represent."""
    if value is not None and not math.isfinite(value):
        warn(Warned("overflow", f"{metric}: the features are too large for float64"))
        value = error = None
    if error is not None and not math.isfinite(error):
        error = None
    return Value(value, error, samples, reference)
