"""The command line: what it prints where, and how it says no."""

import json
import math
import os
import pickle
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path

import dask
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from numpy.exceptions import AxisError
from reference import bits
from stores import create, finished, mounted, read, some, stored
from zarr.codecs.numcodecs import Quantize

from daskclip import clip_by_norm, clip_zarr, plan_zarr
from daskclip.cli import main
from daskclip.errors import DaskClipError
from daskclip.report.reports import ClipReport

DASKCLIP = [sys.executable, "-c", "from daskclip.cli import main; main()"]
NOBODY = 65534


def run(*args):
    """Exit code, stdout and stderr of the command line, in this process."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def shell(*args, code=None, **options):
    """The same in a process of its own; ``code`` runs before the command line."""
    command = [sys.executable, "-c", f"{code}; {DASKCLIP[2]}"] if code else DASKCLIP
    return subprocess.run(
        [*command, *map(str, args)], capture_output=True, text=True, check=False, **options
    )


@pytest.fixture
def source(tmp_path):
    return create(tmp_path / "x", some((5, 6), "f4"), (2, 4))


def wanted(source, clip_norm=1.0, axes=None):
    return bits(clip_by_norm(read(source), clip_norm, axes))


def test_run_prints_the_report_as_text(source, tmp_path):
    done = shell("run", source, tmp_path / "y", "--clip-norm", 1)
    assert done.returncode == 0
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert rows["source"].strip() == str(source)
    assert rows["slices"].strip() == "1"
    assert rows["clipped"].strip() == "1 (100.0 %)"
    assert bits(read(tmp_path / "y")) == wanted(source)


def test_json_is_the_only_thing_on_stdout(source, tmp_path):
    report = tmp_path / "report.json"
    options = ["--axes", 1, "--json", "--report", report]
    done = shell("run", "x", "y", "--clip-norm", "0.5", *options, cwd=tmp_path)
    assert done.returncode == 0
    figures = json.loads(done.stdout, parse_constant=pytest.fail)
    assert list(figures) == [field.name for field in fields(ClipReport)]
    assert (figures["source"], figures["target"]) == (str(tmp_path / "x"), str(tmp_path / "y"))
    assert (figures["clip_norm"], figures["axes"], figures["slices"]) == (0.5, [1], 5)
    assert report.read_text() == done.stdout
    assert done.stderr.startswith("daskclip: ")
    assert bits(read(tmp_path / "y")) == wanted(source, 0.5, 1)


def test_json_has_no_infinity(source, tmp_path):
    done = run("run", source, tmp_path / "y", "--clip-norm", "inf", "--json")
    assert json.loads(done.stdout, parse_constant=pytest.fail)["clip_norm"] == "inf"
    assert bits(read(tmp_path / "y")) == bits(read(source))


@pytest.mark.parametrize("command", [["plan"], ["run", "--dry-run"]])
def test_plan_writes_nothing(source, tmp_path, command):
    before = stored(tmp_path)
    done = run(*command, source, tmp_path / "y", "--clip-norm", 1, "--json", "--axes", "0")
    figures = json.loads(done.stdout)
    planned = plan_zarr(source, tmp_path / "y", 1.0, 0)
    names = ["shape", "axes", "unit", "block", "passes", "slabs", "blocks", "slices", "tasks"]
    names += ["bytes_read", "memory", "projected_memory", "processes", "threads", "window"]
    for name in names:
        value = getattr(planned, name)
        assert figures[name] == (list(value) if isinstance(value, tuple) else value)
    text = run(*command, source, tmp_path / "y", "--clip-norm", 1).stdout
    assert dict(line.split(maxsplit=1) for line in text.splitlines())["passes"] == "1"
    assert stored(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "axes"),
    [(None, None), ("", ()), ("0", 0), ("1", 1), ("-1", 1), ("0,1", (0, 1)), (" 1, 0", (0, 1))],
)
def test_axes(source, tmp_path, text, axes):
    options = [] if text is None else [f"--axes={text}"]
    assert run("run", source, tmp_path / "y", "--clip-norm", 1, *options).exit_code == 0
    assert bits(read(tmp_path / "y")) == wanted(source, 1.0, axes)


@pytest.mark.parametrize("limit", ["1", "1e-3", "-1", "0", "inf", "nan"])
def test_limits(source, tmp_path, limit):
    assert run("run", source, tmp_path / "y", "--clip-norm", limit).exit_code == 0
    assert bits(read(tmp_path / "y")) == wanted(source, float(limit))


@pytest.mark.parametrize("policy", ["propagate", "omit"])
def test_nonfinite(tmp_path, policy):
    values = some((5, 6), "f4")
    values[1, 2] = math.nan
    source = create(tmp_path / "x", values, (2, 4))
    done = run("run", source, tmp_path / "y", "--clip-norm", 1, "--nonfinite", policy)
    assert done.exit_code == 0
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(values, 1.0, nonfinite=policy))


def two_passes(tmp_path):
    """A source and options that make several windows and two passes."""
    source = create(tmp_path / "x", np.ones((64, 1024, 256), "f4"), (1, 1024, 256))
    return ["run", source, tmp_path / "y", "--clip-norm", 1, "--memory", "40MiB"]


def test_progress_as_json_lines(tmp_path):
    done = run(*two_passes(tmp_path), "--progress", "json", "--json")
    states = [json.loads(line) for line in done.stderr.splitlines()]
    figures = json.loads(done.stdout)
    names = {"done", "total", "pass", "passes", "seconds", "rate", "left"}
    assert all(s.keys() == names for s in states)
    assert {s["total"] for s in states} == {figures["bytes_read"]}
    assert [s["done"] for s in states] == sorted({s["done"] for s in states})
    assert [s["pass"] for s in states] == sorted(s["pass"] for s in states)
    assert (states[0]["pass"], states[-1]["pass"], states[-1]["passes"]) == (1, 2, 2)
    assert (states[-1]["done"], states[-1]["left"]) == (figures["bytes_read"], 0)


@pytest.mark.parametrize("options", [[], ["--progress", "lines"], ["--progress", "auto"]])
def test_progress_as_lines_where_stderr_is_no_terminal(source, tmp_path, options):
    done = run("run", source, tmp_path / "y", "--clip-norm", 1, *options)
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("daskclip: ") and "pass 1/1" in line for line in lines)


def test_no_progress(source, tmp_path):
    done = run("run", source, tmp_path / "y", "--clip-norm", 1, "--progress", "none")
    assert (done.exit_code, done.stderr) == (0, "")


@pytest.mark.parametrize("options", [[], ["--progress", "bar"]])
def test_a_bar_where_stderr_is_a_terminal(source, tmp_path, options):
    master, terminal = pty.openpty()
    command = [*DASKCLIP, "run", source, tmp_path / "y", "--clip-norm", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True) as child:
        out, _ = child.communicate()
    shown = os.read(master, 65536).decode()
    os.close(terminal)
    os.close(master)
    assert child.returncode == 0
    assert shown.startswith("\r[")
    assert f"[{'#' * 30}]" in shown
    assert "pass 1/1" in shown
    assert shown.endswith("\n")
    assert str(tmp_path / "y") in out


def test_help_and_version():
    for command in ([], ["run"], ["plan"]):
        text = run(*command, "--help").stdout
        assert "Exit codes:" in text
    if any(e.dist.name == "daskclip" for e in entry_points(group="dask_cli") if e.dist):
        assert run("--version").stdout.startswith("daskclip")


@pytest.mark.parametrize(
    ("command", "headings"),
    [
        ("run", ["What to clip", "Which limit", "Resources", "Output"]),
        ("plan", ["What to clip", "Which limit", "Resources", "Output"]),
        ("stats", ["What to measure", "Resources", "Output"]),
        ("verify", ["What to compare"]),
        ("status", []),
        ("discard", []),
    ],
)
def test_help_lists_all_options_in_groups(command, headings):
    text = run(command, "--help").stdout
    shown = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert shown == [*headings, "Other options"]
    options = [o for p in main.commands[command].params for o in p.opts if o.startswith("--")]
    assert re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, re.MULTILINE) == [*options, "--help"]


def test_it_is_a_command_of_dask(source, tmp_path):
    if "clip" not in entry_points(group="dask_cli").names:
        pytest.skip("daskclip is importable here, but not installed")
    command = [sys.executable, "-m", "dask", "clip", "plan", source, tmp_path / "y"]
    done = subprocess.run(
        [*command, "--clip-norm", "1", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["shape"] == [5, 6]


@pytest.mark.distributed
def test_workers(source, tmp_path):
    options = ["--workers", 2, "--json", "--progress", "json"]
    done = shell("run", source, tmp_path / "y", "--clip-norm", 1, *options)
    assert done.returncode == 0
    first = json.loads(done.stderr.splitlines()[0])
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/status", first["dashboard"])
    assert json.loads(done.stdout)["slices"] == 1
    assert bits(read(tmp_path / "y")) == wanted(source)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_plan_counts_workers(source, tmp_path):
    options = ["--workers", 2, "--json"]
    planned = json.loads(shell("plan", source, tmp_path / "y", "--clip-norm", 1, *options).stdout)
    assert (planned["processes"], planned["threads"]) == (2, 1)


@contextmanager
def started(*command, until):
    """A process that said ``until`` on stderr; gives the rest of that line."""
    with subprocess.Popen(
        [sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            lines = iter(process.stderr.readline, "")
            yield next(line.split(until)[1].strip() for line in lines if until in line)
        finally:
            process.terminate()
            process.communicate()


@pytest.mark.distributed
def test_scheduler(source, tmp_path):
    local = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
    scheduler = ["distributed.cli.dask_scheduler", "--port", "0", *local]
    with started(*scheduler, until="Scheduler at:") as address:
        worker = ["distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1", *local]
        with started(*worker, until="Registered to:"):
            options = ["--clip-norm", 1, "--json", "--progress", "none"]
            done = shell("run", source, tmp_path / "y", "--scheduler", address, *options)
            told = shell("plan", source, tmp_path / "z", "--scheduler", address, *options[:3])
    assert (done.returncode, done.stderr) == (0, "")
    line = r"daskclip: dashboard at http://127\.0\.0\.1:\d+/status\n"
    assert re.fullmatch(line, told.stderr)
    assert json.loads(done.stdout)["slices"] == 1
    assert bits(read(tmp_path / "y")) == wanted(source)


# --- what is refused ---------------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def format_2(path, dtype, data, filters=None):
    """An array of format 2 that zarr itself would not write."""
    path.mkdir()
    document = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": dtype, "fill_value": None}
    document |= {"order": "C", "compressor": None, "filters": filters}
    (path / ".zarray").write_text(json.dumps(document))
    (path / "0").write_bytes(data)


def make_sources(folder):
    """One of everything that is refused, and ``x`` that is not."""
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


def refused(done, code, *words):
    """One line on stderr that holds ``words``, nothing on stdout, and the exit code."""
    assert done.stdout == ""
    line = done.stderr.removesuffix("\n")
    assert line.startswith("daskclip: ")
    assert "\n" not in line
    assert "Traceback" not in line
    for word in words:
        assert word in line
    assert getattr(done, "exit_code", getattr(done, "returncode", None)) == code


def both_refuse(folder, source, target, kind, code, words, **arguments):
    """The library and the command line refuse alike, and nothing is left behind."""
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
        refused(run(*command, folder / source, folder / target, *options), code, *words)
    assert stored(folder) == before


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("integers", TypeError, ["int32", "astype"]),
        ("booleans", TypeError, ["bool", "astype"]),
        ("dates", TypeError, ["datetime64", "astype"]),
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
        ("folder", FileExistsError, 5, ["exists", "remove it or choose another path"]),
        ("text", FileExistsError, 5, ["exists", "remove it or choose another path"]),
        ("dangling", FileExistsError, 5, ["exists", "remove it or choose another path"]),
        ("x", FileExistsError, 5, ["exists", "remove it or choose another path"]),
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
        (ValueError, ["0.0 MiB", "one chunk", "give memory='"], {"memory": "1kB"}),
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
        refused(done, 3, *words, str(caught.value))
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
    ("source", "target"), [(np.ones(3), "y"), (3, "y"), ("x", 3), ("x", None), ("x", "no://b/y")]
)
def test_things_that_are_no_paths_are_refused(everything, source, target):
    before = stored(everything)
    source = everything / source if isinstance(source, str) else source
    with pytest.raises((TypeError, ValueError)) as caught:
        clip_zarr(source, everything / target if target == "y" else target, 1.0)
    assert isinstance(caught.value, DaskClipError)
    assert stored(everything) == before


@pytest.mark.parametrize("axes", ["0.5", "x", "0;1", "True", "1e0"])
def test_axes_that_are_no_integers(everything, axes):
    before = stored(everything)
    done = run("run", everything / "x", everything / "y", "--clip-norm", 1, "--axes", axes)
    refused(done, 3, axes, "0,2")
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
    refused(run("run", everything / "x", everything / "y", *options), 2, *words)
    assert stored(everything) == before


@pytest.mark.parametrize("words", [["--junk"], ["junk"], []], ids=str)
def test_commands_that_are_not_understood(words):
    refused(run(*words), 2, *words)


def test_a_report_that_cannot_be_written_is_refused_before_the_run(everything):
    before = stored(everything)
    options = ["--clip-norm", 1, "--report", everything / "no" / "report.json"]
    done = run("run", everything / "x", everything / "y", *options)
    refused(done, 3, "report", "does not exist", "create it")
    assert stored(everything) == before


@pytest.mark.slow
def test_an_unknown_scheduler_is_refused(everything):
    before = stored(everything)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        options = ["--clip-norm", 1, "--scheduler", address]
        done = shell("run", everything / "x", everything / "y", *options)
    refused(done, 3, address, "check the address")
    assert stored(everything) == before


@pytest.mark.parametrize("address", ["foo://127.0.0.1:1", "tcp://127.0.0.1:port"])
def test_a_junk_scheduler_address_is_refused(everything, address):
    before = stored(everything)
    options = ["--clip-norm", 1, "--scheduler", address]
    done = shell("run", everything / "x", everything / "y", *options)
    refused(done, 3, address, "check the address")
    assert stored(everything) == before


@pytest.mark.parametrize(("source", "word"), [("strings", "str"), ("quantized", "quantize")])
def test_refusals_are_one_line_where_zarr_warns(everything, source, word):
    before = stored(everything)
    refused(shell("run", everything / source, everything / "y", "--clip-norm", 1), 3, word)
    assert stored(everything) == before


@pytest.fixture
def public(everything):
    """A folder that any user may enter, unlike pytest's own, with a source in it."""
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
    # root may write into any folder; what is imported must be so while it can still be read
    code = "import os, daskclip.cli; daskclip.plan_zarr({!r}, {!r}, 1.0)".format(
        str(public / "x"), str(public / "y")
    )
    if os.geteuid() == 0:
        code += f"; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
    done = shell("run", public / "x", closed / "y", "--clip-norm", 1, code=code)
    refused(done, 3, str(closed), "cannot be written", "choose another")
    assert stored(public) == before


def test_a_read_only_mount_is_refused(public):
    with mounted(public, "ro,size=64k") as point:
        done = run("run", public / "x", point / "y", "--clip-norm", 1)
        with pytest.raises(PermissionError):
            clip_zarr(public / "x", point / "y", 1.0)
        assert not stored(point)
    refused(done, 3, str(point), "cannot be written", "choose another")


def test_a_folder_that_only_looks_writable_is_refused(everything):
    target = Path("/proc") / "daskclip-target"
    done = run("run", everything / "x", target, "--clip-norm", 1)
    refused(done, 3, "/proc")
    with pytest.raises((OSError, ValueError)) as caught:
        clip_zarr(everything / "x", target, 1.0)
    assert isinstance(caught.value, DaskClipError)


# --- what fails while it runs --------------------------------------------------------------------


def test_a_chunk_that_cannot_be_read_is_a_storage_failure(tmp_path, source):
    (source / "c/1/0").write_bytes(b"broken")
    before = stored(tmp_path)
    done = shell("run", source, tmp_path / "y", "--clip-norm", 1)
    refused(done, 1, "reading block", str(source), "again to resume")
    assert finished(tmp_path) == before


def test_a_chunk_that_cannot_be_written_is_a_storage_failure(tmp_path):
    source = create(tmp_path / "x", some((64, 256), "f4"), (64, 256), compressors=None)
    before = stored(tmp_path)
    limit = resource.RLIMIT_FSIZE
    code = f"import resource; resource.setrlimit({limit}, (4096, 4096))"
    done = shell("run", source, tmp_path / "y", "--clip-norm", 1, code=code)
    refused(done, 1, "writing block", "again to resume")
    assert finished(tmp_path) == before


@pytest.mark.slow
def test_a_failure_among_many_chunks_is_one_line(tmp_path):
    # zarr goes on with the other chunks of a call when one fails
    source = create(tmp_path / "x", some((3000, 2), "f4"), (1, 2))
    (source / "c/0/0").write_bytes(b"broken")
    before = stored(tmp_path)
    done = shell("run", source, tmp_path / "y", "--clip-norm", 1, "--progress", "none")
    refused(done, 1, "reading block", "again to resume")
    assert finished(tmp_path) == before


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_can_be_discarded(public):
    source = create(public / "many", some((3000, 2), "f4"), (1, 2))
    with mounted(public, "size=2m") as point:
        done = shell("run", source, point / "y", "--clip-norm", 1, "--progress", "none")
        assert not finished(point)
        assert shell("discard", point / "y").stdout == "discarded\n"
        assert not stored(point)
    refused(done, 1, "writing block", "No space left", "at chunk", "again to resume")


def test_nan_under_raise(tmp_path):
    source = create(tmp_path / "x", np.float32([[1, 2], [math.nan, 3]]), (1, 2))
    before = stored(tmp_path)
    options = ["--clip-norm", 1, "--axes", 1, "--nonfinite", "raise"]
    refused(run("run", source, tmp_path / "y", *options), 3, "slice [1, :]", "chunk (1, 0)", "omit")
    assert stored(tmp_path) == before


def test_a_missing_chunk_under_error(tmp_path, source):
    (source / "c/1/0").unlink()
    before = stored(tmp_path)
    options = ["--clip-norm", 1, "--missing", "error"]
    refused(run("run", source, tmp_path / "y", *options), 3, "c/1/0", "missing")
    assert stored(tmp_path) == before


@pytest.mark.slow
@pytest.mark.distributed
def test_a_failure_on_workers_is_one_line(tmp_path, source):
    (source / "c/1/0").write_bytes(b"broken")
    before = stored(tmp_path)
    options = ["--clip-norm", 1, "--workers", 1, "--progress", "none"]
    done = shell("run", source, tmp_path / "y", *options)
    refused(done, 1, "reading block", str(source), "again to resume")
    assert finished(tmp_path) == before


def test_an_interrupted_run_can_be_resumed(tmp_path):
    # chunks that are not stored: as many windows as it takes, without data to make first
    zarr.create_array(tmp_path / "x", shape=(10**6, 4), chunks=(1, 4), dtype="f4", fill_value=1.0)
    before = stored(tmp_path)
    code = "from sizes import use; use(block_nbytes=64, window_blocks=1)"
    # tests that run in the background of a shell inherit that it is ignored
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


# --- for operators -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["environment", "file"])
def test_defaults_come_from_dasks_configuration(source, tmp_path, how):
    environment = {"DASK_DASKCLIP__MEMORY": "40MiB", "DASK_DASKCLIP__PROGRESS": "json"}
    if how == "file":
        (tmp_path / "daskclip.yaml").write_text("daskclip: {memory: 40MiB, progress: json}")
        environment = {"DASK_CONFIG": str(tmp_path)}
    environment |= os.environ
    command = [source, tmp_path / "y", "--clip-norm", 1, "--json"]
    planned = json.loads(shell("plan", *command, env=environment).stdout)
    assert planned["memory"] == 40 * 2**20
    done = shell("run", *command, env=environment)
    assert json.loads(done.stdout)["parameters"]["memory"] == 40 * 2**20
    assert all("rate" in json.loads(line) for line in done.stderr.splitlines())


def test_an_option_counts_more_than_the_configuration(source, tmp_path):
    with dask.config.set(daskclip={"memory": "40MiB"}):
        done = run("plan", source, tmp_path / "y", "--clip-norm", 1, "--json", "--memory", "50MiB")
    assert json.loads(done.stdout)["memory"] == 50 * 2**20


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mem": "1GiB"}, ["daskclip.mem", "memory, nonfinite, missing, progress"]),
        ({"memory": "much"}, ["memory", "'much'"]),
        ({"progress": "loud"}, ["progress", "loud"]),
    ],
)
def test_settings_that_make_no_sense(source, tmp_path, settings, words):
    with dask.config.set(daskclip=settings):
        done = run("run", source, tmp_path / "y", "--clip-norm", 1)
    assert done.exit_code in (2, 3)
    (line,) = done.stderr.splitlines()
    assert all(word in line for word in words)
    assert not (tmp_path / "y").exists()


def test_what_happens_is_logged(source, tmp_path, caplog):
    caplog.set_level("INFO", "daskclip")
    report = clip_zarr(source, tmp_path / "y", 1.0)
    assert [r.name for r in caplog.records] == ["daskclip"] * 2
    begun, done = caplog.messages
    assert begun == f"beginning run {report.run}, {source} to {tmp_path / 'y'}"
    assert done == "clipped: 1 of 1 slices clipped"


def test_the_report_tells_where_the_data_came_from(source, tmp_path):
    report = clip_zarr(source, tmp_path / "y", 1.0, missing="error")
    assert report.parameters == {"nonfinite": "propagate", "missing": "error", "memory": 2**29}
    assert report.versions["zarr"] == zarr.__version__
    assert set(report.versions) > {"python", "daskclip", "dask", "numpy"}
    again = clip_zarr(source, tmp_path / "y", 1.0, missing="error")
    assert (again.status, again.run, again.began) == ("up to date", report.run, report.began)
    # the digest is that of the files, whatever the blocks
    other = clip_zarr(source, tmp_path / "z", 1.0, memory="1GiB")
    assert (other.digest, other.source_fingerprint) == (report.digest, report.source_fingerprint)
    assert clip_zarr(source, tmp_path / "less", 0.5).digest != report.digest
    place = clip_zarr(tmp_path / "z", None, 1.0, in_place=True)
    assert (place.status, place.digest) == ("nothing to clip", None)
    changed = clip_zarr(tmp_path / "z", None, 0.5, in_place=True)
    assert changed.digest == clip_zarr(tmp_path / "y", tmp_path / "w", 0.5).digest
