"""Declarations as the text of their modules tells them: no import, and so no wait for torch.

The command line lists, explains and completes probes; only running one needs the probe itself.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any, Literal

from lsa.probe import registry
from lsa.probe.declaration import PROBES, Option, Probe
from lsa.probe.result import Result


def summaries() -> dict[str, str]:
    """Probe name → first line of its docstring."""
    return {name: _summary(module, name) for name, module in registry.modules().items()}


def _summary(module: str, name: str) -> str:
    definition = _definition(module, name)
    return (ast.get_docstring(definition) or "").partition("\n")[0] if definition else ""


def read(name: str) -> Probe:
    """The declaration, from the text where that tells all of it, else by importing the module.

    What was read from the text cannot be called, and holds what the command line shows: nothing of
    the cost, of the report or of the rules of options.

    Raises:
        InputError: There is no such probe.
    """
    module = registry.modules().get(name)
    if name not in PROBES and module and (definition := _definition(module, name)):
        try:
            return _declaration(definition)
        except ValueError:  # a part is no literal but a constant, an alias, …
            pass
    return registry.find(name)


def _definition(module: str, name: str) -> ast.FunctionDef | None:
    """The text of a probe's function."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:  # an entry point left behind must not break the list of the others
        return None
    if spec is None or spec.origin is None:
        return None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    return None


def _declaration(definition: ast.FunctionDef) -> Probe:
    """The declaration in a definition's text; ValueError where a part of it is no literal."""
    arguments = definition.args
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    options = {argument.arg: _option(argument, default) for argument, default in pairs}
    inputs = tuple(argument.arg for argument in (*arguments.posonlyargs, *arguments.args))
    match definition.decorator_list:
        case [ast.Call(keywords=keywords)]:
            given = {keyword.arg: keyword.value for keyword in keywords}
        case _:
            raise ValueError("decorated otherwise than by @probe(…)")
    headline = ast.literal_eval(given["headline"]) if "headline" in given else ()

    def function() -> Result:
        raise TypeError(f"{definition.name} is only outlined; find it to call it")

    function.__doc__ = ast.get_docstring(definition)
    return Probe(definition.name, function, inputs, options, headline)


def _option(argument: ast.arg, default: ast.expr | None) -> Option:
    match argument.annotation, default:
        case ast.Subscript(slice=ast.Tuple(elts=[kind, text, *_])), ast.expr():
            value, words = ast.literal_eval(default), ast.literal_eval(text)
            return Option(argument.arg, _type(kind), value, words)
    raise ValueError(f"{argument.arg} is no Annotated[type, help] = default")


def _type(node: ast.expr) -> Any:
    match node:
        case ast.Name(id="int" | "float" | "str" as name):
            return {"int": int, "float": float, "str": str}[name]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return Literal[ast.literal_eval(choices)]
    raise ValueError(f"{ast.unparse(node)} is no plain type")
