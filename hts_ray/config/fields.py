"""What settings are made of: sections of typed fields, and the one walk over all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

_EXECUTION = "execution"


def _or_auto(kind: Any) -> BeforeValidator:
    """Return what lets `auto` pass and reports anything else as `kind` alone would."""
    known = TypeAdapter(kind)

    def check(value: Any) -> Any:
        try:
            return value if value == "auto" else known.validate_python(value)
        except ValidationError as error:
            message = f"{error.errors()[0]['msg']}, or auto".replace("{", "{{")
            raise PydanticCustomError("or_auto", message) from None  # type: ignore[arg-type]

    return BeforeValidator(check)


AutoNumber = Annotated[
    float | Literal["auto"], _or_auto(Annotated[float, Field(ge=0, allow_inf_nan=False)])
]
AutoBool = Annotated[bool | Literal["auto"], _or_auto(bool)]


def setting(default: Any, meaning: str, **bounds: Any) -> Any:
    """Declare a setting: its default, its meaning in a line, pydantic's bounds (ge, lt, ...)."""
    return Field(default, description=meaning, **bounds)


def execution(default: Any, meaning: str, **bounds: Any) -> Any:
    """Declare a setting that changes how a stage runs but not what it answers."""
    return setting(default, meaning, json_schema_extra={_EXECUTION: True}, **bounds)


class Section(BaseModel):
    """A group of settings: unknown keys are errors, values are immutable once set."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def _contradictions(self) -> Iterator[tuple[object, str]]:
        """Yield pairs: whether some settings contradict each other, and what to say then."""
        return iter(())

    @model_validator(mode="after")
    def _consistent(self) -> Section:
        for wrong, message in self._contradictions():
            if wrong:
                raise ValueError(message)
        return self

    def answer_settings(self) -> dict[str, Any]:
        """Return the settings that change the stage's answer, JSON-able, for hashing."""
        result: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if _is_execution(info):
                continue
            if isinstance(value, Section):
                result[name] = value.answer_settings()
            else:
                result[name] = json.loads(json.dumps(value, default=str))
        return result


@dataclass(frozen=True)
class Setting:
    """One field of the settings, or a whole section of them.

    - `name` is dotted, such as `train.optim.lr`;
    - `section` is its class where it is a section, else None;
    - `execution` says that it, or a section around it, does not change a stage's answer.
    """

    name: str
    info: FieldInfo
    section: type[Section] | None
    execution: bool

    @property
    def description(self) -> str:
        """What it means, in a line."""
        if self.section is not None:
            return (self.section.__doc__ or "").partition("\n")[0]
        return self.info.description or ""


def walk_settings(root: type[Section], prefix: str = "", runs: bool = False) -> Iterator[Setting]:
    """Yield every setting below a section, and each section right before what is in it.

    `prefix` is put before all names; `runs` says that all of them are of execution only.
    """
    for name, info in root.model_fields.items():
        inner = info.annotation
        section = inner if isinstance(inner, type) and issubclass(inner, Section) else None
        setting = Setting(f"{prefix}{name}", info, section, runs or _is_execution(info))
        yield setting
        if section is not None:
            yield from walk_settings(section, f"{setting.name}.", setting.execution)


def _is_execution(info: FieldInfo) -> bool:
    return isinstance(info.json_schema_extra, dict) and _EXECUTION in info.json_schema_extra
