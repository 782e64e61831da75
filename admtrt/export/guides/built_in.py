"""Names and files of built-in guides, apart from their making, so that ``--help`` loads no PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

FILES: Mapping[str, str] = {
    "linear": "",
    "convolution": "an .npz with the kernel, float [k, l], as arr_0",
    "fourier": "",
    "tv": "",
    "range": "",
    "classifier": "a classifier's checkpoint, several joined by +, or an ONNX file",
    "cosine": "an image encoder's ONNX file, which takes images as CLIP's do",
    "noisy": "a noisy classifier's checkpoint, or several joined by +",
    "null": "",
    "weak": "the checkpoint of a smaller or earlier UNet",
}
"""The file that each takes, in words; empty where it takes none."""
