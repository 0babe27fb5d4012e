"""The kernel as pip, hatchling and other compilers build it, without the network."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
from builds import (
    KERNELS,
    ROOT,
    WITHOUT_GCC,
    WITHOUT_ZIG,
    ZIG_CC,
    copy_tree,
    for_machine,
    sanitized,
)

from hatch_build import SOURCE, ZIG, command, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
needs_gcc = pytest.mark.skipif(bool(WITHOUT_GCC), reason=WITHOUT_GCC)
needs_zig = pytest.mark.skipif(bool(WITHOUT_ZIG), reason=WITHOUT_ZIG)
needs_qemu = pytest.mark.skipif(
    not shutil.which("qemu-aarch64"), reason="qemu-aarch64 (package qemu-user) is not installed"
)
HEADERS = {f"daskclip/numerics/{name}.h" for name in ("runs", "decide", "elements")}
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
NOWHERE = {"PATH": "/nowhere", "CC": ""}  # no cc there
COMPILERS = [
    pytest.param({"CC": "gcc"}, id="gcc", marks=needs_gcc),
    pytest.param(NOWHERE, id="zig", marks=needs_zig),
]
# loads each kernel and clips an array
USE = """
import ctypes, pathlib, numpy, daskclip
folder = pathlib.Path(daskclip.__file__).parent
print(folder)
for path in sorted(folder.glob("numerics/*.so")):
    print(path.name, ctypes.CDLL(str(path)).scratch_bytes(ctypes.c_int64(3)) > 0)
print(daskclip.clip_by_norm(numpy.float32([3, 4]), 10.0))
"""


def python(*arguments, cwd, env=(), **environment):
    """Exit code of a Python, and everything that it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=dict(env or os.environ) | environment,
        check=False,
    )
    return done.returncode, done.stdout


def pip(*arguments, cwd, **environment):
    return python("-m", "pip", *arguments, *OFFLINE, cwd=cwd, **environment)


def wheel_of(source, folder, **environment):
    """Build a wheel of a folder or an sdist; return its path."""
    code, said = pip("wheel", "-w", folder, source, cwd=folder.parent, **environment)
    assert code == 0, said
    (wheel,) = folder.glob("*.whl")
    return wheel


def kernels(tree):
    return {path.name: path.read_bytes() for path in (tree / SOURCE).parent.glob("*.so")}


def used(site):
    """What `USE` prints of a package in a folder."""
    return "\n".join([f"{site / 'daskclip'}", *(f"{k} True" for k in KERNELS), "[3. 4.]\n"])


def complaint(said):
    """The one line that a failed build has to say, in what pip printed around it."""
    assert "Traceback" not in said
    (line,) = [text.strip() for text in said.splitlines() if "cannot" in text]
    remedy = f"; set CC to a C compiler that works, or to ziglang and allow pip to install {ZIG}"
    assert line.endswith(remedy)
    return line.removesuffix(remedy)


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "tree").mkdir()
    return copy_tree(tmp_path / "tree")


def check_wheel(wheel, folder):
    """Verify the tag and what is in a wheel; install it and use it."""
    tag = re.sub("[-.]", "_", sysconfig.get_platform())
    assert wheel.name.endswith(f"-py3-none-{tag}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(n for n in names if ".so" in n) == [f"daskclip/numerics/{k}" for k in KERNELS]
    assert not [n for n in names if "hatch_build" in n]
    site = folder / "site"
    code, said = pip("install", "--target", site, wheel, cwd=folder)
    assert code == 0, said
    code, said = python("-c", USE, cwd=folder, PYTHONPATH=str(site))
    assert code == 0, said
    assert said == used(site)


@pytest.mark.parametrize("environment", COMPILERS)
def test_a_wheel_has_every_kernel(tree, tmp_path, environment):
    check_wheel(wheel_of(tree, tmp_path / "wheels", **environment), tmp_path)
    assert kernels(tree).keys() == set(KERNELS)


@pytest.mark.parametrize("environment", COMPILERS)
def test_the_same_source_makes_the_same_kernels(tree, tmp_path, environment):
    wheel_of(tree, tmp_path / "once", **environment)
    once = kernels(tree)
    wheel_of(tree, tmp_path / "twice", **environment)
    assert kernels(tree) == once


@pytest.mark.parametrize("environment", COMPILERS)
def test_sdist_needs_no_compiler_and_makes_a_wheel(tree, tmp_path, environment):
    (tree / SOURCE).with_name("_kernel_old.so").write_bytes(b"of another machine")
    code, said = python(
        "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path / "sdist", cwd=tree, CC="false"
    )
    assert code == 0, said
    (sdist,) = (tmp_path / "sdist").iterdir()
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"hatch_build.py", "pyproject.toml", SOURCE, *HEADERS} <= names
    assert not [n for n in names if n.endswith(".so")]
    check_wheel(wheel_of(sdist, tmp_path / "wheels", **environment), tmp_path)


@needs_gcc
@pytest.mark.parametrize(
    ("cc", "reason"),
    [
        ("false", "exit status 1"),
        ("gcc-99", "no such file or directory"),
        ("gcc --nonsense", "gcc: error: unrecognized command-line option '--nonsense'"),
        ("gcc -Dstatic=float", SOURCE),
    ],
)
def test_failed_build_leaves_the_kernels_of_an_editable_install(tree, tmp_path, cc, reason):
    # beside the package under test, which pip would remove
    install = ["install", "--ignore-installed", "--prefix", tmp_path / "prefix", "-e", tree]
    code, said = pip(*install, cwd=tmp_path, CC="gcc")
    assert code == 0, said
    before = kernels(tree)
    assert before.keys() == set(KERNELS)
    for way in (install, ["wheel", "-w", tmp_path / "wheels", tree]):
        code, said = pip(*way, cwd=tmp_path, CC=cc)
        assert code != 0
        assert complaint(said).startswith(f"cannot compile {SOURCE} with {cc!r}: {reason}")
        assert kernels(tree) == before


def test_without_compiler_and_network_one_line_names_the_remedy(tree, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "ziglang.py").write_text("import sys\nsys.exit('no such module')\n")
    hidden = NOWHERE | {"PYTHONPATH": str(tmp_path / "hidden")}
    code, said = pip("wheel", "-w", tmp_path / "wheels", tree, cwd=tmp_path, **hidden)
    assert code != 0
    zig = " ".join(ZIG_CC)
    assert complaint(said) == f"cannot compile {SOURCE} with {zig!r}: no such module"
    assert not kernels(tree)


@needs_zig
def test_kernel_for_aarch64_is_compiled(tmp_path):
    out = tmp_path / "kernel.so"
    assert run(command(ZIG_CC, "aarch64", "", out), str(ROOT), str(tmp_path)) == ""
    header = out.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == 183  # EM_AARCH64


@needs_gcc
@needs_zig
@needs_qemu
def test_kernel_runs_on_aarch64(tmp_path):
    there = subprocess.check_output(["qemu-aarch64", for_machine("aarch64", tmp_path)])
    here = subprocess.check_output([for_machine(platform.machine(), tmp_path)])
    assert here.count(b"\n") == 288
    assert there == here


@needs_gcc
def test_tests_of_the_kernel_pass_with_sanitizers(tmp_path):
    env = sanitized(tmp_path)
    code, said = python("-c", USE, cwd=tmp_path, env=env)
    assert code == 0, said
    assert said == used(tmp_path)
    tests = ["tests/numerics/test_kernel.py"]
    code, said = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=ROOT, env=env)
    assert code == 0, said
