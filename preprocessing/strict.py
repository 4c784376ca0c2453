"""Plain values, as TOML and JSON give them, into frozen dataclasses, strictly."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from preprocessing.errors import InputError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str, section: str = "") -> T:
    """Make the dataclass `cls` from a mapping, strictly.

    Args:
        cls: a keyword-only dataclass; nested dataclasses are its sections, tuples of dataclasses
            its arrays of tables, dicts tables with keys of the user's. Where a section may be one
            of several dataclasses, its key `name` tells which; without it, it is the first.
        values: what the recipe says.
        where: file, for messages.
        section: dotted path of `cls` in the recipe.

    Raises:
        InputError: unknown or missing key, wrong type, or a value that the dataclass refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise InputError(f"{where}: unknown key {_dotted(section, key)}{_hint(key, fields)}")
    arguments: dict[str, Any] = {}
    for key, spec in fields.items():
        name = _dotted(section, key)
        kinds = _dataclasses(hints[key])
        if kinds:
            table = values.get(key, {})
            if not isinstance(table, Mapping):
                raise InputError(f"{where}: {name} must be a section, [{name}]")
            arguments[key] = build(_named(kinds, table, where, name), table, where, name)
        elif typing.get_origin(hints[key]) is tuple:
            cls_of_table = typing.get_args(hints[key])[0]
            tables = values.get(key, [])
            if not isinstance(tables, list) or not all(isinstance(t, Mapping) for t in tables):
                raise InputError(f"{where}: {name} must be tables, each under [[{name}]]")
            arguments[key] = tuple(
                build(cls_of_table, table, where, f"{name}.{number}")
                for number, table in enumerate(tables, 1)
            )
        elif typing.get_origin(hints[key]) is dict and key in values:
            arguments[key] = _build_dict(hints[key], values[key], where, name)
        elif key in values:
            arguments[key] = _convert(values[key], hints[key], f"{where}: {name}")
        elif spec.default is spec.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: {name} is missing: add it, or give {name}=VALUE")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise InputError(f"{where}: {f'[{section}] ' if section else ''}{error}") from error


def _build_dict(hint: Any, table: Any, where: str, name: str) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise InputError(f"{where}: {name} must be a section, [{name}]")
    _, kind = typing.get_args(hint)
    if not dataclasses.is_dataclass(kind):
        return {
            key: _convert(value, kind, f"{where}: {name}.{key}") for key, value in table.items()
        }
    built = {}
    for key, value in table.items():
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {name}.{key} must be a section, [{name}.{key}]")
        built[key] = build(typing.cast(Any, kind), value, where, f"{name}.{key}")
    return built


def _dataclasses(hint: Any) -> list[Any]:
    """The dataclass, or the several ones of a union, that a hint consists of; else none."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [*kinds] if all(dataclasses.is_dataclass(kind) for kind in kinds) else []


def _named(kinds: list[Any], table: Mapping[str, Any], where: str, section: str) -> Any:
    """The dataclass whose default of `name` the table gives."""
    if len(kinds) == 1:
        return kinds[0]
    names = {
        spec.default: k for k in kinds for spec in dataclasses.fields(k) if spec.name == "name"
    }
    name = table.get("name", next(iter(names)))
    if name not in names:
        choices = ", ".join(map(repr, names))
        raise InputError(f"{where}: {section}.name = {name!r}: choose one of {choices}")
    return names[name]


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the type `hint`, where that loses nothing."""
    if typing.get_origin(hint) is list:
        if type(value) is not list or not all(type(item) is str for item in value):
            raise InputError(f"{where} = {value!r}: must be a list of strings")
        return value
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
        origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise InputError(f"{where} = {value!r}: choose one of {', '.join(map(repr, choices))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where} = {value!r}: must be {_ARTICLES.get(hint, hint)}")
    return value


_ARTICLES = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
}


def _dotted(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _hint(key: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, list(known), n=1)
    return f": did you mean {nearest[0]}?" if nearest else f" (known: {', '.join(known)})"
