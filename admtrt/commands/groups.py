"""Groups of options, declared in a dataclass, so that commands stay short."""

from __future__ import annotations

import functools
import inspect
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Callable

Command = TypeVar("Command", bound="Callable[..., None]")


def takes_group(group: type[Any], parameter: str) -> Callable[[Command], Command]:
    """A decorator that adds a group's options to a command, which receives them as one parameter.

    Args:
        group: a dataclass whose fields are annotated like typer's parameters and have defaults.
        parameter: the command's parameter that receives the group; it is no option itself.
    """
    own_fields = fields(group)
    hints = get_type_hints(group, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
        for field in own_fields
    ]

    def decorated(command: Command) -> Command:
        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            options = group(**{field.name: given.pop(field.name) for field in own_fields})
            command(**given, **{parameter: options})

        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [one.replace(kind=keyword) for one in own if one.name != parameter]
        wrapped.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
        return cast("Command", wrapped)

    return decorated
