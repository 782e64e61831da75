"""Convert a request's fields to the pipeline's arguments: images, latents, classes and seeds."""

from __future__ import annotations

import base64
import binascii
import math
import secrets
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.contract import event_shape
from admtrt.errors import RequestError
from admtrt.npz import open_npz, reading_fault
from admtrt.runtime.guide_targets import OPERATOR, GuideTargets, target_sizes
from admtrt.runtime.image_inputs import ImageInputs, Known
from admtrt.runtime.images_in import Upload, read_mask_picture, read_npz, read_picture
from admtrt.runtime.latents import Latents
from admtrt.schedule.guides import unknown_guide
from admtrt.schedule.options import OPTIONS
from admtrt.serve.schema import MAX_IMAGES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from admtrt.npz import Header
    from admtrt.schedule.sampler import SamplerChoices
    from admtrt.serve.model import Draw, Model
    from admtrt.serve.schema import SampleRequest

_SAFE_SEEDS = 2**53
"""Number of integers that JavaScript represents exactly."""
_OPERATOR = 200  # characters: each part costs a matrix product
_WIDEST = 8  # bytes of the widest accepted dtype
_ZIP = b"PK"
_OF_GUIDES = ("guide_scale", "guide_interval", "guide_place", "guide_clip")
_CHOICES = ("method", "steps", "scale", "clip", "guidance_interval", *OPTIONS)


def checked_draw(request: SampleRequest, model: Model) -> Draw:
    """Check a request against a model and make its draw.

    Raises:
        RequestError: for anything that the model cannot do.
    """
    network = model.pipelines[0].bundle.manifest.network
    event = event_shape(network)
    low_res = None
    if request.low_res is not None:
        if network.low_res_size is None:
            raise RequestError(f"model '{model.name}' is no upsampler", hint="Leave low_res out.")
        small = (network.in_channels, network.low_res_size, network.low_res_size)
        low_res = pictures(request.low_res, "low_res", small)
    latents = None if request.latents is None else _latents(request.latents, event)
    inputs = ImageInputs(
        init=None if request.init is None else pictures(request.init, "init", event),
        strength=request.strength,
        known=_known(request, event),
        jump=None if request.jump is None else (request.jump[0], request.jump[1]),
        reference=None if request.reference is None else pictures(request.reference, "reference", event),
        low_pass=_low_pass(request.low_pass),
        latents=latents,
        targets=_targets(request, model, event),
        recurrence=request.recurrence,
    )
    choices: SamplerChoices = {name: getattr(request, name) for name in _CHOICES}  # type: ignore[assignment]
    if any(getattr(request, name) for name in ("guides", *_OF_GUIDES)):
        chosen = {name.removeprefix("guide_"): getattr(request, name) for name in _OF_GUIDES}
        choices["guided_by"] = model.pipelines[0].guide_choices(request.guides or {}, **chosen)
    if latents is not None:
        choices = latents.choices(choices)
    labels = _labels(request, latents)
    given = (labels, low_res, *_each(inputs), request.seeds if request.n is None else None)
    count = request.n or max((_rows(one) for one in given if one is not None), default=1)
    return model.draw(
        labels,
        _seeds(request.seeds, count),
        choices=choices,
        low_res=low_res,
        inputs=inputs,
        upsample_steps=request.upsample_steps,
        upsample_scale=request.upsample_scale,
    )


def _each(inputs: ImageInputs) -> list[Any]:
    known = inputs.known
    targets = [
        one for theirs in inputs.targets.given.values() for name, one in theirs.items() if name != OPERATOR
    ]
    return [inputs.init, None if known is None else known.images, inputs.reference, inputs.latents, *targets]


def _rows(given: Any) -> int:
    return 1 if isinstance(given, np.ndarray) and not given.ndim else len(given)


def _labels(request: SampleRequest, latents: Latents | None) -> list[int | str] | None:
    if request.classes is None:
        return None if latents is None or latents.labels is None else latents.labels.tolist()
    if request.n is None:
        return request.classes
    return [request.classes[index % len(request.classes)] for index in range(request.n)]


def _seeds(given: Sequence[int | str] | None, count: int) -> list[int]:
    if given is None:
        return [secrets.randbelow(_SAFE_SEEDS) for _ in range(count)]
    if len(given) != count:
        raise RequestError(f"{len(given)} seeds for {count} samples; give one for each")
    return [int(seed) for seed in given]


def _low_pass(given: int | list[int] | None) -> int | tuple[int, int] | None:
    return (given[0], given[1]) if isinstance(given, list) else given


def _known(request: SampleRequest, event: tuple[int, ...]) -> Known | None:
    if request.known is None or request.mask is None:
        return None
    masks = [
        read_mask_picture(_upload(text, f"mask[{index}]"), event) for index, text in enumerate(request.mask)
    ]
    images = pictures(request.known, "known", event)
    return Known(images, np.concatenate(masks), as_sampled=request.known_as_sampled)


def _targets(request: SampleRequest, model: Model, event: tuple[int, ...]) -> GuideTargets:
    """Decode the guides' targets. Sizes are checked before anything is decompressed."""
    manifest = model.pipelines[0].bundle.manifest
    targets: dict[str, dict[str, Any]] = {}
    for guide, sent in (request.guides or {}).items():
        if guide not in model.guides:
            raise unknown_guide(guide, model.guides, f"model '{model.name}'")
        operator = sent.get(OPERATOR)
        if operator is not None and len(operator) > _OPERATOR:
            raise RequestError(f"the operator of '{guide}' has more than {_OPERATOR} characters")
        targets[guide] = {}
        for name, text in sent.items():
            if name == OPERATOR:
                targets[guide][name] = text
                continue
            sizes = target_sizes(guide, manifest.guides[guide], name, operator, event)
            targets[guide][name] = _target(
                _upload(text, f"guides.{guide}.{name}"), sizes, mask=name == "mask"
            )
    return GuideTargets(targets)


def _target(upload: Upload, sizes: tuple[int, ...], *, mask: bool) -> NDArray[Any]:
    """Decode one target: an npz, or a picture if the target is an image."""
    if len(sizes) == 3 and not upload.getvalue().startswith(_ZIP):
        return read_mask_picture(upload, sizes) if mask else read_picture(upload, sizes)[None]

    def check(header: Header) -> None:
        largest = MAX_IMAGES * math.prod(sizes)
        if math.prod(header.shape) > largest or header.dtype.itemsize > _WIDEST:
            listed = ", ".join(map(str, sizes))
            raise RequestError(
                f"{upload} is {header}; expected float32 [N, {listed}], N at most {MAX_IMAGES}"
            )

    array = read_npz(upload, "the target", {"arr_0": check})["arr_0"]
    return array[None] if mask and array.ndim == 2 else array


def pictures(given: Sequence[str], name: str, event: tuple[int, ...]) -> NDArray[np.uint8]:
    """Decode the images of a request, uint8 [N, H, W, C].

    Raises:
        RequestError: naming the field that is not an image or has another size.
    """
    return np.stack(
        [read_picture(_upload(text, f"{name}[{index}]"), event) for index, text in enumerate(given)]
    )


def _latents(text: str, event: tuple[int, ...]) -> Latents:
    upload = _upload(text, "latents")
    _check_extent(upload, MAX_IMAGES * (math.prod(event) * 8 + 1024))
    return Latents.read(upload, event)


def _check_extent(upload: Upload, limit: int) -> None:
    """Refuse arrays that are larger than any request needs, before decompressing them."""
    try:
        with open_npz(upload) as archive:
            headers = [archive.header(name) for name in archive.names]
    except Exception as error:  # arbitrary bytes can raise anything
        raise RequestError(f"cannot read {upload} as .npz: {reading_fault(error)}") from None
    size = sum(math.prod(header.shape) * header.dtype.itemsize for header in headers)
    if size > limit:
        raise RequestError(f"{upload} holds {size} bytes; expected {limit} at most")


def _upload(text: str, name: str) -> Upload:
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{name} is not base64", hint="Send the bytes of a file as base64.") from None
    return Upload(content, name)
