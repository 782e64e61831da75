"""Names and files of built-in guides, in a module of their own so that ``--help`` loads no PyTorch."""

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
"""Description of the file that each guide takes; empty if it takes none."""
