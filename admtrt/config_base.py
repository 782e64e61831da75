"""The base class of all configurations: reading from plain data, error messages, writing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from admtrt.config_errors import explain
from admtrt.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

_WRITTEN = {"later": False}  # context of serialisation for files
_LATER: dict[str, Any] = {"later": True}  # marks fields


def later(default: Any) -> Any:
    """A field that older files lack; it is written only if its value is not the default."""
    return Field(default=default, json_schema_extra=_LATER)


class Config(BaseModel):
    """Base class of all configurations: immutable, hashable; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "configuration") -> Self:
        """Build from plain data.

        Raises:
            ConfigError: for an unknown key (naming the nearest), a wrong type or an impossible combination.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{source}: {explain(error, cls)}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data that :meth:`from_dict` turns back into an equal object.

        Files contain this form. To compare, use ``model_dump``, which has every field (see :func:`later`).
        """
        return self.model_dump(mode="json", context=_WRITTEN)

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        if info.context is _WRITTEN:
            for name, field in type(self).model_fields.items():
                if field.json_schema_extra is _LATER and getattr(self, name) == field.default:
                    del data[name]
        return data
