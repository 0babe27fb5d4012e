"""Where a library makes subnormal numbers 0 in hardware, nothing is computed."""

import json
import platform
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="cc is not installed")
# bits of MXCSR, or of FPCR: results are flushed, operands are, or both
MODES = {"x86_64": {"ftz": 1 << 15, "daz": 1 << 6, "both": 1 << 15 | 1 << 6}}
MODES["aarch64"] = {"fz": 1 << 24}
FLUSHING = MODES.get(platform.machine(), {})
SOURCE = """
void change(unsigned long mode, unsigned long mask) {
#ifdef __x86_64__
    unsigned csr;
    __asm__ volatile("stmxcsr %0" : "=m"(csr));
    csr = (csr & ~(unsigned)mask) | (unsigned)mode;
    __asm__ volatile("ldmxcsr %0" : : "m"(csr));
#else
    unsigned long csr;
    __asm__ volatile("mrs %0, fpcr" : "=r"(csr));
    csr = (csr & ~mask) | mode;
    __asm__ volatile("msr fpcr, %0" : : "r"(csr));
#endif
}
"""
# in a process of its own, with which the mode ends
USE = """
import concurrent.futures, ctypes, json, sys, tempfile
import dask, dask.array as da, numpy as np, zarr
import daskclip
from click.testing import CliRunner
from daskclip.cli import main

path, modes = sys.argv[1], json.loads(sys.argv[2])
tiny = np.full(30, 5e-324)
x = da.from_array(tiny, 10)
folder = tempfile.mkdtemp()
zarr.create_array(f"{folder}/x", shape=30, chunks=10, dtype="f8")[:] = tiny

def change(mode, mask=0):
    ctypes.CDLL(path).change(ctypes.c_ulong(mode), ctypes.c_ulong(mask))

def is_refused(function):
    try:
        function()
    except daskclip.errors.KernelError as error:
        assert str(error).startswith("subnormal numbers are 0 in this thread"), error
        assert "\\n" not in str(error)
        return True
    return False

def refused(initializer=None, *arguments):
    # threads that are made for this, since threads have the mode of the one that starts them
    pool = concurrent.futures.ThreadPoolExecutor(2, "", initializer, arguments)
    with pool, dask.config.set(pool=pool):
        return refused_here(tempfile.mkdtemp(dir=folder))

def refused_here(to):
    found = map(is_refused, (
        lambda: daskclip.clip_by_norm(tiny, 5e-324),
        lambda: daskclip.norm(tiny),
        lambda: daskclip.norm(x).compute(scheduler="threads"),
        lambda: daskclip.clip_by_norm(x, 5e-324).compute(scheduler="threads"),
        lambda: daskclip.clip_zarr(f"{folder}/x", f"{to}/y", 5e-324),
    ))
    run = ["run", f"{folder}/x", f"{to}/z", "--clip-norm", "5e-324"]
    return [*found, CliRunner().invoke(main, run).exit_code]

if not modes:
    # the constructor of the library sets the mode of the thread that loads it
    ctypes.CDLL(path)
    print(json.dumps(refused()))
    sys.exit()
results = [refused()]
for mode in modes:
    change(mode)
    results.append(refused())
    change(0, mode)
    results.append(refused())
    results.append(refused(change, mode))
print(json.dumps(results))
"""
ALL, NONE = [True] * 5 + [1], [False] * 5 + [0]
IN_THREADS = [False] * 2 + [True] * 3 + [1]


def compile_library(folder, *options):
    source, library = folder / "change.c", folder / "change.so"
    source.write_text(SOURCE)
    subprocess.run(["cc", "-O2", "-fPIC", "-shared", *options, "-o", library, source], check=True)
    return str(library)


def use(library, modes):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE, library, json.dumps(modes)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not FLUSHING, reason=f"no mode is known of {platform.machine()}")
def test_every_thread_that_flushes_is_refused_until_the_mode_is_set_back(tmp_path):
    library = compile_library(tmp_path)
    found = use(library, [*FLUSHING.values()])
    assert found == [NONE] + [ALL, NONE, IN_THREADS] * len(FLUSHING)


def test_start_up_code_of_fast_math_is_refused_before_the_kernel_is_loaded(tmp_path):
    library = compile_library(tmp_path, "-ffast-math")
    load = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); print(5e-324 * float(sys.argv[2]))"
    product = subprocess.check_output([sys.executable, "-c", load, library, "1.25"], text=True)
    if float(product):
        pytest.skip("this compiler links no start-up code into shared libraries")
    assert use(library, []) == ALL
