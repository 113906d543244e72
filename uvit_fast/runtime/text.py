"""Text that users write: how messages quote it, and YAML values in it."""

import reprlib
from typing import Any

import yaml

CUT = 80  # characters of a user's value that a message quotes


def shown(value: Any) -> str:
    """Return a user's value, whatever it is, as a message quotes it: on one line, cut at 80 characters."""
    return cut(repr(value[: CUT + 1]) if isinstance(value, str) else _BRIEF.repr(value))


def cut(text: str) -> str:
    """Return a user's text on one line of at most 80 characters."""
    text = text[: CUT + 1]
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= CUT else text[: CUT - 1] + "…"


def printable(text: str) -> str:
    """Return text on one line for any terminal: bytes that are not UTF-8 and control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Brief(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 300 else f"an integer of {x.bit_length()} bits"


_BRIEF = _Brief()
_BRIEF.maxstring = _BRIEF.maxother = CUT


class _Loader(yaml.SafeLoader):
    """Load YAML's safe values. A value that does not fit its tag and a repeated key are errors with their position."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"no {kind} that can be used", problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse a YAML value of the safe kinds.

    Raises:
        ValueError: it is not one; the message says what is wrong and where.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        hint = "; text that begins with * wants quotes" if "alias" in f"{error.context} {error.problem}" else ""
        raise ValueError(f"{cut(error.problem or error.context or '')}{where}{hint}") from None
    except yaml.YAMLError as error:
        raise ValueError(cut(" ".join(str(error).split()))) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
