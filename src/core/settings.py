"""Validate configuration nodes with typed settings classes (pydantic) where they enter the code.

A settings class has one field per key. One message lists every problem of a node, with the keys as users type them.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, partial, wraps
from types import NoneType
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from src.core.errors import UserError
from src.core.text import typed

Class = TypeVar("Class", bound=type)
LARGEST = 65536
Size = Annotated[int, Field(ge=1, le=LARGEST)]
"""A width or a number of layers of a network; larger values are typos that would exhaust memory."""


class Settings(BaseModel):
    """Base of all settings: immutable; no unknown keys, no strings for numbers, no infinity unless a field allows it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    typed_as: ClassVar[Mapping[str, str]] = {}
    """Field name -> the key that users set, for fields that the configuration copies from elsewhere into this node."""

    @classmethod
    def parse(cls, values: Mapping[str, Any], key: str) -> Self:
        """Validate the plain values of the configuration node `key`. Raises one UserError with every missing, unknown and
        invalid key and what was expected."""
        try:
            return cls.model_validate(_plain(values))
        except ValidationError as error:
            problems = dict.fromkeys(_problem(cls, found, key, values) for found in error.errors())
            raise _user_error(list(problems)) from None


def one_of(names: Collection[str]) -> AfterValidator:
    """Return a validator that accepts only `names`, for `Annotated[str, one_of(TABLE)]`."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(", ".join(names))
        return name

    return AfterValidator(check)


def check_arguments(cls: type, values: Mapping[str, Any], key: str) -> None:
    """Raise UserError, with every problem, if `values` don't fit the annotated parameters of the constructor of `cls`.

    Includes the parameters of base classes if a constructor passes on `**options`. `key`: see `Settings.parse`.
    """
    _argument_settings(cls).parse(values, key)


def checked(key: str) -> Callable[[Class], Class]:
    """Decorate a class whose arguments come from the node `key`: its constructor first runs `check_arguments`."""

    def decorate(cls: Class) -> Class:
        construct = cls.__init__  # type: ignore[misc]
        names = list(inspect.signature(construct).parameters)[1:]

        @wraps(construct)
        def constructor(self: Any, *args: Any, **options: Any) -> None:
            check_arguments(cls, dict(zip(names, args, strict=False)) | options, key)
            construct(self, *args, **options)

        cls.__init__ = constructor  # type: ignore[misc]
        cls.check_arguments = staticmethod(partial(check_arguments, cls, key=key))  # type: ignore[attr-defined]
        return cls

    return decorate


@cache
def _argument_settings(cls: type) -> type[Settings]:
    fields: dict[str, Any] = {}
    for owner in cls.__mro__:  # from the derived class to its bases
        construct = owner.__dict__.get("__init__")
        if construct is None:
            continue
        hints = get_type_hints(construct, include_extras=True)
        parameters, derived = list(inspect.signature(construct).parameters.values())[1:], bool(fields)
        for p in parameters:
            filled_in = derived and p.default is p.empty  # passed by the constructor of the derived class
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and not filled_in:
                fields.setdefault(p.name, (hints[p.name], ... if p.default is p.empty else p.default))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return create_model(cls.__name__, __base__=Settings, **fields)


def class_at(place: object, base: type, key: str) -> type:
    """Import and return the class `place`, such as `package.module.Class`. UserError if it's missing or no subclass of `base`."""
    module, _, name = str(place).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(f"{key}={place!r}: {error}. Expected package.module.Class.") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"{key}={place!r}: expected a subclass of {base.__module__}.{base.__name__}.")
    return cls


def check_keys(values: Iterable[str], known: Collection[str], key: str = "") -> None:
    """Raise UserError if the configuration node `key` (empty: the root) has keys that are not in `known`."""
    if unknown := [_unknown(f"{key}.{name}".lstrip("."), name, known) for name in values if name not in known]:
        raise _user_error(unknown)


def _plain(value: Any) -> Any:
    """Convert nested mappings and sequences, as Hydra's `instantiate` leaves them, to dicts and lists."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return value if not isinstance(value, Sequence) or isinstance(value, str | bytes | tuple) else [*map(_plain, value)]


def _user_error(problems: list[str]) -> UserError:
    if len(problems) == 1:
        return UserError(problems[0])
    return UserError(f"{len(problems)} problems:\n" + "\n".join(f"  {text}" for text in problems))


def _unknown(place: str, name: object, known: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {near[0]}?)." if near else f". Known keys: {', '.join(sorted(known))}."
    return f"unknown key {place}{hint}"


def _problem(cls: type[Settings], error: Any, place: str, values: Mapping[str, Any]) -> str:
    """Word one pydantic error in terms of the configuration; a field's `description` tells what was expected."""
    owner: type[Settings] | None = cls
    annotation, value = None, values
    for part in error["loc"]:
        below = f"{place}.{part}".lstrip(".")
        place = owner.typed_as.get(part, below) if owner else below
        try:
            value = value[part]
        except (LookupError, TypeError):  # missing, or pydantic's name for a member of a union
            value = error["input"]
        if owner and error["type"] == "extra_forbidden" and part not in owner.model_fields:
            return _unknown(place, part, owner.model_fields)
        field = owner.model_fields.get(part) if owner else None
        if field and field.description and error["type"] != "missing":
            return f"{place}={typed(value)}: expected {field.description}."
        annotation = field.annotation if field else None
        owner = annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None
    if error["type"] == "missing":
        return f"{place} is missing."
    if error["type"] == "value_error" and isinstance(error["input"], Mapping):  # from a check of several keys
        return f"{place}: {error['ctx']['error']}"
    null = " or null" if NoneType in get_args(annotation) else ""
    return f"{place}={typed(error['input'])}: expected {_expected(error)}{null}."


def _expected(error: Any) -> str:
    words = {
        "greater_than_equal": "at least {ge:g}", "greater_than": "more than {gt:g}", "less_than_equal": "at most {le:g}",
        "less_than": "less than {lt:g}", "int_type": "a whole number", "float_type": "a number", "string_type": "text",
        "bool_type": "true or false", "finite_number": "a finite number", "dict_type": "a node of keys",
        "model_type": "a node of keys", "multiple_of": "a multiple of {multiple_of:g}", "tuple_type": "a list",
        "list_type": "a list", "literal_error": "{expected}", "value_error": "{error}",
    }  # fmt: skip
    text = words.get(error["type"], error["msg"].removeprefix("Input should be "))
    return text.format(**error.get("ctx", {})).replace("'", "")
