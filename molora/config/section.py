"""The base of every recipe section, and how a section refuses combinations of its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from molora.config.names import check_name
from molora.errors import ConfigError

CLASH = "clash"
Problem = tuple[tuple[str | int, ...], str]  # (path below the section, what is wrong and what is allowed)


class Bound(NamedTuple):
    """The bounds of a type of number, as Python checks and says them: pydantic has them beside it."""

    words: str
    holds: Callable[[Any], bool]
    whole: bool = False


def _count(most: int) -> Bound:
    words = f"must be at least 1 and at most {most:,}"
    return Bound(words, lambda n: type(n) is int and 1 <= n <= most, whole=True)


_NOT_BELOW_0 = Bound("must not be negative", lambda n: 0 <= n < float("inf"))
_ABOVE_0 = Bound("must be positive", lambda n: 0 < n < float("inf"))
# Upper bounds are far beyond any use; they keep a slip of the keyboard from asking for more memory than there is.
PositiveInt = Annotated[int, Field(ge=1, le=10**9), _count(10**9)]  # of steps, texts and the like
ExpertCount = Annotated[int, Field(ge=1, le=2**14), _count(2**14)]
Width = Annotated[int, Field(ge=1, le=2**16), _count(2**16)]  # of a matrix: a rank, a hidden layer
Fraction = Annotated[float, Field(ge=0, lt=1), Bound("must be in [0, 1)", lambda n: 0 <= n < 1)]
Share = Annotated[float, Field(gt=0, le=1), Bound("must be above 0 and at most 1", lambda n: 0 < n <= 1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _NOT_BELOW_0]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _ABOVE_0]


class Section(BaseModel):
    """Unknown keys are errors, types are exact (no "yes" for true, no 1.0 for 1), values do not change later.

    The text below a field says what it is, in docs/recipes.md, `molora recipes keys` and the JSON schema.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    def __init_subclass__(cls, **options: Any) -> None:
        """A section that inherits a declaration has its defaults, those that are made anew among them."""
        super().__init_subclass__(**options)
        for declared in getattr(cls, "__dataclass_fields__", {}).values():
            if declared.default_factory is not MISSING and declared.name not in vars(cls):
                setattr(cls, declared.name, Field(default_factory=declared.default_factory))


def refuse(problems: Iterable[Problem]) -> None:
    """Raise one validation error carrying all `problems`, if there are any."""
    found = list(problems)
    if found:
        text = "; ".join(f"{'.'.join(map(str, path))}: {message}" for path, message in found)
        raise PydanticCustomError(CLASH, "{text}", {"text": text, "problems": found})


def _name_rule(what: str) -> AfterValidator:
    """molora's one rule for names, as pydantic applies it."""

    def check(value: str) -> str:
        try:
            return check_name(value, what)
        except ConfigError as error:
            raise PydanticCustomError("name", "{text}", {"text": str(error).replace("\n  ", " ")}) from None

    return AfterValidator(check)


def _not_latest(name: str) -> str:
    if name.casefold() == "latest":
        raise PydanticCustomError(
            "name", "{text}", {"text": f"{name!r} is the link to a name's newest run; choose another name."}
        )
    return name


RunName = Annotated[str, _name_rule("run"), AfterValidator(_not_latest)]
TaskName = Annotated[str, _name_rule("task")]
ExpertName = Annotated[str, _name_rule("expert")]


def expand_shorthand(data: Any, key: str) -> Any:
    """`section: text` is `section: {key: text}`."""
    return {key: data} if isinstance(data, str) else data


def without_default(given: Mapping[str, Any], key: str, default: Any) -> dict[str, Any]:
    """`given` with `key` filled in where it is absent or null."""
    return {**given, key: default} if given.get(key) is None else dict(given)
