"""Files and functions are short, and typed."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.house.code import PACKAGE, Function, Source, findings, sources

CODE = sources(PACKAGE, "tests", "examples", "benchmarks")
LONGEST_FILE = 600
LONGEST_FUNCTION = 60
SELVES = {"self", "cls"}


def own_lines(function: Function) -> int:
    """Lines of a function, without its docstring and without the classes and functions inside it."""
    inner: list[ast.stmt] = [
        node for node in ast.walk(function) if isinstance(node, Function | ast.ClassDef) and node is not function
    ]
    if ast.get_docstring(function):
        inner.append(function.body[0])
    elsewhere = {line for node in inner for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    return len(set(range(function.lineno, (function.end_lineno or 0) + 1)) - elsewhere)


def test_files_are_short() -> None:
    lengths = {str(source): len(source.text.splitlines()) for source in CODE}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_functions_are_short() -> None:
    def long(source: Source) -> Iterator[str]:
        return (f"{f.name}: {own_lines(f)}" for f in source.functions if own_lines(f) > LONGEST_FUNCTION)

    assert findings(CODE, long) == {}


def test_every_function_is_typed() -> None:
    def untyped(source: Source) -> Iterator[str]:
        for function in source.functions:
            arguments = function.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            bare = [a.arg for a in named if a is not None and a.annotation is None and a.arg not in SELVES]
            if bare or function.returns is None:
                yield f"{function.name}({', '.join(bare)})"

    assert findings(CODE, untyped) == {}


def test_every_module_has_a_docstring() -> None:
    missing = [str(source) for source in sources(PACKAGE) if source.text and not ast.get_docstring(source.tree)]
    assert missing == []
