"""JSON and YAML that strangers may have written: read within bounds, as data and nothing else.

A kilobyte of YAML can stand for gigabytes by its aliases, and a deep document exhausts the stack of
whoever walks through it.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lsa.runtime.errors import InputError

JSON_SIZE = 64 << 20  # bytes; curves and heat maps of a probe are far below
YAML_SIZE = 256 << 10  # bytes; the parser takes seconds for more
YAML_VALUES = 20_000  # in the document that the aliases stand for
DEPTH = 40  # of lists and mappings in each other
YAML = "tag:yaml.org,2002:"  # + a kind: what a value is
# What JSON can say as well, since projects are logged as JSON; and what other kinds are called.
KINDS = ("null", "bool", "int", "float", "str", "seq", "map", "merge")
KEYS = {"null": "nothing", "bool": "true or false", "int": "a number", "float": "a number"}


def read_json(path: Path, name: str = "") -> Any:
    """A JSON file's content.

    Args:
        path: The file.
        name: What messages call it; its own name by default.

    Raises:
        InputError: It is not there, no JSON, or beyond the bounds.
    """
    name = name or path.name
    return parse_json(_text(path, name, JSON_SIZE), name)


def parse_json(text: str, name: str) -> Any:
    """The value of a JSON text.

    Raises:
        InputError: No JSON, or nested too deeply.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not readable JSON ({_reason(error)}); get it again") from None
    level = [content]
    for _ in range(DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return content
    raise InputError(f"{name} nests its values more than {DEPTH} deep; get it again")


def whole_number(text: str) -> int | None:
    """The whole number that a tag or parameter holds, of at most 64 bits; None of any other text.

    `int` takes other scripts' digits, spaces and underscores, and refuses thousands of digits.
    """
    number = int(text) if re.fullmatch("-?[0-9]{1,19}", text) else None
    return number if number is not None and -(2**63) <= number < 2**63 else None


def json_number(value: float) -> float | str:
    """A JSON number, or the name of one that JSON does not have."""
    return float(value) if math.isfinite(value) else str(float(value))


def _children(node: Any) -> list[Any]:
    """The lists and mappings directly inside a value."""
    inside = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [child for child in inside if isinstance(child, dict | list)]


def read_yaml(path: Path) -> Any:
    """A YAML file's content.

    Raises:
        InputError: It cannot be read, is no YAML, or is beyond the bounds.
    """
    return parse_yaml(_text(path, str(path), YAML_SIZE), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text.

    Raises:
        InputError: It is no YAML, or is beyond the bounds.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, name)
        return loader.construct_document(node)
    except InputError:
        raise
    # Beside its own errors, the parser passes on those of `int`, `datetime` and others on values
    # such as `!!int ''` or `2020-13-45`.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{name} is not readable YAML: {_reason(error)}; mend it") from None
    except RecursionError:
        raise InputError(f"{name} nests its values more than {DEPTH} deep; flatten it") from None
    finally:
        if loader:
            loader.dispose()


def _measure(node: Node, known: dict[int, tuple[int, int]], name: str) -> tuple[int, int]:
    """Number of values and depth of what a node stands for, every alias written out."""
    if id(node) in known:
        values, depth = known[id(node)]
        if not values:
            raise InputError(f"{name} holds an alias inside of what it stands for; write it out")
        return values, depth
    known[id(node)] = 0, 0  # under way
    _check_kind(node, name)
    values, depth = 1, 0
    inside: list[Node] = []
    if isinstance(node, SequenceNode):
        inside = node.value
    elif isinstance(node, MappingNode):
        _check_keys(node, name)
        inside = [part for pair in node.value for part in pair]
    for child in inside:
        more, below = _measure(child, known, name)
        values, depth = values + more, max(depth, below)
    if values > YAML_VALUES:
        raise InputError(f"{name} stands for more than {YAML_VALUES} values; shorten it")
    if depth >= DEPTH:
        raise InputError(f"{name} nests its values more than {DEPTH} deep; flatten it")
    known[id(node)] = values, depth + 1
    return known[id(node)]


def _check_kind(node: Node, name: str) -> None:
    """Refuse a value that YAML reads in a way that surprises people, such as 010 for 8."""
    kind = node.tag.removeprefix(YAML)
    text = node.value if isinstance(node, ScalarNode) else "…"
    if kind == "timestamp":
        reason = f"{text} is a date to YAML; write it in quotes, or a number in its place"
    elif kind not in KINDS:
        reason = f"{node.tag} is no kind of value that a project has; leave the tag out"
    elif kind in ("int", "float") and re.fullmatch(r"[-+]?0[0-9_]+|.*:.*", text):
        reason = f"{text} is another number to YAML; write it without leading zeros and colons"
    else:
        return
    raise InputError(f"{_line(node, name)}: {reason}")


def _check_keys(node: MappingNode, name: str) -> None:
    """Refuse keys that are no text, and two of one name, of which YAML would drop the first.

    A key that overrides one from a merge (`<<: *base`) is in another mapping, and may.
    """
    known: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            continue
        if (kind := key.tag.removeprefix(YAML)) in KEYS:
            raise InputError(
                f"{_line(key, name)}: the key {key.value!r} is {KEYS[kind]} to YAML; write it in "
                "quotes"
            )
        line, identity = key.start_mark.line + 1, (key.tag, key.value)
        if identity in known:
            raise InputError(
                f"{name} has the key {key.value!r} twice, in lines {known[identity]} and {line}, "
                "and only the last would count; rename or remove one"
            )
        known[identity] = line


def _line(node: Node, name: str) -> str:
    return f"{name}, line {node.start_mark.line + 1}"


def _text(path: Path, name: str, limit: int) -> str:
    """A file's text, of a size within the limit."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise InputError(f"{name} has more than {limit >> 10} kB; check what it is")
        return data.decode("utf-8")
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}; check it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is no UTF-8 text ({error.reason}); save it as such") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def storable(content: Any) -> Any:
    """The same content with the names of numbers that JSON lacks: nan, inf, -inf."""
    if isinstance(content, dict):
        return {key: storable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [storable(value) for value in content]
    return json_number(content) if isinstance(content, float) else content
