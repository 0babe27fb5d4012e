"""Copies of the package to build, and compilers for its kernel."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import hatch_build
from hatch_build import FLAGS, SOURCE, ZIG, levels

ROOT = Path(hatch_build.__file__).parent
KERNELS = [f"_kernel{level}.so" for level in levels(platform.machine())]
ZIG_CC = [sys.executable, "-m", "ziglang", "cc"]
WITHOUT_ZIG = "" if importlib.util.find_spec("ziglang") else f"{ZIG} is not installed"
WITHOUT_GCC = "" if shutil.which("gcc") else "gcc is not installed"


def copy_package(folder):
    """Copy the package without its kernels."""
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "daskclip", folder / "daskclip", ignore=without)


def copy_tree(folder):
    """Copy what a build reads to a new folder."""
    copy_package(folder)
    for name in (".gitignore", "LICENSE", "README.md", "hatch_build.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def sanitized(folder):
    """Copy the package, with kernels that end Python at the first wrong access or operation.

    Returns the environment in which Python takes the copy: ``subprocess.run([sys.executable, ...],
    env=sanitized(tmp_path))``. What is found is printed on stderr, and the exit code is not 0.
    """
    copy_package(folder)
    numerics = folder / "daskclip" / "numerics"
    check = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g"]
    subprocess.run(
        ["gcc", *FLAGS, *check, "-fPIC", "-shared", "-o", numerics / KERNELS[0], SOURCE],
        cwd=folder, check=True,
    )  # fmt: skip
    for name in KERNELS[1:]:
        shutil.copy(numerics / KERNELS[0], numerics / name)
    # the library must be there before any memory is taken; Python itself leaves some at its end
    find = ["gcc", "-print-file-name=libasan.so"]
    library = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    options = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    return os.environ | options | {"PYTHONPATH": str(folder)}


def for_machine(machine, folder):
    """Compile ``kernel_main.c``, with the kernel in it, to a program for Linux on a machine."""
    program = folder / f"kernel-{machine}"
    cc = ["gcc"]
    if machine != platform.machine():
        cc = [*ZIG_CC, "-fno-sanitize=undefined", "-static", "-target", f"{machine}-linux-musl"]
    source = ROOT / "tests" / "support" / "kernel_main.c"
    subprocess.run([*cc, *FLAGS, "-o", program, source], check=True)
    return program
