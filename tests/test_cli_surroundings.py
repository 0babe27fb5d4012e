"""The command line where stdout, stderr, the environment or a setting of Dask is not as usual."""

import fcntl
import os
import pty
import random
import shlex
import struct
import subprocess
import sys
import termios
from importlib.metadata import entry_points
from pathlib import Path

import dask
import numpy as np
import pytest
import zarr
from command_line import DASKCLIP, assert_fails, run, shell
from reference import bits
from stores import create, read, some, stored
from zarr.codecs import GzipCodec

import daskclip
from daskclip import clip_by_norm, clip_zarr, stats_zarr
from daskclip.errors import DaskClipError
from daskclip.report.progress import ProgressState, progress_printer

PROGRESS = ["bar", "lines", "json", "auto", "none"]


@pytest.fixture
def source(tmp_path):
    return create(tmp_path / "x", some((5, 6), "f4"), (2, 4))


def redirected(source, target, where, *options, command="run"):
    """Run the command line in a shell of the system, which can close and redirect its streams."""
    words = map(shlex.quote, map(str, [*DASKCLIP, command, source, *target, *options]))
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{' '.join(words)} {where}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("where", "progress"),
    [("2>&-", "auto"), ("2>/dev/full", "bar"), ("2>/dev/full", "json"), ("2> >(true)", "lines")],
)
def test_a_run_goes_on_without_stderr(source, tmp_path, where, progress):
    limit = ["--clip-norm", 1, "--progress", progress]
    done = redirected(source, [tmp_path / "y"], where, *limit)
    assert (done.returncode, done.stderr) == (0, "")
    assert "clipped" in done.stdout
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(source), 1.0))


@pytest.mark.distributed
def test_local_workers_go_on_without_stderr(source, tmp_path):
    done = redirected(source, [tmp_path / "y"], "2>/dev/full", "--clip-norm", 1, "--workers", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("where", "target", "code"),
    [
        ("2>&-", "no/y", 3),
        ("2>/dev/full", "x", 5),
        (">&- 2>&-", "", 3),
        ("2>/dev/full", "a b c", 2),
    ],
)
def test_an_error_that_cannot_be_printed_has_its_exit_code(source, tmp_path, where, target, code):
    targets = [tmp_path / name for name in target.split()]
    assert redirected(source, targets, where, "--clip-norm", 1).returncode == code


@pytest.mark.parametrize("stream", [None, "closed", "broken"])
@pytest.mark.parametrize("progress", [True, *PROGRESS])
def test_progress_is_never_a_reason_to_fail(source, tmp_path, monkeypatch, stream, progress):
    if stream is not None:
        stream = open(os.devnull, "w" if stream == "closed" else "r")  # noqa: SIM115
        stream.close() if stream.mode == "w" else None
    monkeypatch.setattr(sys, "stderr", stream)
    report = clip_zarr(source, tmp_path / "y", 1.0, progress=progress)
    monkeypatch.undo()
    assert report.status == "clipped"
    if stream is not None:
        stream.close()


@pytest.mark.parametrize(
    ("where", "command", "options"),
    [
        (">&-", "run", []),
        ("| true", "run", ["--json"]),
        (">/dev/full", "run", []),
        (">/dev/full", "plan", []),
        (">/dev/full", "stats", []),
        ("| true", "verify", []),
        (">/dev/full", "status", []),
        (">&-", "discard", []),
    ],
)
def test_a_stdout_that_cannot_be_written_is_a_storage_failure(
    source, tmp_path, where, command, options
):
    target = tmp_path / "y"
    if command in ("run", "plan", "stats"):
        options = [*options, "--progress", "none"]
    if command in ("run", "plan"):
        options = [*options, "--clip-norm", 1]
    else:
        run("run", source, target, "--clip-norm", 1)
    what = source if command in ("run", "plan", "stats") else target
    where_to = [target] if command in ("run", "plan") else []
    done = redirected(what, where_to, where, *options, command=command)
    assert_fails(done, 1, "stdout", "a target that was made stays", "run the same command")
    if command != "plan":
        assert bits(read(target)) == bits(clip_by_norm(read(source), 1.0))


@pytest.mark.parametrize("command", [["--help"], ["--version"]])
def test_help_that_cannot_be_written_is_one_line(command):
    words = " ".join(map(shlex.quote, [*DASKCLIP, *command]))
    done = subprocess.run(
        ["bash", "-c", f"{words} >/dev/full"], capture_output=True, text=True, check=False
    )
    assert_fails(done, 1, "No space left on device")


@pytest.mark.parametrize("option", ["--report", "--html"])
def test_a_report_that_cannot_be_written_leaves_the_others(source, tmp_path, option):
    other = {"--report": "--html", "--html": "--report"}[option]
    options = ["--clip-norm", 1, "--progress", "none", option, "/dev/full", other, tmp_path / "r"]
    done = shell("run", source, tmp_path / "y", *options)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "/dev/full" in line
    assert "No space left on device" in line
    assert "clipped" in done.stdout
    assert (tmp_path / "r").stat().st_size > 100
    assert (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("größe", {"PYTHONIOENCODING": "ascii"}),
        ("名前", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("a\udcffb", {}),
    ],
)
def test_names_need_not_be_in_the_encoding_of_the_terminal(tmp_path, name, environment):
    source = create(tmp_path / name, some((5, 6), "f4"), (2, 4))
    options = ["--clip-norm", 1, "--html", tmp_path / "page", "--report", tmp_path / "report"]
    done = shell("run", source, tmp_path / "y", *options, env={**os.environ, **environment})
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert (tmp_path / "page").stat().st_size > 100


# --- settings ------------------------------------------------------------------------------------

REFUSED = {
    "DASK_NUM_WORKERS": ["abc", "0", "-1", "1.5", "[2]", "True"],
    "DASK_POOL": ["abc", "4"],
    "DASK_CACHE": ["4"],
    "DASK_SCHEDULER": ["foo", "5", "distributed", "127.0.0.1:1", "tcp://127.0.0.1:1"],
    "DASK_GET": ["5"],
    "DASK_DASKCLIP": ["5", "[1]", "abc", "True"],
    "DASK_DASKCLIP__MEMORY": ["zz", "-1MiB", "[]", "5"],
    "DASK_DASKCLIP__MEMORY__A": ["1"],
    "DASK_DASKCLIP__PROGRESS": ["loud", "False", "3"],
    "DASK_DASKCLIP__NONFINITE": ["", "5"],
    "DASK_DASKCLIP__MISSING": ["abc"],
    "DASK_DASKCLIP__FOO": ["1"],
}
AT_IMPORT = {
    "DASK_NUM_WORKERS": "abc",
    "DASK_LOGGING": "5",
    "DASK_ARRAY": "5",
    "ZARR_BUFFER__FOO": "1",
}
USED = {
    "DASK_ARRAY__QUERY_PLANNING": "True",
    "DASK_OPTIMIZATION": "5",
    "DASK_SPLIT_EVERY": "abc",
    "DASK_ANNOTATIONS": "5",
    "DASK_SCHEDULER": "sync",
    "DASK_DASKCLIP__PROGRESS": "none",
    "DASK_DISTRIBUTED": "5",
    "DASK_TEMPORARY_DIRECTORY": "/nonexistent",
    "TMPDIR": "/nonexistent",
    "COLUMNS": "abc",
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in REFUSED for v in REFUSED[n]])
def test_a_setting_that_cannot_be_used_is_one_line(source, tmp_path, name, value):
    before = stored(tmp_path)
    command = ["run", source, tmp_path / "y", "--clip-norm", 1]
    with dask.config.set(dask.config.collect_env({name: value})):
        assert_fails(run(*command), 3)
    assert stored(tmp_path) == before


@pytest.mark.parametrize(("name", "value"), AT_IMPORT.items())
def test_a_setting_that_is_read_at_import_is_one_line(source, tmp_path, name, value):
    command = ["run", source, tmp_path / "y", "--clip-norm", 1]
    assert_fails(shell(*command, env={**os.environ, name: value}), 3)
    assert not (tmp_path / "y").exists()


ZARR = [
    ("array", "x"), ("array.order", "Q"), ("codecs", 5), ("codecs.bytes", "x"),
    ("codecs.gzip", 5), ("codec_pipeline", 5), ("codec_pipeline.path", "nope.x"), ("buffer", "x"),
    ("ndbuffer", "x"),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["array", "group"])
@pytest.mark.parametrize(("name", "value"), ZARR)
def test_a_setting_of_zarr_is_not_blamed_on_the_source(tmp_path, kind, name, value):
    group = zarr.create_group(tmp_path / "group")
    group.create_array("array", data=some((5, 6), "f4"), compressors=GzipCodec())
    source = tmp_path / ("group" if kind == "group" else "group/array")
    with zarr.config.set({name: value}):
        done = run("plan", source, tmp_path / "y", "--clip-norm", 1)
    assert_fails(done, 3, "zarr cannot open any array", "check its settings: variables ZARR_*")
    assert "group" not in done.stderr


@pytest.mark.parametrize(
    "settings", [USED, {"DASK_OPTIMIZATION__FUSE__DELAYED": "True"}], ids=["all", "fuse"]
)
def test_other_settings_change_nothing(tmp_path, settings):
    # two passes, with sums to combine
    code = "from sizes import use; use(block_nbytes=64, window_blocks=8)"
    source = create(tmp_path / "x", some((64, 6), "f4"), (1, 6))
    command = ["run", source, tmp_path / "y", "--clip-norm", 1, "--axes", 0, "--memory", "40MiB"]
    done = shell(*command, code=code, env={**os.environ, **settings})
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(source), 1.0, 0))


@pytest.mark.parametrize(
    ("name", "text"), [("DASK_CONFIG", "a: [1"), ("DASK_CONFIG", "- a"), ("ZARR_CONFIG", "a: [1")]
)
def test_a_broken_file_of_settings_is_one_line(source, tmp_path, name, text):
    (tmp_path / "settings.yaml").write_text(text)
    command = ["plan", source, tmp_path / "y", "--clip-norm", 1]
    environment = {**os.environ, name: str(tmp_path / "settings.yaml")}
    assert_fails(shell(*command, env=environment), 3, "settings.yaml", "check its settings")
    code = "import daskclip; daskclip.clip_zarr"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert b"ImportError: daskclip cannot be used" in done.stderr


@pytest.mark.parametrize("number", ["abc", 0, -1, 1.5, True, [2]])
def test_python_refuses_a_number_of_workers(source, tmp_path, number):
    with dask.config.set(num_workers=number), pytest.raises(ValueError, match="num_workers") as e:
        clip_zarr(source, tmp_path / "y", 1.0)
    assert isinstance(e.value, DaskClipError)


# --- schedulers ----------------------------------------------------------------------------------

FILES = {
    "empty": b"", "words": b"no json", "list": b"[]", "object": b"{}", "number": b'{"address": 5}',
    "bytes": b"\xff\xfe", "deep": b"[" * 10000, "other": b'{"address": "foo://127.0.0.1:1"}',
}  # fmt: skip
ADDRESSES = [
    "tls://127.0.0.1:1", "ucx://127.0.0.1:1", "foo://127.0.0.1:1", "tcp://127.0.0.1", "tcp://",
    "tcp://[::1", "inproc://x", "", " ", "a\nb", "tcp://127.0.0.1:1:2",
]  # fmt: skip


def no_client_is_left():
    """Whether Dask computes on threads again."""
    return dask.base.get_scheduler() is None and dask.config.get("scheduler", None) is None


@pytest.mark.parametrize("name", FILES)
def test_a_scheduler_file_without_an_address_is_refused(source, tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    command = ["run", source, tmp_path / "y", "--clip-norm", 1, "--scheduler", tmp_path / name]
    assert_fails(run(*command), 3, tmp_path / name, "scheduler file")
    assert no_client_is_left()


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_without_a_scheduler_is_refused(source, tmp_path, address):
    command = ["run", source, tmp_path / "y", "--clip-norm", 1, "--scheduler", address]
    assert_fails(run(*command), 3, "check the address")
    assert no_client_is_left()


@pytest.mark.parametrize("address", ["tls://127.0.0.1:1", "empty"])
def test_the_loggers_of_distributed_are_silent(source, tmp_path, address):
    (tmp_path / "empty").touch()
    command = ["run", source, "y", "--clip-norm", 1, "--scheduler", address]
    assert_fails(shell(*command, cwd=tmp_path), 3, "check the address")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DASK_DISTRIBUTED__NANNY__PRELOAD", "5"),
        ("DASK_TEMPORARY_DIRECTORY", "/proc/none"),
    ],
)
def test_local_workers_that_cannot_start_are_one_line(source, tmp_path, name, value):
    command = ["run", source, tmp_path / "y", "--clip-norm", 1, "--workers", 1]
    assert_fails(shell(*command, env={**os.environ, name: value}), 3, "check Dask's configuration")


# --- terminals -----------------------------------------------------------------------------------


def shown_in(columns, states):
    """Lines of a terminal of some columns after each of some states."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(terminal, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        show = progress_printer("auto")
        texts = []
        for state in states:
            show(state)
            texts.append(os.read(master, 65536).decode())
    os.close(master)
    return [text.strip("\r\n").removesuffix("\x1b[K") for text in texts]


def state(done, total, skipped=0, seconds=1.0):
    return ProgressState(
        done=done, skipped=skipped, total=total, pass_=1, passes=2, seconds=seconds
    )


@pytest.mark.parametrize("columns", [1, 5, 20, 30, 40, 60, 80, 200])
def test_a_bar_fits_into_the_terminal(columns):
    random.seed(columns)
    totals = [10 ** random.randrange(1, 17) for _ in range(50)]
    states = [state(random.randrange(t), t, seconds=random.random() * 1e5) for t in totals]
    for text in shown_in(columns, states):
        assert len(text) < columns


def test_a_bar_in_40_columns_has_a_bar_and_the_time_that_is_left():
    (text,) = shown_in(40, [state(10**9, 4 * 10**9)])
    assert text == "[###            ] 1.00/4.00 GB  3 s left"[:39] or "3 s left" in text
    assert text.startswith("[##")


def test_nothing_is_said_of_a_rate_before_there_is_one(capsys):
    replayed = state(10**9, 4 * 10**9, skipped=10**9)
    (text,) = shown_in(80, [replayed])
    assert "/s" not in text
    assert "left" not in text
    assert replayed.left is None
    progress_printer("json")(replayed)
    assert '"left": null' in capsys.readouterr().err
    assert state(5, 5, skipped=5).left == 0


# --- entry points --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--version"], ["run", "--help"]])
def test_the_package_can_be_run_as_a_module(options):
    done = subprocess.run(
        [sys.executable, "-m", "daskclip", *options], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(("Usage: daskclip run ", "daskclip, version"))


def test_the_console_script_is_this_command():
    (script,) = entry_points(group="console_scripts", name="daskclip")
    assert script.value == "daskclip.cli:main"
    name = Path(sys.executable).with_name("daskclip")
    done = subprocess.run([name, "run"], capture_output=True, text=True, check=False)
    assert_fails(done, 2, "SOURCE")


def test_only_what_is_public_is_listed():
    assert {n for n in dir(daskclip) if not n.startswith("_")} == {*daskclip.__all__}
    done = subprocess.run(
        [sys.executable, "-c", "import daskclip.xarray; help(daskclip)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    first = done.stdout.split("The rooms of the package")[0]
    assert ">>> report = daskclip.clip_zarr(" in first
    assert ">>> y = daskclip.clip_by_norm(" in first
    assert all(name in first for name in daskclip.__all__)
    assert len(first) < 2000
    assert "numerics   exact norms" in done.stdout  # the map


def test_reports_are_short_as_text(source, tmp_path):
    x = zarr.create_array(tmp_path / "long", shape=(4096, 4), chunks=(512, 4), dtype="f4")
    x[:] = np.random.default_rng(0).random((4096, 4))
    group = zarr.create_group(tmp_path / "group")
    for i in range(30):
        group.create_array(f"w{i}", shape=(4, 4), dtype="f4")
    reports = [
        stats_zarr(x, 1),
        clip_zarr(x, tmp_path / "y", 0.5, 1, pictures=True),
        daskclip.verify_zarr(tmp_path / "y", x),
        daskclip.plan_zarr(x, tmp_path / "z", 0.5, 1),
        daskclip.plan_zarr(group.store_path, tmp_path / "z", 0.5),
    ]
    for report in reports:
        assert repr(report) == str(report)
        assert len(repr(report)) < 2500
        assert len(repr(report).splitlines()) == len(report.rows())
        assert report._repr_html_().startswith('<div class="daskclip">')
    verified = reports[2].rows()
    assert verified["largest norm"] == "0.5"
    assert verified["blocks"].startswith(f"{reports[2].blocks:,}")
    assert all("None" not in value for value in verified.values())
