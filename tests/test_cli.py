"""The command line: its options, and what it prints where."""

import json
import math
import os
import pty
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import entry_points

import dask
import numpy as np
import pytest
import zarr
from command_line import DASKCLIP, run, shell
from reference import bits
from stores import create, read, some, stored

from daskclip import clip_by_norm, clip_zarr, plan_zarr
from daskclip.cli import main
from daskclip.engine import passes
from daskclip.report.reports import ClipReport


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
    [(None, None), ("", ()), ("0", 0), ("1", 1), ("-1", 1), ("0,1", (0, 1)), (" 1, 0", (0, 1)),
     ("1:", 1), (":", None), (":-1", 0), ("0:2", None), ("::-2", 1), (" -1 : ", 1)],
)  # fmt: skip
def test_axes_are_integers_or_a_slice_or_none(source, tmp_path, text, axes):
    options = [] if text is None else [f"--axes={text}"]
    assert run("run", source, tmp_path / "y", "--clip-norm", 1, *options).exit_code == 0
    assert bits(read(tmp_path / "y")) == wanted(source, 1.0, axes)


@pytest.mark.parametrize("limit", ["1", "1e-3", "0", "-0", "inf"])
def test_clip_norm_is_any_number(source, tmp_path, limit):
    assert run("run", source, tmp_path / "y", "--clip-norm", limit).exit_code == 0
    assert bits(read(tmp_path / "y")) == wanted(source, float(limit))


@pytest.mark.parametrize("policy", ["propagate", "omit", "zero"])
def test_nonfinite_names_a_policy(tmp_path, policy):
    values = some((5, 6), "f4")
    values[1, 2] = math.nan
    source = create(tmp_path / "x", values, (2, 4))
    done = run("run", source, tmp_path / "y", "--clip-norm", 1, "--nonfinite", policy)
    assert done.exit_code == 0
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(values, 1.0, nonfinite=policy))


def two_passes(tmp_path):
    """Command for a source that takes several windows and two passes."""
    source = create(tmp_path / "x", np.ones((64, 1024, 256), "f4"), (1, 1024, 256))
    return ["run", source, tmp_path / "y", "--clip-norm", 1, "--memory", "40MiB"]


def test_progress_as_json_lines(tmp_path, monkeypatch):
    # counts of a slab are not journalled alone where the disk is slow
    monkeypatch.setattr(passes, "RECORD_S", math.inf)
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


def test_progress_none_prints_nothing(source, tmp_path):
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
def test_workers_start_a_cluster(source, tmp_path):
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
    """Start a process and wait for ``until`` on stderr; yields the rest of that line."""
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
def test_scheduler_is_an_address(source, tmp_path):
    local = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
    scheduler = ["distributed.cli.dask_scheduler", "--port", "0", *local]
    with started(*scheduler, until="Scheduler at:") as address:
        worker = ["distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1", *local]
        with started(*worker, until="Registered to:"):
            options = ["--clip-norm", 1, "--json", "--progress", "none"]
            done = shell("run", source, tmp_path / "y", "--scheduler", address, *options)
            planned = shell("plan", source, tmp_path / "z", "--scheduler", address, *options[:3])
    assert (done.returncode, done.stderr) == (0, "")
    line = r"daskclip: dashboard at http://127\.0\.0\.1:\d+/status\n"
    assert re.fullmatch(line, planned.stderr)
    assert json.loads(done.stdout)["slices"] == 1
    assert bits(read(tmp_path / "y")) == wanted(source)


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
    states = [json.loads(line) for line in done.stderr.splitlines()]
    assert states
    assert all("rate" in state for state in states)


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
