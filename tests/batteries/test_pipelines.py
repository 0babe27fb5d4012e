"""Pipelines in their own environments retry temporary failures, and resume; others fail."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from reference import bits
from stores import create, read, some

from daskclip import clip_by_norm

ROOT = Path(__file__).parents[2]
PIPELINES = ROOT / "examples" / "pipelines"
pytestmark = [pytest.mark.slow, pytest.mark.deployment]
# the second line that a run adds to its journal fails, once, as on a network file system
STALE = """
import errno, os
from daskclip.target.journal import Journal
def stale(self, entry, append=Journal.append, lines=[]):
    lines.append(entry)
    if len(lines) == 2 and not os.path.exists({flag!r}):
        open({flag!r}, "w").close()
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    append(self, entry)
Journal.append = stale
"""


def needs(name):
    """Mark for a test that needs the environment ``.venv-NAME``, made by .ci/run."""
    bin_ = ROOT / f".venv-{name}" / "bin"
    reason = f"no {bin_ / name}; .ci/run installs it"
    return pytest.mark.skipif(not (bin_ / name).exists(), reason=reason)


def run_in(name, *command, cwd, **environment):
    """Exit code and output of a command of an environment."""
    bin_ = ROOT / f".venv-{name}" / "bin"
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = f"{bin_}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [bin_ / name, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=cwd,
        env=kept | environment | {"PATH": path},
    )
    return done.returncode, done.stdout


@pytest.fixture
def failing_once(tmp_path):
    """A PYTHONPATH with which one run fails temporarily."""
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(STALE.format(flag=str(tmp_path / "flag")))
    return str(tmp_path / "patch")


@needs("snakemake")
def test_snakemake(tmp_path, failing_once, record_property):
    for name in ("a", "b"):
        create(tmp_path / f"{name}.zarr", some((8, 8), "f4"), (2, 4))
    command = ["-s", PIPELINES / "Snakefile", "--cores", 1]
    command += ["--config", f"folder={tmp_path}", "clip_norm=1.0"]
    code, said = run_in("snakemake", *command, cwd=tmp_path, PYTHONPATH=failing_once)
    assert code == 0, said
    assert "Stale file handle" in said
    for name in ("a", "b"):
        report = json.loads((tmp_path / f"{name}.clipped.json").read_text())
        assert report["status"] == "clipped"
        x = read(tmp_path / f"{name}.zarr")
        assert bits(read(tmp_path / f"{name}.clipped")) == bits(clip_by_norm(x, 1.0))
    (tmp_path / "b.clipped.json").unlink()
    assert run_in("snakemake", *command, cwd=tmp_path)[0] == 0
    assert json.loads((tmp_path / "b.clipped.json").read_text())["status"] == "up to date"
    # refused: no report, no store
    create(tmp_path / "c.zarr", some((8, 8), "f4").astype("i4"), (2, 4))
    code, said = run_in("snakemake", *command, cwd=tmp_path)
    assert code == 1
    assert "int32" in said
    assert not list(tmp_path.glob("c.clipped*"))
    record_property("deployment", "Snakemake: `examples/pipelines/Snakefile`")


@needs("airflow")
def test_airflow(tmp_path, failing_once, record_property):
    (tmp_path / "dags").mkdir()
    shutil.copy(PIPELINES / "airflow_dag.py", tmp_path / "dags")
    settings = {
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }
    assert run_in("airflow", "db", "migrate", cwd=tmp_path, **settings)[0] == 0
    x = create(tmp_path / "x", some((8, 8), "f4"), (2, 4))
    integers = create(tmp_path / "integers", read(x).astype("i4"), (2, 4))

    def run_dag(source, **more):
        conf = json.dumps({"source": str(source), "target": str(tmp_path / "y")})
        command = ["dags", "test", "clip_gradients", "--conf", conf]
        return run_in("airflow", *command, cwd=tmp_path, **settings, **more)

    code, said = run_dag(integers)
    assert code != 0
    assert "int32" in said
    assert said.count("DTypeError") == said.count("AirflowFailException") > 0
    assert "UP_FOR_RETRY" not in said.upper()
    assert not list(tmp_path.glob("*y*clip*"))
    code, said = run_dag(x, PYTHONPATH=failing_once)
    assert code == 0, said
    assert "Stale file handle" in said
    assert bits(read(tmp_path / "y")) == bits(clip_by_norm(read(x), 1.0))
    record_property("deployment", "Airflow: `examples/pipelines/airflow_dag.py`")
