"""Error messages for configurations: the path of the key, the error, and the most similar known key."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from admtrt.brief import beginning

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic import ValidationError

_ORIGINAL_FLAGS = {
    "channels": "in_channels",
    "class_cond": "num_classes",
    "classifier_attention_resolutions": "attention_resolutions",
    "classifier_depth": "num_res_blocks",
    "classifier_pool": "pool",
    "classifier_resblock_updown": "resblock_updown",
    "classifier_use_scale_shift_norm": "scale_shift_norm",
    "classifier_width": "model_channels",
    "diffusion_steps": "steps",
    "large_size": "image_size",
    "noise_schedule": "schedule",
    "num_channels": "model_channels",
    "predict_xstart": "mean_type",
    "sigma_small": "variance_type",
    "small_size": "low_res_size",
    "use_new_attention_order": "new_attention_order",
    "use_scale_shift_norm": "scale_shift_norm",
}


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """Describe all errors that pydantic found in a ``cls``, in one line."""
    lines = []
    for item in error.errors(include_url=False):
        names, model = _place(item["loc"], cls)
        path = ".".join(names)
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key '{path}'" + _suggestion(names[-1], model))
        elif item["type"] == "missing":
            lines.append(f"'{path}' is required")
        elif item["type"] == "value_error":
            text = item["msg"].removeprefix("Value error, ")
            lines.append(f"'{path}': {text}" if path else text)
        elif item["type"] == "union_tag_invalid":
            kind, kinds = item["input"]["kind"], item["ctx"]["expected_tags"]
            near = nearest_name(str(kind), kinds.replace("'", "").split(", "))
            meant = f"; did you mean '{near}'?" if near else ""
            lines.append(f"'{path}.kind' is {_shown(kind)}; expected one of {kinds}{meant}")
        elif item["type"] == "union_tag_not_found":
            lines.append(f"'{path}' is {_shown(item['input'])}; input should be a table")
        else:
            lines.append(f"'{path}' is {_shown(item['input'])}; {item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join(lines)


def _shown(value: Any) -> str:
    return beginning(repr(value), 60)


def _place(loc: tuple[int | str, ...], cls: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The names that lead to an error, and the model that has the last name, if known.

    For a field with several possible models, pydantic inserts the kind of the chosen model, which is not in
    the user's file.
    """
    names: list[str] = []
    model: type[BaseModel] | None = cls
    choices: list[type[BaseModel]] = []
    for part in loc:
        chosen = next((one for one in choices if len(choices) > 1 and _kind_default(one) == part), None)
        if chosen is not None:
            model, choices = chosen, []
            continue
        if choices:
            model, choices = choices[0], []
        names.append(str(part))
        field = None if model is None else model.model_fields.get(str(part))
        if field is not None:
            choices = list(_models_in(field.annotation))
        # Otherwise the part is an index or a key of the previous value.
    return names, model


def _kind_default(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return None if field is None else field.default


def _suggestion(name: str, model: type[BaseModel] | None) -> str:
    if model is None:
        return ""
    names = sorted(model.model_fields)
    near = nearest_name(name, names)
    return f"; did you mean '{near}'?" if near else f" (known: {', '.join(names)})"


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """Guess the key that an unknown name means: a flag of the original code, else the most similar key."""
    if _ORIGINAL_FLAGS.get(name) in known:
        return _ORIGINAL_FLAGS[name]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
