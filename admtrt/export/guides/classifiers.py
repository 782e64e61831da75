"""Losses from classifiers of the predicted x_0 or of x_t. Label weights are soft and may be negative."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from admtrt.errors import LossError
from admtrt.export.guides.guide import Guide
from admtrt.schedule.guides import WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Sequence


class WeightedLogProbability(nn.Module):
    """- sum over classes of weights log p(class | x0); a negative weight steers away from a class.

    Args:
        logits: modules that map images to logits [N, classes]; the log p of several are averaged.
    """

    def __init__(self, logits: Sequence[nn.Module]) -> None:
        super().__init__()
        self.logits = nn.ModuleList(logits)

    def forward(self, x0: Tensor, weights: Tensor) -> Tensor:
        """The loss, [N]."""
        return _weighted([logits(x0) for logits in self.logits], weights)


class NoisyLogProbability(nn.Module):
    """- sum over classes of weights log p(class | x_t, t), of noisy classifiers.

    Args:
        logits: modules that map images and t to logits; the log p of several are averaged.
    """

    def __init__(self, logits: Sequence[nn.Module]) -> None:
        super().__init__()
        self.logits = nn.ModuleList(logits)

    def forward(self, x: Tensor, t: Tensor, weights: Tensor) -> Tensor:
        """The loss, [N]."""
        return _weighted([logits(x, t) for logits in self.logits], weights)


class AtZero(nn.Module):
    """A noisy classifier at t = 0, where images are clean.

    Args:
        classifier: called with x and t.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x0: Tensor) -> Tensor:
        """Logits, [N, classes]."""
        logits: Tensor = self.classifier(x0, torch.zeros_like(x0[:, 0, 0, 0]))
        return logits


def classifier(logits: Sequence[nn.Module], classes: int, name: str = "classifier") -> Guide:
    """The guide ``classifier``: of the predicted x_0, through the UNet, as Universal Guidance does.

    It is applied before x_0 is clipped. Applied after, nothing bounds x_0, and samples diverge at scales that
    are harmless here (``tools/clean_classifier_digits.py``).

    Args:
        logits: see :class:`WeightedLogProbability`.
        classes: of all of them.
        name: of the guide.
    """
    loss = WeightedLogProbability(logits)
    return Guide(name, loss, {WEIGHTS: (classes,)}, kind="classifier", place="before_clip", clip=False)


def noisy(logits: Sequence[nn.Module], classes: int, name: str = "noisy") -> Guide:
    """The guide ``noisy``: classifiers of x_t, applied as in Algorithm 2.

    Args:
        logits: see :class:`NoisyLogProbability`.
        classes: of all of them.
        name: of the guide.
    """
    loss = NoisyLogProbability(logits)
    return Guide(name, loss, {WEIGHTS: (classes,)}, through="x_t", kind="noisy", place="score")


def _weighted(logits: Sequence[Tensor], weights: Tensor) -> Tensor:
    log_p = (
        torch.stack([F.log_softmax(one, dim=-1) for one in logits]).mean(0)
        if len(logits) > 1
        else (F.log_softmax(logits[0], dim=-1))
    )
    return -(log_p * weights).sum(dim=-1)


def same_classes(counts: Sequence[int]) -> int:
    """The number of classes of several classifiers.

    Raises:
        LossError: if it differs, or there is no classifier.
    """
    if len(set(counts)) != 1:
        listed = ", ".join(map(str, counts)) or "no classifier"
        raise LossError(f"classifiers of one guide need the same classes; there are {listed}")
    return counts[0]
