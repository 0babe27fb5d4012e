"""Source files of a package: their lines, functions and imports.

A *room* is a folder of the package or a module at its top. An *arrow* leads from a module to
another one that it imports; a *room arrow* leads from a room to another room.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

Graph = dict[str, set[str]]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class File:
    """A source file of the package, by its path below the package's folder."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text
        self.lines = text.splitlines()
        self.is_python = path.endswith(".py")
        self.folder = str(PurePosixPath(path).parent)

    @cached_property
    def tree(self) -> ast.Module:
        """Syntax tree of a Python file."""
        return ast.parse(self.text)

    @cached_property
    def name(self) -> str:
        """Dotted name within the package; a folder's name for its ``__init__.py``."""
        parts = PurePosixPath(self.path).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)

    @property
    def room(self) -> str:
        """Name of the room that the file is in."""
        return self.name.split(".")[0]

    @cached_property
    def functions(self) -> list["Function"]:
        """Functions and methods, inner ones too."""
        return list(functions_in(self.tree, self))

    @cached_property
    def code_lines(self) -> int:
        """Number of lines without docstrings, comments and blank lines."""
        return len(python_code_lines(self.text) if self.is_python else c_code_lines(self.text))

    @cached_property
    def comment_lines(self) -> int:
        """Number of lines that hold a comment."""
        return len(python_comments(self.text) if self.is_python else c_comments(self.text))


class Package:
    """The source files of a package, by path."""

    def __init__(self, name: str, texts: dict[str, str]) -> None:
        self.name = name
        self.files = [File(path, texts[path]) for path in sorted(texts)]
        self.modules = [file for file in self.files if file.is_python]

    @classmethod
    def read(cls, folder: Path) -> "Package":
        """Read the Python and C files in a folder."""
        paths = [path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".h")]
        return cls(folder.name, {p.relative_to(folder).as_posix(): p.read_text() for p in paths})

    @cached_property
    def functions(self) -> list["Function"]:
        """Functions of all modules."""
        return [function for module in self.modules for function in module.functions]

    @cached_property
    def arrows(self) -> Graph:
        """Modules of the package that each module imports."""
        known = {module.name for module in self.modules}
        return {m.name: set(imported(m.tree, self.name, known)) - {m.name} for m in self.modules}

    @cached_property
    def room_arrows(self) -> Graph:
        """Other rooms that each room imports anything from."""
        graph: Graph = {module.room: set() for module in self.modules}
        for module in self.modules:
            graph[module.room] |= {name.split(".")[0] for name in self.arrows[module.name]}
        graph.pop("__main__", None)  # it only starts a room
        return {room: others - {room} for room, others in graph.items()}


# lines -------------------------------------------------------------------------------------------


def docstring_of(node: Documented) -> ast.stmt | None:
    """Return the statement that is a node's docstring."""
    return node.body[0] if ast.get_docstring(node, clean=False) is not None else None


def span(node: ast.stmt | None) -> range:
    """Return the line numbers of a statement."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1) if node else range(0)


def is_text(node: ast.expr) -> bool:
    """Tell whether an expression is a literal string."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def python_code_lines(text: str) -> set[int]:
    """Return the numbers of lines that hold code; a string that stands alone documents."""
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in ignored | {tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and is_text(node.value):
            lines.difference_update(span(node))
    blank = {number for number, line in enumerate(text.splitlines(), 1) if not line.strip()}
    return lines - blank


def python_comments(text: str) -> set[int]:
    """Return the numbers of lines that hold a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


C_STRING_OR_COMMENT = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|/\*.*?\*/|//[^\n]*""", re.DOTALL
)


def c_code_lines(text: str) -> set[int]:
    """Return the numbers of lines that hold code."""

    def without_comment(match: re.Match[str]) -> str:
        return match["string"] or "\n" * match[0].count("\n")

    bare = C_STRING_OR_COMMENT.sub(without_comment, text)
    return {number for number, line in enumerate(bare.splitlines(), 1) if line.strip()}


def c_comments(text: str) -> set[int]:
    """Return the numbers of lines that hold a comment or a part of one."""
    lines: set[int] = set()
    for match in C_STRING_OR_COMMENT.finditer(text):
        if not match["string"]:
            first = text.count("\n", 0, match.start()) + 1
            lines.update(range(first, first + match[0].count("\n") + 1))
    return lines


# functions ---------------------------------------------------------------------------------------


class Function(NamedTuple):
    """A function or method, with the names of what it is in."""

    file: File
    name: str
    node: FunctionNode
    is_method: bool
    is_inner: bool

    def __str__(self) -> str:
        return f"{self.file.path}:{self.node.lineno} {self.name}"

    @property
    def lines(self) -> int:
        """Number of lines, the docstring not counted."""
        return len(span(self.node)) - len(span(docstring_of(self.node)))

    @property
    def parameters(self) -> list[ast.arg]:
        """Parameters but for ``self`` and ``cls``."""
        a = self.node.args
        positional = [*a.posonlyargs, *a.args]
        static = any(ast.unparse(d) == "staticmethod" for d in self.node.decorator_list)
        own = positional[1:] if self.is_method and not static else positional
        return [*own, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]

    @property
    def is_public(self) -> bool:
        """Whether neither it nor what it is in is private or a function; constructors are not."""
        return not self.is_inner and not any(n.startswith("_") for n in self.name.split("."))


def functions_in(node: ast.AST, file: File, within: tuple[str, ...] = ()) -> Iterator[Function]:
    """Yield the functions below a node, in order."""
    inner = isinstance(node, FunctionNode)
    for child in ast.iter_child_nodes(node):
        name = (*within, getattr(child, "name", ""))
        if isinstance(child, FunctionNode):
            method = isinstance(node, ast.ClassDef)
            yield Function(file, ".".join(name), child, method, inner or "<locals>" in within)
            yield from functions_in(child, file, (*name, "<locals>"))
        elif isinstance(child, ast.ClassDef):
            yield from functions_in(child, file, name)
        else:
            yield from functions_in(child, file, within)


# imports -----------------------------------------------------------------------------------------


def imported(tree: ast.AST, package: str, known: set[str]) -> Iterator[str]:
    """Yield the modules of a package that a tree imports; the package itself does not count."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *parts = name.split(".")
            while parts and ".".join(parts) not in known:
                parts.pop()
            if first == package and parts:
                yield ".".join(parts)


def lazy_imports(package: Package) -> list[Function]:
    """Return the functions that import a module of the package."""
    known = {module.name for module in package.modules}
    return [f for f in package.functions if any(imported(f.node, package.name, known))]


def reachable(graph: Graph, start: str) -> set[str]:
    """Return what arrows lead to from a node, in one step or more."""
    found: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(graph[node])
    return found


def cycles(graph: Graph) -> list[list[str]]:
    """Return the groups of nodes that lead to each other."""
    ahead = {node: reachable(graph, node) for node in graph}
    groups = {frozenset(o for o in ahead[n] if n in ahead[o]) for n in graph if n in ahead[n]}
    return sorted(map(sorted, groups))


def longest_chain(graph: Graph) -> list[str]:
    """Return the longest chain of arrows, from the top; arrows within a cycle do not count."""
    ahead = {node: reachable(graph, node) for node in graph}
    chains: dict[str, list[str]] = {}
    for node in sorted(graph, key=lambda node: len(ahead[node])):
        below = [chains[o] for o in sorted(graph[node]) if node not in ahead[o] and o in chains]
        chains[node] = [node, *max(below, key=len, default=[])]
    return max(chains.values(), key=len, default=[])
