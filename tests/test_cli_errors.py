"""Errors of the command line and of the library: refused calls, and failures during a run."""

import json
import math
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr
from command_line import DASKCLIP, assert_fails, run, shell
from damage import Payload
from numpy.exceptions import AxisError
from stores import create, finished, mounted, some, stored
from zarr.codecs.numcodecs import Quantize

from daskclip import clip_zarr, plan_zarr
from daskclip.errors import DaskClipError

NOBODY = 65534


@pytest.fixture
def source(tmp_path):
    return create(tmp_path / "x", some((5, 6), "f4"), (2, 4))


def format_2(path, dtype, data, filters=None):
    """Write an array of format 2 that zarr itself would not write."""
    path.mkdir()
    document = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": dtype, "fill_value": None}
    document |= {"order": "C", "compressor": None, "filters": filters}
    (path / ".zarray").write_text(json.dumps(document))
    (path / "0").write_bytes(data)


def make_sources(folder):
    """Make a source of every refused kind, and ``x``, which is valid."""
    create(folder / "x", some((5, 6), "f4"), (2, 4))
    create(folder / "integers", np.ones((5, 6), "i4"), (2, 4))
    create(folder / "booleans", np.ones((5, 6), bool), (2, 4), zarr_format=2)
    create(folder / "dates", np.ones(3, "M8[s]"), (2,), zarr_format=2)
    with warnings.catch_warnings(action="ignore"):
        create(folder / "strings", np.array(["a", "b"]), (2,))
        filters = [Quantize(digits=1, dtype="<f4")]
        create(folder / "quantized", some((5, 6), "f4"), (2, 4), filters=filters)
    payload = pickle.dumps(Payload(folder / "unpickled"))
    format_2(folder / "objects", "|O", payload, [{"id": "pickle", "protocol": 5}])
    format_2(folder / "texts", "|O", b"", [{"id": "vlen-utf8"}])
    format_2(folder / "longdoubles", "<f16", bytes(16))
    group = zarr.create_group(folder / "group")
    group.create_array("a", shape=(3,), dtype="f4")
    zarr.create_group(folder / "consolidated", zarr_format=2)
    zarr.consolidate_metadata(folder / "consolidated", zarr_format=2)
    (folder / "folder").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "of").touch()
    (folder / "text").write_text("not a zarr array")
    for name, text in {"list": "[]", "torn": '{"zarr_format": 3, "no', "empty": ""}.items():
        (folder / name).mkdir()
        (folder / name / "zarr.json").write_text(text)
    (folder / "dangling").symlink_to(folder / "nowhere")


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    make_sources(folder)
    return folder


def both_refuse(folder, source, target, kind, code, words, **arguments):
    """Check that library and command line refuse alike, and leave no files."""
    before = stored(folder)
    python = {"clip_norm": 1.0, **arguments}
    for function in (clip_zarr, plan_zarr):
        with pytest.raises(kind) as caught:
            function(folder / source, folder / target, **python)
        assert isinstance(caught.value, DaskClipError)
        assert caught.value.exit_code == code
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)
    options = [
        f"--{name.replace('_', '-')}={value if isinstance(value, str | float | int) else ''}"
        for name, value in python.items()
    ]
    for command in (["run"], ["plan"], ["run", "--dry-run"]):
        assert_fails(run(*command, folder / source, folder / target, *options), code, *words)
    assert stored(folder) == before


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("integers", TypeError, ["int32", "store a copy as one of float16, bfloat16"]),
        ("booleans", TypeError, ["bool", "store a copy"]),
        ("dates", TypeError, ["datetime64", "store a copy"]),
        ("objects", TypeError, ["O"]),
        ("texts", TypeError, []),
        ("longdoubles", TypeError, ["f16"]),
        ("nowhere", FileNotFoundError, ["does not exist", "check the path"]),
        ("dangling", FileNotFoundError, ["does not exist", "check the path"]),
        ("consolidated", ValueError, ["is an empty group"]),
        ("folder", ValueError, ["is not a zarr array", "give the path of one"]),
        ("text", ValueError, ["is not a zarr array", "give the path of one"]),
        ("list", ValueError, ["is not a zarr array", "give the path of one"]),
        ("torn", ValueError, ["is not a zarr array", "give the path of one"]),
        ("empty", ValueError, ["is not a zarr array", "give the path of one"]),
    ],
)
def test_sources_that_are_refused(everything, source, kind, words):
    both_refuse(everything, source, "y", kind, 3, words)
    assert not (everything / "unpickled").exists()


@pytest.mark.parametrize(
    ("target", "kind", "code", "words"),
    [
        ("integers", FileExistsError, 5, ["exists", "remove it or choose another path"]),
        ("full", FileExistsError, 5, ["exists", "remove it or choose another path"]),
        ("text", FileExistsError, 5, ["exists", "remove it or choose another path"]),
        ("dangling", FileExistsError, 5, ["exists", "remove it or choose another path"]),
        ("x", FileExistsError, 5, ["exists and is the source", "or choose another path"]),
        (".", ValueError, 3, ["lies inside the target", "choose another path"]),
        ("x/c", ValueError, 3, ["inside the source", "choose another path"]),
        ("x/y", ValueError, 3, ["inside the source", "choose another path"]),
        ("x/c/y", ValueError, 3, ["inside the source", "choose another path"]),
        ("no/y", ValueError, 3, ["does not exist", "create it"]),
        ("text/y", ValueError, 3, ["text"]),
        ("consolidated/y", ValueError, 3, ["consolidated metadata", "write elsewhere"]),
    ],
)
def test_targets_that_are_refused(everything, target, kind, code, words):
    both_refuse(everything, "x", target, kind, code, words)


@pytest.mark.parametrize(
    ("kind", "words", "arguments"),
    [
        (AxisError, ["axis 2", "2 dimensions", "-2 to 1"], {"axes": "2"}),
        (AxisError, ["axis -3", "2 dimensions", "-2 to 1"], {"axes": "-3"}),
        (ValueError, ["twice", "once"], {"axes": "0,0"}),
        (ValueError, ["twice", "once"], {"axes": "1,-1"}),
        (ValueError, ["512MiB", "junk"], {"memory": "junk"}),
        (ValueError, ["512MiB", "0"], {"memory": "0"}),
        (ValueError, ["512MiB", "-1MiB"], {"memory": "-1MiB"}),
        (ValueError, ["512MiB", "1e999"], {"memory": "1e999"}),
        (ValueError, ["512MiB", "nan"], {"memory": "nanMiB"}),
        (ValueError, ["0.0 MiB", "a whole slab", "give memory='"], {"memory": "1kB"}),
    ],
    ids=str,
)
def test_parameters_that_are_refused(everything, kind, words, arguments):
    before = stored(everything)
    python = dict(arguments)
    if "axes" in python:
        python["axes"] = [int(a) for a in python["axes"].split(",")]
    with pytest.raises(kind) as caught:
        clip_zarr(everything / "x", everything / "y", 1.0, **python)
    assert isinstance(caught.value, DaskClipError)
    options = [f"--{name}={value}" for name, value in arguments.items()]
    for command in ("run", "plan"):
        done = run(command, everything / "x", everything / "y", "--clip-norm", 1, *options)
        assert_fails(done, 3, *words, str(caught.value))
    assert stored(everything) == before


@pytest.mark.parametrize(
    ("kind", "word", "arguments"),
    [
        (TypeError, "float", {"axes": 0.0}),
        (TypeError, "float", {"axes": [0.5]}),
        (TypeError, "bool", {"axes": True}),
        (TypeError, "str", {"axes": "0"}),
        (TypeError, "list", {"axes": [[0]]}),
        (ValueError, "(2,)", {"clip_norm": [1.0, 2.0]}),
        (ValueError, "(1,)", {"clip_norm": np.ones(1)}),
        (TypeError, "'1'", {"clip_norm": "1"}),
        (TypeError, "1j", {"clip_norm": 1j}),
        (TypeError, "complex", {"clip_norm": np.array(1j)}),
        (TypeError, "None", {"clip_norm": None}),
        (TypeError, "float", {"memory": 1.5e9}),
        (TypeError, "bool", {"memory": True}),
        (TypeError, "None", {"memory": None}),
        (ValueError, "'some'", {"nonfinite": "some"}),
        (ValueError, "'some'", {"missing": "some"}),
        (ValueError, "'some'", {"progress": "some"}),
        ((TypeError, ValueError), "progress", {"progress": []}),
    ],
    ids=str,
)
def test_arguments_that_python_refuses(everything, kind, word, arguments):
    before = stored(everything)
    for function in (clip_zarr, plan_zarr):
        with pytest.raises(kind) as caught:
            function(everything / "x", everything / "y", **{"clip_norm": 1.0, **arguments})
        assert isinstance(caught.value, DaskClipError)
        assert "\n" not in str(caught.value)
        assert word in str(caught.value)
    assert stored(everything) == before


@pytest.mark.parametrize(
    ("source", "target"),
    [(np.ones(3, "i4"), "y"), (3, "y"), ("x", 3), ("x", None), ("x", "no://b/y")],
)
def test_things_that_are_no_paths_are_refused(everything, source, target):
    before = stored(everything)
    source = everything / source if isinstance(source, str) else source
    with pytest.raises((TypeError, ValueError)) as caught:
        clip_zarr(source, everything / target if target == "y" else target, 1.0)
    assert isinstance(caught.value, DaskClipError)
    assert stored(everything) == before


@pytest.mark.parametrize("axes", ["0.5", "x", "0;1", "True", "1e0", "1:x", "1:,2", "1:2:1:1"])
def test_axes_that_are_no_integers(everything, axes):
    before = stored(everything)
    done = run("run", everything / "x", everything / "y", "--clip-norm", 1, "--axes", axes)
    assert_fails(done, 3, axes, "0,2", "1:")
    assert stored(everything) == before


@pytest.mark.parametrize(("axes", "word"), [("::0", "step"), ("2:", "takes no axis")])
def test_slices_of_axes_that_take_none(everything, axes, word):
    before = stored(everything)
    done = run("run", everything / "x", everything / "y", "--clip-norm", 1, "--axes", axes)
    assert_fails(done, 3, word, "axes slice(")
    assert stored(everything) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--clip-norm", "junk"], ["clip-norm", "junk"]),
        (["--clip-norm", "1,2"], ["clip-norm", "1,2"]),
        (["--clip-norm", "1j"], ["clip-norm", "1j"]),
        (["--clip-norm", ""], ["clip-norm"]),
        ([], ["clip-norm"]),
        (["--clip-norm", "1", "--nonfinite", "some"], ["nonfinite", "some", "omit"]),
        (["--clip-norm", "1", "--missing", "some"], ["missing", "some", "error"]),
        (["--clip-norm", "1", "--progress", "some"], ["progress", "some", "bar"]),
        (["--clip-norm", "1", "--workers", "0"], ["workers", "0"]),
        (["--clip-norm", "1", "--workers", "2", "--scheduler", "a"], ["workers", "scheduler"]),
        (["--clip-norm", "1", "--junk"], ["--junk"]),
        (["--clip-norm", "1", "third"], ["third"]),
    ],
    ids=str,
)
def test_command_lines_that_are_not_understood(everything, options, words):
    before = stored(everything)
    assert_fails(run("run", everything / "x", everything / "y", *options), 2, *words)
    assert stored(everything) == before


@pytest.mark.parametrize("words", [["--junk"], ["junk"], []], ids=str)
def test_commands_that_are_not_understood(words):
    assert_fails(run(*words), 2, *words)


def test_a_report_that_cannot_be_written_is_refused_before_the_run(everything):
    before = stored(everything)
    options = ["--clip-norm", 1, "--report", everything / "no" / "report.json"]
    done = run("run", everything / "x", everything / "y", *options)
    assert_fails(done, 3, "report", "does not exist", "create it")
    assert stored(everything) == before


@pytest.mark.slow
def test_an_unknown_scheduler_is_refused(everything):
    before = stored(everything)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        options = ["--clip-norm", 1, "--scheduler", address]
        done = shell("run", everything / "x", everything / "y", *options)
    assert_fails(done, 3, address, "check the address")
    assert stored(everything) == before


@pytest.mark.parametrize("address", ["foo://127.0.0.1:1", "tcp://127.0.0.1:port"])
def test_a_junk_scheduler_address_is_refused(everything, address):
    before = stored(everything)
    options = ["--clip-norm", 1, "--scheduler", address]
    done = shell("run", everything / "x", everything / "y", *options)
    assert_fails(done, 3, address, "check the address")
    assert stored(everything) == before


@pytest.mark.parametrize(("source", "word"), [("strings", "str"), ("quantized", "quantize")])
def test_refusals_are_one_line_where_zarr_warns(everything, source, word):
    before = stored(everything)
    assert_fails(shell("run", everything / source, everything / "y", "--clip-norm", 1), 3, word)
    assert stored(everything) == before


@pytest.fixture
def public(everything):
    """A folder with a source that any user may enter, unlike pytest's own folders."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    shutil.copytree(everything / "x", folder / "x")
    yield folder
    shutil.rmtree(folder)


def test_a_read_only_folder_is_refused(public):
    closed = public / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    before = stored(public)
    # root may write anywhere, so drop privileges; import first, while files can be read
    code = "import os, daskclip.cli; daskclip.plan_zarr({!r}, {!r}, 1.0)".format(
        str(public / "x"), str(public / "y")
    )
    if os.geteuid() == 0:
        code += f"; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
    done = shell("run", public / "x", closed / "y", "--clip-norm", 1, code=code)
    assert_fails(done, 3, str(closed), "cannot be written", "choose another")
    assert stored(public) == before


def test_a_read_only_mount_is_refused(public):
    with mounted(public, "ro,size=64k") as point:
        done = run("run", public / "x", point / "y", "--clip-norm", 1)
        with pytest.raises(PermissionError):
            clip_zarr(public / "x", point / "y", 1.0)
        assert not stored(point)
    assert_fails(done, 3, str(point), "cannot be written", "choose another")


def test_a_folder_that_only_looks_writable_is_refused(everything):
    target = Path("/proc") / "daskclip-target"
    done = run("run", everything / "x", target, "--clip-norm", 1)
    assert_fails(done, 3, "/proc")
    with pytest.raises((OSError, ValueError)) as caught:
        clip_zarr(everything / "x", target, 1.0)
    assert isinstance(caught.value, DaskClipError)


# --- failures during a run -----------------------------------------------------------------------


def test_a_chunk_that_cannot_be_read_is_a_storage_failure(tmp_path, source):
    (source / "c/1/0").write_bytes(b"broken")
    before = stored(tmp_path)
    done = shell("run", source, tmp_path / "y", "--clip-norm", 1)
    assert_fails(done, 1, "reading block", str(source), "again to resume")
    assert finished(tmp_path) == before


def test_a_chunk_that_cannot_be_written_is_a_storage_failure(tmp_path):
    source = create(tmp_path / "x", some((64, 256), "f4"), (64, 256), compressors=None)
    before = stored(tmp_path)
    limit = resource.RLIMIT_FSIZE
    code = f"import resource; resource.setrlimit({limit}, (4096, 4096))"
    done = shell("run", source, tmp_path / "y", "--clip-norm", 1, code=code)
    assert_fails(done, 1, "writing block", "again to resume")
    assert finished(tmp_path) == before


@pytest.mark.slow
def test_a_failure_among_many_chunks_is_one_line(tmp_path):
    # zarr goes on with the other chunks of a call when one fails
    source = create(tmp_path / "x", some((3000, 2), "f4"), (1, 2))
    (source / "c/0/0").write_bytes(b"broken")
    before = stored(tmp_path)
    done = shell("run", source, tmp_path / "y", "--clip-norm", 1, "--progress", "none")
    assert_fails(done, 1, "reading block", "again to resume")
    assert finished(tmp_path) == before


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_can_be_discarded(public):
    source = create(public / "many", some((3000, 2), "f4"), (1, 2))
    with mounted(public, "size=2m") as point:
        done = shell("run", source, point / "y", "--clip-norm", 1, "--progress", "none")
        assert not finished(point)
        assert shell("discard", point / "y").stdout == "discarded\n"
        assert not stored(point)
    assert_fails(done, 1, "writing block", "No space left", "at chunk", "again to resume")


def test_nan_under_raise_is_named_by_its_slice(tmp_path):
    source = create(tmp_path / "x", np.float32([[1, 2], [math.nan, 3]]), (1, 2))
    before = stored(tmp_path)
    options = ["--clip-norm", 1, "--axes", 1, "--nonfinite", "raise"]
    assert_fails(
        run("run", source, tmp_path / "y", *options), 3, "slice [1, :]", "chunk (1, 0)", "omit"
    )
    assert stored(tmp_path) == before


def test_a_missing_chunk_under_error_is_named(tmp_path, source):
    (source / "c/1/0").unlink()
    before = stored(tmp_path)
    options = ["--clip-norm", 1, "--missing", "error"]
    assert_fails(run("run", source, tmp_path / "y", *options), 3, "c/1/0", "missing")
    assert stored(tmp_path) == before


@pytest.mark.slow
@pytest.mark.distributed
def test_a_failure_on_workers_is_one_line(tmp_path, source):
    (source / "c/1/0").write_bytes(b"broken")
    before = stored(tmp_path)
    options = ["--clip-norm", 1, "--workers", 1, "--progress", "none"]
    done = shell("run", source, tmp_path / "y", *options)
    assert_fails(done, 1, "reading block", str(source), "again to resume")
    assert finished(tmp_path) == before


def test_an_interrupted_run_can_be_resumed(tmp_path):
    # nothing is stored: many windows, without data to make first
    zarr.create_array(tmp_path / "x", shape=(10**6, 4), chunks=(1, 4), dtype="f4", fill_value=1.0)
    before = stored(tmp_path)
    code = "from sizes import use; use(block_nbytes=64, window_blocks=1)"
    # the signal is ignored by default in background processes of a shell
    code += "; import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{code}; {DASKCLIP[2]}", "run", tmp_path / "x"]
    command += [tmp_path / "y", "--clip-norm", "1", "--axes", "1", "--progress", "json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        first = json.loads(child.stderr.readline())
        child.send_signal(signal.SIGINT)
        out, err = child.communicate()
    assert first["done"] < first["total"]
    assert (child.returncode, out) == (75, "")
    assert "interrupted" in err.splitlines()[-1]
    assert all(json.loads(line) for line in err.splitlines()[:-1])
    assert finished(tmp_path) == before
