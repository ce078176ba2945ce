"""What a training script imports and defines, read off its text: nothing of it is run for that."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_ckptless.errors import OptionsError

_RUNS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)


@dataclass(frozen=True, slots=True)
class Import:
    """One import at the head of a script.

    Args:
        code: the statement.
        module: that it imports; with the dots of a relative import.
        line: where it stands.
        is_optional: whether the script may do without: it stands in a `try` or in a branch.
    """

    code: str
    module: str
    line: int
    is_optional: bool


def read(path: Path) -> ast.Module:
    """A script as Python reads it.

    Raises:
        OptionsError: there is none, or it is no Python.
    """
    try:
        return ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise OptionsError(f"there is no script {str(path)!r} that can be read: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        raise OptionsError(f"{path} is no Python that this interpreter can read: {error}") from error


def imports_of(tree: ast.Module) -> list[Import]:
    """What a script imports whenever a process runs it, in order; not what its functions import, or its main part."""
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
            case ast.If(test=test, body=chosen, orelse=others) if not _is_elsewhere(test):
                yield from _imports([*chosen, *others], is_optional=True)
            case _:
                pass


def _is_elsewhere(test: ast.expr) -> bool:
    """Whether a branch is for type checkers, or is the main part of the script."""
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(test) if isinstance(node, ast.Attribute)}
    return bool(names & {"TYPE_CHECKING", "__name__"})


def definitions_of(tree: ast.Module) -> str:
    """The functions, classes and constants of a script, as code that defines them and calls nothing else."""
    return ast.unparse(ast.Module([node for node in tree.body if _defines(node)], []))


def _defines(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return True
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__"
    return isinstance(node, ast.Assign | ast.AnnAssign) and not any(isinstance(part, _RUNS) for part in ast.walk(node))


def models_of(tree: ast.Module) -> list[str]:
    """Names of the classes that seem to be Lightning modules, by the names of their bases."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return [node.name for node in classes if any("LightningModule" in ast.unparse(base) for base in node.bases)]
