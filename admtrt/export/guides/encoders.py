"""Losses from image encoders: the cosine between an image's embedding and a target."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from admtrt.errors import LossError
from admtrt.export.guides.guide import Guide
from admtrt.runtime.low_pass import bicubic_matrix

if TYPE_CHECKING:
    from collections.abc import Sequence

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's images, in [0, 1]."""
_LEAST = 1e-12


class Cosine(nn.Module):
    """1 - cosine(encoder(x0), embedding).

    Args:
        encoder: images to embeddings [N, D].
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x0: Tensor, embedding: Tensor) -> Tensor:
        """The loss, [N]."""
        found = self.encoder(x0)
        lengths = (found.square().sum(-1) * embedding.square().sum(-1)).clamp_min(_LEAST).sqrt()
        loss: Tensor = 1 - (found * embedding).sum(-1) / lengths
        return loss


class Prepared(nn.Module):
    """An encoder with its preprocessing: resize, normalise, convert to three channels.

    Args:
        encoder: images to embeddings.
        event: (C, H, W) of the given images, in [-1, 1].
        size: (h, w) of the encoder's input.
        mean, std: by channel, of the encoder's training images in [0, 1].
    """

    rows: Tensor
    columns: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        event: tuple[int, ...],
        size: tuple[int, int],
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__()
        if event[0] not in (1, len(mean)):
            raise LossError(f"an encoder of {len(mean)} channels takes no images of {event[0]}")
        self.encoder = encoder
        for name, own, target in (("rows", event[1], size[0]), ("columns", event[2], size[1])):
            self.register_buffer(name, torch.from_numpy(bicubic_matrix(own, target)).float())
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1))

    def forward(self, x0: Tensor) -> Tensor:
        """The embeddings, [N, D]."""
        resized = self.rows @ x0 @ self.columns.mT  # bicubic resizing, on which engines disagree
        embedding: Tensor = self.encoder(((resized + 1) / 2 - self.mean) / self.std)
        return embedding


def cosine(encoder: nn.Module, size: int, name: str = "cosine") -> Guide:
    """The guide ``cosine``.

    Args:
        encoder: images [N, C, H, W] in [-1, 1] to embeddings [N, size]; see :class:`Prepared`.
        size: of an embedding.
        name: of the guide.
    """
    return Guide(
        name, Cosine(encoder), {"embedding": (size,)}, kind="cosine", place="before_clip", clip=False
    )
