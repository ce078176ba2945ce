"""The code as a tree, for tests that read it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "lightning_ckptless"
REACHES = {"delattr", "getattr", "hasattr", "setattr"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file.

    Args:
        path: relative to the repository.
    """

    path: Path

    @cached_property
    def text(self) -> str:
        """Its content."""
        return (REPOSITORY / self.path).read_text()

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """Every node of its tree."""
        return tuple(ast.walk(self.tree))

    def forget(self) -> None:
        """Release the tree, which has more objects than everything else that tests hold."""
        for name in ("tree", "nodes"):
            vars(self).pop(name, None)

    @property
    def layer(self) -> str:
        """The top-level folder or file of the package that it belongs to: `protocol`, `errors`, ..."""
        return self.path.parts[1].removesuffix(".py")

    @property
    def module(self) -> str:
        """Its module name relative to the package."""
        return ".".join(self.path.with_suffix("").parts[1:])

    @property
    def functions(self) -> Iterator[Function]:
        """Every function and method."""
        return (node for node in self.nodes if isinstance(node, Function))

    def imports(self) -> Iterator[str]:
        """Every module that is imported, anywhere in the file, by its full name."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}:{node.lineno}: a relative import"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    def __str__(self) -> str:
        return str(self.path)


def sources(*folders: str) -> list[Source]:
    """The files of some folders of the repository, those that are there."""
    found = (path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py")))
    return [Source(path.relative_to(REPOSITORY)) for path in found]


def findings(where: Iterable[Source], look: Callable[[Source], Iterable[object]]) -> dict[str, list[object]]:
    """What a look at each file finds, without the files where it finds nothing."""
    found = {str(source): list(look(source)) for source in where}
    return {path: facts for path, facts in found.items() if facts}


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of names; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return ""


def own_names(source: Source) -> set[str]:
    """Every name that a file defines: functions, classes, variables, attributes it assigns, parameters."""
    names: set[str] = set()
    for node in source.nodes:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
            case _:
                pass
    return names


def private(name: str) -> bool:
    """Whether a name is private."""
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names(source: Source) -> Iterator[tuple[int, str]]:
    """Every private name that a file uses without defining it, with its line."""
    own = own_names(source)
    for node in source.nodes:
        match node:
            case ast.Attribute(attr=name, ctx=ast.Load() | ast.Del()) if private(name) and name not in own:
                yield node.lineno, dotted(node) or f"?.{name}"
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ) if private(name):
                yield node.lineno, f"?.{name}"
            case ast.ImportFrom(module=str(module), names=aliases) if not module.startswith(PACKAGE):
                for alias in aliases:
                    if private(alias.name) or any(private(part) for part in module.split(".")):
                        yield node.lineno, f"{module}.{alias.name}"
            case _:
                pass
