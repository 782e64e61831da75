"""Requests: every field with its type and limits. The OpenAPI description derives from this.

Fields have the names of the command line's options and of :class:`~admtrt.runtime.pipeline.Pipeline`'s
arguments. The pipeline checks whether a bundle supports them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from admtrt.schedule.guides import Place
from admtrt.schedule.options import OPTIONS
from admtrt.schedule.sampler import SamplerConfig
from admtrt.serve.flight import Priority

MAX_IMAGES = 64
"""The most samples of one request."""
_NAME = 64  # characters
_RESPACING = (  # bounded, since the schedule is computed before it can be refused
    r"^ *((ddim)?[0-9]{1,4}( *, *[0-9]{1,4})*|(leading|linspace|trailing):[0-9]{1,4}([+][0-9]{1,4})?) *$"
)
_MAX_BASE64 = 2**26  # characters; the server's limit of a body is far lower

Label = Annotated[int, Field(ge=0, le=10**6)] | Annotated[str, Field(max_length=200)]
Seed = Annotated[int, Field(ge=0, lt=2**64)] | Annotated[str, Field(pattern=r"^[0-9]{1,20}$")]
Base64 = Annotated[str, Field(max_length=_MAX_BASE64)]
Pictures = Annotated[list[Base64], Field(min_length=1, max_length=MAX_IMAGES)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Steps = Annotated[int, Field(ge=1, lt=10**4)] | Annotated[str, Field(max_length=_NAME, pattern=_RESPACING)]
ModelName = Annotated[str, Field(max_length=200)]
_Small = Annotated[str, Field(max_length=32, pattern=r"^[a-z][a-z0-9_]*$")]
_Targets = Annotated[dict[_Small, Base64], Field(max_length=16)]
_MOST_GUIDES = 8


class Strict(BaseModel):
    """Base of request models: unknown fields and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _option_fields() -> dict[str, Any]:
    """One field per solver option, with its type in the sampler's configuration."""
    fields, made = SamplerConfig.model_fields, {}
    for name, option in OPTIONS.items():
        kind: Any = fields[name].annotation
        if fields[name].metadata:
            kind = Annotated[(kind, *fields[name].metadata)]
        made[name] = (kind | None, Field(default=None, description=option.help))
    return made


_Options = create_model("_Options", __base__=Strict, **_option_fields())


class SampleRequest(_Options):
    """Samples to draw and how to answer; fields that are left out are the bundle's recommendation."""

    model: ModelName | None = Field(
        None, description="Name of the model; may be left out where there is one."
    )
    classes: Annotated[list[Label], Field(min_length=1, max_length=MAX_IMAGES)] | None = Field(
        None, description="Class of each sample, by number or name."
    )
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = Field(
        None, description="Number of samples; the classes take turns."
    )
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=MAX_IMAGES)] | None = Field(
        None, description="Seed of each sample, as a number or as digits; drawn below 2**53 where left out."
    )
    steps: Steps | None = Field(
        None, description="A respacing (250, ddim25, leading:50) or a number of evaluations."
    )
    method: Annotated[str, Field(max_length=_NAME)] | None = Field(None, description="The solver.")
    scale: Finite | None = Field(None, description="Guidance scale; 0 is unguided.")
    clip: bool | None = Field(None, description="Bound x_0 to [-1, 1].")
    guidance_interval: tuple[Finite, Finite] | None = Field(
        None, description="Guide only at noise levels in this interval."
    )
    low_res: Pictures | None = Field(None, description="Images to enlarge, base64 PNG; of an upsampler.")
    init: Pictures | None = Field(None, description="Images to start at, base64 PNG; one serves all.")
    strength: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="How much of the way is gone from `init`."
    )
    known: Pictures | None = Field(None, description="Images with known pixels, base64 PNG.")
    mask: Pictures | None = Field(None, description="White is known and kept, black is drawn; base64 PNG.")
    known_as_sampled: bool = Field(False, description="Leave known pixels as the networks make them.")
    jump: Annotated[list[Annotated[int, Field(ge=1, le=100)]], Field(min_length=2, max_length=2)] | None = (
        Field(None, description="Resampling around known pixels: steps back, and times.")
    )
    reference: Pictures | None = Field(None, description="Images whose low frequencies are kept.")
    low_pass: (
        Annotated[int, Field(ge=2, le=8192)]
        | Annotated[list[Annotated[int, Field(ge=0, le=10**6)]], Field(min_length=2, max_length=2)]
        | None
    ) = Field(None, description="Factor of their reduction, or that and the step down to which they hold.")
    latents: Base64 | None = Field(None, description="base64 npz of latents, as inversion writes them.")
    recurrence: Annotated[int, Field(ge=1, le=100)] | None = Field(
        None, description="How often each noise level is evaluated."
    )
    guides: Annotated[dict[_Small, _Targets], Field(max_length=_MOST_GUIDES)] | None = Field(
        None,
        description="The guides of the bundle that guide, each with its targets by name: base64 npz (arr_0) "
        "with a row for each sample or one for all, images and masks also as base64 PNG; `operator` of "
        "`linear` is a text as sr:4.",
    )
    guide_scale: Annotated[dict[_Small, Finite], Field(max_length=_MOST_GUIDES)] | None = Field(
        None, description="Scale of a guide, by its name."
    )
    guide_interval: Annotated[dict[_Small, tuple[Finite, Finite]], Field(max_length=_MOST_GUIDES)] | None = (
        Field(None, description="Noise levels at which alone a guide guides.")
    )
    guide_place: Annotated[dict[_Small, Place], Field(max_length=_MOST_GUIDES)] | None = Field(
        None, description="Where a guide enters."
    )
    guide_clip: Annotated[dict[_Small, bool], Field(max_length=_MOST_GUIDES)] | None = Field(
        None, description="Whether a guide's loss sees x_0 within [-1, 1]."
    )
    upsample_steps: Steps | None = Field(None, description="Of the second stage.")
    upsample_scale: Finite | None = Field(None, description="Of the second stage; 0 where left out.")
    format: Literal["png", "npz"] = Field("png", description="JSON with base64 PNG, or an npz file.")
    stream: bool = Field(False, description="Answer by events.")
    preview_every: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="Evaluations between two previews of a stream; 0 for none."
    )
    priority: Priority = Field("interactive", description="`batch` takes what the others leave.")
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(
        None, description="Seconds after which nobody wants the answer."
    )

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if (self.known is None) != (self.mask is None):
            raise ValueError("known and mask belong together")
        if self.preview_every and not self.stream:
            raise ValueError("previews come by a stream; set stream")
        if self.stream and self.format != "png":
            raise ValueError("a stream carries png; leave format out")
        return self


class InversionAsked(Strict):
    """Images to invert by DDIM."""

    model: ModelName | None = Field(
        None, description="Name of the model; may be left out where there is one."
    )
    images: Pictures = Field(description="base64 PNG.")
    classes: Annotated[list[Label], Field(min_length=1, max_length=MAX_IMAGES)] | None = Field(
        None, description="Class of each image, where the network takes them."
    )
    steps: Steps | None = Field(None, description="Of ddim; ddim100 where left out.")
    levels: Annotated[int, Field(ge=1, lt=10**4)] | None = Field(
        None, description="How many of the steps to go up; all but one where left out."
    )
    clip: bool = Field(False, description="Bound x_0 on the way; where that acts, inversion is not exact.")
    format: Literal["json", "npz"] = Field("json", description="JSON with base64 of the npz, or the npz.")
    priority: Priority = Field("interactive", description="`batch` takes what the others leave.")
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = Field(
        None, description="Seconds after which nobody wants the answer."
    )


class ImageRequest(Strict):
    """OpenAI's ``images/generations``, as far as a class-conditional model can honour it."""

    prompt: Annotated[str, Field(min_length=1, max_length=2000)] = Field(
        description="A class by name or number; several with commas between."
    )
    model: ModelName | None = None
    n: Annotated[int, Field(ge=1, le=10)] | None = Field(None, description="Images of each class.")
    size: Annotated[str, Field(max_length=20)] | None = Field(None, description="That of the model, or auto.")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    user: Annotated[str, Field(max_length=200)] | None = Field(None, description="Noted nowhere.")
    seed: Seed | None = Field(None, description="Of the first image; each further one has the next.")
    num_inference_steps: Steps | None = None
    guidance_scale: Finite | None = None


def faults_of(error: ValidationError) -> list[dict[str, str]]:
    """The faults of a request by field, without repeating client data."""
    found: dict[str, str] = {}
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        where = [part for place, part in enumerate(fault["loc"]) if place == 0 or isinstance(part, int)]
        place = ".".join(str(part)[:60] for part in where) or "body"
        found.setdefault(place, fault["msg"].removeprefix("Value error, "))
    return [{"field": place, "message": message[:500]} for place, message in list(found.items())[:20]]
