"""What all sections of a config share: `Section`, and the types of paths and names.

Paths are kept absolute, so that a run can be continued from another folder.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from uvit_fast.runtime.text import shown


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and a loaded config does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError(f"expected a number, got {str(value).lower()}")
        if isinstance(value, set):  # YAML's !!set, whose order is arbitrary
            raise ValueError(f"expected a list in brackets, got {shown(value)}")
        return value

    @model_validator(mode="after")
    def _can_name_files(self) -> Section:
        for key, value in self:
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"{key}: expected text without the character 0, got {shown(value)}")
        return self


def fits_a_file_system(path: str) -> str:
    if len(path) > 4000 or any(len(os.fsencode(part)) > 255 for part in path.split("/")):
        raise ValueError(f"expected a path that a file system can hold, got {len(path)} characters, {shown(path)}")
    return path


def absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path)) if path else path


def _absolute_folder(name: str) -> str:
    return absolute(name) if os.path.isdir(os.path.expanduser(name)) else name


LocalPath = Annotated[str, AfterValidator(fits_a_file_system), AfterValidator(absolute)]
FolderOrHub = Annotated[str, AfterValidator(fits_a_file_system), AfterValidator(_absolute_folder)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


def wrong_value(error: Any) -> str:
    """Return what pydantic expected, and what was given, in our words."""
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    kinds = {
        "tuple_type": "expected a list in brackets",
        "string_type": "expected text",
        "string_too_short": "expected text that is not empty",
        "string_too_long": "expected text of at most {max_length} characters",
        "too_short": "expected a list of at least {min_length}",
        "too_long": "expected a list of at most {max_length}",
        "dict_type": "expected keys with values",
        "model_type": "expected a section of keys with values",
        "model_attributes_type": "expected a section of keys with values",
        "missing": "missing",
        "extra_forbidden": "unknown key",
        "int_parsing_size": "expected a smaller number",
    }
    words = kinds[error["type"]].format(**error.get("ctx", {})) if error["type"] in kinds else error["msg"]
    return f"{words.replace('Input should be', 'expected')}, got {shown(error['input'])}"
