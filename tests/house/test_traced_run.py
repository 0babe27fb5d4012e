"""Limits of what a run calls, measured in a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

# half of the changes of module in 0.2.0, when all modules but five were in one folder
LIMITS = {"modules touched": 25, "functions touched": 160, "changes of module": 434}


@pytest.fixture(scope="module")
def report():
    script = Path(__file__).with_name("traced_run.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.xfail(reason="not reached yet", strict=True)
@pytest.mark.parametrize("name", LIMITS)
def test_a_run_is_within_its_limits(report, name):
    print(report)
    summary = dict(line.split(maxsplit=1)[::-1] for line in report.split("\n\n")[0].splitlines())
    assert int(summary[name]) <= LIMITS[name]


def test_calls_are_listed_in_order(report):
    functions = [line.split()[1] for line in report.split("\n\n")[2].splitlines()[1:]]
    # its decorator comes first
    assert any(function.endswith(".clip_zarr") for function in functions[:5])
    assert any(function.endswith(".clip_block") for function in functions)
