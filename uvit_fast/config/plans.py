"""`sample.cache`: none, outer:N:K, or a plan's file, which says which sublayers reuse their last output, and when."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, Field, ValidationError

from uvit_fast.config.section import Section, absolute, fits_a_file_system, wrong_value
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import write_whole
from uvit_fast.runtime.text import cut, parse_yaml, shown


def _plan_of_layers(value: str) -> str:
    name, *numbers = value.split(":")
    if value == "none" or (name == "outer" and 1 <= len(numbers) <= 2 and all(n.isdecimal() for n in numbers)):
        if numbers and (int(numbers[0]) < 2 or int(numbers[-1]) < 1):
            raise ValueError(
                f"expected outer:N:K with N of at least 2 evaluations and K of at least 1 block, got {value}"
            )
        return value
    if not value.endswith((".yaml", ".yml", ".json")):
        raise ValueError(f"expected none, outer:N, outer:N:K, or a plan's .yaml or .json file, got {shown(value)}")
    return absolute(fits_a_file_system(value))


CachedLayers = Annotated[str, AfterValidator(_plan_of_layers)]


class CachePlan(Section):
    """A plan's file, YAML or JSON."""

    about: str = Field("", description="Where the plan comes from, for readers.")
    steps: int = Field(ge=1, le=10**5, description="Network evaluations per sample for which it is made.")
    sampler: str | None = Field(None, description="sample.sampler for which it is made. Default: any.")
    reuse: dict[int, tuple[str, ...]] = Field(
        description="Evaluation, from 0 -> sublayers that reuse their last output, as in_blocks.3.attn or *.mlp."
    )


def read_plan(path: Path) -> CachePlan:
    """Read a plan.

    Raises:
        UserError: no such file, or not a plan.
    """
    try:
        return CachePlan.model_validate(parse_yaml(path.read_text("utf-8-sig")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        why = f"{where + ': ' if where else ''}{wrong_value(first)}"
    except (OSError, ValueError) as error:
        why = cut(str(getattr(error, "strerror", None) or error))
    raise UserError(f"sample.cache {cut(str(path))}: expected a plan, with steps and reuse: {why}")


def write_plan(plan: CachePlan, path: Path) -> None:
    """Write it as JSON if the name says so, otherwise as YAML, whole or not at all."""
    if path.suffix == ".json":
        text = plan.model_dump_json(indent=1, exclude_none=True)
    else:
        text = yaml.safe_dump(
            plan.model_dump(mode="json", exclude_none=True), sort_keys=False, width=120, default_flow_style=None
        )
    write_whole(path, lambda file: file.write_text(text, "utf-8"))


def expanded(plan: CachePlan, names: Sequence[str], source: str) -> tuple[frozenset[str], ...]:
    """Return the sublayers that each evaluation reuses, for a network that has `names`.

    Raises:
        UserError: an evaluation that does not exist, or a name that matches no sublayer.
    """
    reuse = [frozenset[str]()] * plan.steps
    for evaluation, patterns in plan.reuse.items():
        if not 0 <= evaluation < plan.steps:
            raise UserError(f"{source}: expected evaluations from 0 to {plan.steps - 1}, got {evaluation}")
        for pattern in patterns:
            reuse[evaluation] |= frozenset(fitting(pattern, names, source))
    return tuple(reuse)


def fitting(pattern: str, names: Sequence[str], source: str) -> list[str]:
    """Return the sublayers' `names` that a name or pattern matches: a block's name matches all of it, and blocks are
    counted from the end with -1, -2, ...

    Raises:
        UserError: it matches none.
    """
    side, _, rest = pattern.partition(".")
    index, dot, part = rest.partition(".")
    if re.fullmatch(r"-[1-9]\d*", index):
        blocks = {name.split(".")[1] for name in names if name.startswith(f"{side}.")}
        whole = f"{side}.{len(blocks) + int(index)}{dot}{part}"
    else:
        whole = pattern
    found = [name for name in names if fnmatchcase(name, whole) or fnmatchcase(name, f"{whole}.*")]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; they are {names[0]} to {names[-1]}"
        raise UserError(f"{source}: the network has no sublayer {shown(pattern)}{hint}")
    return found


def contracted(names: Sequence[str], reused: frozenset[str]) -> tuple[str, ...]:
    """Return few patterns that match exactly the reused ones among `names`."""
    groups = [
        "*",
        "*.attn",
        "*.mlp",
        *(f"{side}.{part}" for side in ("in_blocks", "out_blocks") for part in ("*", "*.attn", "*.mlp")),
    ]
    groups += [f"{name.rpartition('.')[0]}.*" for name in names]
    found, left = [], set(reused)
    for pattern in [*groups, *names]:
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if fitting & left and fitting <= reused:
            found.append(pattern)
            left -= fitting
    return tuple(found)
