"""Limits of the package's structure, and the counting behind them on small sources."""

import pytest
from source_files import (
    File,
    Package,
    c_code_lines,
    c_comments,
    cycles,
    lazy_imports,
    longest_chain,
    python_code_lines,
    python_comments,
)
from structure import (
    LIMITS,
    PACKAGE,
    Limit,
    arrows_per_module,
    comments_of_python,
    docstrings,
    floors,
    import_cycles,
    main,
    module_docstrings,
    modules_per_folder,
    percentile,
    plain_any,
    room_arrows,
    short_functions,
)

PYTHON = '''"""Module
docstring."""

import os  # comment

# comment
NAME = """text
# in a string

"""
"""What NAME is."""


def function(a, b):
    """One line."""
    return a + b
'''

C = """/* comment
   of two lines */
#include <stdio.h>

int x; /* comment */ int y; // comment
char *text = "/* no comment */ // none \\"";
char quote = '"'; /* one */
"""


@pytest.fixture(scope="module")
def package():
    return Package.read(PACKAGE)


# limits not reached yet; strict, so that one that is reached has to leave the list
BEYOND = {"arrows per module", "code lines"}


def limit_of(limit):
    marks = [pytest.mark.xfail(reason="not reached yet", strict=True)] * (limit.name in BEYOND)
    return pytest.param(limit, id=limit.name, marks=marks)


@pytest.mark.parametrize("limit", [limit_of(limit) for limit in LIMITS])
def test_the_package_is_within_its_limits(package, limit):
    value, largest = limit.measure(package)
    if not limit.holds(value):
        lines = [f"{limit.name}: {value:.4g}, must be {limit.sense} {limit.bound:g}", *largest]
        pytest.fail("\n    ".join(lines), pytrace=False)


def functions(text):
    return {function.name: function for function in File("a.py", text).functions}


def test_lines_of_python():
    assert python_code_lines(PYTHON) == {4, 7, 8, 10, 14, 16}
    assert python_comments(PYTHON) == {4, 6}


def test_lines_of_c():
    assert c_code_lines(C) == {3, 5, 6, 7}
    assert c_comments(C) == {1, 2, 5, 7}


def test_length_of_a_function_is_without_decorators_and_docstring():
    text = "@f\ndef g(\n    x,\n):\n    '''One.\n\n    Two.\n    '''\n    return x\n"
    assert functions(text)["g"].lines == 4


def test_functions_are_found_in_classes_and_in_functions():
    text = """
class A:
    def m(self, x): ...
    @staticmethod
    def s(x, *y, z=0, **w): ...
    def _p(self): ...
if A:
    async def f():
        def inner(x):
            class B:
                def m(self): ...
"""
    found = functions(text)
    assert {name: len(f.parameters) for name, f in found.items()} == {
        "A.m": 1,
        "A.s": 4,
        "A._p": 0,
        "f": 0,
        "f.<locals>.inner": 1,
        "f.<locals>.inner.<locals>.B.m": 0,
    }
    assert [name for name, f in found.items() if f.is_public] == ["A.m", "A.s", "f"]


def test_any_counts_where_it_is_the_whole_annotation():
    text = "def f(a: Any, b: list[Any], c: 'int', d, *e: typing.Any): ..."
    measured = plain_any(Package("p", {"a.py": text, "b.py": "def g(x: Any): ..."}))
    assert measured.value == pytest.approx(60)
    assert measured.largest == ["2 a.py", "1 b.py", "2 a.py:1 f", "1 b.py:1 g"]
    assert plain_any(Package("p", {"a.py": text}), without="a.py").value == 0


def test_public_things_without_a_docstring_are_named():
    text = (
        "class A:\n    '''A.'''\n    def m(self): ...\n    def __init__(self): ...\ndef _f(): ..."
    )
    package = Package("p", {"a.py": text, "empty.py": ""})
    assert docstrings(package) == (50, ["a.py:3 A.m"])
    assert module_docstrings(package) == (0, ["a.py"])


def test_comments_are_those_of_python():
    package = Package("p", {"a.py": "x = 1  # why\n" + "x = 2\n" * 49, "k.c": "/* what */\n"})
    assert comments_of_python(package) == (2, ["1 missing in a.py"])


def test_short_functions_have_25_lines():
    texts = {
        name: "def f():\n" + "    x = 1\n" * lines for name, lines in [("a.py", 24), ("b.py", 25)]
    }
    assert short_functions(Package("p", texts)) == (50, ["26 b.py:1 f", "25 a.py:1 f"])


@pytest.fixture
def house():
    """A package of two rooms with a facade each, and of three rooms of one module."""
    return Package(
        "p",
        {
            "__init__.py": "from p.upper import start",
            "errors.py": "",
            "other.py": "import os, p.errors, q.lower\nfrom p import __version__, upper",
            "upper/__init__.py": "from p.upper.run import start",
            "upper/run.py": "from p.lower import a, b\nfrom p.errors import E\nimport p.upper.more",
            "upper/more.py": "if TYPE_CHECKING:\n    from p import lower",
            "lower/__init__.py": "",
            "lower/read.py": "def f():\n    from p.errors import E",
        },
    )


def test_arrows_lead_to_modules_and_facades(house):
    assert house.arrows == {
        "__init__": {"upper"},
        "errors": set(),
        "other": {"errors", "upper"},
        "upper": {"upper.run"},
        "upper.run": {"lower", "errors", "upper.more"},
        "upper.more": {"lower"},
        "lower": set(),
        "lower.read": {"errors"},
    }
    assert arrows_per_module(house).value == 9 / 8
    assert arrows_per_module(house).largest[:2] == ["3 upper.run", "2 other"]


def test_rooms_are_folders_and_modules_at_the_top(house):
    assert house.room_arrows == {
        "__init__": {"upper"},
        "errors": set(),
        "other": {"errors", "upper"},
        "upper": {"lower", "errors"},
        "lower": {"errors"},
    }
    assert room_arrows(house).value == 6
    assert room_arrows(house, {"errors"}).value == 3
    assert floors(house) == (4, ["__init__ > upper > lower > errors"])
    assert modules_per_folder(house) == (3, ["3 .", "3 upper", "2 lower"])


def test_imports_in_functions_are_found(house):
    assert [str(function) for function in lazy_imports(house)] == ["lower/read.py:1 f"]


def test_cycles_of_modules_and_of_rooms_are_found(house):
    assert import_cycles(house).value == 0
    knot = Package("p", {"r/a.py": "import p.s.c", "s/c.py": "import p.r.b", "r/b.py": ""})
    assert import_cycles(knot) == (1, ["r <> s"])
    ring = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert cycles(ring) == [["a", "b", "c"]]
    assert longest_chain(ring) == ["c", "d"]


def test_percentiles_are_measured_values():
    assert percentile([], 95) == 0
    assert percentile(range(1, 101), 95) == 95
    assert percentile([1, 2, 3], 50) == 2


def test_limits_have_two_senses():
    assert Limit("", floors, "at most", 4).holds(4)
    assert not Limit("", floors, "at most", 4).holds(4.1)
    assert Limit("", floors, "at least", 4).holds(4)
    assert not Limit("", floors, "at least", 4).holds(3.9)


def test_figures_beyond_their_limits_are_marked(tmp_path, capsys):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.py").write_text('"""A."""\n\n\ndef f(x: Any): ...\n')
    main(tmp_path / "p")
    lines = {line[:50].strip(): line[50:].split() for line in capsys.readouterr().out.splitlines()}
    assert lines["files / lines / code lines"] == ["1", "/", "4", "/", "1"]
    assert lines["parameters of type Any, %"] == ["100", "at", "most", "8", "<-", "beyond"]
    assert lines["import cycles"] == ["0", "at", "most", "0"]
