"""Compile ``daskclip/numerics/kernel.c`` while a wheel is built.

The compiler is ``$CC``, else ``cc``, else the one in the wheel of ziglang (also by ``CC=ziglang``),
which pip then installs for the time of the build. Kernels have neither libc nor Python headers, so
that one wheel serves all versions of Python on a platform.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "daskclip/numerics/kernel.c"
ZIG = "ziglang==0.17.1"
# sums are exact only if every addition rounds where it is written
FLAGS = shlex.split(
    "-O3 -std=c11 -ffp-contract=off -fno-fast-math -fno-math-errno -fno-trapping-math"
    " -fwrapv -fno-strict-aliasing"
)
# x86-64-v2 and x86-64-v3, in words that compilers older than these names know too
V2 = ["-msse4.2", "-mpopcnt", "-mcx16", "-msahf"]
V3 = [*V2, "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mmovbe"]


def compiler() -> list[str]:
    """Command of the C compiler that is used."""
    chosen = shlex.split(os.environ.get("CC", "")) or ["cc" if shutil.which("cc") else "ziglang"]
    return [sys.executable, "-m", "ziglang", "cc"] if chosen == ["ziglang"] else chosen


def levels(machine: str) -> list[str]:
    """Endings of the kernels' names: one for each set of instructions to choose from."""
    return ["_v2", "_v3"] if sys.platform == "linux" and machine == "x86_64" else [""]


def command(cc: list[str], machine: str, level: str, out: Path) -> list[str]:
    """Command that compiles the kernel to `out`, from the top of the repository."""
    linux = sys.platform == "linux"
    options = {"_v2": V2, "_v3": V3, "": []}[level]
    if {"zig", "ziglang"} & {Path(word).name for word in cc}:
        options = ["-fno-sanitize=undefined", f"-mcpu={'x86_64' + level if level else 'baseline'}"]
        options += ["-target", f"{machine}-linux-gnu.2.17"] if linux else []
    options += ["-fPIC", "-shared", "-fvisibility=hidden", *(["-nostdlib", "-s"] if linux else [])]
    return [*cc, *FLAGS, *options, "-o", str(out), SOURCE]


def run(words: list[str], root: str, cache: str) -> str:
    """Run a compiler in the folder `root`; return what went wrong, an empty string if nothing."""
    env = {**os.environ, "LC_ALL": "C", "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    try:
        done = subprocess.run(words, cwd=root, env=env, capture_output=True, errors="replace")
    except OSError as error:
        return str(error.strerror).lower()
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    errors = [line for line in lines if "error" in line]
    return [*errors, lines[-1]][0] if done.returncode else ""


class KernelHook(BuildHookInterface[BuilderConfig]):
    """Hook that puts compiled kernels beside their source and into the wheel."""

    def dependencies(self) -> list[str]:
        """List what pip has to install before."""
        return [ZIG] if "ziglang" in compiler() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile all kernels, then replace those of earlier builds."""
        folder, cc, machine = Path(self.root, SOURCE).parent, compiler(), platform.machine()
        names = {level: f"_kernel{level}.so" for level in levels(machine)}
        # on the same disk, to be renamed; git ignores a folder with this ending
        with tempfile.TemporaryDirectory(dir=folder, suffix=".so") as new:
            for level, name in names.items():
                wrong = run(command(cc, machine, level, Path(new, name)), self.root, new)
                if wrong:
                    raise SystemExit(
                        f"cannot compile {SOURCE} with {shlex.join(cc)!r}: {wrong}; set CC to a C"
                        f" compiler that works, or to ziglang and allow pip to install {ZIG}"
                    )
            for name in names.values():
                os.replace(Path(new, name), folder / name)
        build_data["artifacts"] += [f"/{Path(SOURCE).parent}/{name}" for name in names.values()]
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + re.sub("[-.]", "_", sysconfig.get_platform())
