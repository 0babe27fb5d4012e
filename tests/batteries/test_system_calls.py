"""System calls that fail, a full disk and a read-only mount, all real."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults import CASES, contents, in_child, prepared
from stores import create, finished, mounted, read, some

from daskclip import clip_by_norm, clip_zarr
from daskclip.errors import DaskClipError

# system call: what is injected; none of them is an operation that the hooks of faults.py count
INJECTIONS = [
    "write:error=ENOSPC:when=2+",
    "write:error=EIO:when=5+",
    "write:error=EDQUOT:when=9+",
    "write:signal=KILL:when=3",
    "write:signal=KILL:when=8",
    "read:error=EIO:when=3+",
    "read:error=ESTALE:when=4",
    "read:signal=KILL:when=6",
    "openat:error=EACCES:when=6+",
    "openat:error=EMFILE:when=12+",
    "openat:signal=KILL:when=20",
    "getdents64:error=EIO:when=2+",
    "getdents64:signal=KILL:when=3",
    "flock:error=ENOLCK",
    "flock:signal=KILL",
    "newfstatat,statx:error=EIO:when=30+",
    "newfstatat,statx:signal=KILL:when=25",
    "close:signal=KILL:when=12",
    "close:signal=KILL:when=30",
    "lseek:error=EIO:when=3+",
    "ftruncate,truncate:error=EIO",
    "syncfs:signal=KILL:when=2",
]

# warm first, so that no import is hit; then wait until the tracer is there
CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from pathlib import Path
from faults import CASES, SIZES, warm
from sizes import use
from daskclip.errors import DaskClipError
warm()
use(**SIZES)
print("ready", flush=True)
sys.stdin.readline()
try:
    print(CASES[{case}].run(Path({folder!r})))
except DaskClipError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def traced(folder, index, injection, log):
    """Exit code and output of a run in which a system call fails or kills."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    code = CHILD.format(
        tests=str(Path(__file__).parents[1] / "support"), case=index, folder=str(folder)
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as child:
        assert child.stdout.readline() == "ready\n"
        calls = injection.partition(":")[0]
        options = ["-f", "-p", str(child.pid), "-o", str(log), "-e", f"trace={calls}"]
        with subprocess.Popen(
            ["strace", *options, "-e", f"inject={injection}"], stderr=subprocess.PIPE, text=True
        ) as tracer:
            line = tracer.stderr.readline()
            if "attached" not in line:
                child.kill()
                pytest.skip(f"strace cannot attach here: {line.strip()}")
            out, err = child.communicate("\n", timeout=120)
            tracer.stderr.read()
    return child.returncode, out, err


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(INJECTIONS)), ids=INJECTIONS)
def test_a_system_call_that_fails_leaves_an_old_or_a_new_array(tmp_path, number):
    index = number % len(CASES)
    case = CASES[index]
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    for place in (whole, folder):
        shutil.copytree(prepared(case), place)
    wanted = in_child(lambda: case.run(whole))["value"]
    log = tmp_path / "log"
    code, out, err = traced(folder, index, INJECTIONS[number], log)
    assert code == -9 if "signal" in INJECTIONS[number] else "INJECTED" in log.read_text()
    assert code in (0, 1, 3, 5, 75, -9), (out, err)
    assert "Traceback" not in err
    for name in "xy":
        states = [contents(prepared(case), name), contents(whole, name)]
        assert contents(folder, name) in states
    assert in_child(lambda: case.run(folder))["value"][1:] == wanted[1:]
    assert {name: contents(folder, name) for name in "xy"} == {
        name: contents(whole, name) for name in "xy"
    }
    assert {p.name for p in folder.iterdir()} <= {"x", "y"}


def test_a_disk_that_is_full_is_named_and_the_run_ends_once_there_is_room(tmp_path):
    x = create(tmp_path / "x", some((256, 1024), "f4"), (16, 1024), compressors=None)
    with mounted(tmp_path, "size=1300k") as point:
        filler = point / "filler"
        filler.write_bytes(bytes(600 * 1024))
        with pytest.raises(DaskClipError, match="No space left on device") as caught:
            clip_zarr(x, point / "y", 1.0)
        assert caught.value.exit_code == 1
        assert "\n" not in str(caught.value)
        assert not (point / "y").exists()
        filler.unlink()
        clip_zarr(x, point / "y", 1.0)
        assert (read(point / "y") == clip_by_norm(read(x), 1.0)).all()
        assert [p.name for p in point.iterdir()] == ["y"]


def test_a_disk_that_becomes_read_only_is_named(tmp_path):
    x = create(tmp_path / "x", some((64, 64), "f4"), (16, 64))
    with mounted(tmp_path, "size=4m") as point:
        subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
        with pytest.raises(DaskClipError, match=r"cannot be written") as caught:
            clip_zarr(x, point / "y", 1.0)
        assert caught.value.exit_code == 3
        subprocess.run(["mount", "-o", "remount,rw", str(point)], check=True)
        assert not finished(point)
        clip_zarr(x, point / "y", 1.0)
        assert (read(point / "y") == clip_by_norm(read(x), 1.0)).all()
