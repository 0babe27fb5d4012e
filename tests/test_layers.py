"""The house: imports go one way, files stay short, every export is documented."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import daskclip

FOLDER = Path(daskclip.__file__).parent
# by dotted names; a room is a package, of which others import what its __init__ has
FILES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path
    for path in sorted(FOLDER.rglob("*.py"))
}
TABLE = [line.split()[0] for line in daskclip.__doc__.split("=\n")[1].splitlines()[:-1]]
OUTSIDE = {"numpy", "dask", "zarr", "click"}
LINES = 400


def imports(tree):
    """Absolute names of what the imports of a tree name: modules and things in modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(names):
    """Modules and rooms of this package among imported names."""
    return {name.split(".")[1] for name in names if name.split(".")[0] == "daskclip"}


def room_of(name):
    return name.split(".")[0]


def functions(tree):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.fixture(params=FILES)
def module(request):
    return request.param, ast.parse(FILES[request.param].read_text())


def test_the_map_lists_every_module():
    assert sorted(TABLE) == sorted({*map(room_of, FILES)} - {"__init__"})


def test_imports_go_down_only(module):
    name, tree = module
    room = room_of(name)
    below = TABLE if name == "__init__" else TABLE[: TABLE.index(room)]
    assert own(imports(tree)) <= {*below, *([room] if "." in name else [])}


def test_nothing_inside_a_room_is_imported_from_outside(module):
    name, tree = module
    inside = {f"daskclip.{file}" for file in FILES if "." in file} - {f"daskclip.{name}"}
    named = {".".join(n.split(".")[:3]) for n in imports(tree)} & inside
    assert not {n for n in named if n.split(".")[1] != room_of(name)}


def test_no_module_of_ours_is_imported_inside_a_function(module):
    _, tree = module
    assert not [f for f in functions(tree) if own(imports(f))]


def test_imports_from_outside(module):
    name, tree = module
    allowed = {*sys.stdlib_module_names, "daskclip", *OUTSIDE}
    if name not in ("chunks", "hierarchy", "objects", "regions", "storage", "sources"):
        allowed.remove("zarr")
    allowed |= {"files": {"google_crc32c"}, "guard": {"numcodecs"}, "xarray": {"xarray"}}.get(
        name, set()
    )
    if name != "cli":
        allowed.remove("click")
    everywhere = [n.split(".")[0] for n in imports(tree)]
    lazily = [n.split(".")[0] for f in functions(tree) for n in imports(f)]
    for package in lazily if name == "cli" else ():
        if package == "distributed":
            everywhere.remove(package)
    assert set(everywhere) <= allowed


def test_files_are_short(module):
    name, _ = module
    lines = len(FILES[name].read_text().splitlines())
    assert lines <= LINES


def test_import_loads_no_heavy_optional_package():
    heavy = "{'distributed', 'xarray', 'pandas', 'ml_dtypes'}"
    # dask.array takes xarray in where it is installed
    before = "import dask.array, sys; before = {*sys.modules}; import daskclip"
    code = f"{before}; print(sorted({heavy} & sys.modules.keys() - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_posix_arrays_are_clipped_and_stores_refused(tmp_path):
    code = """import sys
sys.modules["fcntl"] = None
import numpy, zarr, daskclip
print(daskclip.clip_by_norm(numpy.array([3.0, 4.0]), 6.0).tolist())
zarr.create_array("x", shape=2, dtype="f4")
try:
    daskclip.clip_zarr("x", "y", 1.0)
except daskclip.errors.TargetError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[3.0, 4.0]",
        "this system has no flock; use clip_by_norm, which needs none",
    ]


def test_all_holds_the_public_names():
    public = {
        name
        for name, value in vars(daskclip).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(daskclip.__all__) == public
    assert daskclip.__all__ == sorted(daskclip.__all__)


@pytest.mark.parametrize("name", daskclip.__all__)
def test_public_names_are_documented(name):
    thing = getattr(daskclip, name)
    parts = re.split(r"^(\w[\w ]*)\n-+\n", inspect.getdoc(thing), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    wanted = {"Parameters", "Notes", "Examples"} | (
        {"Returns"} if not isinstance(thing, type) else set()
    )
    assert wanted <= sections.keys()
    assert ">>> " in sections["Examples"]
    described = re.findall(r"^(\w[\w, ]*?)(?: :.*)?$", sections["Parameters"], flags=re.MULTILINE)
    assert {n for names in described for n in names.split(", ")} == set(
        inspect.signature(thing).parameters
    )
