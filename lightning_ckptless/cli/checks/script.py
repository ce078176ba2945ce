"""Finds the imports and definitions of a training script in its source, without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_ckptless.errors import OptionsError

_RUNS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)


@dataclass(frozen=True, slots=True)
class Import:
    """A top-level import of a script.

    Args:
        code: import statement.
        module: imported module, with the leading dots of a relative import.
        line: line number.
        is_optional: whether the script can run without it, as the import is in a `try` or a branch.
    """

    code: str
    module: str
    line: int
    is_optional: bool


def read(path: Path) -> ast.Module:
    """Parse a script.

    Raises:
        OptionsError: the script cannot be read or parsed.
    """
    try:
        return ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise OptionsError(f"cannot read the script {str(path)!r}: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        raise OptionsError(f"{path}: not a Python script that this interpreter can parse: {error}") from error


def imports_of(tree: ast.Module) -> list[Import]:
    """Return a script's top-level imports in order, except those of its functions and its main part."""
    return list(_imports(tree.body, is_optional=False))


def _imports(body: Sequence[ast.stmt], *, is_optional: bool) -> Iterator[Import]:
    for node in body:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    code = ast.unparse(ast.Import([alias]))
                    yield Import(code, alias.name, node.lineno, is_optional)
            case ast.ImportFrom(module=module, level=level) if module != "__future__":
                yield Import(ast.unparse(node), "." * level + (module or ""), node.lineno, is_optional)
            case ast.Try(body=tried, handlers=handlers, orelse=orelse, finalbody=finalbody):
                yield from _imports(tried, is_optional=is_optional or bool(handlers))
                yield from _imports([*orelse, *finalbody], is_optional=is_optional)
            case ast.With(body=inner):
                yield from _imports(inner, is_optional=is_optional)
            case ast.If(test=test, body=chosen, orelse=others) if not _is_skipped(test):
                yield from _imports([*chosen, *others], is_optional=True)
            case _:
                pass


def _is_skipped(test: ast.expr) -> bool:
    """Return whether a branch is for type checkers, or is the main part of the script."""
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(test) if isinstance(node, ast.Attribute)}
    return bool(names & {"TYPE_CHECKING", "__name__"})


def definitions_of(tree: ast.Module) -> str:
    """Return the functions, classes and constants of a script, as code without top-level calls."""
    return ast.unparse(ast.Module([node for node in tree.body if _defines(node)], []))


def _defines(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return True
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__"
    return isinstance(node, ast.Assign | ast.AnnAssign) and not any(isinstance(part, _RUNS) for part in ast.walk(node))


def models_of(tree: ast.Module) -> list[str]:
    """Return the names of classes whose bases are named like a Lightning module."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return [node.name for node in classes if any("LightningModule" in ast.unparse(base) for base in node.bases)]
