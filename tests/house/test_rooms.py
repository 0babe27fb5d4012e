"""The house: imports go one way, files stay short, every export is documented."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import daskclip

FOLDER = Path(daskclip.__file__).parent
# by dotted names; a folder is a room, of which others import what its __init__ has
FILES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path
    for path in sorted(FOLDER.rglob("*.py"))
}
# what a room may import beside errors and grid, which everything may
ARROWS = {
    "errors": "",
    "grid": "",
    "numerics": "",
    "storage": "",
    "report": "",
    "plan": "report",
    "target": "storage",
    "arguments": "numerics",
    "worker": "numerics storage plan",
    "lazy": "numerics storage arguments",
    "engine": "numerics storage report plan target arguments worker",
    "xarray": "storage arguments lazy",
    "cli": "report engine arguments",
    "__init__": "lazy engine",
    "__main__": "cli",
}
FREE = {"errors", "grid"}
OUTSIDE = {"numpy", "dask"}
# packages that few modules may import
FEW = {
    "zarr": {
        "storage.array", "storage.codecs", "storage.metadata", "storage.hierarchy",
        "storage.object_store", "storage.stores", "storage.foreign.bfloat16",
        "storage.foreign.store", "storage.foreign.opening",
    },
    "fsspec": {"storage.stores"},
    "google_crc32c": {"storage.durable"},
    "numcodecs": {"storage.decode_guard"},
    "ml_dtypes": {"storage.foreign.bfloat16"},  # where it is used: it is optional
    "xarray": {"xarray"},
    "click": {"cli"},
    "distributed": {"cli", "engine.cluster"},  # where it is used: it takes a second to import
}  # fmt: skip
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
    """Names of this package among imported names, without its own."""
    return {name.split(".", 1)[1] for name in names if name.split(".")[0] == "daskclip"}


def room_of(name):
    return name.split(".")[0]


def functions(tree):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.fixture(params=FILES)
def module(request):
    return request.param, ast.parse(FILES[request.param].read_text())


def test_the_map_lists_every_room():
    listed = [line.split()[0] for line in daskclip.__doc__.split("=\n")[1].splitlines()[:-1]]
    assert (
        sorted([*listed, "__init__", "__main__"])
        == sorted({*map(room_of, FILES)})
        == sorted(ARROWS)
    )
    # from the bottom up
    for i, room in enumerate(listed):
        assert {*ARROWS[room].split()} <= {*listed[:i]}


def test_arrows_between_rooms_are_the_allowed_ones(module):
    name, tree = module
    room = room_of(name)
    free = FREE if room not in FREE else set()
    used = {*map(room_of, own(imports(tree)))}
    assert used - {room} <= free | {*ARROWS[room].split()}


@pytest.mark.parametrize("room", ARROWS)
def test_every_allowed_arrow_is_used(room):
    mine = [path for name, path in FILES.items() if room_of(name) == room]
    used = {room_of(n) for path in mine for n in own(imports(ast.parse(path.read_text())))}
    assert {*ARROWS[room].split()} <= used


def test_nothing_is_imported_past_a_facade(module):
    name, tree = module
    for imported in own(imports(tree)):
        room, *inside = imported.split(".")
        if room == room_of(name) or f"{room}.__init__" not in FILES:
            continue
        assert inside, f"{imported} is a whole room"
        facade = importlib.import_module(f"daskclip.{room}")
        assert inside[0] in facade.__all__, f"{imported} is not in what {room} exports"
        assert len(inside) == 1 or inspect.ismodule(getattr(facade, inside[0]))


@pytest.mark.parametrize("room", sorted({room_of(n) for n in FILES if "." in n}))
def test_a_facade_exports_what_others_import(room):
    facade = importlib.import_module(f"daskclip.{room}")
    others = [path for name, path in FILES.items() if room_of(name) != room]
    used = {n for path in others for n in own(imports(ast.parse(path.read_text())))}
    assert {n.split(".")[1] for n in used if room_of(n) == room} == {*facade.__all__}
    assert len(facade.__doc__.splitlines()) >= 3


def test_no_module_of_ours_is_imported_inside_a_function(module):
    _, tree = module
    assert not [f for f in functions(tree) if own(imports(f))]


def test_only_the_package_imports_the_engine_when_it_is_used(module):
    name, tree = module
    # a third of the memory of an import, which those who clip arrays do not need
    imported = ast.unparse(tree).count("import_module(")
    assert imported == (name == "__init__")


def test_the_engine_is_imported_when_it_is_used():
    code = """import sys, daskclip
engine = lambda: "daskclip.engine" in sys.modules
print(engine(), daskclip.clip_by_norm.__name__, engine(), daskclip.clip_zarr.__name__, engine())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False clip_by_norm False clip_zarr True\n"


def test_imports_from_outside(module):
    name, tree = module
    allowed = {*sys.stdlib_module_names, "daskclip", *OUTSIDE}
    allowed |= {package for package, few in FEW.items() if name in few}
    everywhere = [n.split(".")[0] for n in imports(tree)]
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
    here = {
        name
        for name, value in vars(daskclip).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    room = importlib.import_module("daskclip.engine")
    engine = {name for name in daskclip.__all__ if hasattr(room, name)}
    assert set(daskclip.__all__) == here | engine
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
