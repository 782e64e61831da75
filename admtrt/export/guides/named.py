"""Guides from the command line: built-in ones, some with a file, and those of a user's module."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from admtrt.contract import event_shape
from admtrt.errors import LossError, RequestError
from admtrt.export.guides import losses
from admtrt.export.guides.built_in import FILES
from admtrt.export.guides.classifiers import AtZero, classifier, noisy, same_classes
from admtrt.export.guides.encoders import Prepared, cosine
from admtrt.export.guides.guide import Guide, Reference
from admtrt.export.inside import OnnxFile
from admtrt.models.checkpoint import load_network
from admtrt.models.classifier import Classifier
from admtrt.models.pair import in_units_of
from admtrt.models.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from admtrt.export.guides.guide import AnyGuide
    from admtrt.models.checkpoint import LoadedNetwork

_FORM = "NAME, NAME=FILE, NAME=BUILT_IN[:FILE] or NAME=package.module:factory"


@dataclass(frozen=True)
class BuiltIn:
    """A built-in guide.

    Attributes:
        make: makes the guide from the loaded UNet and the file, which is None if not given.
        file: description of the file; empty if it takes none.
    """

    make: Callable[[LoadedNetwork, Path | None], AnyGuide]
    file: str = ""


def guides_named(texts: Sequence[str], unet: LoadedNetwork) -> list[AnyGuide]:
    """Make guides from texts, see :data:`_FORM`. This imports, and thus runs, a user's module.

    Raises:
        RequestError: for an unknown form, or a built-in guide without its file.
        LossError: if a user's factory returns no guide.
        CheckpointError: if a file is not a checkpoint of the right kind.
    """
    return [_named(text, unet) for text in texts]


def _named(text: str, unet: LoadedNetwork) -> AnyGuide:
    name, equals, rest = text.partition("=")
    kind, colon, place = rest.partition(":")
    if not equals:
        kind, file = name, None
    elif kind in BUILT_INS:
        file = Path(place) if colon else None
    elif name in BUILT_INS:
        kind, file = name, Path(rest)
    elif colon:
        return _from_module(name, kind, place, unet)
    else:
        raise RequestError(f"--guide {text!r} is not of the form {_FORM}", hint=_listed())
    if kind not in BUILT_INS:
        raise RequestError(f"--guide {text!r}: there is no built-in guide '{kind}'", hint=_listed())
    chosen = BUILT_INS[kind]
    if bool(chosen.file) != (file is not None):
        wants = f"needs a file: {chosen.file}" if chosen.file else "takes no file"
        raise RequestError(f"--guide {text!r}: the built-in guide '{kind}' {wants}")
    return chosen.make(unet, file).named(name)


def _listed() -> str:
    return f"Built-in guides: {', '.join(BUILT_INS)}; {_FORM}."


def _from_module(name: str, module: str, attribute: str, unet: LoadedNetwork) -> AnyGuide:
    """Call the factory in a user's module with the shape of the images."""
    sys.path.insert(0, str(Path.cwd()))  # like python -m
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(
            f"--guide {name}={module}:{attribute} cannot be imported: {error}",
            hint="Run the command in the folder of the module, or install its package.",
        ) from None
    finally:
        sys.path.pop(0)
    assert isinstance(unet.module, UNet)
    made = factory(event_shape(unet.module.config)) if callable(factory) else factory
    if not isinstance(made, Guide | Reference):
        raise LossError(
            f"{module}:{attribute} gives a {type(made).__name__}; expected an admtrt.Guide",
            hint="def factory(shape): return Guide(...), with shape (C, H, W).",
        )
    return made.named(name)


def _event(unet: LoadedNetwork) -> tuple[int, ...]:
    assert isinstance(unet.module, UNet)
    return event_shape(unet.module.config)


def _convolution(unet: LoadedNetwork, file: Path | None) -> Guide:
    import numpy as np
    import torch

    from admtrt.runtime.images_in import read_npz

    assert file is not None
    kernel = read_npz(file, "--guide", {"arr_0": lambda _: None})["arr_0"]
    if kernel.ndim != 2 or kernel.dtype.kind != "f" or not np.isfinite(kernel).all():
        raise RequestError(f"{file}: arr_0 is {kernel.dtype} {list(kernel.shape)}; expected a kernel [k, l]")
    return losses.convolution(_event(unet), torch.from_numpy(kernel.astype(np.float32)))


def _classifiers(unet: LoadedNetwork, file: Path | None) -> list[Classifier]:
    """Load classifiers from files joined by ``+``; they take t in the UNet's unit."""
    assert file is not None
    found = []
    for one in str(file).split("+"):
        loaded = in_units_of(unet.config.diffusion, load_network(Path(one), kind="classifier"))
        assert isinstance(loaded.module, Classifier)
        event = _event(unet)
        config = loaded.module.config
        if (config.in_channels, config.image_size, config.image_size) != event:
            raise RequestError(
                f"{one} judges {config.in_channels} x {config.image_size} x {config.image_size} images; the "
                f"UNet's are {' x '.join(map(str, event))}"
            )
        found.append(loaded.module)
    return found


def _clean(unet: LoadedNetwork, file: Path | None) -> Guide:
    assert file is not None
    if file.suffix.lower() == ".onnx":
        judge = OnnxFile(file)
        if judge.image != _event(unet) or len(judge.result) != 1:
            raise RequestError(
                f"{file} maps images {list(judge.image)} to {list(judge.result)}; expected "
                f"{list(_event(unet))} to [classes]"
            )
        return classifier([judge], judge.result[0])
    modules = _classifiers(unet, file)
    classes = same_classes([module.config.num_classes for module in modules])
    return classifier([AtZero(module) for module in modules], classes)


def _noisy(unet: LoadedNetwork, file: Path | None) -> Guide:
    modules = _classifiers(unet, file)
    return noisy(modules, same_classes([module.config.num_classes for module in modules]))


def _cosine(unet: LoadedNetwork, file: Path | None) -> Guide:
    """An encoder from an ONNX file, with CLIP's mean and standard deviation."""
    assert file is not None
    encoder = OnnxFile(file)
    if len(encoder.result) != 1:
        raise RequestError(f"{file} gives {list(encoder.result)} for an image; expected one embedding [D]")
    height, width = encoder.image[1:]
    return cosine(Prepared(encoder, _event(unet), (height, width)), encoder.result[0])


def _weak(_: LoadedNetwork, file: Path | None) -> Reference:
    assert file is not None
    loaded = load_network(file, kind="unet")
    assert isinstance(loaded.module, UNet)
    return Reference("weak", loaded.module)


_MAKERS: Mapping[str, Callable[[LoadedNetwork, Path | None], AnyGuide]] = {
    "linear": lambda unet, _: losses.linear(_event(unet)),
    "convolution": _convolution,
    "fourier": lambda unet, _: losses.fourier(_event(unet)),
    "tv": lambda unet, _: losses.total_variation(_event(unet)),
    "range": lambda unet, _: losses.value_range(_event(unet)),
    "classifier": _clean,
    "cosine": _cosine,
    "noisy": _noisy,
    "null": lambda _, __: Reference("null"),
    "weak": _weak,
}
assert _MAKERS.keys() == FILES.keys(), "the names of built_in.py are not those that are made here"
BUILT_INS: dict[str, BuiltIn] = {name: BuiltIn(_MAKERS[name], file) for name, file in FILES.items()}
"""The built-in guides by name."""
