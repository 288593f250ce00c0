"""What a parameter is: a field of a frozen dataclass, checked when one is made; and all of them in a row."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from ssl_exit.errors import InputError, shown

T = TypeVar("T")
PYTHON = "(Python only)"  # flag of a field that has no place on the command line


def option(default: Any = MISSING, within: str = "", flag: str = "") -> Any:
    """A field of a group: its default, an interval of legal numbers such as "[0, 1)", and its name on the command
    line, where that is not the field's own."""
    return field(default=default, metadata={"within": within, "flag": flag})


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value has a type, where numbers may be NumPy's and a boolean is no number."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_is_a(value, each) for each in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin in (list, tuple):
        return isinstance(value, origin) and all(_is_a(each, args[0]) for each in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint)


def from_json(cls: type[T], saved: Any) -> T:
    """A dataclass from what `dataclasses.asdict` made of it.

    Raises:
        TypeError: a field is missing, unknown or of another type.
    """
    hints = get_type_hints(cls)
    values = {name: _nested(hints.get(name), value) for name, value in dict(saved).items()}
    if wrong := [name for name, value in values.items() if name not in hints or not _is_a(value, hints[name])]:
        raise TypeError(f"{cls.__name__} has {shown(wrong)}")
    return cls(**values)


def _nested(hint: Any, value: Any) -> Any:
    inner = get_args(hint)[0] if get_origin(hint) is list else None
    return [from_json(inner, one) for one in value] if isinstance(inner, type) and is_dataclass(inner) else value


def _inside(value: Any, within: str) -> bool:
    low, high = (float(end) for end in within[1:-1].split(","))
    return (low <= value if within[0] == "[" else low < value) and (
        value <= high if within[-1] == "]" else value < high
    )


def _describe(hint: Any, within: str = "") -> str:
    """A type in words, numbers with what they lie within, for a message."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {args}" if len(args) > 1 else repr(args[0])
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(each, within) for each in args)
    words = {
        int: f"a whole number{within}",
        float: f"a number{within}",
        bool: "True or False",
        str: "a string",
        type(None): "None",
    }
    return words.get(hint) or {list: "a list of names", tuple: "a tuple of names", dict: "a dictionary by name"}.get(
        get_origin(hint) or hint, getattr(hint, "__name__", str(hint))
    )


class Group:
    """Base of frozen dataclasses of parameters; wrong values are refused when one is made."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):  # type: ignore[arg-type]
            value, within = getattr(self, f.name), f.metadata.get("within", "")
            if not _is_a(value, hints[f.name]) or (within and isinstance(value, Real) and not _inside(value, within)):
                legal = _describe(hints[f.name], f" in {within}" if within else "")
                flag = f.metadata.get("flag", "")
                raise InputError(f"{f.name}{f' (--{flag})' if flag else ''} must be {legal}; got {shown(value)}")

    @classmethod
    def of(cls, value: Any) -> Self:
        """The group itself, or one whose first field has this value: `rule="mlp"` means `rule=Rule("mlp")`."""
        return value if isinstance(value, cls) else cls(value)  # type: ignore[call-arg]

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Self:
        """From values named as on the command line; those that are absent have their defaults."""
        hints = get_type_hints(cls)
        parts: dict[str, dict[str, Any]] = {}
        for leaf in options_of(cls):
            if leaf.flag in values:
                parts.setdefault(leaf.group, {})[leaf.name] = values[leaf.flag]
        own: dict[str, Any] = parts.pop("", {})
        return cls(**own, **{name: hints[name](**changes) for name, changes in parts.items()})


class Option(NamedTuple):
    """One parameter that is not a group: where it stands, and what the command line shows of it."""

    flag: str
    group: str
    name: str
    type: Any
    default: Any
    within: str
    help: str


def options_of(cls: type[Group], group: str = "") -> list[Option]:
    """All parameters of a class of groups, those of its own groups too, in order."""
    hints, texts = get_type_hints(cls), help_texts(cls)
    result: list[Option] = []
    for f in fields(cls):  # type: ignore[arg-type]
        if f.metadata.get("flag") == PYTHON:
            continue
        if isinstance(hints[f.name], type) and issubclass(hints[f.name], Group):
            result += options_of(hints[f.name], f.name)
        else:
            flag, within = f.metadata.get("flag") or f.name, f.metadata.get("within", "")
            result.append(Option(flag, group, f.name, hints[f.name], f.default, within, texts.get(f.name, "")))
    return result


def help_texts(documented: Any) -> dict[str, str]:
    """The line of help of every attribute or argument in a Google-style docstring, by name."""
    from docstring_parser import parse

    return {p.arg_name: " ".join((p.description or "").split()) for p in parse(documented.__doc__ or "").params}
