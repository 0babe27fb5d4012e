"""What a run knows of its source: changed chunks are found, and unchanged sources are known again.

For every kind of store; a run is killed in one process and resumed in another.
"""

import signal
import subprocess
import sys

import pytest
from kinds import KINDS, S3, SLOW, change_chunk, lacking, opened, served
from reference import bits
from sizes import SMALL
from stores import create, read, some

from daskclip import clip_by_norm, clip_zarr
from daskclip.engine.run_record import status
from daskclip.errors import TargetExistsError

every = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in KINDS]
)
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
FORMATS = {"zarr_format": 3, "compressors": None}
# a process for each line of stdin, killed once the first window is in its journal
KILLED = f"""
import os, signal, sys
import contextlib, kinds, sizes
from daskclip import clip_zarr
from daskclip.target.journal import Journal

with contextlib.suppress(ImportError):
    import aiohttp

def append(self, record, append=Journal.append):
    append(self, record)
    os.kill(os.getpid(), signal.SIGKILL)

sizes.use(**{SMALL})
Journal.append = append
for line in sys.stdin:
    kind, source, target, url = line.removesuffix("\\n").split("\\t")
    if not (child := os.fork()):
        clip_zarr(kinds.opened(kind, source, url), target, 1.0, axes=1)
    print("ended", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def killed():
    """Function that begins a run in another process, which is killed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", KILLED], **pipes) as process:

        def begin(*words):
            process.stdin.write("\t".join(map(str, words)) + "\n")
            process.stdin.flush()
            # others may log to stdout
            ended = next(line for line in process.stdout if line.startswith("ended"))
            assert int(ended.split()[1]) == signal.SIGKILL

        yield begin
        process.stdin.close()


@pytest.fixture
def folder(tmp_path):
    """An array with a chunk that is missing."""
    (tmp_path / "a").mkdir()
    create(tmp_path / "a" / "x", some((8, 8), "f4"), (2, 4), **FORMATS)
    (tmp_path / "a" / "x" / "c/3/0").unlink()
    return tmp_path / "a" / "x"


@pytest.fixture
def source(kind, folder, request):
    """Function that opens the source as it is now."""
    if reason := lacking(kind):
        pytest.skip(reason)
    with served(kind, folder) as url:
        if kind in S3:
            url = f"{request.getfixturevalue('weed').url} {folder.parents[1].name}"
        open_ = lambda: opened(kind, folder, url)  # noqa: E731
        open_.url = url
        yield open_


def right(folder, target):
    return bits(read(target)) == bits(clip_by_norm(read(folder), 1.0, axes=1))


@every
def test_a_changed_chunk_is_never_up_to_date(kind, source, folder, tmp_path):
    target = tmp_path / "y"
    assert clip_zarr(source(), target, 1.0, axes=1).status == "clipped"
    assert clip_zarr(source(), target, 1.0, axes=1).status == "up to date"
    assert right(folder, target)
    change_chunk(folder)
    with pytest.raises(TargetExistsError, match="exists"):
        clip_zarr(source(), target, 1.0, axes=1)
    assert clip_zarr(source(), target, 1.0, axes=1, overwrite=True).status == "clipped"
    assert right(folder, target)
    # a chunk that appears, and one that goes
    (folder / "c/3/0").write_bytes((folder / "c/0/0").read_bytes())
    if "icechunk" not in kind:
        (folder / "c/1/1").unlink()
    assert clip_zarr(source(), target, 1.0, axes=1, overwrite=True).status == "clipped"
    assert right(folder, target)


@every
@pytest.mark.usefixtures("small")
def test_a_killed_run_is_resumed_by_another_process_unless_a_chunk_changed(
    kind, source, killed, folder, tmp_path
):
    target, other = tmp_path / "y", tmp_path / "z"
    for to in (target, other):
        killed(kind, folder, to, source.url)
        assert not to.exists()
    run = status(target)["unfinished"]
    assert f"run {clip_zarr(source(), target, 1.0, axes=1).run}" == run
    assert right(folder, target)
    change_chunk(folder)
    with pytest.raises(TargetExistsError, match="changed since"):
        clip_zarr(source(), other, 1.0, axes=1)
    with pytest.raises(TargetExistsError, match="changed since"):
        clip_zarr(source(), other, 1.0, axes=1, overwrite=True)
