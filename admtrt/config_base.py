"""The base of all configurations: how they are read from plain data, refused, and written."""

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

_WRITTEN = {"later": False}  # context of what is written to files
_LATER: dict[str, Any] = {"later": True}  # marks fields


def later(default: Any) -> Any:
    """A field that files written before it lack, and that is written only where it is not the default."""
    return Field(default=default, json_schema_extra=_LATER)


class Config(BaseModel):
    """Base of all configurations: immutable, hashable, unknown keys refused."""

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

        It is what files hold; comparisons take ``model_dump``, which has every field (see :func:`later`).
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
