"""Python source reduced to what decides the numbers: no comments, docstrings or captions."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

# Arguments of `@probe` that say what a report does with the numbers.
REPORT = ("headline", "compare", "check", "during", "curve", "scale", "between", "caption")
Node = ast.expr | ast.stmt | ast.keyword
Span = tuple[int, int]  # bytes from the beginning of the text


def without_words(source: bytes, nodes: Sequence[ast.AST]) -> bytes:
    """Python source without comments, docstrings, help of options and a report's part.

    Words are cut out of the text by position, so that every version of Python leaves the same.
    Blank lines and spaces at line ends go as well.

    Args:
        source: The text in UTF-8.
        nodes: Of its syntax tree, all of them.
    """
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: Node) -> Span:
        assert node.end_lineno is not None and node.end_col_offset is not None
        begin = starts[node.lineno - 1] + node.col_offset
        return begin, starts[node.end_lineno - 1] + node.end_col_offset

    spans = [span(node) for node in _words(nodes)] + _comments(source, nodes, span)
    kept, end = [], 0
    for begin, after in sorted(spans):
        kept.append(source[end:begin])
        end = max(end, after)
    text = b"".join([*kept, source[end:]])
    return b"\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def _words(nodes: Iterable[ast.AST]) -> Iterator[Node]:
    """Docstrings, help of options and arguments for reports."""
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    yield first
            for call in getattr(node, "decorator_list", ()):
                if isinstance(call, ast.Call) and _name(call.func) == "probe":
                    yield from (given for given in call.keywords if given.arg in REPORT)
        elif isinstance(node, ast.Subscript) and _name(node.value) == "Annotated":
            if isinstance(node.slice, ast.Tuple):
                yield from (e for e in node.slice.elts[1:] if isinstance(e, ast.Constant))


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _comments(source: bytes, nodes: Iterable[ast.AST], span: Callable[[Node], Span]) -> list[Span]:
    """Positions of comments: from a # outside strings to the end of the line."""
    bare = bytearray(source)
    for node in nodes:
        if isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
        ):
            begin, end = span(node)
            bare[begin:end] = b" " * (end - begin)
    return [match.span() for match in re.finditer(rb"#[^\r\n]*", bare)]
