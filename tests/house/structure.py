"""Figures of the package's structure, and the limits of some of them.

``python tests/house/structure.py [FOLDER]`` prints the figures, marks each one beyond its limit,
and names what contributes most to it.
"""

import ast
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from source_files import (
    Documented,
    File,
    Package,
    cycles,
    docstring_of,
    lazy_imports,
    longest_chain,
)

PACKAGE = Path(__file__).parents[2] / "daskclip"
FREE_ROOMS = {"errors", "grid"}  # every room may import them
CTYPES_FILE = "numerics/compiled.py"
LONG_FUNCTION = 25
MANY_ARGUMENTS = 8


def is_any(parameter: ast.arg) -> bool:
    """Tell whether the annotation of a parameter is exactly ``Any``."""
    annotation = parameter.annotation
    return annotation is not None and ast.unparse(annotation) in ("Any", "typing.Any")


def parameters_of(package: Package, without: str = "") -> list[ast.arg]:
    """Return the parameters of all functions but those of one file."""
    return [p for f in package.functions if f.file.path != without for p in f.parameters]


def public_things(file: File) -> Iterator[tuple[str, Documented]]:
    """Yield (name, node) of the public classes, functions and methods of a file."""
    for function in file.functions:
        if function.is_public:
            yield str(function), function.node
    for node in file.tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield f"{file.path}:{node.lineno} {node.name}", node


class Measured(NamedTuple):
    """A figure, and what contributes most to it."""

    value: float
    largest: list[str]


def most(
    amounts: Iterable[tuple[str, float]], form: str = "g", unit: str = "", count: int = 10
) -> list[str]:
    """Return the largest amounts as text, in descending order."""
    ordered = sorted(amounts, key=lambda pair: (-pair[1], pair[0]))
    return [f"{amount:{form}}{unit} {name}" for name, amount in ordered if amount > 0][:count]


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that at least so many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] if ordered else 0


def share(part: float, whole: float) -> float:
    """Return a part in percent of the whole; all of nothing."""
    return 100 * part / whole if whole else 100


def modules_per_folder(package: Package) -> Measured:
    """Measure the largest folder; ``__init__.py`` counts as a module."""
    count = Counter(module.folder for module in package.modules)
    return Measured(max(count.values()), most(count.items()))


def floors(package: Package) -> Measured:
    """Measure the longest chain of imports between rooms."""
    chain = longest_chain(package.room_arrows)
    return Measured(len(chain), [" > ".join(chain)])


def room_arrows(package: Package, free: Iterable[str] = ()) -> Measured:
    """Measure pairs of rooms of which one imports the other, but for imports of free rooms."""
    arrows = {room: others - {*free} for room, others in package.room_arrows.items()}
    counts = [(f"{room} > {' '.join(sorted(to))}", len(to)) for room, to in arrows.items()]
    return Measured(sum(map(len, arrows.values())), most(counts))


def arrows_per_module(package: Package) -> Measured:
    """Measure modules that a module imports, on average."""
    counts = {name: len(others) for name, others in package.arrows.items()}
    return Measured(sum(counts.values()) / len(counts), most(counts.items()))


def plain_any(package: Package, without: str = "") -> Measured:
    """Measure the share of annotated parameters of which the type is ``Any``."""
    annotated = [p for p in parameters_of(package, without) if p.annotation]
    functions = [(f, sum(map(is_any, f.parameters))) for f in package.functions]
    files = Counter[str]()
    for function, count in functions:
        files[function.file.path] += count
    value = 100 - share(sum(not is_any(p) for p in annotated), len(annotated))
    return Measured(value, most(files.items()) + most((str(f), count) for f, count in functions))


def comments_per_100(files: Iterable[File]) -> float:
    """Return the lines that hold a comment, for 100 lines of files."""
    files = [*files]
    return share(sum(f.comment_lines for f in files), sum(len(f.lines) for f in files))


def comments_of_python(package: Package) -> Measured:
    """Measure comments in Python alone: C has no docstrings, so its comments say other things."""
    missing = [(m.path, len(m.lines) * 0.04 - m.comment_lines) for m in package.modules]
    return Measured(comments_per_100(package.modules), most(missing, ".0f", unit=" missing in"))


def short_functions(package: Package) -> Measured:
    """Measure the share of functions that are not long."""
    lengths = {str(function): function.lines for function in package.functions}
    short = sum(length <= LONG_FUNCTION for length in lengths.values())
    return Measured(share(short, len(lengths)), most(lengths.items()))


def largest_file(package: Package) -> Measured:
    """Measure the lines of the largest file."""
    lines = {file.path: len(file.lines) for file in package.files}
    return Measured(max(lines.values()), most(lines.items()))


def import_cycles(package: Package) -> Measured:
    """Measure groups of modules, or of rooms, that import each other."""
    found = cycles(package.arrows) + cycles(package.room_arrows)
    return Measured(len(found), [" <> ".join(names) for names in found])


def docstrings(package: Package) -> Measured:
    """Measure the share of public classes, functions and methods with a docstring."""
    things = [thing for module in package.modules for thing in public_things(module)]
    without = [name for name, node in things if not docstring_of(node)]
    return Measured(share(len(things) - len(without), len(things)), without)


def module_docstrings(package: Package) -> Measured:
    """Measure the share of modules with a docstring; empty modules need none."""
    modules = [module for module in package.modules if module.code_lines]
    without = [module.path for module in modules if not docstring_of(module.tree)]
    return Measured(share(len(modules) - len(without), len(modules)), without)


def code_lines(package: Package) -> Measured:
    """Measure lines of code, those of C too."""
    folders, files = Counter[str](), {}
    for file in package.files:
        folders[f"{file.folder}/"] += file.code_lines
        files[file.path] = file.code_lines
    return Measured(sum(files.values()), most(folders.items(), count=20) + most(files.items()))


class Limit(NamedTuple):
    """A figure that may be at most, or must be at least, a bound."""

    name: str
    measure: Callable[[Package], Measured]
    sense: str
    bound: float

    def holds(self, value: float) -> bool:
        """Tell whether a value is within the limit."""
        return value <= self.bound if self.sense == "at most" else value >= self.bound


LIMITS = [
    Limit("modules per folder", modules_per_folder, "at most", 12),
    Limit("floors", floors, "at most", 6),
    Limit("room arrows", room_arrows, "at most", 40),
    Limit(
        "room arrows without errors and grid", lambda p: room_arrows(p, FREE_ROOMS), "at most", 24
    ),
    Limit("arrows per module", arrows_per_module, "at most", 3.5),
    Limit("parameters of type Any, %", plain_any, "at most", 8),
    Limit("comments per 100 lines of Python", comments_of_python, "at least", 4),
    Limit(f"functions of {LONG_FUNCTION} lines or less, %", short_functions, "at least", 95),
    Limit("lines of the largest file", largest_file, "at most", 400),
    Limit("import cycles", import_cycles, "at most", 0),
    Limit("docstrings on public things, %", docstrings, "at least", 99),
    Limit("code lines", code_lines, "at most", 5900),
]


def spread(values: Iterable[float]) -> str:
    """Format the median, 95th percentile and maximum of values."""
    values = [*values]
    return f"{percentile(values, 50):g} / {percentile(values, 95):g} / {max(values, default=0):g}"


def figures_of_files(package: Package) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the figures of files that have no limit."""
    for folder in ["", *sorted({file.folder for file in package.files})]:
        files = [file for file in package.files if folder in ("", file.folder)]
        lines, code = sum(len(f.lines) for f in files), sum(f.code_lines for f in files)
        name = f"  in {folder}/" if folder else "files / lines / code lines"
        yield name, f"{len(files)} / {lines:,} / {code:,}"
    sizes = [len(file.lines) for file in package.files]
    larger = [sum(size > limit for size in sizes) for limit in (300, 400)]
    yield "files > 300 / > 400 lines", f"{larger[0]} / {larger[1]}"
    yield "median file, lines", f"{percentile(sizes, 50):g}"
    c_files = [file for file in package.files if not file.is_python]
    if c_files:
        yield "comments per 100 lines of C", f"{comments_per_100(c_files):.1f}"
    yield "comments per 100 lines of all files", f"{comments_per_100(package.files):.1f}"
    yield "docstrings on modules, %", f"{module_docstrings(package).value:.0f}"


def figures_of_functions(package: Package) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the figures of functions that have no limit."""
    yield "function length p50 / p95 / max", spread(f.lines for f in package.functions)
    arguments = [len(f.parameters) for f in package.functions if f.is_public]
    mean = sum(arguments) / max(1, len(arguments))
    high = f"{percentile(arguments, 95):g} / {max(arguments, default=0)}"
    yield "arguments per public function, mean / p95 / max", f"{mean:.1f} / {high}"
    many = sum(len(f.parameters) >= MANY_ARGUMENTS for f in package.functions)
    yield f"functions with >= {MANY_ARGUMENTS} arguments", f"{many}"
    parameters = parameters_of(package)
    annotated = sum(p.annotation is not None for p in parameters)
    yield "annotated parameters, %", f"{share(annotated, len(parameters)):.0f} of {len(parameters)}"
    yield "parameters of type Any", f"{sum(map(is_any, parameters))}"
    rest = plain_any(package, CTYPES_FILE).value
    yield f"  without {CTYPES_FILE}, %", f"{rest:.1f}"


def figures_of_imports(package: Package) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the figures of imports that have no limit."""
    yield "functions that import own modules", f"{len(lazy_imports(package))}"
    arrows = sum(map(len, package.arrows.values()))
    yield "arrows / modules", f"{arrows} / {len(package.modules)}"
    yield "rooms", f"{len(package.room_arrows)}"
    yield "floors of modules", f"{len(longest_chain(package.arrows))}"


def figures_of_tests(package: Package, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the ratio of test lines to source lines, with benchmarks too."""
    source = sum(len(file.lines) for file in package.files)
    lines = {path: len(path.read_text().splitlines()) for path in folder.rglob("*.py")}
    tests = sum(count for path, count in lines.items() if "benchmarks" not in path.parts)
    yield "test : source lines", f"{tests / source:.2f}"
    yield "  with benchmarks", f"{sum(lines.values()) / source:.2f}"


def main(folder: Path) -> None:
    """Print the figures, then those with a limit."""
    package = Package.read(folder)
    for name, text in [
        *figures_of_files(package),
        *figures_of_functions(package),
        *figures_of_imports(package),
        *figures_of_tests(package, folder.parent / "tests"),
    ]:
        print(f"{name:50} {text}")
    print()
    for limit in LIMITS:
        value, largest = limit.measure(package)
        mark = "" if limit.holds(value) else "  <- beyond"
        print(f"{limit.name:50} {value:8.4g}   {limit.sense} {limit.bound:g}{mark}")
        for line in largest if mark else ():
            print(f"    {line}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else PACKAGE)
