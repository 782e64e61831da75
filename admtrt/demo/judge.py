"""The independent judge of the demo's samples: a support vector machine trained on held-out images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.data.image_set import ImageSet, load_data, split
from admtrt.errors import MissingDependencyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from admtrt.run_config import DataConfig

    Pixels = NDArray[np.uint8]

_MOST_SCORED = 10_000


@dataclass(frozen=True)
class Verdict:
    """Judgement of a set of samples.

    Attributes:
        accuracy: fraction judged to be of the requested class.
        diversity: mean distance between two samples of a class, relative to real images; 1 = as diverse as
            the data, 0 = all equal.
    """

    accuracy: float
    diversity: float


class Judge:
    """A classifier fitted to the held-out part of a labelled set, and the diversity of that part.

    Attributes:
        images: number of held-out images that it was fitted to.
        accuracy: accuracy on up to 10,000 of the networks' training images, which it was not fitted to.
    """

    def __init__(self, config: DataConfig) -> None:
        try:
            from sklearn.svm import SVC
        except ImportError:
            raise MissingDependencyError("scikit-learn", extra="train", purpose="The demo's judge") from None
        others, held_out = split(load_data(config), config.hold_out)
        assert held_out.labels is not None
        features = _features(_pixels(held_out))
        self.images = len(held_out)
        self._model: Any = SVC(gamma="scale", C=10.0)
        self._model.fit(features, held_out.labels)
        assert others.labels is not None
        scored = slice(_MOST_SCORED)
        self.accuracy = float(self._model.score(_features(_pixels(others)[scored]), others.labels[scored]))
        self._spread = _spread(features, held_out.labels)

    def __call__(self, images: Pixels, labels: NDArray[np.int64]) -> Verdict:
        """Judge samples uint8 [N, H, W, C] of the requested classes [N]."""
        features = _features(images)
        correct = self._model.predict(features) == labels
        return Verdict(accuracy=float(correct.mean()), diversity=_spread(features, labels) / self._spread)


def _pixels(data: ImageSet) -> Pixels:
    assert isinstance(data.images, np.ndarray)  # the demo's digits are in memory
    return data.images


def _features(images: Pixels) -> NDArray[np.float64]:
    return images.reshape(len(images), -1).astype(np.float64) / 255


def _spread(features: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Mean Euclidean distance between two images of the same class, averaged over the classes."""
    spreads = []
    for label in np.unique(labels):
        rows = features[labels == label]
        total = sum(np.linalg.norm(rows - row, axis=1).sum() for row in rows)  # a matrix may not fit
        spreads.append(total / (len(rows) * (len(rows) - 1)))
    return float(np.mean(spreads))
