"""Write docs/configuration.md: the keys of a training file, from the configurations themselves."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from admtrt.config import DiffusionConfig, EdmConfig
from admtrt.run_config import RunConfig

_HEAD = """# Configuration

Every section and key of a training file. `make docs` writes this page, from the configurations themselves.

`admtrt configure FOLDER --out FILE.toml` writes a file to begin with; [training](training.md) says what the
choices do, and `configs/` holds the files of the models of this repository. `--set section.key=value`
overrides a key; `"none"` stands for no value. In `[unet]`, `[classifier]` and `[upsampler]`, `image_size` and
`in_channels` are those of `[data]` where left out.
"""


def page() -> str:
    """The whole text."""
    parts = [_HEAD]
    for name, field in RunConfig.model_fields.items():
        for title, model in _models(name, field):
            parts.append(f"## {title}\n{_text(model)}\n\n{_table(model)}")
    return "\n".join(parts)


def _models(name: str, field: FieldInfo) -> list[tuple[str, type[BaseModel]]]:
    if name == "diffusion":
        return [("[diffusion]", DiffusionConfig), ("[diffusion] of kind edm", EdmConfig)]
    found = [one for one in (field.annotation, *get_args(field.annotation)) if inspect.isclass(one)]
    return [(f"[{name}]", next(one for one in found if issubclass(one, BaseModel)))]


def _text(model: type[BaseModel]) -> str:
    """The docstrings of a configuration and of those that it extends, as Markdown."""
    own = [one for one in model.__mro__ if one.__module__.startswith("admtrt.") and one.__name__ != "Config"]
    texts = [inspect.cleandoc(one.__doc__) for one in reversed(own) if "__doc__" in vars(one) and one.__doc__]
    text = "\n\n".join(texts)
    text = re.sub(r":\w+:`~?([^`]*\.)?(\w+)`", r"`\2`", text)
    return text.replace("``", "`")


def _table(model: type[BaseModel]) -> str:
    rows = [
        f"| `{name}` | {_type(field)} | {_default(field)} |"
        for name, field in model.model_fields.items()
        if name != "guided_by"
    ]
    return "\n".join(["| key | values | default |", "|---|---|---|", *rows]) + "\n"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "`none`"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(one, name):g}"
        for one in _flat(field.annotation, list(field.metadata))
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(one, name, None) is not None
    ]
    return ", ".join(dict.fromkeys([_name(field.annotation), *bounds]))


def _flat(annotation: Any, metadata: list[Any]) -> list[Any]:
    """Everything that is noted about a type, within its parts, too."""
    found = [inner for one in metadata for inner in (one, *getattr(one, "metadata", ()))]
    for part in get_args(annotation):
        found += _flat(part, list(getattr(part, "__metadata__", ())))
    return found


def _name(annotation: Any) -> str:
    origin, parts = getattr(annotation, "__origin__", None), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _name(parts[0])
    if parts and all(isinstance(part, str | int) for part in parts):
        return ", ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        kinds = [_name(part) for part in parts if part is not Ellipsis]
        return f"list of {kinds[0]}" if Ellipsis in parts else f"{len(kinds)} of {kinds[0]}"
    if parts:
        return " or ".join(_name(part) for part in parts if part is not type(None))
    return {"int": "whole number", "float": "number", "bool": "`true`, `false`", "str": "text"}.get(
        annotation.__name__, annotation.__name__
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
