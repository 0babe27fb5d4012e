"""The tables of README and what they were measured on."""

import datetime
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
END = "<!-- end -->"


def write(name, text):
    """Replace a table of README."""
    begin = f"<!-- begin: {name} -->\n"
    before, rest = README.read_text().split(begin)
    README.write_text(before + begin + text + END + rest.split(END, 1)[1])


def machine(*packages):
    """Processor, cores, versions and date."""
    versions = ", ".join(f"{name} {version(name)}" for name in (*packages, "daskclip"))
    return (
        f"{cpu()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; "
        f"{datetime.date.today().isoformat()}"
    )


def cpu():
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()
