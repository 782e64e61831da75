"""Configurations as TOML: reading, overriding single keys, writing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from admtrt.config_base import Config
from admtrt.config_values import NONE_IN_TOML
from admtrt.errors import ConfigError, OutputError
from admtrt.reading import read_small

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_LARGEST_FILE = 2**20  # bytes

ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(cls: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a TOML file and apply ``section.key=value`` overrides (values in TOML notation, or plain text).

    Raises:
        ConfigError: if the file is missing or not valid TOML, or as :meth:`Config.from_dict`.
    """
    data = read_toml(path)
    apply_overrides(data, overrides)
    return cls.from_dict(data, source=str(path) if not overrides else f"{path} with overrides")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: if it is missing or not valid TOML.
    """
    import tomllib

    try:
        return tomllib.loads(read_small(path, _LARGEST_FILE).decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def value_from_text(text: str) -> Any:
    """Parse a value in TOML's notation; anything else is plain text."""
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text.strip()


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put ``section.key=value`` overrides into plain data.

    Raises:
        ConfigError: for an override of another form, or whose path leads through a value.
    """
    for override in overrides:
        _apply_override(data, override)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    value = value_from_text(text)
    for part in parts[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {override!r}: '{part}' is a value, not a section")
    data[parts[-1]] = value


def save_config(config: Config, path: Path) -> None:
    """Write a configuration as TOML that :func:`load_config` reads back; unset optional keys are left out."""
    try:
        path.write_text(_to_toml(_set_values(config)), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None


def toml_of(config: Config, section: str) -> str:
    """TOML of a configuration, as one section."""
    return _to_toml({section: _set_values(config)})


def _set_values(config: Config) -> dict[str, Any]:
    """Plain data without the keys that are None by default."""
    data = config.to_dict()
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            data[name] = _set_values(value)
        elif value is None and field.default is None:
            data.pop(name, None)
    return data


def _to_toml(data: Mapping[str, Any], section: str = "") -> str:
    values = [f"{key} = {_toml_value(value)}" for key, value in data.items() if not isinstance(value, dict)]
    text = (f"[{section}]\n" if section else "") + "".join(f"{line}\n" for line in values)
    for key, value in data.items():
        if isinstance(value, dict):
            text += "\n" + _to_toml(value, f"{section}.{key}" if section else key)
    return text.lstrip("\n")


def _toml_value(value: Any) -> str:
    import json

    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, float):
        return repr(value)
    # JSON strings are valid TOML, except for escaped surrogates and for DEL.
    text = json.dumps(NONE_IN_TOML if value is None else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")
